"""How activations are multiplied by weights: what a product is, and how each machine does it best.

A way to multiply takes (subscripts, x, param, out_sharding=None) and returns the einsum of x with
the param, gathered and cast for use, in x's dtype; its sums are f32. Subscripts are those of the
weight as it is trained, its dims that are summed over first.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P
from jax.ad_checkpoint import checkpoint_name

from gptjax.compiler import apart
from gptjax.sharding import use

Multiply = Callable[..., jax.Array]

PIECE = 64  # numbers of a row that are moved together where rows are transposed
RESULT = 'result'  # the name by which a remat policy knows what is to be kept of a product


def as_bits(x: jax.Array) -> jax.Array:
  """An array to keep: bf16 as integers, since of bf16 in a loop XLA's CPU backend keeps an f32."""
  spec = jax.typeof(x).sharding.spec
  if x.dtype != jnp.bfloat16 or spec.reduced or spec.unreduced:  # JAX 0.10 takes no bits of these
    return x
  return jax.lax.bitcast_convert_type(x, jnp.uint16)


def of_bits(x: jax.Array) -> jax.Array:
  """What `as_bits` was given."""
  return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


def plainly(subscripts: str, x: jax.Array, param: nnx.Param, out_sharding: P | None = None):
  """As XLA does it: what every other way must equal."""
  _, weight, _ = split(subscripts)
  return jnp.einsum(subscripts, x, use(param, weight, x.dtype), out_sharding=out_sharding)


def by_parts(subscripts: str, x: jax.Array, param: nnx.Param, out_sharding: P | None = None):
  """For a GPU: q, k and v by a product each, because cuDNN wants each of them on its own."""
  if 'c' not in subscripts:
    return plainly(subscripts, x, param, out_sharding)
  _, weight, out = split(subscripts)
  at, of_w = weight.index('c'), out.index('c')
  parts = jnp.split(use(param, weight, x.dtype), param.shape[at], at)
  return jnp.concatenate(
    [jnp.einsum(subscripts, x, w, out_sharding=out_sharding) for w in parts], of_w
  )


def in_bf16(subscripts: str, x: jax.Array, param: nnx.Param, out_sharding: P | None = None):
  """For a CPU: bf16 by bf16 in f32, in the gradients too; x is f32, as all between products is.

  XLA's CPU backend computes what is between products in bf16 more slowly than in f32, and has fast
  products of bf16 only where their result is f32. That is rounded, so that a remat policy can keep
  half as much of it; a part of a sum over devices is not.
  """
  return _lying_well(jnp.bfloat16, subscripts, x, param, out_sharding)


def in_f32(subscripts: str, x: jax.Array, param: nnx.Param, out_sharding: P | None = None):
  """For a CPU: `plainly` in f32, with gradients that are fast products."""
  return _lying_well(jnp.float32, subscripts, x, param, out_sharding)


def _lying_well(dtype, subscripts, x, param, out_sharding):
  """The product of f32, multiplied in a dtype, with operands as XLA's CPU backend wants them.

  It has fast products only where the dim that is summed over is the first operand's last, and
  leaves to itself it finds another way for some gradients.
  """
  rows, weight, out = split(subscripts)
  w = use(param, weight, x.dtype)  # in f32, as its gradient is
  of_x, of_w = _cotangent(x), _cotangent(w)
  dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  cast = lambda a: a.astype(dtype)

  def forward(x, w):
    x = as_bits(cast(x))
    y = dot(subscripts, of_bits(x), cast(w), out_sharding=out_sharding)
    if dtype == jnp.bfloat16 and not jax.typeof(y).sharding.spec.unreduced:
      y = of_bits(checkpoint_name(as_bits(cast(y)), RESULT)).astype(y.dtype)
    return y, x

  def backward(saved, dy):
    x, w, dy = of_bits(saved[0]), saved[1], cast(dy)
    dx = dot(f'{out},{weight}->{rows}', dy, cast(w), out_sharding=of_x)
    dw = dot(f'{rows},{out}->{weight}', _standing(x), dy, out_sharding=of_w)
    return dx, dw

  def keep(x, w):
    y, x = forward(x, w)
    return y, (x, w)

  multiply = jax.custom_vjp(lambda x, w: forward(x, w)[0])
  multiply.defvjp(keep, backward)
  return multiply(x, w)


def _cotangent(x):
  """How the gradient of an array lies."""
  spec = jax.typeof(x).sharding.spec
  return P(*spec.partitions, reduced=spec.unreduced, unreduced=spec.reduced)


def _standing(x):
  """Rows [b, l, …, e], with positions last in memory.

  In two steps, the first of which moves whole pieces of a row: in one, XLA's CPU backend computes x
  number by number, and either step alone it would fold into the product, which is then no fast one.
  """
  B, L, *rest, E = x.shape
  lying = jax.typeof(x).sharding
  spec = lying.spec
  b, l, *dims, e = spec.partitions
  lies = functools.partial(P, reduced=spec.reduced, unreduced=spec.unreduced)
  size = math.gcd(PIECE, lying.shard_shape(x.shape)[-1])
  cut = (B, L, *rest, E // size, size)
  pieces = jax.lax.reshape(x, cut, out_sharding=lies(b, l, *dims, e, None))
  rows_last = apart(lambda x: jnp.moveaxis(x, -1, -3))(jnp.moveaxis(pieces, (0, 1), (-3, -2)))
  joined = jax.lax.reshape(rows_last, (*rest, E, B, L), out_sharding=lies(*dims, e, b, l))
  return jnp.moveaxis(joined, (-2, -1), (0, 1))


def weight_first(subscripts: str, x: jax.Array, param: nnx.Param, out_sharding: P | None = None):
  """For few rows on a CPU, by a param from `summed_last`; only forward.

  The first operand is the one that XLA's CPU backend takes as it lies in memory.
  """
  rows, weight, out = split(subscripts)
  summed = sum(dim in rows for dim in weight)
  weight = weight[summed:] + weight[:summed]
  first = weight[:-summed] + ''.join(dim for dim in out if dim not in weight)
  if out_sharding is not None:
    partitions = (out_sharding.partitions[out.index(dim)] for dim in first)
    out_sharding = P(*partitions, unreduced=out_sharding.unreduced)
  w = use(param, weight, x.dtype)
  y = by_rows(f'{weight},{rows}->{first}', w, x, out_sharding).astype(x.dtype)
  # A barrier, because XLA would write the product the other way round to save a transpose of y.
  return jnp.einsum(f'{first}->{out}', jax.lax.optimization_barrier(y))


def by_rows(subscripts: str, w: jax.Array, x: jax.Array, out_sharding: P | None = None):
  """The einsum of a weight in use with some rows, of which b is the first dim; in f32."""
  _, rows, out = split(subscripts)
  # XLA's CPU backend multiplies bf16 by one row at a tenth of the rate at which it does by two;
  # elsewhere a second row is lost in the time that the weight takes to be read.
  alone = x.dtype == jnp.bfloat16 and all(
    size == 1 for dim, size in zip(rows, x.shape, strict=True) if dim in out
  )
  if alone:
    x = jnp.concatenate([x, x])
  y = jnp.einsum(subscripts, w, x, preferred_element_type=jnp.float32, out_sharding=out_sharding)
  return jax.lax.slice_in_dim(y, 0, 1, axis=out.index('b')) if alone else y


def split(subscripts: str) -> list[str]:
  """The dims of x, of the weight and of their product."""
  return subscripts.replace('->', ',').split(',')


# Of a block's matrices: over how many of their first dims a product sums.
SUMMED = {'qkv': 1, 'out': 2, 'up': 1, 'down': 1}


def summed_last(name: str, w: jax.Array) -> jax.Array:
  """A block's param as `weight_first` wants it: the dims that are summed over last."""
  count, dims = SUMMED.get(name, 0), range(w.ndim)
  return w.transpose(*dims[count:], *dims[:count])


def as_it_is(name: str, w: jax.Array) -> jax.Array:
  """A block's param as `plainly` wants it."""
  return w


def for_reading(platform: str) -> tuple[Multiply, Callable[[str, jax.Array], jax.Array]]:
  """What multiplies a few rows best, and what lays a block's params for it."""
  return (weight_first, summed_last) if platform == 'cpu' else (plainly, as_it_is)
