"""`python -m benchmarks.contender`: training steps in a process of its own, when asked for.

Reads a line of JSON, the job, and after it a number of steps a line; answers each with a line of
JSON, and ends with its input. `benchmarks.against` speaks to it. PyTorch's process does not import
JAX, nor the other way round, so that memory can be told apart.
"""

import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import pathlib
import resource
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from gptjax.errors import Mistake, mistake
from gptjax.sizes import Shape

SQUARE = 4096  # rows of the matrices multiplied, as in benchmarks.train_step
PARAMS = 'params.npz'


class Ours:
  """A step of gptjax on one device."""

  library = 'jax'

  def __init__(self, job: Mapping, size: Sequence[int] | None = None):
    """`size` is slices of a step and rows of each; None: the config's."""
    from gptjax import flags, process
    from gptjax.config import resolve

    self.device = process.devices()[0]
    self.kind = self.device.device_kind
    config = flags.parse(['', *job['words']])
    if size:
      config.compute.microbatch, config.batch.sequences = size[1], math.prod(size)
      config.batch.ramp_tokens = 0.0
    self.run = resolve(config, [self.device])
    self.program, self.mesh = self.run.program, self.run.make_mesh([self.device])

  def begin(self, params: dict) -> None:
    """Takes weights, and makes the rest of a state."""
    import jax

    from gptjax import ahead

    self.train_step = ahead.step(self.run, self.mesh)
    with jax.set_mesh(self.mesh):
      like = self.program.abstract_state()['params']
      params = jax.tree.map(lambda a, like: jax.device_put(a, like.sharding), params, like)
      self.state = jax.jit(self.program.begin, donate_argnums=0)(params)

  def put(self, token_gbl: np.ndarray, rows: int, lr: float) -> tuple:
    """The arguments of a step."""
    import jax

    from gptjax import sharding

    with jax.set_mesh(self.mesh):
      token_gbl = jax.device_put(token_gbl, sharding.computed('gbl'))
    return token_gbl, np.int32(0), np.int32(rows), np.float32(lr)

  def step(self, args: tuple):
    """Takes a step and returns its loss, a scalar that may still be computed."""
    self.state, measured = self.train_step(self.state, *args)
    return measured['loss']

  def finish(self) -> None:
    """Returns when all steps are taken."""
    import jax

    jax.block_until_ready(self.state)

  def product(self, dtype: str) -> Callable[[int], None]:
    """What multiplies two large matrices so many times, and waits."""
    import jax
    import jax.numpy as jnp

    a = jnp.asarray(square(), dtype)
    # In f32, as sums of products are: only so are those of bf16 fast on a CPU.
    multiply = jax.jit(functools.partial(jnp.matmul, preferred_element_type=jnp.float32))
    return lambda times: jax.block_until_ready([multiply(a, a) for _ in range(times)][-1])

  def peak_bytes(self) -> int | None:
    """Of a GPU; None where it does not tell."""
    return (self.device.memory_stats() or {}).get('peak_bytes_in_use')


class Torch:
  """A step of `benchmarks.torch_gpt` on one device."""

  library = 'torch'

  def __init__(self, job: Mapping):
    try:
      import torch
    except ImportError:
      raise Lacks("torch is not installed; try pip install -e '.[test]'") from None

    from benchmarks import torch_gpt

    self.gpt, self.job = torch_gpt, job
    self.where = 'cpu' if job['platform'] == 'cpu' else 'cuda'
    if self.where == 'cuda' and not torch.cuda.is_available():
      got = f'torch {torch.__version__} (CUDA {torch.version.cuda or "none"}), which sees none'
      wanted = f'the {job["platform"]} that JAX uses'
      raise Lacks(str(mistake("torch's device", got, wanted, 'a build of torch for it')))
    self.kind = torch.cuda.get_device_name() if self.where == 'cuda' else 'cpu'

  def begin(self, params: dict) -> None:
    """Takes weights, and makes the rest of a state."""
    job = self.job
    shape = Shape(**job['shape'] | {'windows': tuple(job['shape']['windows'])})
    mode = self.gpt.Mode(job['dtype'], job['compiled'], job['bands'])
    self.trainer = self.gpt.Trainer(shape, params, mode, self.where)

  def put(self, token_gbl: np.ndarray, rows: int, lr: float) -> tuple:
    """The arguments of a step."""
    return self.trainer.put(token_gbl, rows), lr

  def step(self, args: tuple):
    """Takes a step and returns its loss, a scalar that may still be computed."""
    return self.trainer.step(*args)

  def finish(self) -> None:
    """Returns when all steps are taken."""
    self.trainer.synchronize()

  def product(self, dtype: str) -> Callable[[int], None]:
    """What multiplies two large matrices so many times, and waits."""
    return self.gpt.product(square(), dtype, self.where)

  def peak_bytes(self) -> int | None:
    """Of a GPU; None on a CPU."""
    return self.trainer.peak_bytes()


class Lacks(Exception):
  """Something that is not installed."""


def process_peak_bytes() -> int:
  """The most memory that this process has had."""
  try:
    lines = pathlib.Path('/proc/self/status').read_text().splitlines()
    (kilobytes,) = [line.split()[1] for line in lines if line.startswith('VmHWM:')]
    return 1024 * int(kilobytes)
  except (OSError, ValueError):
    # In bytes on macOS. On Linux it would count the process that this one was forked from.
    unit = 1 if sys.platform == 'darwin' else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def save(path: pathlib.Path, params: Mapping) -> None:
  """Nested dicts of arrays as one file, without pickle."""
  np.savez(path, **dict(_flat(params)))


def _flat(params, prefix=''):
  for name, part in params.items():
    if isinstance(part, Mapping):
      yield from _flat(part, f'{prefix}{name}/')
    else:
      yield prefix + name, np.asarray(part)


def load(path: pathlib.Path) -> dict:
  """What `save` wrote."""
  params = {}
  with np.load(path) as arrays:
    for name in arrays.files:
      *folders, last = name.split('/')
      at = params
      for folder in folders:
        at = at.setdefault(folder, {})
      at[last] = arrays[name]
  return params


def draw(job: Mapping) -> dict:
  """Writes the weights that all begin with, and says of what model and on what device."""
  import jax

  ours = Ours(job)
  with jax.set_mesh(ours.mesh):
    params = jax.jit(lambda: ours.program.init(jax.random.key(ours.program.seed))['params'])()
  save(pathlib.Path(job['folder'], PARAMS), params)
  shape = dataclasses.asdict(ours.program.shape)
  return {'platform': ours.device.platform, 'kind': ours.kind, 'shape': shape}


def square() -> np.ndarray:
  """A large matrix. Of random numbers: a GPU multiplies zeros and ones faster."""
  return np.random.default_rng(0).standard_normal((SQUARE, SQUARE), np.float32)


def rate(multiply: Callable[[int], None], repeats: int, calls: int) -> float:
  """FLOP/s of the fastest of some times; `calls` products are dispatched together."""
  multiply(calls)
  seconds = []
  for _ in range(repeats):
    start = time.perf_counter()
    multiply(calls)
    seconds.append(time.perf_counter() - start)
  return calls * 2 * SQUARE**3 / min(seconds)


def work(job: Mapping, answer: Callable[[dict], None]) -> None:
  """Does a job, of `{'who': 'ours' or 'torch', …}`, and then steps as long as there is input."""
  if job['who'] == 'weights':
    return answer(draw(job))
  folder = pathlib.Path(job['folder'])
  token_sgbl, rows_s, lr_s = (np.load(folder / f'{n}.npy') for n in ('tokens', 'rows', 'rates'))
  token_sgbl = token_sgbl[:, :, : job['each'] or token_sgbl.shape[2]]
  rows_s = np.minimum(rows_s, token_sgbl.shape[1] * token_sgbl.shape[2])
  contender = Ours(job, token_sgbl.shape[1:3]) if job['who'] == 'ours' else Torch(job)
  version = importlib.metadata.version(contender.library)
  product = None
  if job['products']:
    calls = 1 if job['platform'] == 'cpu' else 20
    product = rate(contender.product(job['dtype']), job['products'], calls)
  contender.begin(load(folder / PARAMS))
  put = lambda s: contender.put(token_sgbl[s], int(rows_s[s]), float(lr_s[s]))
  kept, taken = put(0), 0
  answer({'kind': contender.kind, 'version': version, 'product': product})
  for line in sys.stdin:
    losses, start = [], time.perf_counter()
    for _ in range(steps := int(line)):
      if len(token_sgbl) > 1:
        kept = put(taken % len(token_sgbl))
      losses.append(contender.step(kept))
      taken += 1
      if len(losses) > 1:  # as in training, a step is dispatched before the last one's loss is read
        losses[-2] = float(losses[-2])
    losses[-1] = float(losses[-1])
    contender.finish()
    seconds = (time.perf_counter() - start) / steps
    peak = contender.peak_bytes() or process_peak_bytes()
    answer({'seconds': seconds, 'losses': losses, 'peak_bytes': peak})


def told(error: BaseException) -> dict:
  """Why there is no answer."""
  if isinstance(error, Lacks):
    return {'failed': 'lacks', 'told': str(error)}
  if isinstance(error, Mistake):
    return {'failed': 'mistake', 'told': str(error)}
  text = f'{type(error).__name__}: {error}'
  full = 'OutOfMemory' in text or 'RESOURCE_EXHAUSTED' in text or 'out of memory' in text.lower()
  traceback.print_exception(error)
  return {'failed': 'memory' if full else 'error', 'told': text.strip()[:300]}


def main() -> None:
  # What libraries print goes to stderr: stdout is for answers.
  out = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)
  answer = lambda record: print(json.dumps(record), file=out, flush=True)
  try:
    work(json.loads(sys.stdin.readline()), answer)
  except Exception as e:
    answer(told(e))
    sys.exit(1)


if __name__ == '__main__':
  main()
