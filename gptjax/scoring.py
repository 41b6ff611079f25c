"""How likely a model finds each token of texts of any length.

A text longer than the context is read through a window that slides over it: each token is scored
once, with at least context - stride of those before it.
"""

import collections
import dataclasses
from collections.abc import Iterable, Iterator

import jax
import numpy as np

from gptjax import sharding
from gptjax.step import Program

MOST_WAITING = 8  # texts for each row, until windows of any size are read
SHORTEST = 64  # tokens for which a program of its own is worth compiling


@dataclasses.dataclass
class _Text:
  """One that is being scored."""

  log_p_t: np.ndarray  # of each token but the first
  left: int  # of which so many are not known yet


def windows(length: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
  """What is read of a text in which so many tokens are predicted: (begin, first, end).

  The tokens begin … end-1 are read, and first … end-1 of what they predict is scored.
  """
  end = min(length, context)
  yield 0, 0, end
  while end < length:
    first, end = end, min(end + stride, length)
    yield end - context, first, end


def fitting(length: int, context: int) -> int:
  """To how many tokens a window is filled up: the context, halved as often as it fits."""
  while context % 2 == 0 and context // 2 >= max(length, SHORTEST):
    context //= 2
  return context


def score(
  program: Program, params: dict, texts: Iterable[np.ndarray], stride: int, rows: int
) -> Iterator[np.ndarray]:
  """The logarithm of the probability of each token but the first, in nats, text by text.

  Args:
    program: as the mesh that is set has it.
    params: of the state.
    texts: token ids [t], two or more in each.
    stride: how far a window slides, at most the context.
    rows: windows that are read together.
  """
  losses, context = jax.jit(program.token_losses), program.shape.context
  pending = collections.defaultdict(list)  # windows to read, by what they are filled up to
  waiting: collections.deque[_Text] = collections.deque()

  def read(size):
    token_bt = np.zeros((rows, size + 1), np.int32)
    for at_t, (_, token_t, *_) in zip(token_bt, pending[size], strict=False):
      at_t[: len(token_t)] = token_t
    laid = jax.device_put(token_bt, sharding.computed('bl'))
    nll_bl = np.asarray(losses(params, laid), np.float64)
    for nll_l, (text, token_t, first, end) in zip(nll_bl, pending.pop(size), strict=False):
      scored = len(token_t) - 1 - (end - first), len(token_t) - 1
      text.log_p_t[first:end] = -nll_l[slice(*scored)]
      text.left -= end - first

  def read_all():
    for size in [*pending]:
      read(size)

  def done():
    while waiting and not waiting[0].left:
      yield waiting.popleft().log_p_t

  for token_t in texts:
    length = len(token_t) - 1
    text = _Text(np.zeros(length), length)
    waiting.append(text)
    for begin, first, end in windows(length, context, stride):
      size = fitting(end - begin, context)
      pending[size].append((text, token_t[begin : end + 1], first, end))
      if len(pending[size]) == rows:
        read(size)
    if len(waiting) > MOST_WAITING * rows:  # a lone short one would hold all others up
      read_all()
    yield from done()
  read_all()
  yield from done()
