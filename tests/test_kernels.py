"""The kernels of GPU and TPU equal the naive one, are chosen at the door, and refuse out loud."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P

from gptjax import attention, kernels, sharding, sizes
from gptjax.errors import Mistake
from gptjax.sizes import Shape
from tests import small
from tests.test_attention import COLLECTIVE, assert_close, qkvd, reference, with_grads

interpreted = kernels.make_splash('interpreted', interpret=True)


@pytest.fixture
def blocks_of_128(monkeypatch):
  """Small blocks, so that short lengths have several."""
  monkeypatch.setattr(kernels, 'largest_block', lambda *_: 128)


# Splash, interpreted on the CPU.

FAST = {
  (256, 1, 64),
  (256, 2, 80),
  (256, 100, 96),
  (256, 128, 128),
  (256, 256, 64),
  (256, None, 80),
  (200, 100, 128),
  (200, 128, 64),
  (200, 205, 96),
  (130, None, 64),
}


ALL = [
  (L, window, K)
  for L, K in itertools.product((130, 200, 256, 384), (64, 80, 96, 128))
  for window in (*sorted({1, 2, 100, 128, 129, 256, L - 1, L, L + 5}), None)
]
assert FAST <= set(ALL)


@pytest.mark.parametrize(
  'L, window, K',
  [case if case in FAST else pytest.param(*case, marks=pytest.mark.slow) for case in ALL],
)
def test_splash_is_reference(blocks_of_128, L, window, K):
  x = qkvd(L, H=1, K=K)
  got = jax.jit(with_grads(interpreted, window))(*x)
  assert_close(got, reference(window, *x), atol=2e-5)


def test_one_key_more_or_less_would_show(blocks_of_128):
  x = qkvd(256, H=1, K=64)
  o_blhk = jax.jit(with_grads(interpreted, 100))(*x)[0]
  for window in (99, 101):
    assert jnp.abs(o_blhk - reference(window, *x)[0]).max() > 0.01


def test_splash_in_bf16(blocks_of_128):
  x = qkvd(200, K=96, dtype=jnp.bfloat16)  # 96**-0.5 is no power of 2, so q is rounded
  got = jax.jit(with_grads(interpreted, 100))(*x)
  assert {a.dtype for a in got} == {jnp.dtype('bfloat16')}
  for a, b in zip(got, reference(100, *x.astype(jnp.float32)), strict=True):
    assert jnp.abs(a.astype(jnp.float32) - b).max() < 2**-6 * jnp.abs(b).max()


@pytest.mark.parametrize('window', [100, pytest.param(None, marks=pytest.mark.slow)])
def test_mesh_changes_nothing_and_costs_no_collective(blocks_of_128, window):
  x = qkvd(200, B=4, H=4, K=64)
  mesh = jax.make_mesh((2, 2, 2), ('some', 'other', 'names'))  # a kernel knows none
  spec = P(('some', 'other'), None, 'names', None)
  with jax.set_mesh(mesh):
    split = [jax.device_put(np.asarray(a), spec) for a in x]
    run = jax.jit(with_grads(interpreted, window)).lower(*split).compile()
    assert not COLLECTIVE.findall(run.as_text())
    got = run(*split)
    assert {a.sharding.spec for a in got} == {spec}
    assert_close(got, reference(window, *map(np.asarray, x)), atol=2e-5)


def test_inside_a_pipeline_with_checkpoint_and_scan(blocks_of_128):
  """In the shard_map of a pipeline's stages, each with its own layers, as when nothing is around.

  That one must be check_vma=False too, as the kernel's is.
  """
  x_blhk, _, _, do_blhk = qkvd(200, B=2, H=1, K=64)
  w_nk = 1 + jnp.arange(128.0).reshape(2, 64) / 128

  def layer(kernel, x_blhk, w_k):
    return kernel(x_blhk * w_k, x_blhk, x_blhk, 100)

  def plain(x_blhk, w_nk):
    return (sum(layer(attention.reference, x_blhk, w_k) for w_k in w_nk) * do_blhk).mean()

  wanted = jax.jit(jax.value_and_grad(plain, (0, 1)))(x_blhk, w_nk)

  def stage(x_blhk, w_nk):
    one = jax.checkpoint(lambda sum_blhk, w_k: (sum_blhk + layer(interpreted, x_blhk, w_k), None))
    o_blhk = jax.lax.scan(one, jnp.zeros_like(x_blhk), w_nk)[0]
    return jax.lax.psum(o_blhk, 'stage')

  with jax.set_mesh(jax.make_mesh((2, 2), ('stage', 'data'), devices=jax.devices()[:4])):
    staged = jax.shard_map(
      stage,
      in_specs=(P(), P('stage')),
      out_specs=P(),
      axis_names={'stage'},
      check_vma=False,
    )
    put = lambda x, *spec: jax.device_put(np.asarray(x), P(*spec))
    do_blhk = put(do_blhk, 'data')
    loss = lambda x_blhk, w_nk: (staged(x_blhk, w_nk) * do_blhk).mean()
    run = jax.jit(jax.value_and_grad(loss, (0, 1)))
    got = jax.tree.map(np.asarray, run(put(x_blhk, 'data'), put(w_nk, 'stage')))
  small.assert_close(got, wanted, rtol=1e-4, atol=1e-7)


def test_attention_is_not_computed_again_where_products_are_kept():
  """By the sine in a kernel, of which a backward pass wants nothing but its cosine."""

  def attend(q_blhk, k_bshk, v_bshk, window, *, dropout, key_b):
    kernel = lambda *qkv: jnp.sin(attention.reference(*qkv, window))
    return kernels._on_each_device(kernel, q_blhk, k_bshk, v_bshk, name=attention.ATTENDED)

  shape = dataclasses.replace(small.SHAPE, n_layers=1)
  counts = {}
  for remat in ('none', 'dots', 'full'):
    program = small.program(shape, attend=attend, remat=remat, apart=True)
    with small.on():
      args = program.abstract_state()['params'], small.put(small.rows(1, 2)), 0, 2
      text = jax.jit(program.gradients).lower(*args).as_text()
    counts[remat] = text.count('stablehlo.sine')
  assert counts == {'none': 1, 'dots': 1, 'full': 2}


@pytest.mark.slow
def test_program_with_splash_is_program_with_the_reference():
  """Over data, fsdp and tensor, with remat, scan and gradients summed over slices."""
  results = []
  for mesh, attend, remat in (
    ((1, 1, 1), attention.reference, 'none'),
    ((2, 2, 2), interpreted, 'dots'),
  ):
    program = small.program(attend=attend, remat=remat)
    with small.on(*mesh):
      params, token_gbl = small.init(program)['params'], small.put(small.rows(2, 8))
      got = jax.jit(program.gradients)(params, token_gbl, 0, jnp.int32(16))
      results.append(jax.tree.map(np.asarray, got))
  small.assert_close(*results)


def test_blocks_cover_the_length_and_are_of_lanes():
  for L in (1, 128, 129, 200, 1000, 1100, 2048, 2049, 32768):
    for largest in (128, 256, 512, 1024):
      block, padded = kernels.split_into_blocks(L, largest)
      assert block % kernels.LANES == 0 and padded % block == 0
      assert block <= largest and L <= padded < L + block
  assert kernels.split_into_blocks(2048, 1024) == (1024, 2048)
  assert kernels.split_into_blocks(1100, 1024) == (640, 1280)


def test_block_of_a_banded_layer_is_no_larger_than_pays():
  rows = lambda *args: kernels.largest_block(*args, row_bytes=256)
  assert rows('TPU v5', None) == 1024
  assert rows('TPU v5', 1) == rows('TPU v5', 256) == 256
  assert rows('TPU v5', 257) == 512
  assert rows('TPU v6 lite', 256) == 512
  assert rows('TPU v5', 10**6) == 1024
  assert kernels.largest_block('TPU v5', None, row_bytes=1024) == 512


# The choice at the door.


CPU = small.Device('cpu')
A100 = small.Device('gpu', 'NVIDIA A100-SXM4-40GB', '8.0')
H100 = small.Device('gpu', 'NVIDIA H100 80GB HBM3', '9.0')
V5E = small.Device('tpu', 'TPU v5 lite')


def shape(d_head=64, context=2048) -> Shape:
  return Shape(2, 64, 4, d_head, 256, context, 100, (None, 256))


def choose(name, device, dtype='bfloat16', dropout=0.0, **sizes):
  return kernels.choose(name, [device], shape(**sizes), jnp.dtype(dtype), dropout)


def test_auto_is_the_kernel_of_the_platform():
  assert choose('auto', CPU, 'float32', 0.1) is attention.chunked
  assert choose('auto', H100) is kernels.cudnn
  assert choose('auto', H100, d_head=256) is kernels.cudnn
  splash = choose('auto', V5E, 'float32')
  assert splash is kernels.make_splash('TPU v5 lite') and splash.__name__ == 'splash'


@pytest.mark.parametrize('device', [CPU, A100, V5E], ids=lambda d: d.platform)
def test_a_name_is_that_kernel_anywhere(device):
  assert choose('chunked', device, 'float32', 0.1, context=7) is attention.chunked
  assert choose('reference', device, 'float32', 0.1, d_head=7) is attention.reference


@pytest.mark.parametrize(
  'told, name, device, settings',
  [
    ("compute.attention: got 'flash' on platform 'cpu', wanted one of", 'flash', CPU, {}),
    ("got 'auto' on platform 'abacus'.*cpu, gpu, tpu", 'auto', small.Device('abacus'), {}),
    ('cudnn: platform: got cpu, wanted gpu; .*attention=auto', 'cudnn', CPU, {}),
    ('cudnn: platform: got tpu, wanted gpu', 'cudnn', V5E, {}),
    ('splash: platform: got gpu, wanted tpu; .*attention=auto', 'splash', H100, {}),
    (
      r'cudnn \(auto on gpu\): compute.dtype: got float32, wanted bfloat16; try '
      '--config.compute.dtype=bfloat16 or --config.compute.attention=chunked',
      'auto',
      H100,
      {'dtype': 'float32'},
    ),
    (
      r'cudnn \(auto on gpu\): model.dropout: got 0.1, wanted 0; .*attention=chunked',
      'auto',
      H100,
      {'dropout': 0.1},
    ),
    ('cudnn: model.d_head: got 100, wanted a multiple of 8', 'cudnn', H100, {'d_head': 100}),
    ('model.d_head: got 264.*at most 256; .*=chunked', 'auto', H100, {'d_head': 264}),
    ('model.d_head: got 136.*at most 128; .*=chunked', 'auto', A100, {'d_head': 136}),
    ('model.context: got 1001, wanted an even number', 'auto', H100, {'context': 1001}),
    (
      'GPU: got compute capability 7.0 .V100., wanted 8.0',
      'auto',
      small.Device('gpu', 'V100', '7.0'),
      {},
    ),
    (
      "GPU: got MI300X, wanted one of NVIDIA's",
      'auto',
      small.Device('gpu', 'MI300X', 'gfx942'),
      {},
    ),
    ('TPU: got TPU v3, wanted v4 or later', 'auto', small.Device('tpu', 'TPU v3'), {}),
    (r'splash \(auto on tpu\): model.dropout: got 0.1.*=chunked', 'auto', V5E, {'dropout': 0.1}),
    ('splash: model.d_head: got 264, wanted at most 256', 'splash', V5E, {'d_head': 264}),
    ('splash: compute.dtype: got float16', 'splash', V5E, {'dtype': 'float16'}),
  ],
)
def test_what_a_kernel_cannot_do_is_told(told, name, device, settings):
  with pytest.raises(Mistake, match=told):
    choose(name, device, **settings)


def test_all_that_it_cannot_do_is_told_at_once():
  with pytest.raises(Mistake, match='3 mistakes') as e:
    choose('auto', H100, 'float32', 0.1, context=99)
  assert str(e.value).count('--config.compute.attention=chunked') == 3


@pytest.mark.parametrize('kernel', [kernels.cudnn, interpreted], ids=lambda k: k.__name__)
def test_dropout_is_refused_inside_too(kernel):
  q_blhk = jnp.zeros((1, 2, 1, 8))
  with pytest.raises(Mistake, match='dropout in attention kernel .*got 0.1, wanted 0'):
    kernel(q_blhk, q_blhk, q_blhk, None, dropout=0.1)


# Compiled ahead of time for machines that are not there.

SIZES = sorted({(row.n_heads, row.d_head) for row in sizes.GPT3.values()})
# What is custom in the compiled program: one forward, and the backward pass in one kernel or two.
CALLS = {
  'tpu': ('splash_mha_fwd', 'splash_mha_dq', 'splash_mha_dkv'),
  'h100': ('fmhaSoftmax', 'fmhaSoftmaxBackward'),
}


MACHINES = {'tpu': 'v5p:2x2x2', 'h100': 'h100:1x8'}


def attend_on(mesh, kernel, windows, B, L, H, K, dtype=jnp.bfloat16):
  """The compiled forward and backward of a layer for each window, rows and heads split."""
  spec = P(('some', 'other'), None, 'names', None)

  def layers(*x):
    return [with_grads(kernel, window)(*x) for window in windows]

  with jax.set_mesh(mesh):
    sharding = jax.NamedSharding(mesh, spec)
    x = jax.ShapeDtypeStruct((B, L, H, K), dtype, sharding=sharding)
    return jax.jit(layers).lower(x, x, x, x).compile()


def calls(text, name):
  """How many calls of a kernel a compiled program has, told by their names or targets."""
  lines = [line for line in text.splitlines() if ' custom-call(' in line]
  return sum(bool(re.search(rf'{name}[_"]', line)) for line in lines)


def arrays_of_scores(text, L):
  """Arrays in a compiled program with two dims of L or more."""
  shapes = {tuple(map(int, dims.split(','))) for dims in re.findall(r'\w\[([\d,]+)\]', text)}
  return [dims for dims in shapes if sum(length >= L for length in dims) > 1]


def assert_is_kernel_alone(program, machine, layers, B, L, H):
  text = program.as_text()
  for call in CALLS[machine]:
    assert calls(text, call) == layers, call
  assert not COLLECTIVE.findall(text)
  assert arrays_of_scores(text, L) == []
  scores = 4 * B * H * L * L / 8  # bytes in f32 on each of the eight
  assert program.memory_analysis().temp_size_in_bytes < scores


@pytest.mark.slow
@pytest.mark.parametrize('machine', MACHINES)
@pytest.mark.parametrize('H, K', SIZES)
def test_every_size_compiles_to_the_kernel(machine, H, K):
  devices = small.machine_or_skip(MACHINES[machine]).devices
  mesh = jax.make_mesh((2, 2, 2), ('some', 'other', 'names'), devices=devices)
  B, L = 4, 2048
  kernel = kernels.choose('auto', devices, shape(K, L), jnp.bfloat16, 0.0)
  program = attend_on(mesh, kernel, (None, 256), B, L, H, K)
  assert_is_kernel_alone(program, machine, 2, B, L, H)


@pytest.mark.slow
@pytest.mark.parametrize('window, keys', [(1, 1), (256, 256), (511, 511), (512, 0), (None, 0)])
def test_cudnn_is_asked_for_the_window(window, keys):
  """What runs on no GPU here can still be read: cuDNN counts a query's own key; 0 is dense."""
  devices = small.machine_or_skip(MACHINES['h100']).devices
  mesh = jax.make_mesh((2, 2, 2), ('some', 'other', 'names'), devices=devices)
  text = attend_on(mesh, kernels.cudnn, (window,), 4, 512, 2, 96).as_text()
  asked = lambda name: re.findall(rf'"{name}": ?"?([\w.]+)', text)
  assert asked('sliding_window_length') == 2 * [str(keys)]
  assert asked('mask_type') == 2 * ['CAUSAL']
  assert [round(float(scale), 6) for scale in asked('fmha_scale')] == 2 * [round(96**-0.5, 6)]


@pytest.mark.slow
@pytest.mark.parametrize('machine', MACHINES)
def test_a_program_without_the_kernel_would_be_seen(machine):
  mesh = jax.make_mesh(
    (2, 2, 2), ('some', 'other', 'names'), devices=small.machine_or_skip(MACHINES[machine]).devices
  )
  program = attend_on(mesh, attention.reference, (256,), 4, 2048, 4, 64)
  assert arrays_of_scores(program.as_text(), 2048)
  with pytest.raises(AssertionError):
    assert_is_kernel_alone(program, machine, 1, 4, 2048, 4)


@pytest.mark.slow
@pytest.mark.parametrize('topology', ['v4:2x2x2', 'v5e:2x4', 'v5p:2x2x2', 'v6e:2x4', 'tpu7x:2x2x1'])
@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_largest_blocks_fit_every_kind_of_tpu(topology, dtype):
  """At the widest head, and a length that is padded."""
  devices = small.machine_or_skip(topology).devices
  mesh = jax.make_mesh((2, 2, 2), ('some', 'other', 'names'), devices=devices)
  L, K = 2047, 256
  kernel = kernels.choose('auto', devices, shape(K, L), jnp.dtype(dtype), 0.0)
  program = attend_on(mesh, kernel, (None,), 4, L, 2, K, jnp.dtype(dtype))
  assert_is_kernel_alone(program, 'tpu', 1, 4, L, 2)


@pytest.mark.slow
@pytest.mark.parametrize('machine', MACHINES)
@pytest.mark.parametrize('stages', [1, 2])
def test_a_training_step_compiles_to_the_kernel(machine, stages):
  """125m with one period of its layers a stage, over data, fsdp and tensor, or stages of those."""
  devices = small.machine_or_skip(MACHINES[machine]).devices
  row, L = sizes.GPT3['125m'], 2048
  D, H, K = row.d_model, row.n_heads, row.d_head
  few = Shape(2 * stages, D, H, K, 4 * D, L, 50257, (None, 256))
  attend = kernels.choose('auto', devices, few, jnp.bfloat16, 0.0)
  program = small.program(few, 512, dtype=jnp.dtype('bfloat16'), attend=attend, remat='dots')
  with jax.set_mesh(sharding.make_mesh(2 // stages, 2, 2, devices, stage=stages)):
    layout = jax.NamedSharding(jax.sharding.get_mesh(), sharding.computed('gbl'))
    token_gbl = jax.ShapeDtypeStruct((2, 4, L + 1), jnp.uint16, sharding=layout)
    scalar = lambda dtype: jax.ShapeDtypeStruct((), dtype)
    step = jax.jit(program.train_step, donate_argnums=0)
    compiled = step.lower(
      program.abstract_state(), token_gbl, scalar('int32'), scalar('int32'), scalar('float32')
    ).compile()
  text = compiled.as_text()
  for call in CALLS[machine]:
    assert calls(text, call) >= 2, call
  scores = [dims for dims in arrays_of_scores(text, L) if dims[-2:] == (L, L)]
  assert scores == []


# On a GPU: `pytest -m gpu`.


@pytest.mark.gpu
@pytest.mark.parametrize('K', [64, 80, 96, 128])
@pytest.mark.parametrize('L', [512, 600])
def test_cudnn_is_reference(L, K):
  x = qkvd(L, B=2, K=K, dtype=jnp.bfloat16)
  for window in (1, 2, 100, 128, 256, L - 1, L, L + 5, None):
    got = jax.jit(with_grads(kernels.cudnn, window))(*x)
    wanted = reference(window, *x.astype(jnp.float32))
    for name, a, b in zip(('o', 'dq', 'dk', 'dv'), got, wanted, strict=True):
      error = jnp.abs(a.astype(jnp.float32) - b).max()
      # A query that sees one key has a probability of 1, whose gradient is 0 but for rounding.
      largest = jnp.abs(wanted[-1] if window == 1 else b).max()
      assert error < 2**-6 * largest, (window, name)


@pytest.mark.gpu
def test_one_key_more_or_less_would_show_on_cudnn():
  x = qkvd(512, K=64, dtype=jnp.bfloat16)
  o_blhk = jax.jit(with_grads(kernels.cudnn, 100))(*x)[0].astype(jnp.float32)
  for window in (99, 101):
    wrong_blhk = reference(window, *x.astype(jnp.float32))[0]
    assert jnp.abs(o_blhk - wrong_blhk).max() > 2**-4 * jnp.abs(wrong_blhk).max()


@pytest.mark.gpu
@pytest.mark.parametrize('remat', ['none', 'dots'])
def test_program_with_cudnn_is_program_with_chunked(remat):
  shape = Shape(3, 64, 4, 64, 128, 256, 250, (None, 50))
  results = []
  with small.on():
    token_gbl, rows = small.put(small.rows(2, 2, shape=shape)), jnp.int32(4)
    for attend in (kernels.cudnn, attention.chunked):
      program = small.program(shape, dtype=jnp.dtype('bfloat16'), attend=attend, remat=remat)
      params = small.init(program)['params']
      run = jax.jit(program.gradients)
      assert ('fmha' in run.lower(params, token_gbl, 0, rows).as_text()) == (
        attend is kernels.cudnn
      )
      results.append(jax.tree.map(np.asarray, run(params, token_gbl, 0, rows)))
  (loss, grads), (wanted_loss, wanted_grads) = results
  np.testing.assert_allclose(loss, wanted_loss, rtol=1e-3)
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted_grads), strict=True):
    assert np.abs(a - b).max() <= 0.03 * np.abs(b).max() + 1e-6
