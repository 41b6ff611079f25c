"""Jobs give the same results in order, whoever runs them."""

import json
import pathlib
import re
import sys

import pytest

from gptjax.data import engines
from gptjax.errors import Mistake, mistake
from tests.test_prepare import contents, run

LOCAL = '--runner=DirectRunner --direct_num_workers=2 --direct_running_mode=multi_processing'


def square(n):
  if n < 0:
    raise mistake('a number', n, '0 or more', 'another')
  return [n, n * n]


def runs(engine, jobs):
  with engine as run:
    return [*run('squaring', square, jobs)]


@pytest.mark.parametrize('workers', [1, 2])
def test_results_come_in_the_order_of_the_jobs(workers):
  assert runs(engines.processes(workers), [3, 1, 2]) == [[3, 9], [1, 1], [2, 4]]
  with pytest.raises(Mistake, match='a number: got -1'):
    runs(engines.processes(workers), [3, -1])


def test_without_beam_it_says_what_to_install(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, 'apache_beam', None)
  with pytest.raises(Mistake, match=r"no apache-beam.*pip install -e '.\[beam\]'"):
    runs(engines.beam([], str(tmp_path / 'x')), [1])


@pytest.fixture
def text(tmp_path):
  """Documents in several files."""
  pytest.importorskip('apache_beam', reason="pip install -e '.[beam]'")
  (tmp_path / 'text').mkdir()
  for i, path in enumerate(sorted(pathlib.Path(json.__file__).parent.glob('*.py'))):
    parts = path.read_text('utf-8').split('\n\n')
    lines = ''.join(json.dumps({'text': part}) + '\n' for part in parts)
    (tmp_path / 'text' / f'{i}.jsonl').write_text(lines)
  return tmp_path / 'text'


@pytest.mark.slow
def test_beam_with_two_workers_makes_the_same_corpus(text, tmp_path):
  assert run(source=text, out=tmp_path / 'here').returncode == 0
  done = run(source=text, out=tmp_path / 'beam', beam=LOCAL)
  assert done.returncode == 0, done.stderr
  assert 'packing: 3 jobs by Beam' in done.stdout
  assert contents(tmp_path / 'beam') == contents(tmp_path / 'here')
  assert sorted(p.name for p in tmp_path.iterdir()) == ['beam', 'here', 'text']


@pytest.mark.slow
def test_a_mistake_on_a_worker_of_beam_is_told_as_any_other(text, tmp_path):
  (text / 'bad.jsonl').write_text('{"text": "fine"}\n{"text": \n')
  done = run(source=text, out=tmp_path / 'x', beam=LOCAL)
  assert done.returncode == 2
  assert re.match('error: .*bad.jsonl:2: got bad JSON', done.stderr.splitlines()[-1])
  assert [p.name for p in tmp_path.iterdir()] == ['text']


@pytest.mark.slow
def test_a_runner_that_there_is_not_is_told(text, tmp_path):
  done = run(source=text, out=tmp_path / 'x', beam='--runner=Abacus')
  assert done.returncode == 2
  assert re.match('error: beam: got .*Abacus', done.stderr.splitlines()[-1])
