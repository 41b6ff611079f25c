"""What a model keeps of the tokens that it has read, so that the next one costs one token's work.

Tokens stand in columns, the same for all rows of a batch, which end together: a shorter row begins
in a later column. Of its keys and values a layer keeps those of the last columns, column c in slot
c mod size of a ring: a banded layer as many as its window, a dense one as many as a row may get.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from gptjax import sharding
from gptjax.attention import dot_f32, visible
from gptjax.sizes import Shape


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Past:
  """Of one layer: the keys and values of the columns before `end`."""

  k_msk: jax.Array  # m: heads and rows, heads first
  v_msk: jax.Array
  first_b: jax.Array  # the column in which a row begins
  end: jax.Array

  def attend(self, q_blhk, k_blhk, v_blhk, window: int | None) -> tuple[jax.Array, tuple]:
    """Attention of new tokens to themselves and to those before; and what is kept after them.

    Softmax and sums are f32, as in the kernels of training, and the window is theirs.
    """
    B, L, _, K = q_blhk.shape
    new_l = self.end + jnp.arange(L)
    q_mlk, k_mlk, v_mlk = (_by_head(x.astype(self.k_msk.dtype)) for x in (q_blhk, k_blhk, v_blhk))
    after = self._write(self.k_msk, k_mlk), self._write(self.v_msk, v_mlk)
    if L == 1:  # what its column takes the place of is seen no more: no need for a copy
      (k_msk, v_msk), key_s = after, self._columns(self.end + 1)
    else:
      k_msk, v_msk = (jnp.concatenate(x, 1) for x in ((self.k_msk, k_mlk), (self.v_msk, v_mlk)))
      key_s = jnp.concatenate([self._columns(self.end), new_l])
    seen_bls = visible(new_l, key_s, window) & (key_s >= self.first_b[:, None, None])
    a_mls = dot_f32('mlk,msk->mls', q_mlk, k_msk) * K**-0.5
    a_hbls = _split(a_mls, B)
    # Not -inf: a query before its row's first column sees nothing, and must not become NaN.
    p_hbls = jax.nn.softmax(jnp.where(seen_bls, a_hbls, jnp.finfo(jnp.float32).min))
    p_mls = _join(p_hbls.astype(v_msk.dtype))
    o_mlk = dot_f32('mls,msk->mlk', p_mls, v_msk)
    o_blhk = _split(o_mlk, B).transpose(1, 2, 0, 3)
    return o_blhk.astype(q_blhk.dtype), after

  def _columns(self, end):
    """Which column each slot has when so many were read; below 0 where there is none yet."""
    S = self.k_msk.shape[1]
    return end - 1 - (end - 1 - jnp.arange(S)) % S

  def _write(self, x_msk, x_mlk):
    """Puts new columns into their slots."""
    S, L = x_msk.shape[1], x_mlk.shape[1]
    if L == 1:
      return lax.dynamic_update_slice_in_dim(x_msk, x_mlk, self.end % S, 1)
    new_s = self._columns(self.end + L) - self.end  # which new column is each slot's
    return jnp.where((new_s >= 0)[:, None], jnp.take(x_mlk, jnp.maximum(0, new_s), 1), x_msk)


def _by_head(x_blhk):
  """To [m, l, k]."""
  return _join(x_blhk.transpose(2, 0, 1, 3))


def _join(x_hblk):
  """Heads and rows as one dim, heads first, since these are what `tensor` splits.

  With two dims, of which that of a single row has size 1, XLA's CPU backend would copy the whole
  ring for each token.
  """
  H, B, L, K = x_hblk.shape
  return lax.reshape(x_hblk, (H * B, L, K), out_sharding=sharding.joined('hb', 'lk'))


def _split(x_msk, B):
  """The inverse of `_join`."""
  size = len(x_msk) // B, B, *x_msk.shape[1:]
  return lax.reshape(x_msk, size, out_sharding=sharding.computed('hbsk'))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """Of all layers."""

  layers: tuple[tuple[jax.Array, jax.Array], ...]  # keys and values [m, s, k] of each
  first_b: jax.Array  # the column in which a row begins
  end: jax.Array  # columns that were read

  def positions(self, L: int) -> jax.Array:
    """Of L new tokens, counted from the first of their row [b, l]; 0 before it."""
    return jnp.maximum(0, self.end + jnp.arange(L) - self.first_b[:, None])

  def past(self, layer: tuple[jax.Array, jax.Array]) -> Past:
    """One layer's share."""
    return Past(*layer, self.first_b, self.end)

  def take(self, row_b: jax.Array) -> 'Cache':
    """Of those rows instead, of which some may be the same."""
    B = len(self.first_b)

    def taken(x_msk):
      return _join(jnp.take(_split(x_msk, B), row_b, 1))

    layers = jax.tree.map(taken, self.layers)
    return Cache(layers, jnp.take(self.first_b, row_b), self.end)

  def after(self, layers: list, L: int) -> 'Cache':
    """When L more columns were read."""
    return Cache(tuple(layers), self.first_b, self.end + L)


def empty(shape: Shape, first_b: jax.Array, dtype: jnp.dtype, positions: int) -> Cache:
  """A cache for rows that begin in these columns and get so many positions at most."""
  B, H, K = len(first_b), shape.n_heads, shape.d_head

  def layer(window):
    size = min(window or positions, positions)
    lies = sharding.computed('blhk')
    zeros = lambda: _by_head(jnp.zeros((B, size, H, K), dtype, out_sharding=lies))
    return zeros(), zeros()

  layers = tuple(layer(shape.window(i)) for i in range(shape.n_layers))
  return Cache(layers, first_b, jnp.int32(0))
