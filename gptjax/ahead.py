"""The training step compiled before the run, for devices that may not be there, and kept in a file.

A file is a line of JSON, what the step was compiled from, and then the executable as JAX writes it.
An executable is a program: load only what you have compiled.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from concurrent import futures

import jax
import numpy as np
import zstandard
from etils import epath
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache

from gptjax import checkpoint, compiler, files, flags, garbage, hosts, process, sharding
from gptjax.config import Run
from gptjax.data import dataset
from gptjax.errors import Mistake, mistake, told_as

KIND = 'a training step of gptjax, 1'
# Of JAX, that change what is traced.
SETTINGS = ('jax_default_matmul_precision', 'jax_enable_x64', 'jax_default_prng_impl')
# What compiles, or runs what was compiled: for all platforms, and for each.
PACKAGES = {
  '': ('jax', 'jaxlib', 'flax', 'optax'),
  'cpu': (),
  'tpu': ('libtpu',),
  'gpu': (
    'jax-cuda12-pjrt',
    'jax-cuda12-plugin',
    'jax-cuda13-pjrt',
    'jax-cuda13-plugin',
    'nvidia-cudnn-cu12',
    'nvidia-cudnn-cu13',
  ),
}
SMALLER = (
  'a smaller --config.compute.microbatch, --config.compute.remat=dots or full, '
  'or more devices with --config.mesh.fsdp'
)


class DoesNotFit(Mistake):
  """The compiler refuses a program that wants more memory than there is."""


def cache_in(workdir: epath.Path, wanted: bool) -> None:
  """Keeps what is compiled in the workdir, so that the next start need not compile it again."""
  own = workdir / 'cache'
  if hosts.first():
    for name in files.names(own):
      # XLA keeps folders of its own there.
      if name.endswith('-cache') and (own / name).is_file() and _cut((own / name).read_bytes()):
        hosts.say(f'cache    {name[:40]}… was cut, and is compiled again')
        (own / name).unlink(missing_ok=True)
  # A folder that the environment names is meant for more runs than this one.
  folder = os.environ.get('JAX_COMPILATION_CACHE_DIR') or str(own)
  jax.config.update('jax_compilation_cache_dir', folder if wanted else None)
  compilation_cache.reset_cache()  # of a run in this process before


def _cut(entry: bytes) -> bool:
  """Whether who wrote this entry of JAX's cache died of it: JAX would never replace it."""
  reader = zstandard.ZstdDecompressor().decompressobj()
  try:
    reader.decompress(entry)
  except zstandard.ZstdError:
    return True
  return not reader.eof


def step(run: Run, mesh: jax.sharding.Mesh) -> Callable:
  """What to call as `Program.train_step`: from the run's file, or compiled from now on.

  That is done in a thread, while the caller makes or restores a state; the first call waits for it,
  and raises what the compiler raised. A device's lack of memory is a Mistake.
  """
  if run.compiled:
    compiled = futures.Future()
    compiled.set_result(load(run.compiled, run, mesh))
  else:
    compiling = futures.ThreadPoolExecutor(1, flags.COMPILING)
    compiled = compiling.submit(_compile, run, mesh)
    compiling.shutdown(wait=False)

  def made(*_):
    result = compiled.result()
    garbage.look_as_usual()
    process.give_memory_back()  # what compiling took, and what making the state did
    if mesh.devices.flat[0].platform == 'cpu':
      process.keep_memory()
    return result

  return _memory_told()(hosts.called_together(made))


@contextlib.contextmanager
def _memory_told() -> Iterator[None]:
  try:
    yield
  except jax.errors.JaxRuntimeError as e:
    if 'RESOURCE_EXHAUSTED' not in str(e):
      raise
    raise mistake('memory', str(e).splitlines()[0][:300], 'enough for a step', SMALLER) from e


def _compile(run, mesh):
  with jax.set_mesh(mesh):  # a thread has a mesh of its own
    return jitted(run, mesh).lower(*abstract_arguments(run)).compile()


def jitted(run: Run, mesh: jax.sharding.Mesh) -> Callable:
  """The step, compiled by its first call."""
  options = compiler.options(mesh.devices.flat[0].platform)
  return jax.jit(run.program.train_step, donate_argnums=0, compiler_options=options)


def compile_step(run: Run, mesh: jax.sharding.Mesh) -> jax.stages.Compiled:
  """The step that `train` runs, for the devices of a mesh.

  Raises:
    DoesNotFit: where the compiler finds too little memory.
    Mistake: with the compiler's own words, where it refuses for another reason.
  """
  with _refusals_told(), _anew():
    return _compile(run, mesh)


@contextlib.contextmanager
def _anew() -> Iterator[None]:
  """Takes nothing from JAX's cache: a CPU program from there has lost what saving it wants."""
  before = jax.config.jax_enable_compilation_cache
  jax.config.update('jax_enable_compilation_cache', False)
  compilation_cache.reset_cache()  # it asks once only whether it is wanted
  try:
    yield
  finally:
    jax.config.update('jax_enable_compilation_cache', before)
    compilation_cache.reset_cache()


def abstract_arguments(run: Run) -> tuple:
  """What the step takes on the mesh that is set, as shapes, dtypes and shardings."""
  shape = run.program.shape
  tokens = dataset.features(shape.context, shape.vocab_size)['tokens']
  size = run.slices, run.microbatch, *tokens.shape
  layout = jax.NamedSharding(jax.sharding.get_mesh(), sharding.computed('gbl'))
  token_gbl = jax.ShapeDtypeStruct(size, tokens.np_dtype, sharding=layout)
  scalars = [jax.ShapeDtypeStruct((), kind) for kind in (np.int32, np.int32, np.float32)]
  return run.program.abstract_state(), token_gbl, *scalars


@contextlib.contextmanager
def _refusals_told() -> Iterator[None]:
  """Turns what a compiler refuses into a Mistake: too little memory, or its own words."""
  try:
    yield
  except jax.errors.JaxRuntimeError as e:
    if sizes := out_of_memory(str(e)):
      used, there = (f'{size / 1e9:,.2f} GB' for size in sizes)
      over = f'{(sizes[0] - sizes[1]) / 1e9:,.2f} GB too much'
      raise DoesNotFit(f'memory of a device: {used} wanted, {there} there: {over}') from e
    words = '\n'.join(line[:200] for line in str(e).splitlines()[:8])
    fix = 'another topology or mesh, or compute.attention=chunked'
    raise mistake('the compiler', f'its refusal: {words}', 'a program', fix) from e


def out_of_memory(message: str) -> tuple[float, float] | None:
  """Bytes wanted and there, of a TPU compiler's refusal; None if it is for another reason."""
  size = r'([\d.]+)([KMGT]?)'
  found = re.search(rf'Used {size} of {size} hbm', message) or re.search(
    rf'required for HLO temporaries \({size}\) exceeds available HBM \({size}\)', message
  )
  if not found:
    return None
  unit = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}
  wanted, u, there, v = found.groups()
  return float(wanted) * unit[u], float(there) * unit[v]


def save(
  path: str | os.PathLike, compiled: jax.stages.Compiled, run: Run, mesh: jax.sharding.Mesh
) -> int:
  """Writes a compiled step, with all that it was made from, and returns how many bytes."""
  payload, _, out_tree = serialize_executable.serialize(compiled)
  _, metrics = out_tree.unflatten(range(out_tree.num_leaves))
  head = {
    'kind': KIND,
    'metrics': sorted(metrics),
    'sha256': hashlib.sha256(payload).hexdigest(),
    'made from': made_from(run, mesh),
  }
  data = json.dumps(head).encode() + b'\n' + payload
  files.write_whole(path, data)
  return len(data)


def load(path: str, run: Run, mesh: jax.sharding.Mesh) -> Callable:
  """The step from a file, to call as `Program.train_step` on the devices of a mesh.

  Raises:
    Mistake: for a file that is none, is damaged, or was made from anything else than this run.
  """
  what = f'compute.compiled={path}'
  wanted = 'a step that gptjax.plan --save wrote'
  fix = "compiling it again, or --config.compute.compiled=''"
  with told_as(what, wanted, fix, OSError, ValueError, KeyError, TypeError):
    line, payload = epath.Path(path).read_bytes().split(b'\n', 1)
    head = json.loads(line)
    metrics = dict.fromkeys(head['metrics'], 0)
    if head['kind'] != KIND:
      raise mistake(what, head['kind'], KIND, fix)
    if hashlib.sha256(payload).hexdigest() != head['sha256']:
      raise mistake(what, 'a file that was cut or changed', wanted, fix)
    there, here = head['made from'], made_from(run, mesh)
    other = [name for name in sorted({*there, *here}) if there.get(name) != here.get(name)]
    if other:
      told = lambda found: ', '.join(f'{name} {found.get(name, "none")}' for name in other)
      raise mistake(what, f'a step made from {told(there)}', f'{told(here)} as here', fix)
  with jax.set_mesh(mesh):
    arguments = abstract_arguments(run)
  in_tree = jax.tree.structure((arguments, {}))
  out_tree = jax.tree.structure((arguments[0], metrics))
  devices = [*mesh.devices.flat]
  with told_as(what, 'a step that this machine can load', fix, Exception):
    return serialize_executable.deserialize_and_load(
      payload, in_tree, out_tree, devices[0].client, devices
    )


def made_from(run: Run, mesh: jax.sharding.Mesh) -> dict[str, object]:
  """All that the compiled step follows from, flat and as JSON gives it back."""
  program, devices = run.program, mesh.devices.flat
  platform = devices[0].platform
  recipe = {
    'model': dataclasses.asdict(program.shape),
    'adamw': dataclasses.asdict(program.optimizer),
    'stability': dataclasses.asdict(program.guard),
    'numerics': dataclasses.asdict(program.numerics)
    | {name: getattr(program.numerics, name).name for name in ('dtype', 'between')}
    | {name: getattr(program.numerics, name).__name__ for name in ('attend', 'multiply')},
    'loss_chunk': program.loss_chunk,
    'seed': program.seed,
    'mesh': run.mesh,
    'microbatch': run.microbatch,
    'slices': run.slices,
    'device': devices[0].device_kind,
    'devices in order': [device.id for device in devices],
    'code': _code(),
    'version': {name: _version(name) for name in (*PACKAGES[''], *PACKAGES[platform])},
    'options': compiler.options(platform) or {},
    'flags': {name: compiler.flags(name) for name in compiler.SAID_IN},
    'jax': {name: str(getattr(jax.config, name)) for name in SETTINGS},
  }
  return checkpoint.flatten(recipe)


def _code() -> str:
  """A hash of gptjax's own source."""
  root = pathlib.Path(__file__).parent
  text = [path.read_bytes() for path in sorted(root.rglob('*.py'))]
  return hashlib.sha256(b'\0'.join(text)).hexdigest()[:16]


def _version(package):
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return 'none'
