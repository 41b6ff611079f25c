"""What a run says of itself is so."""

import dataclasses
import json

import jax
import pytest

from gptjax import sharding, summary
from gptjax.config import resolve
from gptjax.data import corpora
from gptjax.data.mixture import Mixture, Stage
from tests.runs import config


def described(config, start=0, taken=0, **changed):
  run = dataclasses.replace(resolve(config, jax.devices()), **changed)
  opened = corpora.open_all(config.data.sources, run.program.shape)
  mesh = sharding.make_mesh(**run.mesh)
  return summary.describe(run, mesh, opened, Mixture([Stage(0, opened.stage)]), start, taken, ())


@pytest.mark.parametrize(
  'profile, told',
  [('3-4', 'steps 3 … 4'), ('2-9', 'steps 3 … 9'), ('1-2', 'no step'), ('99-100', 'no step')],
)
def test_steps_of_a_profile_that_are_not_taken_are_told(corpus, profile, told):
  said = described(config('x', corpus, profile=profile), start=16, taken=2)
  assert f'profile  {told}' in said


def test_verdict_says_over_what_it_is_and_what_is_missing(corpus, tmp_path):
  opened = corpora.open_all(corpus, resolve(config('x', corpus), jax.devices()).program.shape)
  there = opened.first.validation.windows
  record = {'kind': 'validation', 'step': 1, 'sequences': 8, 'tokens': 256, 'loss': 1.0}
  record |= {'bits_per_byte': 0.5, 'windows': 3}
  (tmp_path / 'metrics.jsonl').write_text(json.dumps(record) + '\n')
  assert f'over 3 of {there:,} windows' in summary.verdict(tmp_path, opened)
  record['windows'] = there
  (tmp_path / 'metrics.jsonl').write_text(json.dumps(record) + '\n')
  assert ' windows' not in summary.verdict(tmp_path, opened)
  (tmp_path / 'metrics.jsonl').write_text(json.dumps(record | {'kind': 'train'}) + '\n')
  assert 'held-out loss  not in metrics.jsonl' in summary.verdict(tmp_path, opened)


def test_which_axes_cross_slow_links_is_said(corpus):
  c = config('x', corpus, mesh__data=2, mesh__fsdp=2, mesh__tensor=2)
  assert 'links  ' not in described(c) and 'order  ' not in described(c)
  one = dict.fromkeys(sharding.AXES, 1)
  said = described(c, across=one | {'data': 2, 'fsdp': 2})
  assert (
    'links    data 2 · fsdp 2 over the slow links between 4 nodes; within each tensor 2' in said
  )
  assert 'order    of devices 0–7' in said and 'warning' not in said
  said = described(c, across=one | {'data': 2, 'tensor': 2})
  assert 'within each fsdp 2' in said
  assert 'warning  tensor' in said and '--config.mesh.tensor=1 would keep it within a node' in said


def test_numbers_are_told_in_ranges():
  assert summary.in_ranges([0, 1, 2, 3]) == '0–3'
  assert summary.in_ranges([0, 4, 1, 5, 6]) == '0 4 1 5–6'
