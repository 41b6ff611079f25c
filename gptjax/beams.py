"""Beam search, as `transformers` does it."""

import functools
import math
from collections.abc import Sequence

import jax
import numpy as np

from gptjax import decode, sampling, sharding
from gptjax.decode import Decoder


def search(
  decoder: Decoder,
  prompts: Sequence[Sequence[int]],
  count: int,
  length_penalty: float,
  no_repeat: int,
  end_of_text: int,
) -> list[list[tuple[list[int], float]]]:
  """Of each prompt the likeliest continuations that it finds, best first.

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
    # As long in each turn: what is there, and what is still to come.
    history = decode.history_of(rows, count - i + 1) if no_repeat else None
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
