"""What is left out is what `transformers` leaves out, and what is drawn is as likely as it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation import logits_process

from gptjax.sampling import History, Sampling, choose, filtered, forbid
from tests import small

V = 50
LOGITS = np.random.default_rng(0).normal(0, 3, (4, V)).astype('f')


def how(temperature=1.0, top_k=0, top_p=1.0, no_repeat=0):
  return Sampling(temperature, top_k, top_p, no_repeat)


def theirs(*processors):
  scores = torch.tensor(LOGITS)
  for processor in processors:
    scores = processor(None, scores)
  return scores.numpy()


@pytest.mark.parametrize('temperature', [0.3, 1.0, 2.5])
@pytest.mark.parametrize('top_k', [0, 1, 7, V, 10 * V])
@pytest.mark.parametrize('top_p', [1.0, 0.9, 0.4, 1e-6])
def test_temperature_top_k_and_top_p_are_theirs(temperature, top_k, top_p):
  processors = [logits_process.TemperatureLogitsWarper(temperature)]
  if top_k:
    processors.append(logits_process.TopKLogitsWarper(top_k))
  if top_p < 1:
    processors.append(logits_process.TopPLogitsWarper(top_p))
  got = filtered(jnp.asarray(LOGITS), how(temperature, top_k, top_p))
  # Ours are counted from the largest, which leaves the probabilities what they are.
  want = theirs(*processors)
  np.testing.assert_allclose(got, want - want.max(1, keepdims=True), rtol=1e-5, atol=1e-5)


@given(
  tokens=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=24), min_size=4, max_size=4),
  n=st.integers(1, 5),
)
def test_what_may_not_be_repeated_is_theirs(tokens, n):
  """Row by row there, since rows of one batch have one length."""
  token_bt = np.full((4, 24), 49, np.int32)
  for row, at_t in zip(tokens, token_bt, strict=True):
    at_t[: len(row)] = row
  history = History(token_bt, np.array([len(row) for row in tokens]))
  got = np.asarray(forbid(jnp.asarray(LOGITS), history, n))
  processor = logits_process.NoRepeatNGramLogitsProcessor(n)
  for b, row in enumerate(tokens):
    want = processor(torch.tensor([row]), torch.tensor(LOGITS[b : b + 1])).numpy()[0]
    np.testing.assert_array_equal(got[b], want)


def drawn(settings, count=20_000, history=None):
  """How often each token of the first row is drawn."""
  logit_bv = jnp.broadcast_to(LOGITS[0] / 2, (count, V))
  with small.on():
    key_b = jax.random.split(jax.random.key(0), count)
    token_b = jax.jit(choose, static_argnums=3)(logit_bv, key_b, history, settings)
  return np.bincount(token_b, minlength=V)


@pytest.mark.parametrize('settings', [how(), how(0.5), how(2.0, top_k=5), how(top_p=0.7)], ids=str)
def test_what_is_drawn_is_as_likely_as_it_should_be(settings):
  """By chi squared, which is beyond its mean and six standard deviations once in a thousand years.

  Tokens that are expected less than five times are one.
  """
  counts = drawn(settings)
  p_v = np.asarray(jax.nn.softmax(filtered(jnp.asarray(LOGITS[:1] / 2), settings)))[0]
  assert counts[p_v == 0].sum() == 0
  expected = p_v * counts.sum()
  often = expected >= 5
  pairs = [*zip(counts[often], expected[often], strict=True)]
  pairs.append((counts[~often].sum(), expected[~often].sum() + 1e-9))
  squared = sum((got - want) ** 2 / want for got, want in pairs if want > 1e-6)
  freedom = max(1, len(pairs) - 1)
  assert squared < freedom + 6 * (2 * freedom) ** 0.5


def test_temperature_zero_takes_the_likeliest():
  assert np.flatnonzero(drawn(how(0.0), count=5)).tolist() == [int(LOGITS[0].argmax())]


@pytest.mark.parametrize('temperature', [1e-12, 1e-30, 1e-45])
def test_the_coldest_temperature_takes_the_likeliest(temperature):
  assert np.flatnonzero(drawn(how(temperature), count=5)).tolist() == [int(LOGITS[0].argmax())]


def test_where_all_is_forbidden_nothing_is():
  history = History(np.arange(V, dtype=np.int32)[None], np.array([V]))
  got = forbid(jnp.asarray(LOGITS[:1]), history, 1)
  np.testing.assert_array_equal(got, LOGITS[:1])


def test_what_is_forbidden_is_not_taken():
  first, second = np.argsort(-LOGITS[0])[:2]
  history = History(np.array([[first]], np.int32), np.array([1]))
  with small.on():
    settings = how(0.0, no_repeat=1)
    token_b = choose(
      jnp.asarray(LOGITS[:1]), jax.random.split(jax.random.key(0), 1), history, settings
    )
  assert token_b.tolist() == [second]
