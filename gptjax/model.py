"""GPT-3 (Brown et al. 2020, 2.1): GPT-2 with alternating dense and banded attention.

The model names dims by letter and knows no mesh, device or config: `sharding.py` says where a
letter lies. Weights are f32 and are cast where they are used.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import reshard

from gptjax.attention import ATTENDED
from gptjax.cache import Cache
from gptjax.errors import mistake
from gptjax.products import RESULT, Multiply
from gptjax.sharding import (
  GATHERED,
  computed,
  constant,
  gather_positions,
  reshard_residual,
  residual,
  scatter_positions,
  split_leading,
  spread,
  stored,
  use,
  use_rows,
  weight,
)
from gptjax.sizes import Shape

INIT_STD = 0.02  # Radford et al. 2019's code, for every matrix
NORM_EPS = 1e-5  # likewise


def keep_all_but_weights(primitive, *_, **params) -> bool:
  """A remat policy: every residual is kept but weights, gathered or spread over rows."""
  # `jax.checkpoint_policies.save_anything_except_these_names` keeps the named value's operand.
  named = primitive.name == 'name' and params['name'] == GATHERED
  return not (named or primitive.name == 'reshard' or _spreads(primitive, params))


def keep_products(primitive, *operands, **params) -> bool:
  """A remat policy: products with weights are kept, summed over devices if they have to be.

  And what they and attention name, because it is dearer to make again than to keep.
  """
  if primitive.name == 'reshard':
    return bool(operands[0].sharding.spec.unreduced)
  if primitive.name == 'name':
    return params['name'] in (RESULT, ATTENDED)
  if primitive.name != 'dot_general' or _spreads(primitive, params):
    return False
  _, (batch, _) = params['dimension_numbers']
  # A product that is wider than its operands names what is to be kept of it.
  out, wider = params['out_sharding'], params['preferred_element_type'] != operands[0].dtype
  return not (batch or wider or out and out.spec.unreduced)


def _spreads(primitive, params):
  # What `use_rows` makes is as large as an activation, and costs nothing to make again.
  outer = primitive.name == 'dot_general' and not params['dimension_numbers'][0][0]
  return outer or primitive.name == 'broadcast_in_dim'


# What the backward pass finds in memory, from most to least. Gathered weights are never kept but
# by `none`: keeping them would undo FSDP.
REMAT = {
  'none': None,
  'weights': keep_all_but_weights,
  'dots': keep_products,
  'full': jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class Numerics:
  """How a model is computed: none of it changes what is on disk."""

  dtype: jnp.dtype  # of what is multiplied; sums, logits, norms and softmax are f32
  between: jnp.dtype  # of activations between products
  attend: Callable  # (q_blhk, k_bshk, v_bshk, window, *, dropout, key_b) -> o_blhk
  multiply: Multiply
  remat: str  # a name in REMAT
  apart: bool  # each layer is compiled on its own, and not one for all in a loop
  dropout: float


class LayerNorm(nnx.Module):
  """Layer normalisation over d, its statistics in f32 (Ba et al. 2016)."""

  def __init__(self, D: int):
    self.scale = constant(1.0, 'd', D)
    self.bias = constant(0.0, 'd', D)

  def __call__(self, x_btd: jax.Array, dtype: jnp.dtype) -> jax.Array:
    B, T, _ = x_btd.shape
    scale_btd, bias_btd = (
      use_rows(w, 'd', dtype, residual(T), B, T) for w in (self.scale, self.bias)
    )
    return normalise(x_btd, dtype) * scale_btd + bias_btd


def normalise(x_btd: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """Rows of mean 0 and variance 1, which are computed in f32, in a dtype.

  Its derivative is written out: both of its sums are over what the same pass reads, where those
  that JAX derives wait for each other, and of a row it keeps the row itself and two numbers.
  """

  def forward(x_btd):
    x32_btd = x_btd.astype(jnp.float32)
    mean_bt1 = x32_btd.mean(-1, keepdims=True)
    centred_btd = x32_btd - mean_bt1
    scale_bt1 = lax.rsqrt(jnp.square(centred_btd).mean(-1, keepdims=True) + NORM_EPS)
    return (centred_btd * scale_bt1).astype(dtype), (x_btd, mean_bt1, scale_bt1)

  def backward(kept, dy_btd):
    x_btd, mean_bt1, scale_bt1 = kept
    y_btd = (x_btd.astype(jnp.float32) - mean_bt1) * scale_bt1
    dy_btd = dy_btd.astype(jnp.float32)
    along_bt1 = (dy_btd * y_btd).mean(-1, keepdims=True)
    dx_btd = (dy_btd - dy_btd.mean(-1, keepdims=True) - along_bt1 * y_btd) * scale_bt1
    return (dx_btd.astype(x_btd.dtype),)

  normed = jax.custom_vjp(lambda x_btd: forward(x_btd)[0])
  normed.defvjp(forward, backward)
  return normed(x_btd)


class Attention(nnx.Module):
  """Multi-head self-attention with biases; n_heads · d_head is independent of d_model."""

  def __init__(self, shape: Shape, *, key: jax.Array):
    D, H, K = shape.d_model, shape.n_heads, shape.d_head
    qkv_key, out_key = jax.random.split(key)
    self.qkv = weight(qkv_key, 'dchk', D, 3, H, K, std=INIT_STD)
    self.qkv_bias = constant(0.0, 'chk', 3, H, K) if shape.qkv_bias else None
    self.out = weight(out_key, 'hkd', H, K, D, std=residual_std(shape))
    self.out_bias = constant(0.0, 'd', D)

  def __call__(self, x_btd, window, numerics, key_b, past):
    B, L, _ = x_btd.shape
    dtype = x_btd.dtype
    x_bld = gather_positions(x_btd)
    qkv_blchk = numerics.multiply('bld,dchk->blchk', x_bld, self.qkv)
    # Split, and not indexed: then XLA's GPU backend copies nothing, either way.
    qkv = jnp.split(qkv_blchk, 3, 2)
    if self.qkv_bias is not None:
      bias_blchk = use_rows(self.qkv_bias, 'chk', dtype, 'bl', B, L)
      qkv = map(jnp.add, qkv, jnp.split(bias_blchk, 3, 2))
    if past is None:
      dropout = 0.0 if key_b is None else numerics.dropout
      qkv = (a.squeeze(2).astype(numerics.dtype) for a in qkv)
      o_blhk = numerics.attend(*qkv, window, dropout=dropout, key_b=key_b).astype(dtype)
    else:
      o_blhk, past = past.attend(*(a.squeeze(2) for a in qkv), window)
    o_btd = scatter_positions(numerics.multiply, 'blhk,hkd->bld', o_blhk, self.out)
    return o_btd + use_rows(self.out_bias, 'd', dtype, residual(L), B, L), past


class Mlp(nnx.Module):
  """Two matrices with biases around GELU in its tanh approximation, as in GPT-2."""

  def __init__(self, shape: Shape, *, key: jax.Array):
    D, F = shape.d_model, shape.d_ff
    up_key, down_key = jax.random.split(key)
    self.up = weight(up_key, 'df', D, F, std=INIT_STD)
    self.up_bias = constant(0.0, 'f', F)
    self.down = weight(down_key, 'fd', F, D, std=residual_std(shape))
    self.down_bias = constant(0.0, 'd', D)

  def __call__(self, x_btd, numerics):
    B, L, _ = x_btd.shape
    dtype, multiply = x_btd.dtype, numerics.multiply
    h_blf = multiply('bld,df->blf', gather_positions(x_btd), self.up)
    bias_f = use(self.up_bias, 'f', dtype, 'bl')

    def add(h_blf, bias_f):
      return h_blf + spread(bias_f, 'f', 'bl', B, L)

    gelu = functools.partial(jax.nn.gelu, approximate=True)
    forward = lambda *kept: gelu(add(*kept))

    def backward(kept, dh_blf):
      if numerics.remat == 'none':  # else XLA would keep what both directions compute
        kept = lax.optimization_barrier(kept)
      h_blf, both = jax.vjp(add, *kept)
      (dh_blf,) = jax.vjp(gelu, h_blf)[1](dh_blf)
      # As the product of it is rounded: else it would be held as f32 for the bias.
      return both(dh_blf.astype(numerics.dtype).astype(dtype))

    # Its derivative is computed again: to read it from memory would take longer.
    again = jax.custom_vjp(forward)
    again.defvjp(lambda *kept: (forward(*kept), kept), backward)
    h_blf = again(h_blf, bias_f)
    x_btd = scatter_positions(multiply, 'blf,fd->bld', h_blf, self.down)
    return x_btd + use_rows(self.down_bias, 'd', dtype, residual(L), B, L)


class Block(nnx.Module):
  """A pre-LN transformer block."""

  def __init__(self, shape: Shape, *, key: jax.Array):
    attn_key, mlp_key = jax.random.split(key)
    self.attn_norm = LayerNorm(shape.d_model)
    self.attn = Attention(shape, key=attn_key)
    self.mlp_norm = LayerNorm(shape.d_model)
    self.mlp = Mlp(shape, key=mlp_key)

  def __call__(self, x_btd, window, numerics, key_b, past=None):
    attend_key_b, attn_key_b, mlp_key_b = split_rows(key_b, 3)
    y_btd = self.attn_norm(x_btd, numerics.between)
    y_btd, past = self.attn(y_btd, window, numerics, attend_key_b, past)
    x_btd += drop(y_btd, numerics.dropout, attn_key_b)
    y_btd = self.mlp(self.mlp_norm(x_btd, numerics.between), numerics)
    return x_btd + drop(y_btd, numerics.dropout, mlp_key_b), past


class GPT(nnx.Module):
  """Tokens in, final hidden states and the matrix that turns them into logits out."""

  def __init__(self, shape: Shape, *, key: jax.Array):
    embed_key, position_key, blocks_key = jax.random.split(key, 3)
    V, D = shape.padded_vocab, shape.d_model
    embed_vd = weight(embed_key, 've', V, D, std=INIT_STD)
    # Rows of the padding are 0 and get no gradient, so they stay 0 for ever.
    real_v1 = jnp.arange(V, out_sharding=stored('v'))[:, None] < shape.vocab_size
    self.embed = nnx.Param(jnp.where(real_v1, embed_vd[...], 0))
    self.position = weight(position_key, 'ld', shape.context, D, std=INIT_STD)
    keys_n = reshard(jax.random.split(blocks_key, shape.n_layers), stored('n'))
    self.blocks = jax.vmap(lambda key: Block(shape, key=key))(keys_n)
    self.norm = LayerNorm(D)
    self.windows = shape.windows

  def __call__(
    self,
    token_bl: jax.Array,
    numerics: Numerics,
    key_b: jax.Array | None = None,
    cache: Cache | None = None,
  ) -> tuple[jax.Array, jax.Array, Cache | None]:
    """Final hidden states x_bld and the output matrix e_vd, of which `loss.logits` makes logits.

    Args:
      token_bl: token ids, L at most the context.
      numerics: how to compute it.
      key_b: one PRNG key a row turns dropout on. The masks depend on the row's key alone, so
        dropout is the same however rows are split over slices and devices.
      cache: what was read before; the tokens go on from there, and what comes back knows them too.
        Then the blocks are a list, each apart.
    """
    e_vd = self.output(numerics)
    x_btd = self.start(e_vd, token_bl, numerics, key_b, cache)
    if cache is None:
      x_btd = self.run_layers(x_btd, numerics, key_b)
    else:
      x_btd, cache = self.go_on(x_btd, numerics, cache)
    return self.finish(x_btd, numerics), e_vd, cache

  def output(self, numerics: Numerics) -> jax.Array:
    """The output matrix e_vd in use; the embedding is the same."""
    return use(self.embed, 'vd', numerics.between)

  def start(self, e_vd, token_bl, numerics, key_b, cache=None) -> jax.Array:
    """What goes into the first layer."""
    B, L = token_bl.shape
    T = self.position.shape[0]
    if L > T:
      raise mistake('length of a row', f'{L} tokens', f'at most {T}, the positions', 'shorter rows')
    x_bld = look_up(e_vd, token_bl)
    if cache is None:
      x_bld += use_rows(self.position, 'ld', numerics.between, 'bl', B, T)[:, :L]
    else:
      x_bld += look_up(
        use(self.position, 'ld', numerics.between), jnp.minimum(cache.positions(L), T - 1)
      )
    return drop(reshard_residual(x_bld), numerics.dropout, fold_rows(key_b, 0))

  def finish(self, x_btd, numerics) -> jax.Array:
    """The final hidden states of what comes out of the last layer."""
    return reshard(self.norm(x_btd, numerics.between), computed('bld'))

  def run_layers(self, x_btd, numerics, key_b, first=0) -> jax.Array:
    """Through all layers there are, of which the first has this number."""
    return run_blocks(self.blocks, x_btd, self.windows, numerics, fold_rows(key_b, 1), first)

  def go_on(self, x_btd, numerics, cache) -> tuple[jax.Array, Cache]:
    """Through all layers, one after the other, from what each has read before."""
    layers = []
    for i, (block, past) in enumerate(zip(self.blocks, cache.layers, strict=True)):
      window = self.windows[i % len(self.windows)]
      x_btd, past = block(x_btd, window, numerics, None, cache.past(past))
      layers.append(past)
    return x_btd, cache.after(layers, x_btd.shape[1])


def look_up(e_vd: jax.Array, token_bl: jax.Array) -> jax.Array:
  """Rows of a matrix in use, whose gradient is summed over tokens in f32 and then cast.

  A frequent token is a thousand times in a slice, and a bf16 sum of as many terms is percents off.
  """
  rows = lambda e_vd, token_bl: e_vd.at[token_bl].get(out_sharding=computed('bld'))
  table = jax.typeof(e_vd)
  table_f32 = jax.ShapeDtypeStruct(table.shape, jnp.float32, sharding=table.sharding)

  def backward(token_bl, dx_bld):
    add = jax.linear_transpose(lambda e_vd: rows(e_vd, token_bl), table_f32)
    (de_vd,) = add(dx_bld.astype(jnp.float32))
    return de_vd.astype(table.dtype), None

  looked_up = jax.custom_vjp(rows)
  looked_up.defvjp(lambda e_vd, token_bl: (rows(e_vd, token_bl), token_bl), backward)
  return looked_up(e_vd, token_bl)


def run_blocks(blocks, x_btd, windows, numerics, key_b, first=0):
  """Scans blocks [n, …] in periods of the pattern; layers left over run after the scan.

  `first` is the number of the first of them, from 0, for its dropout.
  """
  p = len(windows)
  N = jax.tree.leaves(blocks)[0].shape[0]
  whole = N // p * p

  def run(x_btd, blocks, start, count):
    for i in range(count):
      block = jax.tree.map(lambda a: a[i], blocks)  # noqa: B023
      x_btd, _ = block(x_btd, windows[i], numerics, fold_rows(key_b, start + i))
    return x_btd

  if numerics.remat != 'none':
    run = jax.checkpoint(run, policy=REMAT[numerics.remat], static_argnums=3)
  if whole:
    periods = jax.tree.map(lambda a: split_leading(a[:whole], p), blocks)
    step = lambda x_btd, xs: (run(x_btd, *xs, p), None)
    xs = periods, first + jnp.arange(0, whole, p)
    x_btd, _ = lax.scan(step, x_btd, xs, unroll=numerics.apart)
  if whole < N:
    x_btd = run(x_btd, jax.tree.map(lambda a: a[whole:], blocks), first + whole, N - whole)
  return x_btd


def residual_std(shape: Shape) -> float:
  """Of matrices that write to the residual stream, of which there are two a layer."""
  return INIT_STD / (2 * shape.n_layers) ** 0.5


def drop(x_btd: jax.Array, rate: float, key_b: jax.Array | None) -> jax.Array:
  """Dropout (Srivastava et al. 2014) with one key a row; no keys, no dropout."""
  if key_b is None or not rate:
    return x_btd
  keep_btd = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x_btd.shape[1:]))(key_b)
  return jnp.where(keep_btd, x_btd / (1 - rate), 0)


def split_rows(key_b, count):
  """`count` keys for each row's key."""
  return [None] * count if key_b is None else [fold_rows(key_b, i) for i in range(count)]


def fold_rows(key_b, data):
  """Each row's key with an integer folded in."""
  return None if key_b is None else jax.vmap(lambda key: jax.random.fold_in(key, data))(key_b)
