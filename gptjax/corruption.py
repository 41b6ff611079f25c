"""Whether the machine computes right: copies that agree, and a step that comes out the same twice.

A chip that errs now and then, without an error, is found by nothing else (Hochschild et al. 2021,
"Cores that don't count"; Dixit et al. 2021, "Silent Data Corruptions at Scale").
"""

import collections
import json
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import P, lax
from jax.sharding import reshard

from gptjax import hosts
from gptjax.errors import mistake

FIX = 'the same command on other machines; the checkpoints before this are not touched'


def comparing() -> Callable[[dict], None]:
  """A check of all copies of each part of a state, over all processes, on the mesh that is set.

  The check raises a Mistake with the devices whose copy is not that of most.
  """
  sums = None

  def check(state: dict) -> None:
    nonlocal sums
    if not sums:  # compiled once
      specs = jax.tree.map(lambda a: a.sharding.spec, state)
      local = lambda state: jnp.stack([_sum(a) for a in jax.tree.leaves(state)])[None]
      every = P(jax.sharding.get_mesh().axis_names)
      mapped = jax.shard_map(local, in_specs=(specs,), out_specs=every, check_vma=False)
      sums = hosts.compiled_by_all(jax.jit(mapped))
    # A row of sums from each device, of its own parts.
    rows = sums(state).addressable_shards
    mine = {str(row.device.id): np.asarray(row.data)[0].tolist() for row in rows}
    said = {}
    for each in hosts.all_say(json.dumps(mine)):
      said |= json.loads(each)
    wrong = []
    for i, (path, array) in enumerate(jax.tree_util.tree_leaves_with_path(state)):
      copies = collections.defaultdict(dict)
      for device, index in array.sharding.devices_indices_map(array.shape).items():
        copies[str(index)][device.id] = said[str(device.id)][i]
      for found in copies.values():
        most = collections.Counter(found.values()).most_common()[0][0]
        if others := sorted(device for device, sum_ in found.items() if sum_ != most):
          wrong.append(f'{jax.tree_util.keystr(path)} on {others} of {sorted(found)}')
    if wrong:
      got = 'other bits in ' + ', '.join(wrong[:5]) + ', …' * (len(wrong) > 5)
      raise mistake('copies of the state', got, 'the same on all of those devices', FIX)

  return check


def repeating(train_step: Callable, options: Mapping | None = None) -> Callable:
  """A check that takes what `train_step` takes, and computes the step twice, keeping neither.

  The check raises a Mistake if the bits of the two differ. `options` are those that the step that
  trains is compiled with.
  """
  sums = jax.jit(lambda *args: jax.tree.map(_sum, train_step(*args)), compiler_options=options)
  digest = hosts.compiled_by_all(sums)

  def check(*args) -> None:
    first, second = (jax.device_get(digest(*args)) for _ in range(2))
    paths = jax.tree_util.tree_leaves_with_path(first)
    pairs = zip(paths, jax.tree.leaves(second), strict=True)
    other = [jax.tree_util.keystr(path) for (path, a), b in pairs if a != b]
    if other:
      got = f'other bits in {", ".join(other[:5])}'
      raise mistake('a step computed twice', got, 'the same bits', FIX)

  return check


def _sum(x: jax.Array) -> jax.Array:
  """A number that one flipped bit changes, and two that are exchanged: words times odd numbers."""
  if x.dtype.itemsize != 4:
    x = x.astype(jnp.float32)
  words = lax.bitcast_convert_type(x, jnp.uint32)
  layout = jax.typeof(words).sharding
  for dim in range(words.ndim):
    odd = 2 * lax.broadcasted_iota(jnp.uint32, words.shape, dim) + 1
    words = words * (odd if layout.mesh.empty else reshard(odd, layout))
  return words.sum(dtype=jnp.uint32)
