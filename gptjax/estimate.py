"""From what a compiled step does to how long it takes at best: arithmetic, and no measurement."""

import collections
import dataclasses

from gptjax import hlo, metrics
from gptjax.machines import Chip
from gptjax.schedule import Ramp
from gptjax.sizes import Shape

# Products of queries with keys, or of scores with values, in one run of an attention kernel over a
# layer: two forward, and backward those, their gradients, and what is computed again. By the
# beginnings of what the kernels are called.
KERNEL_PRODUCTS = {
  '__cudnn$fmhaSoftmaxBackward': 5,
  '__cudnn$fmhaSoftmax': 2,
  'tpu_custom_call splash_mha_fwd': 2,
  'tpu_custom_call splash_mha_dkv': 4,
  'tpu_custom_call splash_mha_dq': 3,
}
# Bytes that a device sends in a collective, of the whole array's.
SENT = {
  'all-gather': lambda n: (n - 1) / n,
  'reduce-scatter': lambda n: (n - 1) / n,
  'all-to-all': lambda n: (n - 1) / n,
  'all-reduce': lambda n: 2 * (n - 1) / n,
  'collective-permute': lambda n: 1,
}


@dataclasses.dataclass(frozen=True)
class Work:
  """What a device does: in a step besides its slices, in a slice, or in a whole step."""

  flops: float
  bytes: float  # from memory and to it
  sent: dict[tuple[str, tuple[str, ...]], float]  # bytes by kind of collective and axes

  def plus(self, other: 'Work', times: int) -> 'Work':
    """Both, the other so many times."""
    sent = collections.Counter(self.sent)
    for key, size in other.sent.items():
      sent[key] += times * size
    sent = {key: size for key, size in sent.items() if size}
    return Work(self.flops + times * other.flops, self.bytes + times * other.bytes, sent)


def work(costs: hlo.Costs, shape: Shape, rows: float, tensor: int) -> Work:
  """What costs come to with what is inside of kernels.

  Args:
    costs: of the compiled program, or a part of it.
    shape: of the model.
    rows: of a slice, on each device.
    tensor: over how many devices heads are split.
  """
  seen = sum(shape.keys_seen(shape.window(i)) for i in range(shape.n_layers)) / shape.n_layers
  product = 2 * rows * shape.context * seen * shape.n_heads * shape.d_head / tensor
  flops = costs.flops
  for name, times in costs.kernels.items():
    kinds = [kind for kind in KERNEL_PRODUCTS if name.startswith(kind)]
    flops += KERNEL_PRODUCTS[kinds[0]] * times * product if kinds else 0
  sent = collections.Counter()
  for c, times in costs.collectives.items():
    sent[c.kind, c.axes] += times * c.bytes * SENT[c.kind](c.devices)
  return Work(flops, costs.bytes, dict(sent))


@dataclasses.dataclass(frozen=True)
class Seconds:
  """How long each part of some work takes by itself."""

  compute: float
  memory: float
  network: float

  @property
  def least(self) -> float:
    """If each part hides behind the longest."""
    return max(self.compute, self.memory, self.network)

  @property
  def most(self) -> float:
    """If no part hides behind another."""
    return self.compute + self.memory + self.network

  @property
  def bound(self) -> str:
    """The part that takes longest."""
    return max(('compute', 'memory', 'network'), key=lambda part: getattr(self, part))


def seconds(done: Work, chip: Chip, mesh: dict[str, int], across: dict[str, int]) -> Seconds:
  """How long work takes at the rates of the data sheet.

  Collectives follow each other. One between nodes goes at the pace of their network, where each of
  a group's devices in a node has its own share of it.
  """
  network = 0.0
  for (_, axes), sent in done.sent.items():
    cut = [across.get(axis, 1) for axis in axes]
    if max(cut, default=1) == 1:
      network += sent / chip.fast
      continue
    within = 1
    for axis, parts in zip(axes, cut, strict=True):
      within *= mesh[axis] // parts
    network += sent / ((chip.slow or float('nan')) * within)
  peak = metrics.peak_flops(chip.kind)
  return Seconds(done.flops / peak, done.bytes / chip.bandwidth, network)


def run_seconds(ramp: Ramp, microbatch: int, extra: int, besides: Seconds, each: Seconds):
  """The whole run, at best and at worst, from a step's time besides its slices and that of each.

  Args:
    ramp: the batches.
    microbatch: sequences in a slice.
    extra: turns that a pipeline takes in each step besides its slices.
    besides: of a step without slices.
    each: of a slice.
  """
  least = most = 0.0
  for rows, steps in ramp.stretches():
    slices = -(-rows // microbatch) + extra
    parts = {f.name: 0.0 for f in dataclasses.fields(Seconds)}
    for name in parts:
      parts[name] = getattr(besides, name) + slices * getattr(each, name)
    step = Seconds(**parts)
    least, most = least + steps * step.least, most + steps * step.most
  return least, most
