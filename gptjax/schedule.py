"""The clock: everything is a function of the sequences consumed so far.

People write durations in tokens; here all is counted in sequences of `context` tokens, since
300 B tokens overflow an int32 and 146 M sequences do not.
"""

import bisect
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence

import jax
import numpy as np
import optax

from gptjax.errors import mistake

MAX_SEQUENCES = 2**31 - 1  # the clock is an int32 on devices


def to_sequences(tokens: float, context: int) -> int:
  """A duration in tokens as the nearest whole number of sequences, at least one if not zero."""
  return max(round(tokens / context), min(1, math.ceil(tokens)))


def learning_rate(
  peak: float, warmup_tokens: float, decay_tokens: float, final_fraction: float, context: int
) -> optax.Schedule:
  """Linear from 0 to the peak, cosine to its `final_fraction` at `decay_tokens`, then flat.

  An optax schedule of sequences, not of steps. `decay_tokens` is counted from the start and not
  from the end of the warm-up (Brown et al. 2020, appendix B).
  """
  warmup, decay = warmup_tokens / context, decay_tokens / context
  if not 0 <= warmup < decay:
    raise mistake(
      'lr.warmup_tokens',
      f'{warmup_tokens:g}',
      f'0 or more, and less than lr.decay_tokens = {decay_tokens:g}',
      '--config.lr.decay_tokens larger',
    )
  cosine = optax.cosine_decay_schedule(peak, decay - warmup, alpha=final_fraction)
  if not warmup:
    return cosine
  return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), cosine], [warmup])


@dataclasses.dataclass(frozen=True)
class Rung:
  """A stretch of steps of one batch size."""

  start: int  # sequences consumed where it starts
  batch: int  # sequences a step


@dataclasses.dataclass(frozen=True)
class Step:
  """One step of the run: it consumes the sequences `start … end - 1`."""

  number: int  # from 1, for people; counted, since another ramp may have led here
  start: int
  end: int

  @property
  def rows(self) -> int:
    """Sequences in this step's batch."""
    return self.end - self.start


@dataclasses.dataclass(frozen=True)
class Ramp:
  """The batch size as a function of the clock: a short ladder of rungs, then `full` for ever.

  The batch grows in steps of `increment` sequences along the line from `first` at 0 to `full` at
  `length` sequences, and each rung is rounded up to whole steps of its batch.
  """

  rungs: tuple[Rung, ...]
  total: int  # sequences in the whole run; its last step is cut to end there

  @classmethod
  def linear(cls, first: int, full: int, increment: int, length: int, total: int) -> 'Ramp':
    """The ramp of Brown et al. 2020, appendix B; `length` 0 starts at `full`."""
    batches = [*range(first, full, increment), full] if length else [full]
    rungs, start = [], 0
    for i, batch in enumerate(batches):
      rungs.append(Rung(start, batch))
      if i + 1 < len(batches):
        # Where the line reaches the next rung's batch; integers, so that it is exact.
        until = -(-length * (batches[i + 1] - first) // (full - first))
        start += max(0, -(-(until - start) // batch)) * batch
    return cls(tuple(rungs), total)

  def rung(self, sequences: int) -> Rung:
    """The rung on which a step starts that has `sequences` consumed before it."""
    return self.rungs[bisect.bisect_right(self.rungs, sequences, key=lambda r: r.start) - 1]

  def steps(
    self, sequences: int = 0, taken: int = 0, skipped: Sequence[range] = ()
  ) -> Iterator[Step]:
    """The steps from `sequences` to the end, after so many steps taken.

    No step has a sequence in `skipped`, ranges that are apart and in order: one that would reach
    into a range ends before it, and the next one starts behind it.
    """
    number = taken
    for start, stop in self._open(sequences, skipped):
      while start < stop:
        number += 1
        step = Step(number, start, min(start + self.rung(start).batch, stop))
        yield step
        start = step.end

  def steps_left(self, sequences: int = 0, skipped: Sequence[range] = ()) -> int:
    """How many steps it is from `sequences` to the end, without walking there."""
    left = 0
    for start, stop in self._open(sequences, skipped):
      for rung, end in zip(self.rungs, self._ends(), strict=True):
        steps = max(0, -(-(min(end, stop) - start) // rung.batch))
        left, start = left + steps, start + steps * rung.batch
    return left

  def end(self, skipped: Sequence[range] = ()) -> int:
    """Where the last step ends."""
    return min([self.total, *(r.start for r in skipped if r.stop >= self.total)])

  def _open(self, sequences, skipped) -> Iterator[tuple[int, int]]:
    """The stretches from `sequences` to the end that are not skipped."""
    for closed in [*skipped, range(self.total, self.total)]:
      yield sequences, min(closed.start, self.total)
      sequences = max(sequences, closed.stop)

  def slots(self, microbatch: int) -> tuple[int, int]:
    """Rows computed over the run in slices of `microbatch`, and those of them that weigh 0."""
    computed = sum(steps * -(-rows // microbatch) for rows, steps in self.stretches()) * microbatch
    return computed, computed - self.total

  def stretches(self) -> Iterator[tuple[int, int]]:
    """The rows of a step and how many steps of so many follow each other, over the whole run."""
    start = 0
    for rung, end in zip(self.rungs, self._ends(), strict=True):
      whole, rest = divmod(end - start, rung.batch)
      yield from ((rows, steps) for rows, steps in ((rung.batch, whole), (rest, 1)) if rows * steps)
      start = end

  def _ends(self) -> list[int]:
    """Where each rung ends, none after the run."""
    return [min(rung.start, self.total) for rung in self.rungs[1:]] + [self.total]


def due(every: int, start: int, end: int) -> bool:
  """Whether a multiple of `every` sequences lies in (start, end]; never if `every` is 0."""
  return every > 0 and end // every > start // every


def at(schedule: optax.Schedule, sequences: int) -> np.float32:
  """A schedule's value at a position of the clock, computed where no training step is waiting."""
  with jax.default_device(_host()):
    # As one program: number by number it is a dozen, which every start would compile anew.
    return np.float32(jax.jit(schedule)(np.int32(sequences)))


@functools.cache
def _host() -> jax.Device | None:
  try:
    return jax.local_devices(backend='cpu')[0]
  except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
    return None
