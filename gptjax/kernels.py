"""Attention on every machine: the kernels of GPU and TPU, and the choice between all there are.

Each takes q_blhk, k_bshk, v_bshk and a window, and returns o_blhk in q's dtype, as those of
`attention.py` do. Like them they know no axis of a mesh: how rows and heads are split is read from
the type of the operands.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
from jax import P
from jax.ad_checkpoint import checkpoint_name

from gptjax import attention
from gptjax.errors import mistake, raise_all
from gptjax.sizes import Shape

LANES = 128  # of a TPU's vector registers: blocks are multiples of it
ANYWHERE = '--config.compute.attention=chunked, which does everything on every machine'


def cudnn(q_blhk, k_bshk, v_bshk, window, *, dropout: float = 0.0, key_b=None) -> jax.Array:
  """The GPU kernel: cuDNN's flash attention (Dao 2023, "FlashAttention-2").

  Raises:
    Mistake: for dropout.
  """
  _refuse_dropout('cudnn', dropout)
  L, _, K = q_blhk.shape[1:]
  # cuDNN's window counts the keys before a query's own. One that sees all keys is none.
  before = None if window is None or window >= L else (window - 1, 0)
  attend = functools.partial(
    jax.nn.dot_product_attention,
    scale=K**-0.5,
    is_causal=True,
    local_window_size=before,
    implementation='cudnn',
  )
  # A name for cuDNN's alone: splash lays out anew what it keeps, which would then be there twice.
  return _on_each_device(attend, q_blhk, k_bshk, v_bshk, name=attention.ATTENDED)


@functools.cache  # so that equal choices are one function, which compiles once
def make_splash(device_kind: str, interpret: bool = False) -> Callable:
  """The TPU kernel for a kind of TPU: splash attention, which skips blocks that no query sees.

  It raises a Mistake for dropout.

  Args:
    device_kind: as JAX names it.
    interpret: runs on any machine, slowly: for tests.
  """

  def splash(q_blhk, k_bshk, v_bshk, window, *, dropout: float = 0.0, key_b=None) -> jax.Array:
    _refuse_dropout('splash', dropout)
    attend = functools.partial(_splash, device_kind, interpret, window)
    return _on_each_device(attend, q_blhk, k_bshk, v_bshk)

  return splash


def largest_block(device_kind: str, window: int | None, row_bytes: int) -> int:
  """Queries, and keys, in a block of splash; a short length has smaller ones.

  Args:
    device_kind: as JAX names it.
    window: None for a dense layer.
    row_bytes: of one head of q at one position.
  """
  # Not timed on a TPU yet. Larger blocks mean fewer turns of the kernel's loop, and each turn costs
  # something. 1024 is the largest power of 2 whose scores fit the 16 MiB that a kernel gets on
  # every kind since v4, and 512 that with wide rows on v5p: found by compiling for them.
  dense = 1024 if row_bytes <= 512 else 512
  if window is None:
    return dense
  # A block of B queries meets the keys of 1 + (window - 1) / B blocks, rounded up: a large one
  # computes many scores in vain. The faster the matrix unit, the less they cost beside the turn.
  least = 512 if device_kind in ('TPU v6 lite', 'TPU7x') else 256
  return min(dense, max(least, 1 << (window - 1).bit_length()))


def split_into_blocks(L: int, largest: int) -> tuple[int, int]:
  """The size of equal blocks no larger than that, and the length, L or more, that they cover."""
  n = -(-L // largest)
  block = -(-L // (n * LANES)) * LANES
  return block, n * block


def _splash(device_kind, interpret, window, q_blhk, k_bshk, v_bshk):
  from jax.experimental.pallas.ops.tpu import splash_attention  # 0.4 s that only a TPU needs

  L, H, K = q_blhk.shape[1:]
  largest = largest_block(device_kind, window, K * q_blhk.dtype.itemsize)
  block, padded = split_into_blocks(L, largest)
  if window is None or window >= L:
    mask = splash_attention.CausalMask((padded, padded))
  else:
    mask = splash_attention.LocalMask((padded, padded), (window - 1, 0), 0)
  sizes = splash_attention.BlockSizes(
    block_q=block,
    block_kv=block,
    block_q_dkv=block,
    block_kv_dkv=block,
    block_q_dq=block,
    block_kv_dq=block,
  )
  kernel = splash_attention.make_splash_mha_single_device(
    splash_attention.MultiHeadMask([mask] * H), block_sizes=sizes, interpret=interpret
  )

  def by_head(x_blhk):
    # A padded key comes after every query that is not padded, so none of those sees it.
    x_blhk = jnp.pad(x_blhk, ((0, 0), (0, padded - L), (0, 0), (0, 0)))
    return x_blhk.transpose(0, 2, 1, 3)

  # The kernel does not scale. Scaling q instead of the scores costs one rounding to q's dtype,
  # and none where the width is a power of 4.
  q_blhk = q_blhk * K**-0.5
  o_bhlk = jax.vmap(kernel)(by_head(q_blhk), by_head(k_bshk), by_head(v_bshk))
  return o_bhlk.transpose(0, 2, 1, 3)[:, :L]


def _on_each_device(attend, q_blhk, k_bshk, v_bshk, name=''):
  """Runs attend on each device's own rows and heads, which is all that its result depends on.

  By its name, if it has one, a remat policy knows what the backward pass wants.
  """
  if jax.typeof(q_blhk).sharding.mesh.empty:
    return attend(q_blhk, k_bshk, v_bshk)

  # What a pullback is besides its arrays. Two traces of it are never equal for JAX, and with and
  # without a `vmap` outside the axes that are mapped over differ.
  structure = {}

  def forward(*qkv):
    o_blhk, pull = jax.vjp(attend, *qkv)
    kept, structure[jax.sharding.get_abstract_mesh()] = jax.tree.flatten(pull)
    return o_blhk, kept

  def backward(do_blhk, *kept):
    pull = jax.tree.unflatten(structure[jax.sharding.get_abstract_mesh()], kept)
    return pull(do_blhk)

  # Forward and backward are each mapped over the devices, and not one derived from the other: so a
  # `vmap` over an axis of the mesh, as a pipeline has it, meets nothing but `_by_device`.
  run = jax.custom_vjp(lambda *qkv: _by_device(attend, qkv))
  run.defvjp(
    lambda *qkv: checkpoint_name(_by_device(forward, qkv, keeps=True), name),
    lambda kept, do_blhk: _by_device(backward, (do_blhk,), *kept),
  )
  return run(q_blhk, k_bshk, v_bshk)


def _by_device(run, like_q, *kept, keeps=False):
  """run(*like_q, *kept) on each device, of arrays that are split as q is.

  What is kept, and with `keeps` run's second result, is a device's own affair, whatever it is.
  """
  at = lambda tree, index: jax.tree.map(lambda a: a[index, index], tree)

  def own(like_q, kept):
    made = run(*like_q, *at(kept, 0))
    return (made[0], at(made[1], None)) if keeps else made

  def over_devices(like_q, kept):
    split = jax.typeof(like_q[0]).sharding.spec
    *outer, b, l, h, k = split.partitions
    assert l is None and k is None, f'positions and widths must be whole: {split}'
    each = own
    for _ in outer:
      each = jax.vmap(each)
    apart = P(*outer, b, h)  # a dim for each of the two along which devices differ
    # check_vma: JAX cannot see over which axes the result of a kernel varies.
    mapped = jax.shard_map(
      each,
      in_specs=(split, apart),
      out_specs=(split, apart) if keeps else split,
      check_vma=False,
    )
    return mapped(like_q, kept)

  def vmapped(_, batched, like_q, kept):
    assert all(jax.tree.leaves(batched)), 'all or none come from a stage'
    made = over_devices(like_q, kept)
    return made, jax.tree.map(lambda _: True, made)

  # Under a `vmap` JAX hides its axis of the mesh from a `shard_map`, and kernels must see all.
  over_all = jax.custom_batching.custom_vmap(over_devices)
  over_all.def_vmap(vmapped)
  return over_all(like_q, kept)


def _refuse_dropout(name, dropout):
  if dropout:
    raise mistake(f'dropout in attention kernel {name}', dropout, 0, ANYWHERE)


@dataclasses.dataclass(frozen=True)
class Kernel:
  """How to get a kernel for a device, and what it cannot do."""

  build: Callable[[jax.Device], Callable]
  # (device, shape, dtype, dropout) -> what, got, wanted, try of all that stands against it.
  limits: Callable[..., Iterator[tuple[str, object, object, str]]] = lambda *_: iter(())


def _limits_of_cudnn(device, shape, dtype, dropout):
  capability = 0.0
  if device.platform == 'gpu':
    try:
      capability = float(device.compute_capability)
    except ValueError:  # AMD's are names, such as gfx942
      yield 'GPU', f'{device.device_kind}', "one of NVIDIA's", ANYWHERE
    else:
      if capability < 8:
        got = f'compute capability {capability} ({device.device_kind})'
        yield 'GPU', got, '8.0 or more, as A100', ANYWHERE
  else:
    yield 'platform', device.platform, 'gpu', '--config.compute.attention=auto'
  if dtype != jnp.bfloat16:
    fix = f'--config.compute.dtype=bfloat16 or {ANYWHERE}'
    yield 'compute.dtype', dtype, 'bfloat16', fix
  widest = 256 if capability >= 9 else 128
  if shape.d_head % 8 or shape.d_head > widest:
    wanted = f'a multiple of 8, at most {widest}'
    yield 'model.d_head', shape.d_head, wanted, ANYWHERE
  if shape.context % 2:
    yield 'model.context', shape.context, 'an even number', ANYWHERE
  if dropout:
    yield 'model.dropout', dropout, 0, f'--config.model.dropout=0.0 or {ANYWHERE}'


def _limits_of_splash(device, shape, dtype, dropout):
  if device.platform != 'tpu':
    yield 'platform', device.platform, 'tpu', '--config.compute.attention=auto'
  elif device.device_kind in ('TPU v2', 'TPU v3'):
    yield 'TPU', device.device_kind, 'v4 or later', ANYWHERE
  if dtype not in (jnp.bfloat16, jnp.float32):
    yield 'compute.dtype', dtype, 'bfloat16 or float32', ANYWHERE
  if shape.d_head > 256:
    yield 'model.d_head', shape.d_head, 'at most 256', ANYWHERE
  if dropout:
    yield 'model.dropout', dropout, 0, f'--config.model.dropout=0.0 or {ANYWHERE}'


KERNELS = {
  'reference': Kernel(lambda device: attention.reference),
  'chunked': Kernel(lambda device: attention.chunked),
  'cudnn': Kernel(lambda device: cudnn, _limits_of_cudnn),
  'splash': Kernel(lambda device: make_splash(device.device_kind), _limits_of_splash),
}
AUTO = {'cpu': 'chunked', 'gpu': 'cudnn', 'tpu': 'splash'}


def named(name: str, platform: str) -> str:
  """The name in KERNELS of the kernel that a name, or 'auto', means on a platform.

  Raises:
    Mistake: if it is none.
  """
  chosen = AUTO.get(platform) if name == 'auto' else name
  if chosen not in KERNELS:
    got = f'{name!r} on platform {platform!r}'
    wanted = f'one of {", ".join(KERNELS)}, or auto on {", ".join(AUTO)}'
    raise mistake('compute.attention', got, wanted, ANYWHERE)
  return chosen


def choose(
  name: str, devices: Sequence[jax.Device], shape: Shape, dtype: jnp.dtype, dropout: float
) -> Callable:
  """The kernel called name, or for 'auto' that of the devices' platform: an `attend` of Numerics.

  Args:
    name: in KERNELS, or 'auto'.
    devices: of the mesh, all of one kind.
    shape: of the model.
    dtype: of q, k and v.
    dropout: of the attention probabilities.

  Raises:
    Mistake: with all that the kernel cannot do. None ever takes the place of another.
  """
  device = devices[0]
  chosen = named(name, device.platform)
  what = f'attention kernel {chosen}' + f' (auto on {device.platform})' * (name == 'auto')
  kernel = KERNELS[chosen]
  limits = kernel.limits(device, shape, jnp.dtype(dtype), dropout)
  raise_all([mistake(f'{what}: {part}', *rest) for part, *rest in limits])
  return kernel.build(device)
