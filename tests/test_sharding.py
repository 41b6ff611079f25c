"""The tables: what divides, what is gathered, and in what dtype gradients are summed."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import P

from gptjax import attention, sharding
from gptjax.errors import Mistake
from gptjax.sizes import GPT3, Shape
from tests import small


def test_a_letter_lies_where_the_tables_say():
  with small.on(2, 2, 2):
    assert sharding.stored('ve') == P('tensor', 'fsdp')
    assert sharding.computed('vd') == P('tensor', None)
    assert sharding.computed('bld') == P(('data', 'fsdp'), None, None)
    assert sharding.computed('btd') == P(('data', 'fsdp'), 'tensor', None)
  with small.on(1, 8, 1):
    assert sharding.stored('ve') == P(None, 'fsdp')
    assert sharding.stored('ndchk') == P(None, 'fsdp', None, None, None)
  with small.on(1, 2, 2, stage=2):
    assert sharding.stored('ve') == P('tensor', ('stage', 'fsdp'))
    assert sharding.stored('ndchk') == P('stage', 'fsdp', None, 'tensor', None)
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
  large = [a for a in jax.tree.leaves((state['params'], state['moments'])) if a.ndim]
  share = [a.addressable_shards[0].data.size / a.size for a in large]
  up = state['moments']['mu']['blocks']['mlp']['up']
  assert up.addressable_shards[0].data.size * 4 == up.size
  assert max(share) <= 0.5


def product(w_df, x_btd):
  used_df = sharding.use(nnx.Param(w_df), 'df', jnp.bfloat16)
  return jnp.einsum('bld,df->blf', sharding.gather_positions(x_btd), used_df)


def scaled(w_d, x_btd):
  return x_btd * sharding.use_rows(nnx.Param(w_d), 'd', jnp.bfloat16, 'bt', *x_btd.shape[:2])


@pytest.mark.parametrize(
  'used, dims, over', [(product, 'df', {'data', 'fsdp'}), (scaled, 'd', {'data', 'fsdp', 'tensor'})]
)
def test_gradients_are_reduced_in_f32_whatever_they_were_computed_in(used, dims, over):
  """Over all that splits the rows, of which the positions of a residual are some."""
  with small.on(2, 2, 2):
    w = jax.device_put(np.ones((8, 8)[: len(dims)], 'f'), sharding.stored(dims))
    x_btd = jax.device_put(jnp.ones((4, 6, 8), jnp.bfloat16), sharding.computed('btd'))
    loss = lambda w, x_btd: used(w, x_btd).astype(jnp.float32).sum()
    jaxpr = jax.make_jaxpr(jax.grad(loss))(w, x_btd)
  summed = [
    eqn.invars[0].aval
    for eqn in jaxpr.eqns
    if eqn.primitive.name == 'reshard' and eqn.invars[0].aval.sharding.spec.unreduced
  ]
  (gradient,) = [a for a in summed if a.shape == w.shape]
  assert gradient.dtype == jnp.float32 and gradient.sharding.spec.unreduced == over


@pytest.mark.parametrize('dims, rows', [('f', 'bl'), ('chk', 'bl'), ('d', 'bt'), ('ld', 'bl')])
@pytest.mark.parametrize('mesh', [(1, 1, 1), (2, 2, 2)])
def test_a_bias_is_spread_over_rows_and_its_gradient_summed_in_f32(mesh, dims, rows):
  """A bf16 sum of thousands of terms of one sign stops growing at a few hundred."""
  B, L = 1024, 8
  size = {'b': B, 'l': L, 't': L, 'd': 8, 'f': 16, 'c': 3, 'h': 2, 'k': 4}
  every = rows + ''.join(dim for dim in dims if dim not in rows)
  random = np.random.default_rng(0)
  w = random.normal(size=[size[d] for d in dims]).astype('f')
  dy = np.asarray(random.random([size[d] for d in every]), jnp.bfloat16)
  with small.on(*mesh):
    laid = jax.device_put(w, sharding.stored(dims))
    dy_there = jax.device_put(dy, sharding.computed(every))
    used = lambda w: sharding.use_rows(nnx.Param(w), dims, jnp.bfloat16, rows, B, L)
    y, pull = jax.vjp(jax.jit(used), laid)
    (dw,) = pull(dy_there)
  np.testing.assert_array_equal(
    np.float32(y),
    np.einsum(f'{rows},{dims}->{every}', np.ones((B, L)), np.float32(jnp.bfloat16(w))),
  )
  want = np.einsum(f'{every}->{dims}', np.float64(dy))
  np.testing.assert_allclose(dw, want, rtol=2**-7)  # rounded on each device, and then added


@pytest.mark.slow
def test_sequence_parallelism_changes_where_the_residual_lies_and_nothing_else(monkeypatch):
  """With the row of the table and without: equal gradients, and a quarter of each residual kept."""
  shape = dataclasses.replace(small.SHAPE, n_layers=8, context=64)
  program = small.program(shape, attend=attention.chunked, remat='weights', dropout=0.1)
  token_gbl = small.rows(1, 4, shape=shape)

  def measured():
    with small.on(tensor=4):
      args = small.init(program)['params'], small.put(token_gbl), 0, 4
      compiled = jax.jit(program.gradients).lower(*args).compile()
      held = compiled.memory_analysis().temp_size_in_bytes
      return jax.device_get(compiled(*args)), held

  got, split = measured()
  monkeypatch.setitem(sharding.COMPUTE, 't', None)
  want, whole = measured()
  small.assert_close(got, want)
  residual = 4 * token_gbl.shape[1] * shape.context * shape.d_model  # bytes in f32
  # The input of each half of a block is kept, and in each its norm's.
  assert whole - split > 3 / 4 * residual * 2 * 2 * shape.n_layers


def test_mesh_that_does_not_divide_the_model_lists_everything():
  with pytest.raises(Mistake) as e:
    sharding.check(small.SHAPE, {'stage': 1, 'data': 1, 'fsdp': 3, 'tensor': 5}, 8)
  told = str(e.value)
  assert 'wanted 8, all there are' in told and '1·1·3·5' in told
  assert 'd_model over the mesh axis fsdp: got 32 over 3' in told
  assert 'n_heads over the mesh axis tensor: got 4 over 5' in told
  assert 'd_ff' in told and 'padded vocabulary' in told
  assert 'context over the mesh axis tensor: got 16 over 5' in told
  assert '--config.mesh.fsdp= one of 1, 2, 4, 8' in told


def machine(nodes, each):
  return [small.Device('gpu', id=i, slice_index=i // each) for i in range(nodes * each)]


def sizes(stage=1, data=1, fsdp=1, tensor=1):
  return {'stage': stage, 'data': data, 'fsdp': fsdp, 'tensor': tensor}


@pytest.mark.parametrize(
  'mesh, nodes, slow_axes, want',
  [
    (sizes(data=8), 1, 'auto', {}),
    (sizes(data=4, fsdp=8), 4, 'auto', sizes(data=4)),
    (sizes(data=2, fsdp=16), 4, 'auto', sizes(data=2, fsdp=2)),
    (sizes(stage=4, data=2, fsdp=4), 4, 'auto', sizes(data=2, stage=2)),
    (sizes(stage=4, data=2, fsdp=4), 4, 'stage', sizes(stage=4)),
    (sizes(stage=2, data=4, fsdp=4), 4, 'stage,data', sizes(stage=2, data=2)),
    (sizes(data=6, fsdp=4), 4, 'auto', sizes(data=2, fsdp=2)),
    (sizes(tensor=16), 2, 'auto', sizes(tensor=2)),
    (sizes(fsdp=4, tensor=2), 2, 'tensor', sizes(tensor=2)),
  ],
)
def test_slow_links_cut_the_axes_that_are_named(mesh, nodes, slow_axes, want):
  devices = machine(nodes, math.prod(mesh.values()) // nodes)
  assert sharding.cross(mesh, devices, slow_axes) == want


@pytest.mark.parametrize('nodes, slow_axes', [(2, 'auto'), (4, 'stage'), (4, 'tensor,data')])
def test_devices_that_fast_links_join_lie_together_but_along_slow_axes(nodes, slow_axes):
  mesh = sizes(stage=4, data=2, fsdp=2, tensor=2)
  devices = machine(nodes, 32 // nodes)[::-1]
  across = sharding.cross(mesh, devices, slow_axes)
  ordered = sharding.make_mesh(**mesh, devices=devices, across=across).devices
  assert sorted(d.id for d in ordered.flat) == list(range(32))
  node = np.vectorize(lambda d: d.slice_index)(ordered)
  for i, axis in enumerate(sharding.AXES):
    changes = (np.diff(node, axis=i) != 0).sum(i)
    assert (changes == across[axis] - 1).all()


def test_axes_that_cannot_cross_are_told():
  mesh = sizes(stage=2, fsdp=4)
  for wrong in ('', 'date', 'data,', 'data,data'):
    with pytest.raises(Mistake, match='wanted auto or some of data, stage, fsdp, tensor'):
      sharding.cross(mesh, machine(2, 4), wrong)
  with pytest.raises(Mistake, match='mesh.slow_axes: got stage 2 over 4 nodes'):
    sharding.cross(mesh, machine(4, 2), 'stage')
  uneven = machine(2, 4)[1:]
  with pytest.raises(Mistake, match='devices of 2 nodes: got 3 on one and 4 on another'):
    sharding.cross(sizes(fsdp=7), uneven, 'auto')


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
