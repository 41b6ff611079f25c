"""What XLA is asked for besides its own defaults: the one place for its options.

Those of OPTIONS go into each compilation, so that a run, a step compiled ahead of it and a plan are
the same program. What the user says in XLA_FLAGS or LIBTPU_INIT_ARGS wins: an option that is named
there is left out here.
"""

import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

SAID_IN = ('XLA_FLAGS', 'LIBTPU_INIT_ARGS')
# By platform, because no compiler takes an option of another. A GPU's has none: collectives go on
# beside work by themselves, and benchmarks/NOTES.md has what was tried.
OPTIONS = {
  'cpu': {
    # By default it begins early what waits for nothing, as filling the arrays that a loop stacks
    # gradients in with zeros, which are then held all through the forward pass. Not where processes
    # train together: there Gloo ended them for collectives that do not match.
    'xla_cpu_scheduler_type': 'CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED',
  },
  'tpu': {
    # Weights are gathered beside work on v5p too; either of the two alone changes nothing there.
    'xla_enable_async_all_gather': True,
    'xla_tpu_enable_async_collective_fusion_fuse_all_gather': True,
    # Sums of gradients are scattered also where a part has no whole lanes of d.
    'xla_tpu_relayout_group_size_threshold_for_reduce_scatter': 1,
  },
}
# Not an option of OPTIONS, since all that the process compiles wants it, and not the steps alone.
ORDERED = '--xla_gpu_deterministic_ops=true'


def options(platform: str) -> dict[str, bool | int | str] | None:
  """As `jax.jit` takes them; None if there are none."""
  said = {name for variable in SAID_IN for name in re.findall(r'--(\w+)', flags(variable))}
  together = platform == 'cpu' and jax.distributed.is_initialized()  # which starts no device
  wanted = {} if together else OPTIONS.get(platform, {})
  return {name: value for name, value in wanted.items() if name not in said} or None


def apart(function: Callable) -> Callable:
  """The function, whose arguments XLA computes before it and not within it.

  XLA's CPU backend drops barriers before it fuses, and then computes one by one what it writes
  transposed.
  """

  def call(*args):
    with set_xla_metadata(inlineable='false'):
      return jax.jit(function)(*args)

  return call


def written(*arrays: Any) -> tuple:
  """The arrays, or trees of them, which a GPU has written before it reads what comes out here.

  What sums it does not write in place: XLA would make one of an update and the norms of it, and
  then copy params and moments to where they were.
  """
  return lax.platform_dependent(
    *arrays, default=lambda *same: same, cuda=lambda *same: lax.optimization_barrier(same)
  )


def fix_order(deterministic: bool) -> None:
  """Has XLA leave out, if it is wanted, what adds in any order on a GPU, before JAX starts one."""
  words = _said('XLA_FLAGS').split()
  if deterministic and ORDERED not in words:
    os.environ['XLA_FLAGS'] = ' '.join([*words, ORDERED])


def flags(variable: str) -> str:
  """What the user says in a variable, sorted."""
  # How many devices a CPU shall be says nothing that the mesh does not.
  words = _said(variable).split()
  return ' '.join(sorted(w for w in words if 'host_platform_device_count' not in w))


def _said(variable):
  """The text of a variable, or of the file that it may name instead."""
  text = os.environ.get(variable, '').strip()
  path = pathlib.Path(text)
  return path.read_text() if text and not text.startswith('-') and path.is_file() else text
