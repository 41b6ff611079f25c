"""Goes on from rows of tokens, one token at a time.

Two programs serve rows of all lengths: one that reads a chunk of their tokens, and one that reads a
single one. Where a row is longer than the context, the model sees the end of it: what `seen` says.
"""

import functools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gptjax import cache, sampling, sharding
from gptjax.cache import Cache
from gptjax.sampling import History, Sampling
from gptjax.step import Program, split_blocks

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

  def __init__(self, program: Program, params: dict, rows: int, positions: int | None = None):
    """For so many rows at a time.

    Args:
      program: as its mesh has it.
      params: of the state; they are given up.
      rows: how many there are in each call.
      positions: how long a row will get at most, if that is known and less than the context: a
        shorter cache is read faster.
    """
    self.rows, self.context = rows, program.shape.context
    self.positions = min(self.context, positions or self.context)
    self._params, self._chunk = split_blocks(params), min(CHUNK, self.context)
    shape, dtype = program.shape, program.numerics.dtype
    self._empty = jax.jit(lambda first_b: cache.empty(shape, first_b, dtype, self.positions))
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
  history = _history(rows, count) if how.no_repeat else None
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


def _history(rows, count) -> History:
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


def beams(
  decoder: Decoder,
  prompts: Sequence[Sequence[int]],
  count: int,
  length_penalty: float,
  no_repeat: int,
  end_of_text: int,
) -> list[list[tuple[list[int], float]]]:
  """Beam search: of each prompt the likeliest continuations that it finds, best first.

  A continuation ends with an end-of-text, which is left out, or after `count` tokens. Its score is
  the logarithm of its probability over its length, with the end, to the power of the penalty. A
  prompt is done when its best live beam, as long as it is now, scores below all it has found. That
  is `transformers`' search, whose paper's settings are a width of 4 and a penalty of 0.6.

  Args:
    decoder: of `width` rows for each prompt.
    prompts: one token or more in each.
    count: of tokens, at most.
    length_penalty: 0 for none; more favours longer ones.
    no_repeat: length of n-grams that come but once; 0: of none.
    end_of_text: the token.

  Returns:
    For each prompt as many continuations as it has beams, with their scores.
  """
  width, B = decoder.rows // len(prompts), len(prompts)
  rows = [list(prompt) for prompt in prompts for _ in range(width)]
  logit_vb = decoder.read(rows)
  # Beams begin alike: all but the first of each prompt are worth nothing until they differ.
  score_bw = np.full((B, width), -np.inf, np.float32)
  score_bw[:, 0] = 0
  found: list[list[tuple[float, list[int]]]] = [[] for _ in prompts]
  done = [False] * B
  for i in range(1, count + 1):
    history = _history(rows, count) if no_repeat else None
    best = _best(logit_vb, score_bw, history, no_repeat, 2 * width)
    origins, tokens = [*range(B * width)], [end_of_text] * (B * width)
    best = [each.tolist() for each in map(np.asarray, best)]
    for b, candidates in enumerate(zip(*best, strict=True)):
      live = []
      for rank, (score, beam, token) in enumerate(zip(*candidates, strict=True)):
        row = b * width + beam
        if token != end_of_text and i < count:
          live.append((score, row, token))
        elif rank < width and not done[b] and score > -math.inf:
          text = rows[row][len(prompts[b]) :] + [token] * (token != end_of_text)
          found[b].append((score / i**length_penalty, text))
      found[b] = sorted(found[b], key=lambda each: -each[0])[:width]
      if i == count:
        continue
      for w, (score, row, token) in enumerate(live[:width]):
        origins[b * width + w], tokens[b * width + w], score_bw[b, w] = row, token, score
      full = len(found[b]) == width
      done[b] |= full and score_bw[b, 0] / i**length_penalty <= found[b][-1][0]
    if all(done) or i == count:
      break
    rows = [[*rows[row], token] for row, token in zip(origins, tokens, strict=True)]
    decoder.reorder(origins)
    again = not decoder.knows([len(row) for row in rows])
    logit_vb = decoder.read(rows) if again else decoder.read_one(np.array(tokens))
  return [[(text, score) for score, text in each] for each in found]


@functools.partial(jax.jit, static_argnames=('no_repeat', 'count'))
def _best(logit_vb, score_bw, history, no_repeat, count):
  """Of each prompt the best of all tokens after all its beams: scores, beams and tokens [b, j]."""
  B, W = score_bw.shape
  log_p_bv = jax.nn.log_softmax(sharding.whole(logit_vb).T)
  if no_repeat:
    log_p_bv = sampling.forbid(log_p_bv, history, no_repeat)
  V = log_p_bv.shape[1]
  total_bj = (log_p_bv.reshape(B, W, V) + score_bw[..., None]).reshape(B, W * V)
  score_bj, at_bj = jax.lax.top_k(total_bj, count)
  return score_bj, at_bj // V, at_bj % V
