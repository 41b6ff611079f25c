"""Every path of attention equals the naive one, which has the window its definition says."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P

from gptjax import attention

COLLECTIVE = re.compile('all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter')


def qkvd(L, B=1, H=2, K=8, dtype=jnp.float32):
  """Random q, k, v and the cotangent of o, each [b, l, h, k]."""
  return jnp.asarray(np.random.default_rng(L).normal(size=(4, B, L, H, K)), dtype)


def with_grads(kernel, window, dropout=0.0):
  """A function of (q, k, v, do, key_b) to (o, dq, dk, dv)."""

  def run(q_blhk, k_bshk, v_bshk, do_blhk, key_b=None):
    attend = lambda q, k, v: kernel(q, k, v, window, dropout=dropout, key_b=key_b)
    o_blhk, pullback = jax.vjp(attend, q_blhk, k_bshk, v_bshk)
    return o_blhk, *pullback(do_blhk)

  return run


def assert_close(got, wanted, atol=1e-5):
  for name, x, y in zip(('o', 'dq', 'dk', 'dv'), got, wanted, strict=True):
    np.testing.assert_allclose(np.asarray(x), np.asarray(y), atol=atol, err_msg=name)


@jax.jit
def reference(window, *x):
  """The naive (o, dq, dk, dv), compiled once per length: here the window may be traced."""
  return with_grads(attention.reference, window)(*x)


def test_visible_by_hand():
  five = jnp.arange(5)
  table = lambda window: attention.visible(five, five, window).astype(int).tolist()
  assert table(1) == np.eye(5).tolist()
  assert table(3) == [
    [1, 0, 0, 0, 0],
    [1, 1, 0, 0, 0],
    [1, 1, 1, 0, 0],
    [0, 1, 1, 1, 0],
    [0, 0, 1, 1, 1],
  ]
  assert table(5) == table(None) == np.tri(5).tolist()
  assert attention.visible(jnp.array([9]), jnp.array([6, 7, 9, 10]), 3).tolist() == [
    [False, True, True, False]
  ]


def cases():
  for L in (1, 7, 64, 200, 256, 512, 1000):
    windows = {1, 2, 3, 100, 128, 256, L - 1, L, L + 5}
    for window in [*sorted(w for w in windows if 1 <= w <= L + 5), None]:
      yield L, window


@pytest.mark.parametrize('L, window', list(cases()))
def test_chunked_is_reference(L, window):
  x = qkvd(L)
  chunked = jax.jit(with_grads(attention.chunked, window))(*x)
  assert_close(chunked, reference(window, *x))


@pytest.mark.parametrize('kernel', [attention.reference, attention.chunked])
@pytest.mark.parametrize('window', [1, 2, 100, None])
def test_causal_by_gradient(kernel, window):
  L = 200  # two chunks of 100
  q_blhk, k_bshk, v_bshk, _ = qkvd(L, H=1)
  sum_l = lambda k_bshk, v_bshk: kernel(q_blhk, k_bshk, v_bshk, window)[0, :, 0].sum(-1)
  dk_lsk, dv_lsk = (
    np.asarray(x[:, 0, :, 0]) for x in jax.jit(jax.jacrev(sum_l, (0, 1)))(k_bshk, v_bshk)
  )
  lag_ls = np.subtract.outer(np.arange(L), np.arange(L))
  seen_ls = (lag_ls >= 0) & (lag_ls < (window or L))
  np.testing.assert_array_equal((dv_lsk != 0).any(-1), seen_ls)
  assert not dk_lsk[~seen_ls].any()
  if window != 1:  # the probability of an only key is 1, whatever the key
    edge_ls = seen_ls & ((lag_ls == 0) | (lag_ls == (window or L) - 1)) & (lag_ls[:, :1] > 0)
    assert edge_ls.sum() >= L - 1
    assert (dk_lsk[edge_ls] != 0).any(-1).all()


@pytest.mark.parametrize('rows', [1, 3])
@pytest.mark.parametrize('window', [100, None])
@pytest.mark.parametrize('L', [1, 7, 128, 129, 300])
def test_bf16_of_any_length_can_be_multiplied(L, window, rows):
  """Where XLA folds a transpose into a product of bf16 it has none, and says so when it runs."""
  x = qkvd(L, B=rows, dtype=jnp.bfloat16)
  got = jax.jit(with_grads(attention.chunked, window))(*x)
  wanted = reference(window, *x.astype(jnp.float32))
  for a, b in zip(got, wanted, strict=True):
    assert jnp.abs(a.astype(jnp.float32) - b).max() <= 2**-6 * jnp.abs(b).max() + 1e-6


@pytest.mark.parametrize('kernel', [attention.reference, attention.chunked])
@pytest.mark.parametrize('window', [100, None])
def test_bf16_is_summed_in_f32(kernel, window):
  x = qkvd(1000, dtype=jnp.bfloat16)
  run = with_grads(kernel, window)
  text = str(jax.make_jaxpr(run)(*x))
  sums = re.findall(r':(\w+)\[[^\]]*\] = (?:dot_general|exp|log|reduce_sum|reduce_max)\b', text)
  assert len(sums) >= 9 and set(sums) == {'f32'}
  # Equal scores and equal values: any rounding of a row's sum (259 is no bf16) shows in the mean.
  o_blhk = jax.jit(run)(0 * x[0], x[1], x[2] * 0 + 1, x[3])[0]
  assert (o_blhk == 1).all()
  got = jax.jit(run)(*x)
  assert {a.dtype for a in got} == {jnp.dtype('bfloat16')}
  wanted = reference(window, *x.astype(jnp.float32))
  for a, b in zip(got, wanted, strict=True):
    assert jnp.abs(a.astype(jnp.float32) - b).max() < 2**-7 * jnp.abs(b).max()


@pytest.mark.parametrize(
  'kernel, window, dropout',
  [
    (attention.reference, 100, 0.0),
    (attention.chunked, 100, 0.3),
    (attention.chunked, 100, 0.0),
    (attention.chunked, None, 0.0),
  ],
)
def test_mesh_changes_nothing_and_costs_no_collective(kernel, window, dropout):
  x = qkvd(300, B=4, H=4)
  key_b = jax.random.split(jax.random.key(1), 4)
  alone = jax.jit(with_grads(attention.reference, window, dropout))(*x, key_b)
  mesh = jax.make_mesh((2, 2, 2), ('some', 'other', 'names'))  # a kernel knows none
  spec = P(('some', 'other'), None, 'names', None)
  with jax.set_mesh(mesh):
    x = [jax.device_put(np.asarray(a), spec) for a in x]
    key_b = jax.device_put(key_b, P(('some', 'other')))
    run = jax.jit(with_grads(kernel, window, dropout)).lower(*x, key_b).compile()
    assert not COLLECTIVE.findall(run.as_text())
    split = run(*x, key_b)
    assert {a.sharding.spec for a in split} == {spec}
    assert_close(split, alone)
    needs_one = jax.jit(jnp.sum).lower(x[0]).compile().as_text()
    assert COLLECTIVE.findall(needs_one)  # so the pattern can match


@pytest.mark.parametrize('stages', [1, 2])
def test_inside_checkpoint_scan_and_pipeline(stages):
  """Two layers, remat, in a scan, in a shard_map over the stages: as when nothing is around."""

  def layers(kernel, remat, x_blhk, w_nk):
    def layer(x_blhk, w_k):
      for window in (None, 100):
        x_blhk = kernel(x_blhk * w_k, x_blhk, x_blhk, window)
      return x_blhk, None

    if remat:
      return jax.lax.scan(jax.checkpoint(layer), x_blhk, w_nk)[0]
    for w_k in w_nk:
      x_blhk = layer(x_blhk, w_k)[0]
    return x_blhk

  x_blhk, _, _, do_blhk = qkvd(300, B=2)
  w_nk = 1 + jnp.arange(16.0).reshape(2, 8) / 16
  plain = jax.jit(
    jax.value_and_grad(lambda *a: (layers(attention.reference, False, *a) * do_blhk).mean(), (0, 1))
  )(x_blhk, w_nk)
  with jax.set_mesh(jax.make_mesh((stages, 2), ('stage', 'data'))):
    put = lambda x, *spec: jax.device_put(np.asarray(x), P(*spec))
    do_blhk = put(do_blhk, 'data')
    # Every stage runs all layers on its copy of x, so the loss is a mean over the stages.
    stage = jax.shard_map(
      lambda x_mblhk, w_nk: layers(attention.chunked, True, x_mblhk[0], w_nk)[None],
      in_specs=(P('stage'), P()),
      out_specs=P('stage'),
      axis_names={'stage'},
    )
    loss = lambda x_mblhk, w_nk: (stage(x_mblhk, w_nk) * do_blhk).mean()
    x_mblhk = put(np.stack([x_blhk] * stages), 'stage', 'data')
    loss, (dx_mblhk, dw_nk) = jax.jit(jax.value_and_grad(loss, (0, 1)))(x_mblhk, put(w_nk))
    dx_blhk = np.asarray(dx_mblhk).sum(0)
  np.testing.assert_allclose(loss, plain[0], rtol=1e-4)
  np.testing.assert_allclose(dx_blhk, plain[1][0], atol=1e-4 * jnp.abs(plain[1][0]).max())
  np.testing.assert_allclose(dw_nk, plain[1][1], atol=1e-4 * jnp.abs(plain[1][1]).max())


@pytest.mark.parametrize('L, window', [(300, None), (300, 50)])
def test_dropout_of_chunked_is_dropout_of_reference(L, window):
  x, key_b = qkvd(L, B=2), jax.random.split(jax.random.key(1), 2)
  chunked = jax.jit(with_grads(attention.chunked, window, 0.3))(*x, key_b)
  assert_close(chunked, jax.jit(with_grads(attention.reference, window, 0.3))(*x, key_b))


def test_dropout_drops_what_kept_says():
  L, window, rate = 160, 50, 0.25  # two chunks of 80
  position, key_b = jnp.arange(L), jax.random.split(jax.random.key(1), 2)
  q_blhk, k_bshk, _, _ = qkvd(L, B=2, K=L) / 4
  one_hot_bshk = jnp.broadcast_to(jnp.eye(L)[:, None], q_blhk.shape)  # so o is the probabilities
  seen_ls = attention.visible(position, position, window)
  keep_bhls = attention.kept(key_b, 2, position, position, rate)
  for kernel in (attention.reference, attention.chunked):
    p_blhs = kernel(q_blhk, k_bshk, one_hot_bshk, window)
    drop = jax.jit(lambda *x, f=kernel: f(*x, window, dropout=rate, key_b=key_b))
    dropped_blhs = drop(q_blhk, k_bshk, one_hot_bshk)
    keep_blhs = (keep_bhls & seen_ls).swapaxes(1, 2)
    np.testing.assert_array_equal(dropped_blhs != 0, keep_blhs)
    np.testing.assert_allclose(dropped_blhs, keep_blhs * p_blhs / (1 - rate), rtol=1e-5)


def test_dropout_pattern_is_of_row_head_and_positions():
  position, key_b = jnp.arange(200), jax.random.split(jax.random.key(1), 3)
  keep_bhls = np.asarray(attention.kept(key_b, 4, position, position, 0.25))
  n = keep_bhls.size
  assert abs(keep_bhls.mean() - 0.75) < 5 * (0.25 * 0.75 / n) ** 0.5
  part = attention.kept(key_b[1:], 2, position[30:70], position[90:], 0.25)
  np.testing.assert_array_equal(part, keep_bhls[1:, :2, 30:70, 90:])
  for dim in range(4):  # independent along every dim: neighbours agree as often as chance says
    agree = (np.roll(keep_bhls, 1, dim) == keep_bhls).mean()
    assert abs(agree - (0.75**2 + 0.25**2)) < 0.01, dim


def shapes(L, H=4, K=64):
  return 4 * [jax.ShapeDtypeStruct((1, L, H, K), jnp.float32)]


def temporaries(kernel, window, L):
  """Bytes that the compiled forward and backward pass needs besides inputs and outputs."""
  return (
    jax.jit(with_grads(kernel, window))
    .lower(*shapes(L))
    .compile()
    .memory_analysis()
    .temp_size_in_bytes
  )


def test_memory_of_banded_is_linear_in_length():
  short, long = (temporaries(attention.chunked, 256, L) for L in (2048, 8192))
  assert long < 5 * short


def test_memory_of_dense_never_holds_the_scores():
  scores = lambda L: 4 * L * L * 4  # bytes of [h, l, s]
  assert temporaries(attention.chunked, None, 4096) < scores(4096) / 5
  assert temporaries(attention.reference, None, 2048) > scores(2048)  # so the measure can tell


def test_work():
  """Scores per query and per layer of 2048: half and a bit if dense, the band and a bit if not."""

  def scores(L, window):
    rows, groups = attention._groups(L, window)
    assert [g[0] for g in groups] == [0, *(g[1] for g in groups[:-1])]
    assert 0 <= groups[-1][1] * rows - L < rows
    return sum((end - first) * rows * S for first, end, S in groups)

  assert scores(2048, None) <= 0.57 * 2048**2
  assert scores(2048, 256) <= 2048 * (256 + 128)
  assert not any(S % 2 for w in (2, 100, 255, 256) for *_, S in attention._groups(2048, w)[1])
  assert scores(2048, 1) <= 2048 * 128
  assert scores(8192, 256) == 4 * scores(2048, 256)
  eqns = lambda L: str(jax.make_jaxpr(with_grads(attention.chunked, None))(*shapes(L))).count('\n')
  assert eqns(2048) == eqns(8192)
