"""A model without its biases of q, k and v is the function that it was with them."""

import dataclasses

import jax
import numpy as np
import pytest

from gptjax.fold import fold
from tests import small, their_models


@pytest.mark.parametrize('mesh', [{}, {'fsdp': 2, 'tensor': 2}])
def test_what_is_folded_says_the_same(mesh):
  shape = dataclasses.replace(their_models.SHAPES['gpt_neo'], qkv_bias=True)
  bare = dataclasses.replace(shape, qkv_bias=False)
  random = np.random.default_rng(1)
  with small.on(**mesh):
    like = small.program(shape).abstract_state()['params']
    draw = lambda a: jax.device_put(random.normal(0, 0.2, a.shape).astype('f'), a.sharding)
    params = jax.tree.map(draw, like)
    folded = fold(params, shape)
    want = small.program(bare).abstract_state()['params']
    assert jax.tree.map(lambda a: (a.shape, a.sharding), folded) == jax.tree.map(
      lambda a: (a.shape, a.sharding), want
    )
    got = their_models.ours(bare, folded)
    np.testing.assert_allclose(got, their_models.ours(shape, params), rtol=1e-4, atol=1e-4)
    without = {n: a for n, a in params['blocks']['attn'].items() if n != 'qkv_bias'}
    without = params | {'blocks': params['blocks'] | {'attn': without}}
    assert np.abs(their_models.ours(bare, without) - got).max() > 0.1
