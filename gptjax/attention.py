"""Causal attention, dense or locally banded: the window, the naive reference, the CPU kernel.

Every kernel takes q_blhk, k_bshk, v_bshk and a window, and returns o_blhk in q's dtype; scores,
softmax and sums are f32 whatever the dtype of the inputs. With window w a query sees w keys,
itself included; window None is a dense layer, which is causal only.
"""

import functools
import operator

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from gptjax.compiler import apart
from gptjax.products import as_bits, of_bits

# Query rows per chunk, and into how many groups a dense layer's chunks fall: measured on CPU.
# Shorter chunks starve the matrix products, longer ones fall out of the cache. G groups compute
# (G + 1) / 2G of the L x L scores (8: 56 %), and each adds to the time of compilation.
ROWS = 128
MAX_GROUPS = 8

ATTENDED = 'attended'  # the name by which a remat policy knows what would be attention again

dot_f32 = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def visible(query_l: jax.Array, key_s: jax.Array, window: int | None) -> jax.Array:
  """The window's definition: which key positions a query position sees, bool [l, s].

  Query i sees the keys i-window+1 … i. Brown et al. 2020, 2.1 ("locally banded").
  """
  lag_ls = query_l[:, None] - key_s
  seen_ls = lag_ls >= 0
  return seen_ls if window is None else seen_ls & (lag_ls < window)


def kept(key_b, n_heads: int, query_l, key_s, dropout: float) -> jax.Array:
  """Which attention probabilities dropout leaves: bool [b, h, l, s].

  A bit depends on its row's key, head, query and key position alone, so that neither the kernel,
  its chunks nor the mesh shows in the pattern.
  """

  def bits(key, head, query, key_position):
    for position in (head, query, key_position):
      key = jax.random.fold_in(key, position)
    return jax.random.key_data(key)[0]

  for dim in (3, 2, 1, 0):  # one vmap per dim of bhls, the innermost first
    bits = jax.vmap(bits, [0 if i == dim else None for i in range(4)])
  return bits(key_b, jnp.arange(n_heads), query_l, key_s) >= jnp.uint32(dropout * 2**32)


def reference(q_blhk, k_bshk, v_bshk, window, *, dropout: float = 0.0, key_b=None) -> jax.Array:
  """The naive kernel, with the whole L x L of scores: what every other one must equal.

  key_b: one PRNG key per row, for dropout of the attention probabilities.
  """
  L, H, K = q_blhk.shape[1:]
  position = jnp.arange(L)
  a_bhls = dot_f32('blhk,bshk->bhls', q_blhk, k_bshk) * K**-0.5
  p_bhls = jax.nn.softmax(jnp.where(visible(position, position, window), a_bhls, -jnp.inf))
  if dropout:
    keep_bhls = kept(key_b, H, position, position, dropout)
    p_bhls = jnp.where(keep_bhls, p_bhls / (1 - dropout), 0)
  return dot_f32('bhls,bshk->blhk', p_bhls, v_bshk.astype(jnp.float32)).astype(q_blhk.dtype)


def chunked(q_blhk, k_bshk, v_bshk, window, *, dropout: float = 0.0, key_b=None) -> jax.Array:
  """The CPU kernel: a chunk of queries at a time against the keys it may see.

  Besides a few arrays of q's size it holds one chunk's scores: ROWS x L if dense, ROWS x (ROWS +
  window) if banded, whose work is linear too. The backward pass saves the log-sum-exp and computes
  the probabilities again (Dao et al. 2022, "FlashAttention", algorithm 4).
  """
  return _chunked(window, dropout, q_blhk, k_bshk, v_bshk, key_b)


def _groups(L: int, window: int | None) -> tuple[int, list[tuple[int, int, int]]]:
  """Rows per chunk, and the groups of chunks (first, end, S) in which each sees S keys.

  A chunk sees the S keys up to its own last one. S is static, so a banded layer is one group; the
  chunks of a dense layer are grouped so that no more than its group's prefix is multiplied.
  """
  n = -(-L // ROWS)
  rows = -(-L // n)
  if window is not None:
    S = window + rows - 1
    S += S % 2  # an odd number of keys is slower to multiply
    if S < L:
      return rows, [(0, n, S)]
  # Two chunks or more to a group: XLA unrolls a loop of one, and then holds all groups at once.
  G = max(1, min(n // 2, MAX_GROUPS))
  ends = [n * g // G for g in range(G + 1)]
  return rows, [(first, end, end * rows) for first, end in zip(ends, ends[1:], strict=False)]


def _by_head(x_bshk, rows):
  """To [b, h, s, k], padded to whole chunks: only padded queries see a padded key."""
  x_bhsk = x_bshk.transpose(0, 2, 1, 3)
  return jnp.pad(x_bhsk, ((0, 0), (0, 0), (0, -x_bhsk.shape[2] % rows), (0, 0)))


def _by_chunk(x_blhk, rows):
  """To [i, b, h, l, k]: i chunks of rows queries, the last padded."""
  x_blhk = jnp.pad(x_blhk, ((0, 0), (0, -x_blhk.shape[1] % rows), (0, 0), (0, 0)))
  B, L, H, K = x_blhk.shape
  return x_blhk.reshape(B, L // rows, rows, H, K).transpose(1, 0, 3, 2, 4)


def _by_row(x_ibhlk, L):
  """Back from _by_chunk."""
  n, B, H, rows, K = x_ibhlk.shape
  return x_ibhlk.transpose(1, 0, 3, 2, 4).reshape(B, n * rows, H, K)[:, :L]


def _scan_chunks(chunk, carry, L, window, xs):
  """Scans chunk(carry, query_l, start, S, x), whose keys are start … start+S-1."""
  rows, groups = _groups(L, window)
  ys = []
  for first, end, S in groups:

    def step(carry, ix, S=S):
      # A loop over layers would compute what follows from i alone once, and stack: every mask.
      i, x = lax.optimization_barrier(ix)
      start = jnp.maximum(0, (i + 1) * rows - S)
      return chunk(carry, i * rows + jnp.arange(rows), start, S, x)

    group = jax.tree.map(operator.itemgetter(slice(first, end)), (jnp.arange(end), xs))
    carry, y = lax.scan(step, carry, group)
    ys.append(y)
  return carry, jax.tree.map(lambda *y: jnp.concatenate(y), *ys)


def _hidden(query_l, key_s, window):
  """What is added to scores [l, s]: 0, or -inf where a query does not see a key.

  With `where`, a loop over layers would keep its -inf as large as the scores, to read it again.
  """
  return jnp.where(visible(query_l, key_s, window), 0.0, -jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(window, dropout, q_blhk, k_bshk, v_bshk, key_b):
  return _forward(window, dropout, q_blhk, k_bshk, v_bshk, key_b)[0]


def _forward(window, dropout, q_blhk, k_bshk, v_bshk, key_b):
  L, H, K = q_blhk.shape[1:]
  rows, _ = _groups(L, window)
  k_all, v_all = _by_head(k_bshk, rows), _by_head(v_bshk, rows)

  def chunk(carry, query_l, start, S, q_bhlk):
    k_bhsk, v_bhsk = (lax.dynamic_slice_in_dim(x, start, S, 2) for x in (k_all, v_all))
    key_s = start + jnp.arange(S)
    a_bhls = dot_f32('bhlk,bhsk->bhls', q_bhlk, k_bhsk) * K**-0.5
    a_bhls += _hidden(query_l, key_s, window)
    max_bhl = a_bhls.max(-1)
    p_bhls = jnp.exp(a_bhls - max_bhl[..., None])
    sum_bhl = p_bhls.sum(-1)
    if dropout:
      keep_bhls = kept(key_b, H, query_l, key_s, dropout)
      p_bhls = jnp.where(keep_bhls, p_bhls / (1 - dropout), 0)
    o_bhlk = dot_f32('bhls,bhsk->bhlk', p_bhls.astype(v_bhsk.dtype), v_bhsk) / sum_bhl[..., None]
    return carry, (o_bhlk.astype(q_bhlk.dtype), max_bhl + jnp.log(sum_bhl))

  _, (o_ibhlk, lse_ibhl) = _scan_chunks(chunk, (), L, window, _by_chunk(q_blhk, rows))
  o_blhk = checkpoint_name(as_bits(_by_row(o_ibhlk, L)), ATTENDED)
  lse_ibhl = checkpoint_name(lse_ibhl, ATTENDED)
  return of_bits(o_blhk), (q_blhk, k_bshk, v_bshk, key_b, o_blhk, lse_ibhl)


def _backward(window, dropout, saved, do_blhk):
  q_blhk, k_bshk, v_bshk, key_b, o_blhk, lse_ibhl = saved
  L, H, K = q_blhk.shape[1:]
  rows, _ = _groups(L, window)
  k_all, v_all = _by_head(k_bshk, rows), _by_head(v_bshk, rows)
  # Apart, since XLA's CPU backend takes ten times as long to sum what it multiplies meanwhile.
  terms_blhk = apart(lambda do, o: do.astype(jnp.float32) * of_bits(o))(do_blhk, o_blhk)
  delta_blh = terms_blhk.sum(-1, keepdims=True)

  # Keys before queries, [s, l]: with [l, s] XLA's CPU backend has no fast product for dk and dv.
  # For dq it has one if that is [k, l]: turned at once, XLA would fold that into the product, which
  # is then none of bf16.
  k_all_bhks = k_all.swapaxes(-1, -2)

  def chunk(grads, query_l, start, S, x):
    q_bhlk, do_bhlk, lse_bhl, delta_bhl1 = x
    at_keys = lambda x: lax.dynamic_slice_in_dim(x, start, S, 2)
    add = lambda g, dg: lax.dynamic_update_slice_in_dim(g, at_keys(g) + dg, start, 2)
    k_bhsk, v_bhsk = at_keys(k_all), at_keys(v_all)
    key_s = start + jnp.arange(S)
    a_bhsl = dot_f32('bhsk,bhlk->bhsl', k_bhsk, q_bhlk) * K**-0.5 - lse_bhl[..., None, :]
    p_bhsl = jnp.exp(a_bhsl + _hidden(query_l, key_s, window).T)
    dp_bhsl = dot_f32('bhsk,bhlk->bhsl', v_bhsk, do_bhlk)
    kept_p_bhsl = p_bhsl
    if dropout:
      keep_bhsl = kept(key_b, H, query_l, key_s, dropout).swapaxes(-1, -2) / (1 - dropout)
      kept_p_bhsl, dp_bhsl = keep_bhsl * p_bhsl, keep_bhsl * dp_bhsl
    da_bhsl = p_bhsl * (dp_bhsl - delta_bhl1.swapaxes(-1, -2)) * K**-0.5
    da_bhsl = da_bhsl.astype(q_bhlk.dtype)
    dk_bhsk = dot_f32('bhsl,bhlk->bhsk', da_bhsl, q_bhlk)
    dv_bhsk = dot_f32('bhsl,bhlk->bhsk', kept_p_bhsl.astype(q_bhlk.dtype), do_bhlk)
    k_bhks = lax.dynamic_slice_in_dim(k_all_bhks, start, S, 3)
    dq_bhkl = dot_f32('bhks,bhsl->bhkl', k_bhks, da_bhsl)
    return (add(grads[0], dk_bhsk), add(grads[1], dv_bhsk)), dq_bhkl.astype(q_bhlk.dtype)

  xs = _by_chunk(q_blhk, rows), _by_chunk(do_blhk, rows), lse_ibhl, _by_chunk(delta_blh, rows)
  grads = jnp.zeros_like(k_all, jnp.float32), jnp.zeros_like(v_all, jnp.float32)
  grads, dq_ibhkl = _scan_chunks(chunk, grads, L, window, xs)
  dk_bshk, dv_bshk = (g.transpose(0, 2, 1, 3)[:, :L].astype(k_bshk.dtype) for g in grads)
  return _by_row(dq_ibhkl.swapaxes(-1, -2), L), dk_bshk, dv_bshk, None


_chunked.defvjp(_forward, _backward)
