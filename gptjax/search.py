"""Which meshes, microbatches and remat policies are worth compiling for a run on a machine."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import jax

from gptjax import sharding
from gptjax.errors import Mistake
from gptjax.sizes import Shape

SIZES = (1, 2, 4, 8, 16)  # of tensor and stage; more of either never paid in what was published
STATE_BYTES = 16  # of a parameter: itself, its gradient, two moments, all f32


@dataclasses.dataclass(frozen=True)
class Settings:
  """Knobs of the machine that change what a device holds, and nothing of the training."""

  mesh: dict[str, int]
  microbatch: int  # sequences for each part of data·fsdp
  remat: str

  @property
  def shape(self) -> str:
    """Of the mesh, in the order of its axes."""
    return '·'.join(map(str, self.mesh.values()))

  def knobs(self) -> dict[str, object]:
    """As dotted knobs of a config."""
    mesh = {f'mesh.{axis}': size for axis, size in self.mesh.items()}
    return mesh | {'compute.microbatch': self.microbatch, 'compute.remat': self.remat}


def meshes(
  shape: Shape, batch: int, devices: Sequence[jax.Device], memory: int
) -> Iterator[dict[str, int]]:
  """Meshes that divide the model and hold its state, those that exchange least first.

  tensor stays within a node, and fsdp, which gathers weights, is as small as holds the state.

  Args:
    shape: of the model.
    batch: sequences of a step after the ramp.
    devices: of the machine.
    memory: bytes of each.
  """
  n, node, found = len(devices), len(sharding.nodes(devices)[0]), []
  for tensor, stage in itertools.product(SIZES, SIZES):
    rest = n // (tensor * stage)
    if node % tensor or rest * tensor * stage != n:
      continue
    for fsdp in sorted(d for d in range(1, rest + 1) if rest % d == 0):
      mesh = {'stage': stage, 'data': rest // fsdp, 'fsdp': fsdp, 'tensor': tensor}
      held = STATE_BYTES * shape.n_params / (stage * fsdp * tensor)
      if held > memory / 2 or batch % rest or not _divides(shape, mesh, n):
        continue
      found.append(mesh)
      break
  # A stage idles, tensor exchanges in every layer: as little of them as will do.
  yield from sorted(found, key=lambda mesh: (mesh['tensor'] * mesh['stage'] ** 2, mesh['stage']))


def policies(batch: int, mesh: dict[str, int]) -> Iterator[Settings]:
  """Microbatches and remat policies for a mesh, those that compute least again first."""
  for remat, microbatch in itertools.product(('none', 'dots', 'full'), (4, 2, 1)):
    if batch % (mesh['data'] * mesh['fsdp'] * microbatch) == 0:
      yield Settings(mesh, microbatch, remat)


def _divides(shape, mesh, n) -> bool:
  try:
    sharding.check(shape, mesh, n)
  except Mistake:
    return False
  return True
