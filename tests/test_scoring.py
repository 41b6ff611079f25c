"""Each token is scored once, and as `transformers` scores it."""

import dataclasses

import jax
import numpy as np
import pytest
import torch

from gptjax import scoring
from tests import small, their_models


@pytest.mark.parametrize('length', [1, 5, 15, 16, 17, 40, 100])
@pytest.mark.parametrize('context, stride', [(16, 8), (16, 16), (16, 1), (15, 4), (1, 1)])
def test_windows_score_each_token_once_with_enough_before_it(length, context, stride):
  scored = []
  for begin, first, end in scoring.windows(length, context, stride):
    assert 0 <= begin <= first < end and end - begin <= context
    assert begin == 0 or first - begin >= context - stride
    scored += range(first, end)
  assert scored == [*range(length)]


@pytest.mark.parametrize('length', [1, 64, 65, 500, 2048])
def test_a_window_is_filled_up_to_few_sizes(length):
  size = scoring.fitting(length, 2048)
  assert size >= length and size in (64, 128, 256, 512, 1024, 2048) and size < max(2 * length, 65)


def texts():
  random = np.random.default_rng(0)
  return [random.integers(0, 250, length).astype('int32') for length in (2, 90, 24, 25, 26, 7)]


def theirs(model, token_t, context, stride):
  """Their own way: a window after the other, and what is told before is not scored."""
  log_p = []
  begin, done = 0, 0
  while done < len(token_t) - 1:
    end = min(context, len(token_t) - 1) if not done else min(done + stride, len(token_t) - 1)
    begin = max(0, end - context)
    with torch.no_grad():
      logits = model(torch.tensor(token_t[None, begin:end], dtype=torch.long)).logits[0]
    all_p = torch.log_softmax(logits, -1).numpy()
    log_p += [all_p[i - begin, token_t[i + 1]] for i in range(done, end)]
    done = end
  return np.array(log_p)


@pytest.mark.parametrize('family', ['gpt2', 'gpt_neo'])
@pytest.mark.parametrize('stride, rows', [(12, 2), pytest.param(5, 1, marks=pytest.mark.slow)])
def test_scores_are_theirs(family, stride, rows, tmp_path):
  with small.on():
    model, program, params = their_models.same_here(family, tmp_path)
    got = [*scoring.score(program, params, texts(), stride, rows)]
  assert [len(log_p_t) for log_p_t in got] == [len(token_t) - 1 for token_t in texts()]
  for log_p_t, token_t in zip(got, texts(), strict=True):
    np.testing.assert_allclose(log_p_t, theirs(model, token_t, 24, stride), atol=1e-4)


def test_a_lone_short_text_holds_nothing_up():
  """Of a context in which short texts are filled up to less than long ones."""
  program = small.program(dataclasses.replace(small.SHAPE, context=128))
  read = 0

  def texts():
    nonlocal read
    for length in [5, *[100] * 60]:
      read += 1
      yield np.arange(length, dtype=np.int32)

  with small.on():
    scored = scoring.score(program, small.init(program)['params'], texts(), 64, 2)
    assert len(next(scored)) == 4
    assert read < 30
    assert [len(log_p_t) for log_p_t in scored] == [99] * 60


@pytest.mark.parametrize('mesh', [{'tensor': 2}, {'fsdp': 2}])
def test_any_mesh_scores_the_same(mesh):
  program = small.program()
  with small.on():
    params = jax.tree.map(np.asarray, small.init(program)['params'])

  def scored():
    like = program.abstract_state()['params']
    laid = jax.tree.map(lambda a, like: jax.device_put(a, like.sharding), params, like)
    return np.concatenate([*scoring.score(program, laid, texts(), 8, 4)])

  with small.on():
    want = scored()
  with small.on(**mesh):
    np.testing.assert_allclose(scored(), want, atol=1e-5)
