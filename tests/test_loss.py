"""Cross-entropy against the textbook, and that the logits of a batch are never all there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptjax import loss, sharding
from tests import small

B, L, D, V, REAL = 8, 10, 16, 128, 100


def inputs(seed=0):
  random = np.random.default_rng(seed)
  return (
    random.normal(size=(B, L, D)).astype('f'),
    random.normal(size=(V, D)).astype('f'),
    random.integers(0, REAL, (B, L)),
    random.random((B, L)).astype('f'),
  )


def textbook(x_bld, e_vd, label_bl, weight_bl):
  logit_blv = jnp.einsum('bld,vd->blv', x_bld, e_vd[:REAL])
  probability_blv = jax.nn.softmax(logit_blv)
  hit_bl = jnp.take_along_axis(probability_blv, label_bl[..., None], -1)[..., 0]
  return -(jnp.log(hit_bl) * weight_bl).sum()


@pytest.mark.parametrize('chunk', [1, 3, 5, 10, 64])
@pytest.mark.parametrize('mesh', [(1, 1, 1), (2, 2, 2)])
def test_value_and_gradients_are_the_textbooks(mesh, chunk):
  x_bld, e_vd, label_bl, weight_bl = inputs()
  want = jax.value_and_grad(lambda *a: 3 * textbook(*a, label_bl, weight_bl), (0, 1))(x_bld, e_vd)
  with small.on(*mesh):
    place = lambda a, dims: jax.device_put(a, sharding.computed(dims))
    label, weight = place(label_bl, 'bl'), place(weight_bl, 'bl')

    def scaled(x_bld, e_vd):  # by 3, so that an ignored cotangent shows
      used = sharding.use(nnx.Param(e_vd), 'vd', jnp.float32)
      return 3 * loss.cross_entropy(x_bld, used, label, weight, REAL, chunk, x_bld.dtype)

    args = place(x_bld, 'bld'), jax.device_put(e_vd, sharding.stored('vd'))
    got = jax.jit(jax.value_and_grad(scaled, (0, 1)))(*args)
    primal = jax.jit(scaled)(*args)
  small.assert_close(got, want, atol=1e-4)
  np.testing.assert_allclose(primal, want[0], rtol=1e-6)


@pytest.mark.parametrize(
  'how', [loss._by_sums, loss._in_one_pass, loss._exp_once], ids=lambda f: f.__name__
)
@pytest.mark.parametrize('top', [0, 80, 1e4])
def test_every_machine_finds_the_same_in_logits(how, top):
  """With logits whose exponentials no f32 holds, and with a padding of -inf."""
  random = np.random.default_rng(1)
  logit_blv = random.normal(size=(B, L, V)).astype('f') * 3 + np.float32(top)
  logit_blv[..., REAL:] = -np.inf
  label_bl = random.integers(0, REAL, (B, L))
  with small.on():
    got = jax.jit(how)(jnp.asarray(logit_blv), label_bl)
  logit_blv = np.float64(logit_blv)
  lse_bl1 = np.logaddexp.reduce(logit_blv, -1, keepdims=True)
  hit_blv = label_bl[..., None] == np.arange(V)
  nll_bl = (lse_bl1 - logit_blv)[hit_blv].reshape(B, L)
  # An f32 tells logits apart by this much.
  small.assert_close(got, (nll_bl, np.exp(logit_blv - lse_bl1) - hit_blv), 1e-6, 1e-6 + top * 1e-7)


def test_padding_is_never_predicted():
  x_bld, e_vd, _, _ = inputs()
  e_vd[REAL:] = 100 * np.sign(x_bld[0, 0])  # would win if it were let
  with small.on():
    logit_blv = loss.logits(jnp.asarray(x_bld), jnp.asarray(e_vd), REAL)
  assert np.isneginf(logit_blv[..., REAL:]).all()
  assert np.isfinite(logit_blv[..., :REAL]).all()


def test_logits_of_bf16_are_f32():
  x_bld, e_vd = (np.asarray(a, jnp.bfloat16) for a in inputs()[:2])
  with small.on():
    logit_blv = loss.logits(jnp.asarray(x_bld), jnp.asarray(e_vd), REAL)
  want = np.einsum('bld,vd->blv', np.float64(x_bld), np.float64(e_vd))
  assert logit_blv.dtype == np.float32
  np.testing.assert_allclose(logit_blv[..., :REAL], want[..., :REAL], rtol=1e-5, atol=1e-5)


def test_chunks_do_not_show_in_bf16():
  """A gradient summed in bf16 would stop growing after some hundred chunks."""
  random = np.random.default_rng(0)
  x_bld = np.asarray(random.random((2, 1024, 8)), jnp.bfloat16)
  e_vd = np.asarray(random.normal(size=(16, 8)), jnp.bfloat16)
  label_bl, weight_bl = jnp.zeros((2, 1024), 'int32'), jnp.ones((2, 1024))

  def gradients(chunk):
    value = lambda *xe: loss.cross_entropy(*xe, label_bl, weight_bl, 16, chunk, xe[0].dtype)
    return jax.tree.map(np.float32, jax.jit(jax.value_and_grad(value, (0, 1)))(x_bld, e_vd))

  with small.on():
    small.assert_close(gradients(1), gradients(1024), rtol=2**-7, atol=1e-2)


def temporaries(chunk):
  b, l, d, v = 2, 512, 16, 4096
  with small.on():
    mesh = jax.sharding.get_mesh()

    def a(dims, *shape, dtype='float32'):
      layout = jax.NamedSharding(mesh, sharding.computed(dims))
      return jax.ShapeDtypeStruct(shape, dtype, sharding=layout)

    def value(x_bld, e_vd, label_bl, weight_bl):
      used = sharding.use(nnx.Param(e_vd), 'vd', jnp.float32)
      return loss.cross_entropy(x_bld, used, label_bl, weight_bl, v, chunk, x_bld.dtype)

    step = jax.jit(jax.value_and_grad(value, (0, 1)))
    label_bl, weight_bl = a('bl', b, l, dtype='int32'), a('bl', b, l)
    lowered = step.lower(a('bld', b, l, d), a('vd', v, d), label_bl, weight_bl)
    return lowered.compile().memory_analysis().temp_size_in_bytes, 4 * b * l * v


def test_logits_of_a_batch_are_never_all_held():
  few, logits = temporaries(32)
  all_at_once, _ = temporaries(512)
  assert all_at_once > logits  # or this would measure nothing
  assert few < logits / 4


def test_logits_are_computed_once():
  """Three products with the embedding: logits and two gradients. A fourth would be a recompute."""
  with small.on():
    x_bld, e_vd, label_bl, weight_bl = (
      jax.device_put(a, sharding.computed(dims))
      for a, dims in zip(inputs(), ('bld', 'vd', 'bl', 'bl'), strict=True)
    )

    def value(x_bld, e_vd):
      used = sharding.use(nnx.Param(e_vd), 'vd', jnp.float32)
      return loss.cross_entropy(x_bld, used, label_bl, weight_bl, REAL, 5, x_bld.dtype)

    lowered = jax.jit(jax.grad(value, (0, 1))).lower(x_bld, e_vd).as_text()
  assert lowered.count('stablehlo.dot_general') == 3
