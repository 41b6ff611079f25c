"""What is left out is read, joined, and on disk before it is acted on."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax import schedule, skips
from gptjax.errors import Mistake


def test_ranges_are_read_with_both_ends():
  assert skips.parse('') == []
  assert skips.parse('0-0,10-19, 5-7') == [range(0, 1), range(10, 20), range(5, 8)]


@pytest.mark.parametrize('text', ['5', '7-5', '-5', '5-', '1-2;3-4', 'all', '1-2,,x'])
def test_what_is_no_range_is_told(text):
  with pytest.raises(Mistake, match='skip_sequences: got .*first-last'):
    skips.parse(text)


ranges = st.lists(st.tuples(st.integers(0, 99), st.integers(1, 20)), max_size=6)


@given(ranges)
def test_a_union_holds_the_same_apart_and_in_order(pairs):
  given = [range(a, a + n) for a, n in pairs]
  joined = skips.union(given)
  assert {i for r in joined for i in r} == {i for r in given for i in r}
  assert all(a.stop < b.start for a, b in zip(joined, joined[1:], strict=False))


@given(ranges, st.integers(0, 110), st.integers(1, 120))
def test_steps_take_each_sequence_once_but_those_left_out(pairs, start, total):
  """And their number is known without walking there, and where they end."""
  skipped = skips.union(range(a, a + n) for a, n in pairs)
  ramp = schedule.Ramp.linear(4, 12, 4, 40, total)
  steps = list(ramp.steps(start, 7, skipped))
  closed = {i for r in skipped for i in r}
  assert [i for s in steps for i in range(s.start, s.end)] == [
    i for i in range(start, total) if i not in closed
  ]
  assert [s.number for s in steps] == list(range(8, 8 + len(steps)))
  assert all(0 < s.rows <= ramp.rung(s.start).batch for s in steps)
  assert ramp.steps_left(start, skipped) == len(steps)
  if steps:
    assert steps[-1].end == ramp.end(skipped)


def test_rollbacks_are_kept(tmp_path):
  assert skips.read(tmp_path) == []
  first, second = skips.Rollback(10, 20, 'one'), skips.Rollback(40, 48, 'two')
  skips.add(tmp_path, first)
  skips.add(tmp_path, second)
  assert skips.read(tmp_path) == [first, second]
  (tmp_path / skips.FILE).write_text('[{"start": 1}]')
  with pytest.raises(Mistake, match='skips.json: got TypeError'):
    skips.read(tmp_path)
