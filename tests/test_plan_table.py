"""A plan says the same to people and to programs."""

import dataclasses

import pytest

from gptjax import plan_table
from tests import plans


@pytest.fixture(scope='module')
def made():
  return plans.planned(mesh__data=2, mesh__fsdp=2, mesh__tensor=2)


def test_the_table_and_the_json_say_the_same(made):
  told, found = plan_table.table(made), plan_table.as_json(made)
  assert found['fits'] and 'fits, with ' in told
  assert f'{found["estimate"]["step"][0]:12.3f} s at best' in told
  assert f'{found["step"]["flops"] / 1e12:12,.1f} TFLOP' in told
  assert found['memory']['held'] == sum(
    size for name, size in found['memory'].items() if name not in ('held', 'there')
  )
  assert found['settings'] == made.settings.knobs()
  assert plan_table.line(made).split()[:3] == ['1·2·2·2', '1', 'none']


def test_what_does_not_fit_is_told_with_by_how_much(made):
  too_small = dataclasses.replace(made.memory, there=made.memory.held - 10**7)
  less = dataclasses.replace(made, memory=too_small)
  assert '0.01 GB too much' in plan_table.table(less)
  assert not plan_table.as_json(less)['fits']
  assert plan_table.line(less).endswith('does not fit')


def test_slow_links_are_marked(made):
  across = {'stage': 1, 'data': 2, 'fsdp': 1, 'tensor': 1}
  two = dataclasses.replace(made, run=dataclasses.replace(made.run, across=across))
  told = plan_table.table(two).splitlines()
  (data,) = [line for line in told if line.startswith('  all-reduce') and 'along data' in line]
  assert data.endswith('(slow links)')
  assert 'links    data 2 over the slow links between 2 nodes' in plan_table.table(two)
  assert 'between nodes' in plan_table.table(two) and 'slow links' not in plan_table.table(made)
