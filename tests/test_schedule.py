"""The clock: rates against float64, and the ladder against the walk it stands for."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax import schedule
from gptjax.errors import Mistake

CONTEXT = 2048


def gpt3_rate(tokens: float, peak: float = 6e-4) -> float:
  """Appendix B in float64."""
  if tokens < 375e6:
    return peak * tokens / 375e6
  done = min(1.0, (tokens - 375e6) / (260e9 - 375e6))
  return peak * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2)


@pytest.mark.parametrize('tokens', [2**15, 1e8, 375e6, 3e9, 130e9, 260e9, 299e9, 300e9])
def test_learning_rate_is_that_of_the_paper(tokens):
  rate = schedule.learning_rate(6e-4, 375e6, 260e9, 0.1, CONTEXT)
  sequences = round(tokens / CONTEXT)
  wanted = gpt3_rate(sequences * CONTEXT)
  # optax subtracts from the peak in f32, so the smallest rates are exact to a bit of the peak.
  assert float(schedule.at(rate, sequences)) == pytest.approx(wanted, rel=2e-6, abs=6e-4 * 2e-7)


@pytest.mark.parametrize('fraction', [0.0, 0.25, 1.0])
def test_learning_rate_ends_at_its_fraction_and_stays(fraction):
  rate = schedule.learning_rate(2.0, 10, 100, fraction, 1)
  assert schedule.at(rate, 10) == 2
  assert schedule.at(rate, 100) == pytest.approx(2 * fraction, abs=1e-6)
  assert schedule.at(rate, 100) == schedule.at(rate, 10**6)


def test_learning_rate_without_warmup_starts_at_the_peak():
  assert schedule.at(schedule.learning_rate(1.0, 0, 100, 0.1, 1), 0) == 1


def test_learning_rate_is_compiled_once(compiled):
  rate = schedule.learning_rate(1.0, 10, 100, 0.1, 1)
  values = {float(schedule.at(rate, sequences)) for sequences in range(0, 100, 9)}
  assert len(values) == 12 and len(compiled) == 1


def test_learning_rate_that_never_decays_is_refused():
  with pytest.raises(Mistake, match='warmup_tokens.*less than lr.decay_tokens'):
    schedule.learning_rate(1.0, 100, 100, 0.1, 1)


@pytest.mark.parametrize('tokens, sequences', [(0, 0), (1, 1), (300e9, 146_484_375), (4096, 2)])
def test_tokens_are_whole_sequences(tokens, sequences):
  assert schedule.to_sequences(tokens, CONTEXT) == sequences


ramps = st.tuples(
  st.integers(1, 20), st.integers(0, 60), st.integers(1, 30), st.integers(0, 900)
).flatmap(
  lambda a: st.builds(
    schedule.Ramp.linear,
    st.just(a[0]),
    st.just(a[0] + a[1]),
    st.just(a[2]),
    st.just(a[3]),
    st.integers(1, 2000),
  )
)


@given(ramps)
def test_steps_cover_the_run_once_and_in_order(ramp):
  steps = list(ramp.steps())
  assert steps[0].start == 0 and steps[-1].end == ramp.total
  for i, (before, after) in enumerate(zip(steps, steps[1:], strict=False)):
    assert before.end == after.start
    assert before.number == i + 1 and after.number == i + 2
    assert before.rows <= after.rows or after.end == ramp.total


@given(ramps, st.data())
def test_any_position_goes_on_as_the_walk_does_and_counts_on(ramp, data):
  steps = list(ramp.steps())
  step = data.draw(st.sampled_from(steps))
  assert list(ramp.steps(step.start, step.number - 1)) == steps[step.number - 1 :]
  assert [s.number for s in ramp.steps(step.start, 7)] == [
    s.number - step.number + 8 for s in steps[step.number - 1 :]
  ]


@given(ramps, st.integers(0, 2500))
def test_steps_left_are_those_that_are_walked(ramp, sequences):
  """From any position: one that another ramp led to lies between two steps of this one."""
  assert ramp.steps_left(sequences) == len(list(ramp.steps(sequences)))


@given(ramps, st.integers(1, 64))
def test_slots_are_what_the_steps_compute(ramp, microbatch):
  computed = sum(-(-step.rows // microbatch) * microbatch for step in ramp.steps())
  assert ramp.slots(microbatch) == (computed, computed - ramp.total)


@given(st.integers(1, 20), st.integers(1, 60), st.integers(1, 30), st.integers(1, 10**6))
def test_batch_follows_the_line_from_below(first, more, increment, length):
  full = first + more
  ramp = schedule.Ramp.linear(first, full, increment, length, 2**31 - 1)
  for rung in ramp.rungs:
    line = first + more * rung.start / length
    assert rung.batch <= line + 1e-9 or rung.start == 0
  last = ramp.rungs[-1]
  assert last.batch == full and last.start >= length


def test_gpt3_ramp_in_full():
  ramp = schedule.Ramp.linear(16, 256, 16, schedule.to_sequences(4e9, CONTEXT), 146_484_375)
  assert [rung.batch for rung in ramp.rungs] == list(range(16, 257, 16))
  assert abs(ramp.rungs[-1].start * CONTEXT - 4e9) < 16 * 256 * CONTEXT
  (last,) = ramp.steps(146_484_374)
  assert last.end == 146_484_375


@given(st.integers(0, 50), st.integers(0, 1000), st.integers(0, 200))
def test_due_once_for_each_multiple(every, start, length):
  multiples = [n for n in range(start + 1, start + length + 1) if every and n % every == 0]
  assert schedule.due(every, start, start + length) == bool(multiples)


def test_clock_of_the_whole_run_fits_where_it_is_counted():
  assert np.int32(schedule.to_sequences(300e9, CONTEXT)) > 0
