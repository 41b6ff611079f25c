"""Records that survive a crash, each position of the clock once."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax import journal
from gptjax.errors import Mistake

CONTEXT = 16


def train(sequences, **more):
  """The record of a step of two sequences."""
  step = {'step': sequences // 2, 'sequences': sequences, 'tokens': sequences * CONTEXT}
  return {'kind': 'train', **step, 'loss': 5.0 - sequences / 100, **more}


def validation(sequences):
  return {**train(sequences), 'kind': 'validation'}


def write(workdir, records, resume_at=0):
  opened = journal.Journal(workdir, resume_at)
  for record in records:
    opened.append(record)
  opened.close()


read = journal.read


scalars = st.floats() | st.integers(-(2**53), 2**53) | st.booleans()


@given(values=st.lists(st.dictionaries(st.sampled_from('abcde'), scalars), min_size=1, max_size=5))
def test_what_is_written_is_read_back(tmp_path_factory, values):
  workdir = tmp_path_factory.mktemp('run')
  records = [train(2 * i) | value for i, value in enumerate(values)]
  write(workdir, records)
  assert repr(read(workdir)) == repr(records)  # in which NaN is NaN


def test_every_line_is_strict_json_even_of_what_json_cannot_say(tmp_path):
  write(tmp_path, [train(2, loss=math.nan, lr=-math.inf, batch=math.inf)])

  def refuse(name):
    raise AssertionError(f'{name} is not JSON')

  line = (tmp_path / 'metrics.jsonl').read_text().splitlines()[0]
  record = json.loads(line, parse_constant=refuse)
  assert (record['loss'], record['lr'], record['batch']) == ('NaN', '-Infinity', 'Infinity')


def test_a_record_is_on_disk_before_the_next(tmp_path):
  opened = journal.Journal(tmp_path, resume_at=0)
  opened.append(train(2))
  assert read(tmp_path) == [train(2)]
  opened.append(train(4))
  assert read(tmp_path) == [train(2), train(4)]
  opened.close()


def test_the_workdir_is_made_if_it_is_not_there(tmp_path):
  write(tmp_path / 'a' / 'b', [train(2)])
  assert read(tmp_path / 'a' / 'b') == [train(2)]


@given(died=st.integers(1, 20), saved=st.integers(0, 20), torn=st.integers(0, 30))
def test_after_a_crash_and_a_resume_each_step_is_there_once(tmp_path_factory, died, saved, torn):
  workdir = tmp_path_factory.mktemp('run')
  saved = min(saved, died) * 2
  both = lambda steps: [r for i in steps for r in (train(2 * i), validation(2 * i))]
  write(workdir, both(range(1, died + 1)))
  with (workdir / 'metrics.jsonl').open('a') as file:
    file.write(json.dumps(train(2 * died + 2))[:torn])  # what it was writing when it died
  write(workdir, both(range(saved // 2 + 1, 26)), resume_at=saved)
  assert read(workdir) == both(range(1, 26))


def test_a_run_that_starts_over_keeps_nothing(tmp_path):
  baseline = {**train(0), 'kind': 'baseline'}
  write(tmp_path, [baseline, train(2)])
  write(tmp_path, [baseline, train(2)], resume_at=0)
  assert read(tmp_path) == [baseline, train(2)]


def test_a_record_whose_line_feed_is_missing_is_whole_and_kept(tmp_path):
  (tmp_path / 'metrics.jsonl').write_text(json.dumps(train(2)))
  write(tmp_path, [train(4)], resume_at=2)
  assert read(tmp_path) == [train(2), train(4)]


def test_a_file_is_replaced_whole_and_nothing_is_left_beside_it(tmp_path, monkeypatch):
  write(tmp_path, [train(2), train(4)])
  before = (tmp_path / 'metrics.jsonl').read_text()

  def die(*_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(journal.os, 'replace', die)
    write(tmp_path, [], resume_at=2)
  assert (tmp_path / 'metrics.jsonl').read_text() == before
  write(tmp_path, [], resume_at=2)
  assert [path.name for path in tmp_path.iterdir()] == ['metrics.jsonl']


def test_a_damaged_line_that_is_not_the_last_is_a_mistake_that_names_it(tmp_path):
  write(tmp_path, [train(2), train(4)])
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"kind"\n' + path.read_text())
  with pytest.raises(Mistake, match='line 1'):
    read(tmp_path)
  with pytest.raises(Mistake, match='line 1'):
    write(tmp_path, [], resume_at=2)


def test_no_file_and_an_empty_one_are_mistakes_that_differ(tmp_path):
  with pytest.raises(Mistake, match='no such file'):
    read(tmp_path)
  write(tmp_path, [])
  with pytest.raises(Mistake, match='no records'):
    read(tmp_path)


@pytest.mark.parametrize(
  'line',
  ['{"a": 1}', '[]', '{"kind": "train", "step": 1, "sequences": "x", "tokens": 1, "loss": 1}'],
)
def test_a_line_that_is_no_record_is_told(tmp_path, line):
  (tmp_path / 'metrics.jsonl').write_text(line + '\n{}\n')
  with pytest.raises(Mistake, match='metrics.jsonl, line 1: got .*, wanted a record of a run'):
    read(tmp_path)
