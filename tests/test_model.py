"""The model against a loop anyone can check, and the promises of its parts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptjax import attention, sharding
from gptjax.errors import Mistake
from gptjax.model import GPT, REMAT, LayerNorm, drop, normalise, run_blocks
from tests import small


def textbook_gpt(params, token_bl, shape):
  """Radford et al. 2019 with banded layers, in plain NumPy: logits [b, l, v]."""

  def norm(x, p):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p['scale'] + p['bias']

  B, L = token_bl.shape
  x = params['embed'][token_bl] + params['position'][:L]
  for n in range(shape.n_layers):
    p = jax.tree.map(lambda a: a[n], params['blocks'])  # noqa: B023
    y = norm(x, p['attn_norm'])
    o = np.zeros_like(x)
    for h in range(shape.n_heads):
      q, k, v = (y @ p['attn']['qkv'][:, c, h] + p['attn']['qkv_bias'][c][h] for c in range(3))
      for b in range(B):
        for i in range(L):
          first = 0 if shape.window(n) is None else max(0, i - shape.window(n) + 1)
          a = np.exp(k[b, first : i + 1] @ q[b, i] / np.sqrt(shape.d_head))
          o[b, i] += (a / a.sum()) @ v[b, first : i + 1] @ p['attn']['out'][h]
    x = x + o + p['attn']['out_bias']
    y = norm(x, p['mlp_norm']) @ p['mlp']['up'] + p['mlp']['up_bias']
    y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    x = x + y @ p['mlp']['down'] + p['mlp']['down_bias']
  return norm(x, params['norm']) @ params['embed'].T


@pytest.fixture(scope='module')
def trained():
  """A program and params in which no bias is 0 and attention is far from uniform."""
  program = small.program()
  with small.on():
    params = small.init(program)['params']
  random = np.random.default_rng(1)
  noisy = lambda a: np.asarray(a) + 0.3 * random.normal(size=a.shape).astype('f')
  return program, jax.tree.map(noisy, params)


def logits(program, params, token_bl):
  with small.on():
    token_bl = jax.device_put(token_bl, sharding.computed('bl'))
    return np.asarray(jax.jit(program.logits)(jax.tree.map(jnp.asarray, params), token_bl))


@pytest.mark.parametrize('attend', [attention.reference, attention.chunked])
def test_logits_are_the_textbooks(trained, attend):
  program, params = trained
  numerics = dataclasses.replace(program.numerics, attend=attend)
  token_bl = small.rows(1, 2)[0, :, :-1]
  want = textbook_gpt(jax.tree.map(np.float64, params), token_bl, program.shape)
  got = logits(dataclasses.replace(program, numerics=numerics), params, token_bl)
  real = program.shape.vocab_size
  np.testing.assert_allclose(got[..., :real], want[..., :real], rtol=1e-3, atol=1e-3)
  assert np.isneginf(got[..., real:]).all()


def test_a_token_changes_nothing_before_it_and_something_at_once(trained):
  program, params = trained
  token_bl = small.rows(1, 1)[0, :, :-1]
  before = logits(program, params, token_bl)
  for at in (0, 7, 15):
    other = token_bl.copy()
    other[0, at] = (other[0, at] + 1) % program.shape.vocab_size
    after = logits(program, params, other)
    np.testing.assert_array_equal(before[0, :at], after[0, :at])
    assert (before[0, at] != after[0, at]).any()


@pytest.mark.parametrize(
  'n_layers, windows',
  [
    (1, (None, 5)),
    pytest.param(2, (None,), marks=pytest.mark.slow),
    pytest.param(2, (None, 5), marks=pytest.mark.slow),
    (3, (None, 5)),
    pytest.param(4, (3, None, 7), marks=pytest.mark.slow),
  ],
)
def test_scan_over_periods_is_a_loop_over_layers(n_layers, windows):
  program = small.program(dataclasses.replace(small.SHAPE, n_layers=n_layers, windows=windows))
  x_btd = np.random.default_rng(0).normal(size=(2, 16, 32)).astype('f')

  def scanned(blocks, x_btd):
    return run_blocks(blocks, x_btd, windows, program.numerics, None)

  def looped(blocks, x_btd):
    for n in range(n_layers):
      block = jax.tree.map(lambda a: a[n], blocks)  # noqa: B023
      x_btd, _ = block(x_btd, program.shape.window(n), program.numerics, None)
    return x_btd

  with small.on():
    x_btd = jax.device_put(x_btd, sharding.computed('btd'))
    blocks = jax.jit(lambda: GPT(program.shape, key=jax.random.key(0)).blocks)()
    got, want = (
      jax.jit(jax.value_and_grad(lambda b, x: (run(b, x) ** 2).sum()))(blocks, x_btd)  # noqa: B023
      for run in (scanned, looped)
    )
  small.assert_close(got, want)


def test_program_does_not_grow_with_depth():
  def lines(n_layers):
    program = small.program(dataclasses.replace(small.SHAPE, n_layers=n_layers))
    with small.on():
      state = program.abstract_state()
      lowered = jax.jit(program.train_step).lower(state, small.put(small.rows(2, 2)), 0, 3, 0.1)
      return len(lowered.as_text().splitlines())

  # But for a few lines that compare the length of the scan with nothing.
  assert lines(40) < lines(4) + 20


def gradients_under(remat):
  program = small.program(remat=remat)
  with small.on(tensor=2):
    args = small.init(program)['params'], small.put(small.rows(1, 2)), 0, 2
    lowered = jax.jit(program.gradients).lower(*args)
    return jax.device_get(lowered.compile()(*args)), lowered.as_text()


@pytest.fixture(scope='module')
def without_remat():
  return gradients_under('none')


QUICK = ('full', 'dots')


@pytest.mark.parametrize(
  'policy',
  [p if p in QUICK else pytest.param(p, marks=pytest.mark.slow) for p in REMAT if p != 'none'],
)
def test_remat_changes_the_program_and_not_the_gradients(without_remat, policy):
  want, plain = without_remat
  got, remat = gradients_under(policy)
  assert plain != remat
  small.assert_close(got, want, rtol=1e-5)


def test_each_policy_is_another_program_and_all_but_none_gather_again():
  texts = {}
  for remat in REMAT:
    program = small.program(remat=remat)
    with small.on(1, 2, 1):
      params = program.abstract_state()['params']
      lowered = jax.jit(program.gradients).lower(params, small.put(small.rows(1, 2)), 0, 2)
      texts[remat] = lowered.as_text()
  assert len(set(texts.values())) == len(REMAT)
  products, tanhs, layouts = (
    {remat: text.count(word) for remat, text in texts.items()}
    for word in ('dot_general', 'stablehlo.tanh', 'sdy.sharding_constraint')
  )
  # The scales of norms are spread over rows again, and no other product is made twice.
  n = small.SHAPE.n_layers
  assert products['none'] + 2 * n == products['weights'] < products['dots'] < products['full']
  # GELU's derivative is always computed again.
  assert tanhs == {'none': 2 * n, 'weights': 2 * n, 'dots': 3 * n, 'full': 3 * n}
  assert layouts['none'] < min(layouts[remat] for remat in REMAT if remat != 'none')


@pytest.mark.parametrize('mesh', [(1, 1, 1), pytest.param((2, 2, 2), marks=pytest.mark.slow)])
def test_layers_apart_are_layers_in_a_loop(mesh):
  shape = dataclasses.replace(small.SHAPE, n_layers=5)  # two periods, and a layer left over
  results, loops = [], []
  for apart in (False, True):
    program = small.program(shape, remat='dots', apart=apart)
    with small.on(*mesh):
      args = small.init(program)['params'], small.put(small.rows(1, 8)), 0, jnp.int32(8)
      lowered = jax.jit(program.gradients).lower(*args)
      loops.append(lowered.as_text().count('stablehlo.while'))
      results.append(jax.device_get(lowered.compile()(*args)))
  small.assert_close(*results)
  assert loops[1] == loops[0] - 2  # forward and back


def test_no_policy_but_none_keeps_gathered_weights():
  """Memory of a gradient over fsdp, where the gathered weights of all layers would show."""
  shape = dataclasses.replace(small.SHAPE, n_layers=8, d_model=128, d_ff=512)
  gathered = 4 * (8 * (4 * 128 * 24 + 2 * 128 * 512))  # bytes in f32

  def temporaries(remat):
    program = small.program(shape, remat=remat)
    with small.on(1, 8, 1):
      params = program.abstract_state()['params']
      lowered = jax.jit(program.gradients).lower(params, small.put(small.rows(1, 8)), 0, 8)
      return lowered.compile().memory_analysis().temp_size_in_bytes

  kept = temporaries('none')
  assert kept > gathered
  assert temporaries('weights') < kept - gathered / 2


def test_weights_are_drawn_as_the_paper_says():
  shape = dataclasses.replace(small.SHAPE, d_model=128, d_ff=512, n_layers=8, d_head=16)
  with small.on():
    params = small.init(small.program(shape))['params']
  blocks = params['blocks']
  for name, a, std in [
    ('embed', params['embed'][: shape.vocab_size], 0.02),
    ('position', params['position'], 0.02),
    ('qkv', blocks['attn']['qkv'], 0.02),
    ('up', blocks['mlp']['up'], 0.02),
    ('out', blocks['attn']['out'], 0.02 / 16**0.5),
    ('down', blocks['mlp']['down'], 0.02 / 16**0.5),
  ]:
    assert np.std(a) == pytest.approx(std, rel=0.05), name
  assert not np.allclose(blocks['mlp']['up'][0], blocks['mlp']['up'][1])
  for path, a in jax.tree_util.tree_leaves_with_path(params):
    if path[-1].key.endswith('bias'):
      assert (a == 0).all()
    elif path[-1].key == 'scale':
      assert (a == 1).all()


def test_output_is_the_embedding_itself():
  with small.on():
    params = small.init(small.program())['params']
  rows = [a for a in jax.tree.leaves(params) if small.SHAPE.padded_vocab in a.shape]
  assert len(rows) == 1


def test_row_longer_than_the_positions_is_refused(trained):
  program, params = trained
  with pytest.raises(Mistake, match='got 17 tokens, wanted at most 16'):
    logits(program, params, small.rows(1, 1)[0])


def test_dropout_drops_its_share_and_keeps_the_mean():
  with small.on():
    x_btd = drop(jnp.ones((4, 64, 64)), 0.25, jax.random.split(jax.random.key(0), 4))
  assert set(np.unique(x_btd)) == {0, np.float32(1 / 0.75)}
  assert np.mean(x_btd == 0) == pytest.approx(0.25, abs=0.02)
  assert not np.array_equal(x_btd[0], x_btd[1])


def test_dropout_is_of_attention_too_and_off_without_keys(trained):
  _, params = trained

  def deaf(q_blhk, k_bshk, v_bshk, window, **_):
    return attention.reference(q_blhk, k_bshk, v_bshk, window)

  def hidden(key_b, **numerics):
    with small.on():
      run = jax.jit(small.program(**numerics).hidden)
      return np.asarray(run(params, small.rows(1, 2)[0, :, :-1], key_b)[0])

  keys, undropped = jax.random.split(jax.random.key(0), 2), hidden(None)
  assert (hidden(keys, dropout=0.5) != hidden(keys, dropout=0.5, attend=deaf)).any()
  np.testing.assert_array_equal(hidden(None, dropout=0.5), undropped)


@pytest.fixture
def bare(monkeypatch):
  """`bare(program)` makes params that are all 0; norms do nothing.

  A hidden state is then the sum of an embedding, a position and each branch's last bias.
  """
  monkeypatch.setattr(LayerNorm, '__call__', lambda self, x_btd, dtype: x_btd)
  return lambda program: jax.tree.map(jnp.zeros_like, program.abstract_state()['params'])


def test_every_branch_of_every_layer_and_row_has_its_own_dropout(bare):
  B, N = 2, 5
  program = small.program(dataclasses.replace(small.SHAPE, n_layers=N), dropout=0.5)
  with small.on():
    params = bare(program)
    # Each branch has its own digit in base 4: 0 if dropped, 2 if kept, 1 if it knows no dropout.
    params['embed'] += 1
    params['blocks']['attn']['out_bias'] += 4.0 ** jnp.arange(1, 2 * N, 2)[:, None]
    params['blocks']['mlp']['down_bias'] += 4.0 ** jnp.arange(2, 2 * N + 1, 2)[:, None]
    keys = jax.random.split(jax.random.key(0), B)
    x_bld, _ = jax.jit(program.hidden)(params, small.rows(1, B)[0, :, :-1], keys)
  digits = np.int64(x_bld) // 4 ** np.arange(2 * N + 1)[:, None, None, None] % 4
  assert set(np.unique(digits)) == {0, 2}
  masks = digits.reshape((2 * N + 1) * B, -1)
  same = (masks[:, None] == masks).mean(-1)
  np.testing.assert_allclose(masks.mean(-1), 1, atol=0.2)
  np.testing.assert_allclose(same[~np.eye(len(same), dtype=bool)], 0.5, atol=0.15)


@pytest.mark.parametrize('mesh', [(1, 1, 1), (2, 2, 2)])
def test_gradient_of_a_frequent_token_is_summed_in_f32(bare, mesh):
  """A bf16 sum of a thousand terms of one sign stops growing at a few hundred."""
  shape = dataclasses.replace(small.SHAPE, n_layers=1, windows=(None,), context=128)
  program = small.program(shape, dtype=jnp.dtype('bfloat16'))
  random = np.random.default_rng(0)
  token_bl = np.where(random.random((8, 128)) < 0.9, 7, random.integers(0, 250, (8, 128)))
  dx_bld = np.asarray(random.random((8, 128, 32)), jnp.bfloat16)
  with small.on(*mesh):
    params = bare(program)
    token, dx = (
      jax.device_put(a, sharding.computed(dims)) for a, dims in ((token_bl, 'bl'), (dx_bld, 'bld'))
    )
    value = lambda params: (program.hidden(params, token)[0].astype('f') * dx).sum()
    got = jax.jit(jax.grad(value))(params)['embed']
  want = np.zeros(got.shape)
  np.add.at(want, token_bl, np.float64(dx_bld))
  np.testing.assert_allclose(got, want, rtol=2**-8)


def test_statistics_of_a_norm_are_in_f32():
  """Only the result is rounded: rows this far from 0 have no exact mean in bf16."""
  x_btd = np.asarray(8 + np.random.default_rng(0).normal(size=(2, 16, 32)), jnp.bfloat16)
  with small.on():
    got = LayerNorm(32)(jnp.asarray(x_btd), jnp.bfloat16)
  x = np.float64(x_btd)
  want = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
  np.testing.assert_allclose(np.float64(got), want, rtol=1.01 * 2**-8)


def test_gradient_of_a_norm_is_its_derivative():
  """Which is written out: against differences of f64, of rows whose mean and scale are far off."""
  random = np.random.default_rng(0)
  x_btd, weight_btd, step_btd = random.normal(size=(3, 2, 16, 32))
  x_btd = np.float32(3 + 5 * x_btd)

  def want(x):
    centred = x - x.mean(-1, keepdims=True)
    return (weight_btd * centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-5)).sum()

  loss = lambda x_btd: (weight_btd.astype('f') * normalise(x_btd, jnp.float32)).sum()
  got = np.float64(jax.jit(jax.grad(loss))(x_btd))
  h = 1e-5 * step_btd
  for b, t in np.ndindex(2, 16):
    along = np.zeros_like(h)
    along[b, t] = h[b, t]
    differs = (want(x_btd + along) - want(x_btd - along)) / 2
    np.testing.assert_allclose((got * along).sum(), differs, rtol=1e-4, atol=1e-10)


def test_model_is_a_pytree_of_named_arrays():
  with small.on():
    params = nnx.to_pure_dict(nnx.state(GPT(small.SHAPE, key=jax.random.key(0))))
  assert set(params) == {'embed', 'position', 'blocks', 'norm'}
  assert params['blocks']['attn']['qkv'].shape == (3, 32, 3, 4, 6)
