"""Cross-entropy that never holds the logits of a batch, on logits split over the vocabulary."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import reshard

from gptjax import sharding
from gptjax.products import by_rows


def logits(x_bld: jax.Array, e_vd: jax.Array, vocab_size: int) -> jax.Array:
  """Logits [b, l, v] in f32; rows of the padding are -inf, so they are never predicted."""
  logit_blv = jnp.einsum('bld,vd->blv', x_bld, e_vd, preferred_element_type=jnp.float32)
  hidden = lambda logit_blv: jnp.where(_ids(logit_blv) < vocab_size, logit_blv, -jnp.inf)
  if _splits(logit_blv, 2):
    return hidden(logit_blv)
  # In place, since XLA's CPU backend makes a pass over all logits of a `where`.
  in_place = lambda logit_blv: logit_blv.at[..., vocab_size:].set(-jnp.inf)
  return lax.platform_dependent(logit_blv, default=hidden, cpu=in_place)


def next_logits(x_bd: jax.Array, e_vd: jax.Array, vocab_size: int) -> jax.Array:
  """Logits [v, b] in f32 after one token of each row; those of the padding are -inf.

  The vocabulary comes first: for few rows XLA's CPU backend is then a third faster, since it takes
  the matrix as it lies.
  """
  logit_vb = by_rows('vd,bd->vb', e_vd, x_bd)
  out = jax.typeof(logit_vb).sharding
  id_vb = lax.broadcasted_iota(jnp.int32, logit_vb.shape, 0, out_sharding=out)
  return jnp.where(id_vb < vocab_size, logit_vb, -jnp.inf)


def token_losses(
  x_bld: jax.Array, e_vd: jax.Array, label_bl: jax.Array, vocab_size: int, chunk: int
) -> jax.Array:
  """Cross-entropy in nats of each token [b, l]; holds the logits of `chunk` positions at a time."""
  nll = lambda _, xs: (None, _nll(*xs, e_vd, vocab_size)[0])
  return _over_chunks(nll, None, (x_bld, label_bl), chunk)[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def cross_entropy(
  x_bld: jax.Array,
  e_vd: jax.Array,
  label_bl: jax.Array,
  weight_bl: jax.Array,
  vocab_size: int,
  chunk: int,
  dtype: jnp.dtype,
) -> jax.Array:
  """Cross-entropy in nats, weighted and summed over all tokens, of products in a dtype.

  Holds the logits of `chunk` positions at a time. The gradients with respect to `x_bld` and `e_vd`
  are computed in the forward pass, while a chunk's logits are there: computing logits twice, as
  rematerialisation would, costs a tenth of all FLOPs at 125m.
  """
  used_vd = e_vd.astype(dtype)

  def add(total_b, inputs):
    x_bld, label_bl, weight_bl = inputs
    nll_bl, _ = _nll(x_bld.astype(dtype), label_bl, used_vd, vocab_size)
    return total_b + (nll_bl * weight_bl).sum(1), None

  zeros_b = jnp.zeros_like(weight_bl[:, 0])
  return _over_chunks(add, zeros_b, (x_bld, label_bl, weight_bl), chunk)[0].sum()


def _forward(x_bld, e_vd, label_bl, weight_bl, vocab_size, chunk, dtype):
  partial_vd = sharding.partial_sum('vd')
  between, used_vd = x_bld.dtype, e_vd.astype(dtype)

  def add(carry, inputs):
    total_b, de_vd = carry
    x_bld, label_bl, weight_bl = inputs
    x_bld = x_bld.astype(dtype)
    nll_bl, dlogit_blv = _nll(x_bld, label_bl, used_vd, vocab_size)
    dlogit_blv = (dlogit_blv * weight_bl[..., None]).astype(dtype)
    dx_bld = jnp.einsum(
      'blv,vd->bld',
      dlogit_blv,
      used_vd,
      preferred_element_type=between,
      out_sharding=sharding.computed('bld'),
    )
    de_vd += jnp.einsum(
      'blv,bld->vd',
      dlogit_blv,
      x_bld,
      preferred_element_type=jnp.float32,
      out_sharding=partial_vd,
    )
    return (total_b + (nll_bl * weight_bl).sum(1), de_vd), dx_bld

  # Summed by row until the end: a sum over rows here would be a collective in every chunk.
  zeros_b = jnp.zeros_like(weight_bl[:, 0])
  zeros_vd = reshard(jnp.zeros(e_vd.shape, jnp.float32), partial_vd)
  (total_b, de_vd), dx_bld = _over_chunks(
    add, (zeros_b, zeros_vd), (x_bld, label_bl, weight_bl), chunk
  )
  return total_b.sum(), (dx_bld, de_vd.astype(e_vd.dtype))


def _backward(vocab_size, chunk, dtype, grads, dtotal):
  dx_bld, de_vd = grads
  scale = sharding.same_everywhere(dtotal).astype(de_vd.dtype)
  return dx_bld * dtotal.astype(dx_bld.dtype), de_vd * scale, None, None


cross_entropy.defvjp(_forward, _backward)


def _nll(x_bld, label_bl, e_vd, vocab_size):
  """Negative log-likelihood [b, l] and its gradient with respect to the logits [b, l, v]."""
  logit_blv = logits(x_bld, e_vd, vocab_size)
  return lax.platform_dependent(
    logit_blv, label_bl, default=_by_sums, cpu=_exp_once, cuda=_in_one_pass
  )


def _by_sums(logit_blv, label_bl):
  """Both from the log-sum-exp and the logit of the label."""
  lse_bl = jax.nn.logsumexp(logit_blv, -1)
  return _from(lse_bl, _gold(logit_blv, label_bl), logit_blv, label_bl)


def _gold(logit_blv, label_bl):
  """The logit of each label [b, l], found among zeros."""
  return jnp.where(_hits(logit_blv, label_bl), logit_blv, 0).sum(-1)


def _from(lse_bl, gold_bl, logit_blv, label_bl):
  """What `_nll` returns, from the log-sum-exp and the logit of the label."""
  return lse_bl - gold_bl, jnp.exp(logit_blv - lse_bl[..., None]) - _hits(logit_blv, label_bl)


def _exp_once(logit_blv, label_bl):
  """The same for a CPU, where an exponential takes longer than to read it again.

  And a logit is taken faster than it is found among zeros.
  """
  if any(_splits(logit_blv, dim) for dim in range(3)):
    return _by_sums(logit_blv, label_bl)
  top_bl1 = logit_blv.max(-1, keepdims=True)
  exp_blv = jnp.exp(logit_blv - top_bl1)
  sum_bl = exp_blv.sum(-1)
  gold_bl1 = jnp.take_along_axis(logit_blv, label_bl[..., None], -1)
  nll_bl = (top_bl1 - gold_bl1)[..., 0] + jnp.log(sum_bl)
  return nll_bl, exp_blv * (1 / sum_bl)[..., None] - _hits(logit_blv, label_bl)


def _in_one_pass(logit_blv, label_bl):
  """The same, reading logits once: on a GPU they are read from memory each time.

  Maxima and sums of what was seen are joined pair by pair (Milakov and Gimelshein 2018, "Online
  normalizer calculation for softmax").
  """
  if _splits(logit_blv, 2):
    return _by_sums(logit_blv, label_bl)  # JAX reduces no pair over a split dim
  least = jnp.finfo(logit_blv.dtype).min  # and not -inf, of which two have no difference

  def join(a, b):
    top = jnp.maximum(a[0], b[0])
    return top, a[1] * jnp.exp(a[0] - top) + b[1] * jnp.exp(b[0] - top)

  pairs = jnp.maximum(logit_blv, least), jnp.ones_like(logit_blv)
  top_bl, sum_bl = lax.reduce(pairs, (least, jnp.zeros_like(least)), join, (2,))
  gold_bl = _gold(logit_blv, label_bl)
  # A barrier: XLA would take gold's sum together with the gradient, which is then half as fast.
  lse_bl, gold_bl = lax.optimization_barrier((top_bl + jnp.log(sum_bl), gold_bl))
  return _from(lse_bl, gold_bl, logit_blv, label_bl)


def _splits(a, dim):
  """Whether a dim is split over devices."""
  return jax.typeof(a).sharding.spec[dim] is not None


def _hits(logit_blv, label_bl):
  return _ids(logit_blv) == label_bl[..., None]


def _ids(logit_blv):
  out = jax.typeof(logit_blv).sharding
  return lax.broadcasted_iota(jnp.int32, logit_blv.shape, 2, out_sharding=out)


def _over_chunks(add, carry, arrays, chunk):
  """Scans `add` over whole chunks of positions, then over the rest; joins what it yields."""
  L = arrays[0].shape[1]
  if L <= chunk:
    return add(carry, arrays)  # and XLA then adds to no zeros
  whole = L // chunk * chunk

  def at(carry, i):
    cut = lambda a: lax.dynamic_slice_in_dim(a, i * chunk, chunk, 1)
    return add(carry, jax.tree.map(cut, arrays))

  carry, y_cbl = lax.scan(at, carry, jnp.arange(whole // chunk))
  # A tree, and not an array, because `add` may yield nothing.
  y_bl = jax.tree.map(lambda y: jnp.moveaxis(y, 0, 1).reshape(y.shape[1], -1, *y.shape[3:]), y_cbl)
  if whole < L:
    carry, rest_bl = add(carry, jax.tree.map(lambda a: a[:, whole:], arrays))
    y_bl = jax.tree.map(lambda y, rest: jnp.concatenate([y, rest], 1), y_bl, rest_bl)
  return carry, y_bl
