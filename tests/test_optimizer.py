"""AdamW against its equations in NumPy and against optax, and which parameters decay."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptjax.optimizer import MATRICES, decays
from tests import small

ADAMW = small.ADAMW


def test_update_is_adamw_with_clip_and_decay_of_matrices():
  random = np.random.default_rng(0)
  params = {'up': random.normal(size=(3, 4)), 'up_bias': random.normal(size=4)}
  params = jax.tree.map(lambda a: a.astype('float32'), params)
  moments = ADAMW.init(jax.tree.map(jnp.asarray, params))
  mu = nu = dict.fromkeys(params, 0.0)
  for t in range(1, 4):
    # Norms on both sides of the clip.
    scale = (0.1, 9)[t % 2]
    grads = {k: scale * random.normal(size=a.shape).astype('f') for k, a in params.items()}
    norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
    updates, moments = ADAMW.update(grads, moments, params, np.float32(0.01), norm)
    for name, g in grads.items():
      g = g / max(1.0, norm)
      mu = mu | {name: 0.9 * mu[name] + 0.1 * g}
      nu = nu | {name: 0.95 * nu[name] + 0.05 * g**2}
      step = mu[name] / (1 - 0.9**t) / (np.sqrt(nu[name] / (1 - 0.95**t)) + 1e-8)
      decay = 0.1 * params[name] if name == 'up' else 0
      np.testing.assert_allclose(updates[name], -0.01 * (step + decay), rtol=1e-4, atol=1e-7)
    params = jax.tree.map(lambda p, u: np.asarray(p + u), params, updates)
  assert int(moments['count']) == 3


@pytest.mark.parametrize('tokens', [1.0, 4096.0])
def test_update_is_that_of_optax(tokens):
  random = np.random.default_rng(0)
  draw = lambda scale: {
    name: jnp.asarray(scale * random.normal(size=(5, 3)), 'float32') for name in ('up', 'up_bias')
  }
  theirs = optax.chain(
    optax.clip_by_global_norm(ADAMW.clip_norm),
    optax.adamw(0.01, ADAMW.b1, ADAMW.b2, ADAMW.eps, weight_decay=ADAMW.weight_decay, mask=decays),
  )
  params = draw(1)
  state, moments = theirs.init(params), ADAMW.init(params)
  for scale in (0.01, 9, 0.0, 1):  # on both sides of the clip, and nothing at all
    grads = draw(scale)
    want, state = theirs.update(grads, state, params)
    norm = optax.tree.norm(grads)
    sums = jax.tree.map(lambda g: tokens * g, grads)
    updates, moments = ADAMW.update(sums, moments, params, 0.01, norm, tokens=tokens)
    for name in params:
      np.testing.assert_allclose(updates[name], want[name], rtol=1e-5, atol=1e-9)
    params = optax.apply_updates(params, updates)


@pytest.mark.parametrize('bad', [float('nan'), float('inf'), 1.0])
def test_an_update_that_is_not_taken_changes_nothing(bad):
  params = {'up': jnp.ones((2, 2))}
  grads = {'up': jnp.full((2, 2), bad)}
  moments = ADAMW.init(params) | {'count': jnp.int32(7)}
  norm = optax.tree.norm(grads)
  updates, after = ADAMW.update(grads, moments, params, np.float32(0.01), norm, jnp.array(False))
  assert not np.any(updates['up'])
  jax.tree.map(np.testing.assert_array_equal, after, moments)


def test_matrices_decay_and_nothing_else():
  with small.on():
    params = small.program().abstract_state()['params']
  flat = jax.tree_util.tree_leaves_with_path(decays(params))
  decayed = {jax.tree_util.keystr(path) for path, decay in flat if decay}
  # A block's bias has a dim for the layers, so rank cannot tell; its name can.
  vectors = ('bias', 'scale')
  assert decayed == {
    jax.tree_util.keystr(path) for path, _ in flat if not path[-1].key.endswith(vectors)
  }
  assert {path[-1].key for path, decay in flat if decay} == set(MATRICES)


def test_state_is_a_plain_dict():
  with small.on():
    state = small.program().abstract_state()
  kinds = {type(node) for node in jax.tree.leaves(state, is_leaf=lambda n: not isinstance(n, dict))}
  assert kinds == {jax.ShapeDtypeStruct}
