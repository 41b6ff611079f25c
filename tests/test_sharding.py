"""The tables: what divides, what is gathered, and in what dtype gradients are summed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import P

from gptjax import sharding
from gptjax.errors import Mistake
from gptjax.sizes import GPT3, Shape
from tests import small


def test_a_letter_lies_where_the_tables_say():
  with small.on(2, 2, 2):
    assert sharding.stored('ve') == P('tensor', 'fsdp')
    assert sharding.computed('vd') == P('tensor', None)
    assert sharding.computed('bld') == P(('data', 'fsdp'), None, None)
  with small.on(1, 8, 1):
    assert sharding.stored('ve') == P(None, 'fsdp')
    assert sharding.stored('ncdhk') == P(None, None, 'fsdp', None, None)
  with small.on(1, 2, 2, stage=2):
    assert sharding.stored('ve') == P('tensor', ('stage', 'fsdp'))
    assert sharding.stored('ncdhk') == P('stage', None, 'fsdp', 'tensor', None)
    assert sharding.computed('vd') == P(('tensor', 'stage'), None)
    assert sharding.computed('bld') == P('fsdp', None, None)


@pytest.mark.parametrize('mesh', small.MESHES)
def test_a_weight_does_not_depend_on_the_mesh(mesh):
  draw = lambda: sharding.weight(jax.random.key(3), 'df', 16, 24, std=0.5)[...]
  with small.on():
    alone = np.asarray(jax.jit(draw)())
  with small.on(*mesh):
    split = jax.jit(draw)()
    assert split.addressable_shards[0].data.size * mesh[1] * mesh[2] == alone.size
    np.testing.assert_array_equal(split, alone)


def test_state_at_rest_is_split_over_fsdp_and_tensor():
  with small.on(2, 2, 2):
    state = small.init(small.program())
  share = [a.addressable_shards[0].data.size / a.size for a in jax.tree.leaves(state) if a.ndim]
  up = state['moments']['mu']['blocks']['mlp']['up']
  assert up.addressable_shards[0].data.size * 4 == up.size
  assert max(share) <= 0.5


def test_gradients_are_reduced_in_f32_whatever_they_were_computed_in():
  def loss(w, x_bld):
    used = sharding.use(nnx.Param(w), 'df', jnp.bfloat16)
    return jnp.einsum('bld,df->blf', x_bld, used).astype(jnp.float32).sum()

  with small.on(2, 2, 2):
    w = jax.device_put(np.ones((8, 8), 'f'), sharding.stored('df'))
    x_bld = jax.device_put(jnp.ones((4, 3, 8), jnp.bfloat16), sharding.computed('bld'))
    jaxpr = jax.make_jaxpr(jax.grad(loss))(w, x_bld)
  unreduced = [
    eqn
    for eqn in jaxpr.eqns
    if eqn.primitive.name == 'reshard' and eqn.invars[0].aval.sharding.spec.unreduced
  ]
  assert len(unreduced) == 1
  assert unreduced[0].invars[0].aval.dtype == jnp.float32


def test_mesh_that_does_not_divide_the_model_lists_everything():
  with pytest.raises(Mistake) as e:
    sharding.check(small.SHAPE, {'stage': 1, 'data': 1, 'fsdp': 3, 'tensor': 5}, 8)
  told = str(e.value)
  assert 'wanted 8, all there are' in told and '1·1·3·5' in told
  assert 'd_model over the mesh axis fsdp: got 32 over 3' in told
  assert 'n_heads over the mesh axis tensor: got 4 over 5' in told
  assert 'd_ff' in told and 'padded vocabulary' in told
  assert '--config.mesh.fsdp= one of 1, 2, 4, 8' in told


def test_mesh_that_divides_is_accepted():
  sharding.check(small.SHAPE, {'stage': 1, 'data': 2, 'fsdp': 2, 'tensor': 2}, 8)


@pytest.mark.parametrize(
  'name, works', [('13b', [1, 2, 4, 5, 10, 20]), ('175b', [1, 2, 3, 4, 6, 8, 12, 16, 24, 48])]
)
def test_stages_have_whole_periods(name, works):
  row = GPT3[name]
  shape = Shape(row.n_layers, row.d_model, 40, 128, 4 * 128, 2048, 50257, (None, 256))
  mesh = lambda stages: {'stage': stages, 'data': 1, 'fsdp': 1, 'tensor': 1}
  for stages in range(1, 50):
    if stages in works:
      sharding.check(shape, mesh(stages), stages)
    else:
      with pytest.raises(Mistake, match='layers over the mesh axis stage'):
        sharding.check(shape, mesh(stages), stages)
  with pytest.raises(Mistake, match='--config.mesh.stage= one of ' + ', '.join(map(str, works))):
    sharding.check(shape, mesh(49), 49)
  odd = dataclasses.replace(shape, n_layers=9)
  with pytest.raises(Mistake, match='--config.mesh.stage= one of 1(\n|$)'):
    sharding.check(odd, mesh(3), 3)
