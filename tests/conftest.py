"""Eight CPU devices for every test, unless it is `pytest -m gpu`; and Python in a subprocess."""

import functools
import gc
import importlib.metadata
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence

import hypothesis
import psutil
import pytest
from absl import logging

ROOT = pathlib.Path(__file__).parents[1]
DEVICES = '--xla_force_host_platform_device_count'
# Tests compile much and compute little: LLVM's optimiser would take half of their time, and XLA's
# newer way to write fusions a third of what is left, which JAX 0.11 has no choice about.
FAST = '--xla_backend_optimization_level=0'
if importlib.metadata.version('jaxlib').startswith('0.10.'):
  FAST += ' --xla_cpu_use_fusion_emitters=false'

# The same examples on every machine, and no judgement by its speed.
hypothesis.settings.register_profile('house', deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile('house')
logging.set_verbosity(logging.ERROR)


def pytest_configure(config: pytest.Config) -> None:
  """Chooses JAX's platform, before any test module imports jax."""
  assert 'jax' not in sys.modules, 'JAX reads the environment once, when it is imported'
  # A shell that runs the tests in the background has children ignore what stops a program, and
  # these would pass that on to the programs that the tests stop.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  signal.signal(signal.SIGHUP, signal.SIG_DFL)
  # What JAX traced stays: to look through it for cycles again and again takes time for nothing.
  gc.set_threshold(100_000, 20, 100)
  if not _wants_gpu(config):
    os.environ.update(_cpu(8))
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    # Many tests train the same small model, in one process or another.
    config.cache_folder = tempfile.TemporaryDirectory(prefix='gptjax-compiled-')
    os.environ['JAX_COMPILATION_CACHE_DIR'] = config.cache_folder.name
    os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.2'


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
  """Skips what needs a GPU where there is none."""
  on_gpu = [item for item in items if item.get_closest_marker('gpu')]
  if not on_gpu:
    return
  reason = 'on the CPU, unless run with -m gpu'
  if _wants_gpu(config):
    import jax

    if jax.default_backend() == 'gpu':
      return
    reason = 'no GPU here'
  for item in on_gpu:
    item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def compiled() -> Iterator[list[str]]:
  """An event of JAX for each program that is compiled while a test runs."""
  import jax

  events = []
  listen = lambda name, seconds, **_: events.append(name) if 'backend_compile' in name else None
  jax.monitoring.register_event_duration_secs_listener(listen)
  yield events
  jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope='session')
def run_python() -> Callable[..., subprocess.CompletedProcess]:
  """`run_python(code_or_args, timeout=…)` runs Python on CPU devices, in the repository's root.

  Returns the finished process with text output; fails the test if it exits with another code than
  `code`, or is not done in `timeout` seconds, and then ends it with all processes it started.

  A program that dispatches to many devices must read every step's result before the next: eight
  virtual devices on few cores wait for each other and abort otherwise.
  """

  def run(
    program: str | Sequence[str],
    *,
    timeout: float,
    devices: int = 1,
    code: int = 0,
    env: Mapping[str, str] | None = None,
    cwd: os.PathLike | str = ROOT,
  ) -> subprocess.CompletedProcess:
    args = ['-c', program] if isinstance(program, str) else [str(arg) for arg in program]
    command = [sys.executable, *args]
    full_env = {**_environment(devices), **(env or {})}
    process = subprocess.Popen(
      command,
      cwd=cwd,
      env=full_env,
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      start_new_session=True,
    )
    try:
      out, err = process.communicate(timeout=timeout)
    except BaseException as e:  # an interrupt from the keyboard too leaves nothing behind
      os.killpg(process.pid, signal.SIGKILL)
      out, err = process.communicate()
      if not isinstance(e, subprocess.TimeoutExpired):
        raise
      pytest.fail(f'{command} took over {timeout} s\n{_tail(out)}\n{_tail(err)}')
    if process.returncode != code:
      told = f'{command} exited with {process.returncode}, not {code}'
      pytest.fail(f'{told}\n{_tail(out)}\n{_tail(err)}')
    return subprocess.CompletedProcess(command, process.returncode, out, err)

  return run


@pytest.fixture(scope='session')
def start_python() -> Callable[..., subprocess.Popen]:
  """`start_python(args, devices=1)` starts what `run_python` runs, to be killed or waited for.

  Its stdout is thrown away unless asked for; its stderr waits in a pipe that a short run cannot
  fill.
  """

  def start(
    args: Sequence[str],
    devices: int = 1,
    stdout: int = subprocess.DEVNULL,
    env: Mapping[str, str] | None = None,
    cwd: str | pathlib.Path = ROOT,
  ) -> subprocess.Popen:
    return subprocess.Popen(
      [sys.executable, *args],
      cwd=cwd,
      env=_environment(devices) | (env or {}),
      stdout=stdout,
      stderr=subprocess.PIPE,
      text=True,
    )

  return start


@pytest.fixture(scope='session')
def free_port() -> Callable[[], int]:
  """`free_port()` is a port of the loopback that nobody listens on."""

  def find() -> int:
    with socket.socket() as s:
      s.bind(('127.0.0.1', 0))
      return s.getsockname()[1]

  return find


@pytest.fixture
def together():
  """`together(processes, devices, args)` starts the launch script on a free port."""
  started = []

  def start(processes, devices, program):
    flags = program[2:]  # without -m gptjax.train, which the script says itself
    # How many devices there are the script says itself.
    environment = _environment(devices) | {'PYTHON': sys.executable, 'XLA_FLAGS': FAST}
    process = subprocess.Popen(
      [ROOT / 'launch' / 'local_processes.sh', str(processes), str(devices), *map(str, flags)],
      cwd=ROOT,
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      start_new_session=True,
    )
    started.append(process)
    return process

  yield start
  for process in started:
    if process.poll() is None:
      for one in [*psutil.Process(process.pid).children(recursive=True), process]:
        one.kill()
      process.communicate()


@pytest.fixture(scope='session')
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
  """A folder with a small prepared corpus."""
  from tests import runs  # imports jax, so not before the platform was chosen

  return runs.make_corpus(tmp_path_factory.mktemp('corpus'))


@pytest.fixture(scope='session')
def standard_library(tmp_path_factory: pytest.TempPathFactory, run_python) -> pathlib.Path:
  """The corpus of `make train`, on which `configs/tiny.py` trains."""
  out = tmp_path_factory.mktemp('standard-library') / 'data'
  knobs = [f'--config.{knob}' for knob in ('source=stdlib', f'out={out}', 'context=256')]
  run_python(['-m', 'gptjax.prepare', '--config=configs/corpus.py', *knobs], timeout=200)
  return out


@pytest.fixture(scope='session')
def texts() -> list[str]:
  """Real documents of many sizes, all different."""
  from tests.texts import documents

  return documents()


@pytest.fixture(scope='session', params=['bytes', 'train'])
def packed(request, texts, tmp_path_factory):
  """A described corpus of `texts`, by each kind of tokenizer."""
  from tests.texts import make

  return make(tmp_path_factory.mktemp('packed'), texts, tokenizer=request.param)


@pytest.fixture(scope='session')
def straight(tmp_path_factory, corpus, run_python) -> tuple[pathlib.Path, str]:
  """The workdir of a run on one device that nothing disturbed, and what it printed."""
  from tests import runs

  workdir = tmp_path_factory.mktemp('straight')
  return workdir, run_python(runs.args(workdir, corpus), timeout=200).stdout


@pytest.fixture(scope='session', params=['gpt2', 'gpt_neo'])
def twins(request, tmp_path_factory):
  """A model of `transformers`; and the same one here, a program and its params."""
  from tests import small, their_models

  with small.on():
    folder = tmp_path_factory.mktemp(request.param)
    model, program, params = their_models.same_here(request.param, folder)
  return model, (program, params)


@pytest.fixture
def poisoned(monkeypatch) -> list[tuple[range, float, float]]:
  """Steps that begin in these ranges get a loss or a gradient times a factor."""
  import jax
  import jax.numpy as jnp

  from gptjax.step import Program

  real, plan = Program.sums, []

  def sums(self, params, batch):
    loss, grads, tokens = real(self, params, batch)
    for where, on_loss, on_grads in plan:
      here = (batch.start >= where.start) & (batch.start < where.stop)
      loss = loss * jnp.where(here, on_loss, 1.0)
      factor = jnp.where(here, on_grads, 1.0)
      grads = jax.tree.map(functools.partial(jnp.multiply, factor), grads)
    return loss, grads, tokens

  monkeypatch.setattr(Program, 'sums', sums)
  return plan


def _wants_gpu(config: pytest.Config) -> bool:
  marks = config.option.markexpr
  return 'gpu' in marks and 'not gpu' not in marks


def _cpu(devices: int) -> dict[str, str]:
  """The environment for so many CPU devices; flags of XLA that are set otherwise stay."""
  mine = [f'{DEVICES}={devices}', *FAST.split()]
  names = tuple(flag.partition('=')[0] for flag in mine)
  kept = [f for f in os.environ.get('XLA_FLAGS', '').split() if not f.startswith(names)]
  return {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ' '.join([*kept, *mine])}


def _environment(devices: int) -> dict[str, str]:
  path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
  return {**os.environ, **_cpu(devices), 'PYTHONPATH': path}


def _tail(text: str, lines: int = 60) -> str:
  return '\n'.join(text.splitlines()[-lines:])
