"""Token by token is what the model says of the whole row; searches are those of `transformers`."""

import dataclasses

import jax
import numpy as np
import pytest

from gptjax import decode
from gptjax.sampling import Sampling
from tests import small, their_models

GREEDY = Sampling(0.0, 0, 1.0, 0)
WARM = Sampling(1.5, 0, 1.0, 0)


@pytest.fixture(scope='module')
def loud():
  """A model with opinions: ten times the weights that training starts from."""
  program = small.program()
  with small.on():
    return program, jax.tree.map(lambda a: np.asarray(10 * a), small.init(program)['params'])


def sampled(model, prompts, count, how=GREEDY, seed=0, numbers=None, mesh=None):
  with small.on(**mesh or {}):
    numbers = numbers or [*range(len(prompts))]
    made = decode.sample(small.decoder(model, len(prompts)), prompts, count, how, seed, numbers)
    return np.stack([*made], 1).tolist()


def without_cache(model, prompt, count):
  """The likeliest tokens by full forward passes."""
  program, params = model
  tokens = list(prompt)
  with small.on():
    logits, params = jax.jit(program.logits), small.laid(program, params)
    for _ in range(count):
      told = tokens[-decode.seen(len(tokens), program.shape.context) :]
      padded = np.zeros((1, program.shape.context), np.int32)
      padded[0, : len(told)] = told
      tokens.append(int(np.argmax(logits(params, padded)[0, len(told) - 1])))
  return tokens[len(prompt) :]


@pytest.mark.parametrize('rows', [pytest.param(1, marks=pytest.mark.slow), 3])
def test_in_another_dtype_it_says_nearly_the_same(loud, rows):
  program, params = loud
  prompts = [[7, 8, 9, 10, 11]] * rows
  said = {}
  with small.on():
    for dtype in ('float32', 'bfloat16'):
      decoder = decode.Decoder(program, small.laid(program, params), rows, dtype=dtype)
      first = decoder.read(prompts)
      said[dtype] = [np.asarray(a)[:250] for a in (first, decoder.read_one(np.full(rows, 12)))]
  for exact, rough in zip(*said.values(), strict=True):
    off = np.abs(exact - rough).max() / exact.std()
    assert 1e-4 < off < 0.2


@pytest.mark.parametrize('windows', [(None, 5), pytest.param((4,), marks=pytest.mark.slow)])
def test_greedy_is_the_likeliest_token_far_past_the_end_of_the_context(windows):
  program = small.program(dataclasses.replace(small.SHAPE, windows=windows))
  with small.on():
    params = jax.tree.map(lambda a: np.asarray(10 * a), small.init(program)['params'])
  prompts = [[3, 1, 4], [7] * 9, [*range(20)]]
  got = sampled((program, params), prompts, 40)
  assert got == [without_cache((program, params), prompt, 40) for prompt in prompts]


def test_prompts_of_many_chunks(loud, monkeypatch):
  monkeypatch.setattr(decode, 'CHUNK', 3)
  prompts = [[*range(14)], [5, 6], [9] * 7]
  assert sampled(loud, prompts, 9) == [without_cache(loud, prompt, 9) for prompt in prompts]


@pytest.mark.parametrize('context', [1, 2, 3, 16, 17])
def test_what_is_seen_fits_and_only_grows_until_half_is_let_go(context):
  lengths = range(1, 6 * context)
  seen = [decode.seen(length, context) for length in lengths]
  assert seen[:context] == [*lengths][:context]
  assert all(1 <= s <= context for s in seen)
  begins = [length - s for length, s in zip(lengths, seen, strict=True)]
  assert {b - a for a, b in zip(begins, begins[1:], strict=False)} <= {0, max(1, context // 2)}


@pytest.mark.slow
def test_what_is_drawn_for_a_row_depends_on_nothing_else_in_the_batch(loud):
  prompts = [[3, 1, 4], [7] * 9, [2]]
  together = sampled(loud, prompts, 30, WARM, seed=3)
  apart = [sampled(loud, [prompt], 30, WARM, 3, [i])[0] for i, prompt in enumerate(prompts)]
  assert together == apart
  assert sampled(loud, prompts, 30, WARM, seed=4) != together
  other = sampled(loud, [[2]] * 2, 30, WARM, 3, [0, 1])
  assert other[0] != other[1]


@pytest.mark.parametrize('tensor', [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_model_split_over_devices_says_the_same(loud, tensor):
  prompts = [[3, 1, 4], [7] * 9]
  assert sampled(loud, prompts, 20, mesh={'tensor': tensor}) == sampled(loud, prompts, 20)


def test_two_programs_serve_all_lengths(loud):
  with small.on():
    made = small.decoder(loud, 1)
    for length in (1, 5, 11):
      for _ in decode.sample(made, [[3] * length], 4, GREEDY, 0, [0]):
        pass
  assert made._read._cache_size() == 2


def test_the_padding_of_the_vocabulary_is_never_drawn(loud):
  hottest = sampled(loud, [[5]], 60, Sampling(1e30, 0, 1.0, 0))[0]
  assert len(set(hottest)) > 40 and max(hottest) < loud[0].shape.vocab_size


# As transformers.


@pytest.mark.parametrize('no_repeat', [0, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_greedy_is_theirs(twins, no_repeat):
  model, ours = twins
  how = {'max_new_tokens': 19, 'no_repeat_ngram_size': no_repeat, 'eos_token_id': None}
  want = their_models.generate(model, their_models.PROMPTS, **how)
  assert sampled(ours, their_models.PROMPTS, 19, Sampling(0.0, 0, 1.0, no_repeat)) == want


def test_greedy_of_prompts_of_different_lengths_is_theirs(twins):
  model, ours = twins
  prompts = [[3, 1, 4, 1, 5], [9, 2], [7]]
  how = {'max_new_tokens': 19, 'eos_token_id': None}
  want = [their_models.generate(model, [prompt], **how)[0] for prompt in prompts]
  assert sampled(ours, prompts, 19) == want
