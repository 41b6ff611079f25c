"""Reads a compiled program: what it computes, moves and exchanges, with every loop counted out.

The compiler's own counts take the body of a loop once, however often it runs; here each is
multiplied by its trips. All counts are of one device.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

COLLECTIVES = ('all-reduce', 'reduce-scatter', 'all-gather', 'all-to-all', 'collective-permute')
BITS = {'pred': 8, 'token': 0, 'opaque': 0}  # the other types have theirs in their names
SLICES = ('dynamic-slice', 'slice', 'gather')
START, DONE = '"AsyncCollectiveStart"', '"AsyncCollectiveDone"'
IOTA = r'\[([\d,]+)\](?:T\(([\d,]+)\))?'  # how XLA writes the devices 0, 1, 2 … in another order
# Custom calls of a TPU that only say what lies where.
STILL = ('AllocateBuffer', 'ConcatBitcast', 'AssumeGatherIndicesInBound')
# What moves nothing, or is counted where it is used or where it began.
FREE = {
  'parameter',
  'constant',
  'tuple',
  'get-tuple-element',
  'bitcast',
  'partition-id',
  'replica-id',
  'iota',
  'after-all',
  'opt-barrier',
  'broadcast',
}


@dataclasses.dataclass(frozen=True)
class Collective:
  """An exchange between the devices that differ along some axes of the mesh."""

  kind: str  # in COLLECTIVES
  axes: tuple[str, ...]
  devices: int  # in a group
  bytes: int  # of the whole array, before it is reduced and scattered or after it was gathered


@dataclasses.dataclass
class Costs:
  """What a device does in one run of a program."""

  flops: float  # of matrix products, two for each multiply-add; not those inside of kernels
  bytes: float  # from memory and to it
  collectives: collections.Counter  # how often each Collective
  kernels: collections.Counter  # how often each custom call, by what names it


@dataclasses.dataclass(frozen=True)
class _Array:
  dtype: str
  dims: tuple[int, ...]
  in_memory: bool  # on TPU, some arrays never leave the chip

  @property
  def bytes(self) -> float:
    bits = BITS[self.dtype] if self.dtype in BITS else int(re.search(r'\d+', self.dtype)[0])
    return math.prod(self.dims) * bits / 8

  @property
  def moved(self) -> float:
    """Bytes that go to memory, or come from it, when it is written or read."""
    return self.bytes * self.in_memory


@dataclasses.dataclass(frozen=True)
class _Instruction:
  name: str
  arrays: tuple[_Array, ...]  # of its result; a tuple's, one after the other
  opcode: str
  operands: tuple[str, ...]
  attributes: str  # what follows the operands; of a parameter or constant, what stands for them
  root: bool

  def find(self, pattern: str) -> str:
    """What a group in a pattern matches in the attributes; '' if nothing does."""
    found = re.search(pattern, self.attributes)
    return found[1] if found else ''

  @property
  def moved(self) -> float:
    return sum(a.moved for a in self.arrays)


def read(text: str, mesh: Mapping[str, int], trips: int = 1) -> Costs:
  """The costs of a program.

  Args:
    text: of the compiled program, `compiled.as_text()`.
    mesh: the sizes of its axes, in the order in which devices are numbered.
    trips: of loops whose count is not known when they are compiled.

  Raises:
    ValueError: for a program in which something is not as this module knows it.
  """
  computations, entry = _parsed(text)
  return _Reader(computations, mesh, trips).costs(entry)


def group(text: str) -> list[int] | None:
  """The devices of the first group of a collective, in each of the ways that XLA writes it.

  None is all there are.
  """
  if found := re.search(r'source_target_pairs=\{\{(\d+),(\d+)\}', text):
    return [int(found[1]), int(found[2])]
  if found := re.search(r'replica_groups=\{\{([\d,]*)\}', text):
    return [int(i) for i in found[1].split(',')]
  if found := re.search(r'replica_groups=\[([\d,]+)\]<=' + IOTA, text):
    return _iota(*found.groups()[1:]).reshape(_numbers(found[1]))[0].tolist()
  if found := re.search(r'replica_groups=mesh\[([^\]]*)\](.*?)\{([^}]*)\}', text):
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
    ordered = re.search(r'device_ids=\(' + IOTA, found[2])
    devices = _iota(*ordered.groups()) if ordered else np.arange(math.prod(sizes.values()))
    if re.search(r'device_ids', found[2]) and not ordered or ':' in found[3]:
      raise ValueError(f'groups of devices written otherwise: {found[0]}')
    named = re.findall(r"'(\w+)'", found[3])
    pick = tuple(slice(None) if name in named else 0 for name in sizes)
    return devices.reshape([*sizes.values()])[pick].ravel().tolist()
  if 'replica_groups={}' in text or 'replica_groups' not in text:
    return None
  raise ValueError(f'groups of devices written otherwise: {text[:200]}')


def _iota(sizes: str, order: str | None) -> np.ndarray:
  """Devices counted up in an array of these sizes, transposed."""
  devices = np.arange(math.prod(_numbers(sizes))).reshape(_numbers(sizes))
  return devices.transpose(_numbers(order) if order else None)


class _Reader:
  """Adds up computations: a callee is read once, and counts as often as it is called."""

  def __init__(self, computations, mesh, trips):
    self._computations, self._mesh, self._trips = computations, mesh, trips
    self._done = {}

  def costs(self, name: str) -> Costs:
    if name not in self._done:
      total = Costs(0, 0, collections.Counter(), collections.Counter())
      for instruction in self._computations[name].values():
        self._add(total, instruction, self._computations[name])
      self._done[name] = total
    return self._done[name]

  def _add(self, total, i, around):
    operands = [around[name] for name in i.operands]
    opcode = i.opcode.removesuffix('-start')
    if opcode.endswith(('-done', '-update')) or opcode in FREE:
      return
    if opcode == 'while':
      self._include(total, i.find(r'body=%?([\w.-]+)'), self._count(i))
    elif opcode in ('call', 'async'):
      self._include(total, i.find(r'(?:to_apply|calls)=%?([\w.-]+)'), 1)
    elif opcode == 'conditional':
      raise ValueError(f'a conditional, of which no one knows what it takes: {i.name}')
    elif opcode == 'fusion':
      self._fusion(total, i, operands)
    elif opcode in COLLECTIVES and not _goes_on(i, around.values()):
      total.collectives[self._collective(opcode, i, operands)] += 1
      total.bytes += sum(o.moved for o in operands) + i.moved
    elif opcode not in COLLECTIVES:
      total.flops += _flops(i, operands)
      total.bytes += _moved(i, operands)
      if opcode == 'custom-call':
        total.kernels[f'{i.find(r"custom_call_target=.([^,]*).,")} {i.name}'] += 1

  def _include(self, total, name, times, inside=False):
    part = self.costs(name)
    total.flops += part.flops * times
    total.bytes += part.bytes * times * (not inside)
    for counted in ('collectives', 'kernels'):
      for key, n in getattr(part, counted).items():
        getattr(total, counted)[key] += n * times

  def _count(self, i: _Instruction) -> int:
    """How often a loop runs."""
    if known := i.find(r'"known_trip_count":\{"n":"(\d+)"'):
      return int(known)
    # `counter < constant`, from 0 by 1, is what `scan` makes.
    condition = self._computations[i.find(r'condition=%?([\w.-]+)')].values()
    opcodes = sorted(j.opcode for j in condition)
    limits = [j.attributes for j in condition if j.opcode == 'constant']
    if opcodes == ['compare', 'constant', 'get-tuple-element', 'parameter']:
      return int(limits[0])
    return self._trips

  def _fusion(self, total, i, operands):
    name = i.find(r'calls=%?([\w.-]+)')
    inside = self._computations[name].values()
    part = self.costs(name)
    sums = [c for c in part.collectives if c.kind == 'all-reduce']
    if sums and i.arrays[0].bytes < operands[0].arrays[0].bytes:
      # How a TPU scatters a sum: an all-reduce of which each device keeps its part.
      for c in sums:
        total.collectives[dataclasses.replace(c, kind='reduce-scatter')] += part.collectives[c]
      total.flops += part.flops
    else:
      self._include(total, name, 1, inside=True)
    total.bytes += _read_by(inside) + _written_by(inside, i)

  def _collective(self, kind, i, operands) -> Collective:
    among = group(i.attributes)
    shape = tuple(self._mesh.values())
    among = [*range(math.prod(shape))] if among is None else among
    places = np.array(np.unravel_index(among, shape))
    axes = [axis for axis, at in zip(self._mesh, places, strict=True) if (at != at[0]).any()]
    size = sum(a.bytes for o in operands for a in o.arrays)
    size *= len(among) if kind == 'all-gather' else 1
    return Collective(kind, tuple(axes), len(among), int(size))


def _goes_on(i: _Instruction, inside) -> bool:
  """Whether a collective began in an earlier fusion, with work that a TPU does meanwhile.

  Each fusion of such a chain has the collective in it; the first one starts it.
  """
  if not i.find(r'(chain_id)="'):
    return False
  return not any(START in use.attributes for use, _ in _uses(i, inside))


def _in_place(inside) -> set[str]:
  """The arrays of collectives that began earlier, which a fusion only passes on."""
  ends = {
    j.name
    for j in inside
    if j.opcode in COLLECTIVES and _goes_on(j, inside) or DONE in j.attributes
  }
  if not ends:
    return ends
  known = ends | {j.name for j in inside if j.root and j.opcode == 'tuple'}
  parameters = (j for j in inside if j.opcode == 'parameter')
  return ends | {
    j.name for j in parameters if all(use.name in known for use, _ in _uses(j, inside))
  }


def _read_by(inside) -> float:
  """Bytes that a fusion reads: of an operand of which it only takes slices, the slices."""
  total, in_place = 0.0, _in_place(inside)
  for j in inside:
    if j.opcode != 'parameter' or j.name in in_place:
      continue
    if len(j.arrays) != 1:
      total += j.moved
      continue
    (array,), uses = j.arrays, [*_uses(j, inside)]
    if uses and all(use.opcode in SLICES and at == 0 for use, at in uses):
      total += sum(use.arrays[0].bytes for use, _ in uses) * array.in_memory
    elif not all(use.opcode == 'dynamic-update-slice' and at == 0 for use, at in uses):
      total += array.moved  # else it is written into, in place
  return total


def _uses(source, inside) -> Iterator[tuple[_Instruction, int]]:
  """The instructions that use one, and as which operand, whatever it is called in between."""
  for j in inside:
    for at, operand in enumerate(j.operands):
      if operand == source.name:
        if j.opcode == 'bitcast':
          yield from _uses(j, inside)
        else:
          yield j, at


def _written_by(inside, fusion) -> float:
  """Bytes that a fusion writes: of an array that it only updates, the update."""
  by_name = {j.name: j for j in inside}
  (root,) = [j for j in inside if j.root]
  outputs = [by_name[o] for o in root.operands] if root.opcode == 'tuple' else [root]
  if START in root.attributes:  # its result names the operand first
    return sum(array.moved for array in fusion.arrays[1:])
  total, in_place = 0.0, _in_place(inside)
  for array, output in zip(fusion.arrays, outputs, strict=False):
    while output.opcode == 'bitcast':
      output = by_name[output.operands[0]]
    if output.name in in_place:
      continue
    if output.opcode == 'dynamic-update-slice':
      total += by_name[output.operands[1]].arrays[0].bytes * array.in_memory
    else:
      total += array.moved
  return total


def _moved(i, operands) -> float:
  """Bytes that an instruction of its own reads and writes."""
  if i.find(r'custom_call_target="(\w+)"') in STILL:
    return 0
  if i.opcode in SLICES:
    return i.moved + i.arrays[0].bytes * operands[0].arrays[0].in_memory
  if i.opcode == 'slice-start':  # its result names the operand first
    return i.arrays[1].moved + i.arrays[1].bytes * operands[0].arrays[0].in_memory
  if i.opcode == 'dynamic-update-slice':
    update = operands[1].arrays[0]
    return update.moved + update.bytes * i.arrays[0].in_memory
  if i.opcode == 'copy-start':  # its result names the operand too
    return sum(a.moved for a in i.arrays[:2])
  return sum(o.moved for o in operands) + i.moved


def _flops(i, operands) -> float:
  if i.opcode == 'dot':
    contracted = _numbers(i.find(r'lhs_contracting_dims=\{([\d,]*)\}'))
  elif i.opcode == 'custom-call' and '$gemm' in i.attributes or '$lt$matmul' in i.attributes:
    contracted = _numbers(i.find(r'"lhs_contracting_dimensions":\[([\d,"]*)\]').replace('"', ''))
  elif i.opcode == 'convolution':
    return _convolution(i, operands)
  else:
    return 0
  inner = math.prod(operands[0].arrays[0].dims[d] for d in contracted)
  return 2 * math.prod(i.arrays[0].dims) * inner


def _convolution(i, operands) -> float:
  """What a TPU makes of a product: pairs of input and kernel that do not meet cost nothing."""
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', i.attributes)
  image, kernel, out = (labels[n] for n in (1, 2, 3))
  window = i.find(r'window=\{([^}]*)\}')
  spatial = sorted(c for c in kernel if c.isdigit())
  each = lambda name, default: (
    re.search(rf'(?<![a-z_]){name}=([\dx_-]+)', window) or [0, 'x'.join([default] * len(spatial))]
  )[1].split('x')
  dims = lambda letters, array: dict(zip(letters, array.dims, strict=True))
  x, w = dims(image, operands[0].arrays[0]), dims(kernel, operands[1].arrays[0])
  y = dims(out, i.arrays[0])
  pairs = 1
  for n, c in enumerate(spatial):
    stride, x_apart, w_apart = (
      int(each(name, '1')[n]) for name in ('stride', 'lhs_dilate', 'rhs_dilate')
    )
    low = int(each('pad', '0_0')[n].split('_')[0])
    at = np.arange(y[c])[:, None] * stride + np.arange(w[c])[None] * w_apart - low
    meets = (at >= 0) & (at % x_apart == 0) & (at // x_apart < x[c])
    pairs *= int(meets.sum())
  return 2 * y['b'] * y['f'] * w['i'] * pairs


def _numbers(text: str) -> list[int]:
  return [int(n) for n in text.split(',') if n]


def _parsed(text: str) -> tuple[dict[str, dict[str, _Instruction]], str]:
  """The instructions of each computation by their names, and the name of the first to run."""
  computations, entry, inside = {}, '', None
  for line in text.splitlines():
    if head := re.match(r'(ENTRY )?%?([\w.-]+) \(.*\{$', line):
      inside = computations.setdefault(head[2], {})
      entry = head[2] if head[1] else entry
    elif line == '}':
      inside = None
    elif inside is not None and (found := re.match(r' +(ROOT )?%?([\w.-]+) = (.*)', line)):
      instruction = _instruction(found[2], found[3], bool(found[1]))
      inside[instruction.name] = instruction
  if not entry:
    raise ValueError('not the text of a compiled program')
  return computations, entry


def _instruction(name, text, root) -> _Instruction:
  end = _closing(text, 0) + 1 if text.startswith('(') else text.index(' ')
  kind, rest = text[:end], text[end:].lstrip()
  opcode, _ = rest.split('(', 1)
  end = _closing(rest, len(opcode))
  inside, attributes = rest[len(opcode) + 1 : end], rest[end + 1 :]
  if opcode in ('parameter', 'constant'):
    operands, attributes = (), inside
  else:
    operands = tuple(re.findall(r'%([\w.-]+)', inside))
  arrays = tuple(
    _Array(dtype, tuple(_numbers(dims)), 'S(' not in (layout or ''))
    for dtype, dims, layout in re.findall(r'(\w+)\[([\d,]*)\](\{[^}]*\})?', kind)
  )
  return _Instruction(name, arrays, opcode, operands, attributes, root)


def _closing(text: str, start: int) -> int:
  """Where the bracket at `start` is closed."""
  depth = 0
  for found in re.compile(r'[()]').finditer(text, start):
    depth += 1 if found[0] == '(' else -1
    if not depth:
      return found.start()
  raise ValueError(f'a bracket is not closed: {text[:100]}')
