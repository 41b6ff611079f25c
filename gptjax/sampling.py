"""From logits to the next token: what is forbidden, what is left out, what is drawn.

Each is what `transformers` calls by the same name, in its order: no n-gram twice, temperature,
top-k, top-p.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

COLDEST = 1e-20  # a temperature below which logits would leave f32


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How to choose among tokens."""

  temperature: float  # 0: the likeliest
  top_k: int  # of the likeliest; 0: of all
  top_p: float  # of the fewest that are together as likely (Holtzman et al. 2020); 1: of all
  no_repeat: int  # length of n-grams that come but once; 0: of none


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class History:
  """All tokens so far of rows of different lengths: what is after the length is no token."""

  token_bt: jax.Array
  length_b: jax.Array

  def add(self, token_b: jax.Array) -> 'History':
    """With one token more in each row."""
    row_b = jnp.arange(len(token_b))
    return History(self.token_bt.at[row_b, self.length_b].set(token_b), self.length_b + 1)


def forbid(logit_bv: jax.Array, history: History, n: int) -> jax.Array:
  """-inf for each token that would complete an n-gram which is there already.

  Where that leaves no token, none is forbidden.
  """
  token_bt, length_b = history.token_bt, history.length_b
  (B, T), V = token_bt.shape, logit_bv.shape[1]
  if n == 0 or n > T:
    return logit_bv
  J = T - n + 1  # beginnings of n-grams
  last_bn = length_b[:, None] - n + 1 + jnp.arange(n - 1)
  last_bn = jnp.take_along_axis(token_bt, jnp.maximum(0, last_bn), 1)
  again_bj = jnp.arange(J) + n <= length_b[:, None]
  for i in range(n - 1):
    again_bj &= token_bt[:, i : i + J] == last_bn[:, i, None]
  banned_bj = jnp.where(again_bj, token_bt[:, n - 1 :], V)  # V is no token: dropped
  left_bv = logit_bv.at[jnp.arange(B)[:, None], banned_bj].set(-jnp.inf, mode='drop')
  return jnp.where((left_bv > -jnp.inf).any(1, keepdims=True), left_bv, logit_bv)


def filtered(logit_bv: jax.Array, sampling: Sampling) -> jax.Array:
  """Logits at a temperature above 0, and -inf for what top-k and top-p leave out."""
  logit_bv = (logit_bv - logit_bv.max(1, keepdims=True)) / max(sampling.temperature, COLDEST)
  V = logit_bv.shape[1]
  k = min(sampling.top_k or V, V)
  if k == V and sampling.top_p == 1:
    return logit_bv
  best_bk, _ = lax.top_k(logit_bv, k)
  if sampling.top_p < 1:  # the first stays, and each before which there is less than top_p
    p_bk = jax.nn.softmax(best_bk)
    stays_bk = (jnp.cumsum(p_bk, 1) - p_bk < sampling.top_p).at[:, 0].set(True)
    best_bk = jnp.where(stays_bk, best_bk, jnp.inf)
  least_b1 = best_bk.min(1, keepdims=True)
  return jnp.where(logit_bv >= least_b1, logit_bv, -jnp.inf)


def choose(
  logit_bv: jax.Array, key_b: jax.Array, history: History | None, sampling: Sampling
) -> jax.Array:
  """The next token of each row [b].

  Args:
    logit_bv: in f32.
    key_b: one a row, for what is drawn.
    history: wanted where n-grams must not come again.
    sampling: how.
  """
  if sampling.no_repeat:
    logit_bv = forbid(logit_bv, history, sampling.no_repeat)
  if not sampling.temperature:
    return jnp.argmax(logit_bv, 1).astype(jnp.int32)
  draw = jax.vmap(jax.random.categorical)
  return draw(key_b, filtered(logit_bv, sampling)).astype(jnp.int32)
