"""Goes on from rows of tokens, one token at a time.

Two programs serve rows of all lengths: one that reads a chunk of their tokens, and one that reads a
single one. Where a row is longer than the context, the model sees the end of it: what `seen` says.
"""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gptjax import cache, sampling, sharding
from gptjax.cache import Cache
from gptjax.sampling import History, Sampling
from gptjax.step import Program, to_read

CHUNK = 64  # tokens of a row that are read at once; a row is filled up to a multiple of it


def seen(length: int, context: int) -> int:
  """Of how many of its last tokens the model is told when a row has this length.

  All that fit. Beyond the context half of it is let go at once, and not one with each token: every
  position changes when the first one does, and all that is seen must be read again.
  """
  if length <= context:
    return length
  step = max(1, context // 2)
  return length - -(-(length - context) // step) * step


class Decoder:
  """A model, and what it has read of some rows; on the mesh that is set when it is used."""

  def __init__(
    self,
    program: Program,
    params: dict,
    rows: int,
    positions: int | None = None,
    dtype: str | None = None,
  ):
    """For so many rows at a time.

    Args:
      program: as its mesh has it.
      params: of the state; they are given up.
      rows: how many there are in each call.
      positions: how long a row will get at most, if that is known and less than the context: a
        shorter cache is read faster.
      dtype: to compute in; None: the program's own.
    """
    platform = jax.sharding.get_mesh().devices.flat[0].platform
    program, self._params = to_read(program, params, platform, dtype)
    self.rows, self.context = rows, program.shape.context
    self.positions = min(self.context, positions or self.context)
    shape, dtype = program.shape, program.numerics.dtype
    self._chunk = min(CHUNK, self.context)
    # XLA's CPU backend writes to a ring of bf16 by making f32 of all of it.
    kept = jnp.float32 if platform == 'cpu' else dtype
    self._empty = jax.jit(lambda first_b: cache.empty(shape, first_b, kept, self.positions))
    self._read = jax.jit(program.read, donate_argnums=2)
    self._reorder = jax.jit(Cache.take, donate_argnums=0)
    self._cache: Cache | None = None
    self._begins: list[int] = []  # the first token of each row that is seen

  def read(self, rows: Sequence[Sequence[int]]) -> jax.Array:
    """Logits [padded vocabulary, b] of the token after each row's last, all rows read anew."""
    assert len(rows) == self.rows and all(rows)
    self._begins = [len(row) - seen(len(row), self.context) for row in rows]
    told = [row[begin:] for row, begin in zip(rows, self._begins, strict=True)]
    longest = max(map(len, told))
    assert longest <= self.positions, f'rows of {longest} tokens for {self.positions} positions'
    columns = -(-longest // self._chunk) * self._chunk
    token_bt = np.zeros((self.rows, columns), np.int32)
    for at_t, row in zip(token_bt, told, strict=True):
      at_t[columns - len(row) :] = row
    self._cache = self._empty(_laid([columns - len(row) for row in told], 'b'))
    for start in range(0, columns, self._chunk):
      logit_vb = self._go_on(token_bt[:, start : start + self._chunk])
    return logit_vb

  def knows(self, lengths: Sequence[int]) -> bool:
    """Whether rows that have got this long, by one token more, go on from what was read."""
    return self._begins == [length - seen(length, self.context) for length in lengths]

  def read_one(self, token_b: jax.Array | np.ndarray) -> jax.Array:
    """The same logits after one token more in each row, which may not be computed yet."""
    return self._go_on(token_b[:, None])

  def reorder(self, row_b: Sequence[int]) -> None:
    """From now on each row is what that one was."""
    self._cache = self._reorder(self._cache, np.array(row_b))
    self._begins = [self._begins[row] for row in row_b]

  def _go_on(self, token_bl):
    logit_vb, self._cache = self._read(self._params, _laid(token_bl, 'bl'), self._cache)
    return logit_vb


def _laid(a, dims):
  return jax.device_put(jnp.asarray(a, jnp.int32), sharding.computed(dims))


def sample(
  decoder: Decoder,
  prompts: Sequence[Sequence[int]],
  count: int,
  how: Sampling,
  seed: int,
  numbers: Sequence[int],
) -> Iterator[np.ndarray]:
  """The next tokens of all rows [b], and the next, up to `count` of them.

  Args:
    decoder: of as many rows as there are prompts.
    prompts: one token or more in each.
    count: of tokens.
    how: to choose them.
    seed: for what is drawn.
    numbers: of the rows, which with the seed tell what is drawn for them: whatever else is in the
      batch.
  """
  rows = [list(prompt) for prompt in prompts]
  history = history_of(rows, count) if how.no_repeat else None
  number_b = np.array(numbers, np.uint32)
  logit_vb = decoder.read(rows)
  for i in range(count):
    token_b = _chosen(logit_vb, number_b, i, seed, history, how)
    known = decoder.knows([len(row) + 1 for row in rows])
    if i + 1 < count and known:  # computed while what came before is looked at
      logit_vb = decoder.read_one(token_b)
      history = history and _add(history, token_b)
    told_b = np.asarray(token_b)
    for row, token in zip(rows, told_b.tolist(), strict=True):
      row.append(token)
    yield told_b
    if i + 1 < count and not known:
      logit_vb = decoder.read(rows)
      history = history and _add(history, token_b)


def history_of(rows: Sequence[Sequence[int]], count: int) -> History:
  """Of rows that get so many tokens more."""
  longest = -(-(max(map(len, rows)) + count) // CHUNK) * CHUNK  # few sizes, to compile for few
  token_bt = np.zeros((len(rows), longest), np.int32)
  for at_t, row in zip(token_bt, rows, strict=True):
    at_t[: len(row)] = row
  return History(jnp.asarray(token_bt), jnp.array([len(row) for row in rows]))


_add = jax.jit(History.add)


@functools.partial(jax.jit, static_argnames='how')
def _chosen(logit_vb, number_b, i, seed, history, how):
  key = jax.random.key(seed)
  key_of = lambda number: jax.random.fold_in(jax.random.fold_in(key, number), i)
  return sampling.choose(sharding.whole(logit_vb).T, jax.vmap(key_of)(number_b), history, how)
