"""The alphabet and the mesh: on which axis of the mesh each dim of an array lies.

One letter per dim, the same in einsums, in the suffixes of variables and in the two tables here:
b sequences, l query position, s key position, t position in the residual, d model width, e the
same in a weight that is in no layer, h heads, k head width, f feed-forward width, v vocabulary,
n layers, c the three of q, k, v, g accumulation slice, p pipeline stage, r what a stage keeps for
later. Changing how a model is split over a machine means changing a table.
"""

import collections
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P, lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import mesh_utils
from jax.sharding import reshard

from gptjax.errors import Mistake, mistake, raise_all
from gptjax.sizes import Shape

AXES = ('stage', 'data', 'fsdp', 'tensor')
BATCH = ('data', 'fsdp')  # the axes that split the rows: a gradient is a sum over them
STORE = {  # weights at rest
  'n': 'stage',
  'd': 'fsdp',
  'e': ('stage', 'fsdp'),
  'h': 'tensor',
  'f': 'tensor',
  'v': 'tensor',
}
COMPUTE = {  # arrays in use
  'p': 'stage',
  'b': BATCH,
  't': 'tensor',  # sequence parallelism: what is not in a product is not done by all of tensor
  'h': 'tensor',
  'f': 'tensor',
  'v': ('tensor', 'stage'),  # embedding and output matrix are in no stage: each has a part of them
}

# Which axes best cross the links between machines: those that exchange least. data sums gradients
# once a step, stage hands on an activation, fsdp gathers every weight in every slice, and tensor
# exchanges activations several times in every layer.
SLOW_FIRST = ('data', 'stage', 'fsdp', 'tensor')

# Gradients are summed over devices in this dtype, whatever the dtype they were computed in: a sum
# of thousands of bf16 terms in bf16 loses the small ones.
REDUCE_DTYPE = jnp.float32

GATHERED = 'gathered'  # the name by which a remat policy knows a weight in use


def make_mesh(
  data: int,
  fsdp: int,
  tensor: int,
  devices: Sequence | None = None,
  *,
  stage: int = 1,
  across: dict[str, int] | None = None,
) -> jax.sharding.Mesh:
  """A mesh of explicit axes over all devices of the run, or over those given.

  Args:
    across: into how many parts slow links cut each axis, from `cross`; {} where there are none.
  """
  devices = jax.devices() if devices is None else devices
  sizes = stage, data, fsdp, tensor
  # As a torus of 4 × 8 has no 16 × 2 without: an axis of the mesh may end within one of the torus.
  split = {'allow_split_physical_axes': True}
  if across:
    outer = tuple(across[axis] for axis in AXES)
    inner = tuple(size // parts for size, parts in zip(sizes, outer, strict=True))
    ordered = mesh_utils.create_hybrid_device_mesh(
      inner, outer, devices, process_is_granule=_by_process(devices), **split
    )
  else:
    ordered = mesh_utils.create_device_mesh(sizes, devices, **split)
  return jax.sharding.Mesh(ordered, AXES, axis_types=(jax.sharding.AxisType.Explicit,) * len(AXES))


def nodes(devices: Sequence[jax.Device]) -> list[list[int]]:
  """The ids of devices by what fast links join: TPU slices, machines with GPUs, CPU processes."""
  found = collections.defaultdict(list)
  for device in devices:
    node = device.process_index if _by_process(devices) else getattr(device, 'slice_index', 0)
    found[node].append(device.id)
  return [found[key] for key in sorted(found)]


def _by_process(devices):
  """Whether it is a process that tells a device's node, and not the slice that JAX counts it to."""
  platform = devices[0].platform
  if platform in ('cpu', 'tpu'):
    # Processes with CPU devices on one machine are one slice for JAX, and here stand for as many
    # machines. A TPU that is one slice need not say which.
    return platform == 'cpu'
  # A slice of GPUs is what NVLink joins, a machine mostly. Ahead of time JAX calls all one slice.
  slices = {getattr(device, 'slice_index', 0) for device in devices}
  processes = {device.process_index for device in devices}
  return len(slices) == 1 < len(processes) < len(devices)


def cross(sizes: dict[str, int], devices: Sequence[jax.Device], slow_axes: str) -> dict[str, int]:
  """Into how many parts the links between nodes cut each axis of a mesh; {} for one node.

  Args:
    sizes: of the axes.
    devices: as many as the mesh has.
    slow_axes: those that may be cut, with commas between, of which the first are cut the most; or
      'auto', which is SLOW_FIRST.

  Raises:
    Mistake: if they cannot be cut into as many parts as there are nodes.
  """
  names = SLOW_FIRST if slow_axes == 'auto' else tuple(slow_axes.split(','))
  if not names or len(set(names) & set(AXES)) < len(names):
    wanted = f'auto or some of {", ".join(SLOW_FIRST)}, with commas between'
    raise mistake('mesh.slow_axes', repr(slow_axes), wanted, '--config.mesh.slow_axes=auto')
  groups = nodes(devices)
  if len(groups) == 1:
    return {}
  counts = sorted({len(group) for group in groups})
  if len(counts) > 1:
    got, fix = f'{counts[0]} on one and {counts[-1]} on another', 'machines that are alike'
    raise mistake(f'devices of {len(groups)} nodes', got, 'as many on each', fix)
  across, left = dict.fromkeys(sizes, 1), len(groups)
  for axis in names:
    across[axis] = math.gcd(sizes[axis], left)
    left //= across[axis]
  if left > 1:
    got = ', '.join(f'{axis} {sizes[axis]}' for axis in names) + f' over {len(groups)} nodes'
    wanted = f'sizes of which {len(groups)} nodes hold whole parts'
    raise mistake('mesh.slow_axes', got, wanted, '--config.mesh.slow_axes=auto')
  return across


def stages() -> int:
  """Into how many stages the layers are split, on the mesh that is set."""
  return jax.sharding.get_abstract_mesh().shape['stage']


def check(shape: Shape, sizes: dict[str, int], n_devices: int) -> None:
  """Raises one Mistake that lists everything about a mesh that does not divide."""
  mistakes = []
  if math.prod(sizes.values()) != n_devices:
    factors = '·'.join(sizes)
    product = '·'.join(str(size) for size in sizes.values())
    mistakes.append(
      mistake(
        f'mesh of {factors}',
        f'{product} = {math.prod(sizes.values())} devices',
        f'{n_devices}, all there are',
        'sizes of --config.mesh whose product is the number of devices'
        ' (of a CPU as many as XLA_FLAGS=--xla_force_host_platform_device_count=… says)',
      )
    )
  dims = {
    'd': ('d_model', shape.d_model),
    'h': ('n_heads', shape.n_heads),
    'f': ('d_ff', shape.d_ff),
    'v': ('the padded vocabulary', shape.padded_vocab),
    't': ('context', shape.context),
  }
  for dim, (name, length) in dims.items():
    axis = (COMPUTE | STORE)[dim]
    if length % sizes[axis]:
      divisors = [i for i in range(1, min(length, n_devices) + 1) if length % i == 0]
      mistakes.append(
        mistake(
          f'{name} over the mesh axis {axis}',
          f'{length} over {sizes[axis]}',
          'a size that divides it',
          f'--config.mesh.{axis}= one of {", ".join(map(str, divisors))}',
        )
      )
  if sizes['stage'] > 1:
    mistakes += _unstaged(shape, sizes['stage'], sizes['fsdp'])
  raise_all(mistakes)


def _unstaged(shape: Shape, stages: int, fsdp: int) -> Iterator[Mistake]:
  # Every stage runs the same program, so each has whole periods of the pattern.
  n, period = shape.n_layers, len(shape.windows)
  if n % (period * stages):
    works = [s for s in range(1, n + 1) if n % (period * s) == 0] or [1]
    yield mistake(
      'layers over the mesh axis stage',
      f'{n} over {stages}',
      f'whole periods of {period} layers in each',
      f'--config.mesh.stage= one of {", ".join(map(str, works))}',
    )
  if shape.d_model % (stages * fsdp):
    got, wanted = f'{shape.d_model} over {stages}·{fsdp}', 'sizes that divide it'
    yield mistake('d_model over stage·fsdp', got, wanted, 'another --config.mesh.fsdp')


def stored(dims: str) -> P:
  """How a weight of these dims lies at rest."""
  return P(*(_splitting(STORE.get(dim)) for dim in dims))


def computed(dims: str) -> P:
  """How an array of these dims lies in use."""
  return P(*(_splitting(COMPUTE.get(dim)) for dim in dims))


def joined(dims: str, rest: str) -> P:
  """How an array in use lies of which the first dim is these dims in one, and the rest those."""
  axes = [a for a in computed(dims).partitions if a]
  names = tuple(name for a in axes for name in ((a,) if isinstance(a, str) else a))
  return P(names or None, *computed(rest).partitions)


def _splitting(axes: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
  """Those axes that split anything: on the mesh that is set, one of size 1 need not exist."""
  sizes = jax.sharding.get_abstract_mesh().shape
  names = (axes,) if isinstance(axes, str) else axes or ()
  names = tuple(name for name in names if sizes[name] > 1)
  return names if len(names) > 1 else names[0] if names else None


def weight(key: jax.Array, dims: str, *shape: int, std: float) -> nnx.Param:
  """A parameter in f32 drawn from N(0, std), born sharded: the values do not depend on the mesh."""
  return nnx.Param(std * jax.random.normal(key, shape, out_sharding=stored(dims)))


def constant(value: float, dims: str, *shape: int) -> nnx.Param:
  """A parameter in f32 that starts as one value, born sharded."""
  return nnx.Param(jnp.full(shape, value, jnp.float32, out_sharding=stored(dims)))


def use(param: nnx.Param, dims: str, dtype: jnp.dtype, rows: str = 'b') -> jax.Array:
  """A parameter ready for use: cast, then gathered where STORE splits and COMPUTE does not.

  This line is FSDP. The result is `reduced` over the axes that split the `rows` it is used on, so
  that its gradient arrives as each device's own sum; it is cast to REDUCE_DTYPE and scattered over
  `fsdp` here, and stays unreduced over `data` if the parameter came through `defer`.
  """
  w = param[...]
  at_rest = jax.typeof(w).sharding.spec

  def gathered(w):
    used = reshard(w.astype(dtype), P(*computed(dims).partitions, reduced=_axes(rows)))
    return checkpoint_name(used, GATHERED)

  def backward(_, dw):
    cotangent = P(*at_rest.partitions, unreduced=at_rest.reduced)
    return (reshard(dw.astype(REDUCE_DTYPE), cotangent),)

  gather = jax.custom_vjp(gathered)
  # Not `gather(w)`: a remat policy would see one opaque call, and not the name inside it.
  gather.defvjp(lambda w: (gathered(w), None), backward)
  return gather(w)


def use_rows(param: nnx.Param, dims: str, dtype: jnp.dtype, rows: str, *shape: int) -> jax.Array:
  """A parameter for elementwise use on rows of a shape: [*rows, *dims]."""
  return spread(use(param, dims, dtype, rows), dims, rows, *shape)


def spread(w: jax.Array, dims: str, rows: str, *shape: int) -> jax.Array:
  """A parameter in use, spread over rows of a shape: [*rows, *dims]; XLA makes no array of it.

  A dim that is among both is its own, so that row l meets w[l].

  Explicit sharding lets a `reduced` array into products only, since there it knows how to leave
  the gradient unreduced; so a bias is spread over the rows by an outer product with ones. Its
  gradient is a plain sum, in f32: a product with ones XLA's GPU backend would join with others,
  and copy all their operands into one.
  """
  every = rows + ''.join(dim for dim in dims if dim not in rows)
  out, own_sum = computed(every), P(*computed(dims).partitions, unreduced=_axes(rows))
  summed = tuple(i for i, dim in enumerate(every) if dim not in dims)
  assert ''.join(dim for dim in every if dim in dims) == dims, 'a sum leaves dims in their order'

  def spread(w):
    ones = jnp.ones(shape, w.dtype, out_sharding=computed(rows))
    return jnp.einsum(f'{rows},{dims}->{every}', ones, w, out_sharding=out)

  def backward(_, dy):
    # Shardy aborts if it finds the gradient gathered for another use.
    dy_f32 = reshard(dy, out).astype(jnp.float32)
    return (lax.reduce_sum(dy_f32, summed, out_sharding=own_sum).astype(dy.dtype),)

  spreading = jax.custom_vjp(spread)
  spreading.defvjp(lambda w: (spread(w), None), backward)
  return spreading(w)


def residual(positions: int) -> str:
  """The letters of rows and positions of a residual: its positions are t where t splits them.

  A single token, as is read when text is generated, is whole on all devices.
  """
  sizes = jax.sharding.get_abstract_mesh().shape
  parts = math.prod(sizes[axis] for axis in _axes('t'))
  return 'bl' if positions % parts else 'bt'


def gather_positions(x_btd: jax.Array) -> jax.Array:
  """A residual with all positions on each device [b, l, d], for products that `tensor` splits.

  Each device's own sum in its gradient is added up over `tensor` and scattered here.
  """
  return reshard(x_btd, P(*computed('bld').partitions, reduced=_axes('t')))


def scatter_positions(
  multiply: Callable, subscripts: str, x: jax.Array, param: nnx.Param
) -> jax.Array:
  """The product of an array and a param, a sum over `tensor`, each device getting its positions.

  Args:
    multiply: of `products.py`.
    subscripts: of the product, ending in '->bld'.
  """
  own_sum = P(*computed('bld').partitions, unreduced=_axes('t'))
  return reshard_residual(multiply(subscripts, x, param, out_sharding=own_sum))


def reshard_residual(x_bld: jax.Array) -> jax.Array:
  """A residual as it lies between products."""
  return reshard(x_bld, computed(residual(x_bld.shape[1]) + 'd'))


def split_leading(a: jax.Array, p: int) -> jax.Array:
  """An array [n·p, …] as [n, p, …], the rest of its type unchanged."""
  # The output's type is given because JAX 0.10 cannot work it out for a `reduced` array and 1.
  spec = jax.typeof(a).sharding.spec
  first, *rest = spec.partitions
  out = P(first, None, *rest, reduced=spec.reduced, unreduced=spec.unreduced)
  return lax.reshape(a, (a.shape[0] // p, p, *a.shape[1:]), out_sharding=out)


def join_leading(a: jax.Array) -> jax.Array:
  """An array [n, p, …] as [n·p, …]: the inverse of `split_leading`."""
  spec = jax.typeof(a).sharding.spec
  first, _, *rest = spec.partitions
  out = P(first, *rest, reduced=spec.reduced, unreduced=spec.unreduced)
  return lax.reshape(a, (a.shape[0] * a.shape[1], *a.shape[2:]), out_sharding=out)


def use_for_long(w_vd: jax.Array) -> jax.Array:
  """The embedding [v, d] as `use` lays it, still in f32, for a whole step of a pipeline.

  Then `use` moves nothing, and its gradient stays each device's own sum until `take_back`. Rows
  that stages do not divide are filled up with rows of zeros.
  """
  used, sizes = computed('vd').partitions, jax.sharding.get_abstract_mesh().shape
  parts = math.prod(sizes[axis] for axis in COMPUTE['v'])
  rows = _spec(w_vd)[0] if len(w_vd) % parts == 0 else None
  # In two steps, because XLA knows no way to do both at once: gathered over fsdp, and then dealt
  # anew along the stages.
  w_vd = reshard(w_vd, P(rows, _splitting('stage')))
  w_vd = jnp.pad(w_vd, ((0, -len(w_vd) % parts), (0, 0)))
  return reshard(w_vd, P(*used, reduced=_axes('b')))


def take_back(dw_vd: jax.Array, w_vd: jax.Array) -> jax.Array:
  """The gradient of what `use_for_long` made of the embedding, reduced and laid as that is."""
  rows, columns = _spec(w_vd)
  if len(dw_vd) > len(w_vd):
    return reshard(reshard(dw_vd, P(None, columns))[: len(w_vd)], P(rows, columns))
  dw_vd = reshard(dw_vd, P(rows, _splitting('stage'), unreduced=_axes('b')))
  return reshard(dw_vd, P(rows, columns))


def defer(params: dict) -> dict:
  """Params whose gradients stay unreduced over `data`, to be summed over slices first."""
  return jax.tree.map(lambda w: reshard(w, P(*_spec(w), reduced=_data())), params)


def deferred_zeros(deferred: dict) -> dict:
  """Zeros in which gradients of `defer`red params are summed."""
  unreduced = lambda w: P(*_spec(w), unreduced=jax.typeof(w).sharding.spec.reduced)
  return jax.tree.map(lambda w: reshard(jnp.zeros(w.shape, REDUCE_DTYPE), unreduced(w)), deferred)


def reduce(grads: dict) -> dict:
  """Deferred gradients, summed over `data`: the one reduction of a step."""
  return jax.tree.map(lambda g: reshard(g, P(*_spec(g))), grads)


def whole(a: jax.Array) -> jax.Array:
  """An array of which every device has all."""
  return reshard(a, P())


def partial_sum(dims: str) -> P:
  """The type of a gradient of a weight in use: each device's own sum over its rows."""
  return P(*computed(dims).partitions, unreduced=_axes('b'))


def same_everywhere(a: jax.Array) -> jax.Array:
  """A scalar typed so that a `partial_sum` may be multiplied by it."""
  return reshard(a, P(reduced=_axes('b')))


def concrete(abstract: dict) -> dict:
  """Abstract arrays on the devices of the mesh that is set, and not on a mesh of any devices."""
  mesh = jax.sharding.get_mesh()

  def on_devices(a):
    spec = a.sharding.spec if a.sharding else P()  # one device: nothing to say
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=jax.NamedSharding(mesh, spec))

  return jax.tree.map(on_devices, abstract)


def _axes(dims: str) -> set[str]:
  """The axes that split dims in use."""
  axes = (_splitting(COMPUTE.get(dim)) or () for dim in dims)
  return {name for a in axes for name in ((a,) if isinstance(a, str) else a)}


def _data() -> set[str]:
  return {axis for axis in ('data',) if _splitting(axis)}


def _spec(a: jax.Array) -> tuple:
  return jax.typeof(a).sharding.spec.partitions
