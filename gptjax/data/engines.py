"""What runs the jobs of a preparation: processes of this machine, or a cluster through Beam."""

import concurrent.futures
import contextlib
import json
import multiprocessing
import os
import pathlib
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import tqdm

from gptjax import files
from gptjax.errors import Mistake, mistake, told_as

Job, Result = TypeVar('Job'), TypeVar('Result')
# Runs a function over jobs, in any order of work, and yields the results in the jobs' order.
Run = Callable[[str, Callable[[Job], Result], list[Job]], Iterator[Result]]


@contextlib.contextmanager
def processes(workers: int) -> Iterator[Run]:
  """Something to run jobs with: here if `workers` is 1, else in that many processes."""

  def here(label: str, function: Callable[[Job], Result], jobs: list[Job]) -> Iterator[Result]:
    return _shown(label, map(function, jobs), len(jobs))

  if workers == 1:
    yield here
    return
  # Spawned, not forked: the caller may hold threads and locks.
  context = multiprocessing.get_context('spawn')
  with concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker) as pool:

    def there(label: str, function: Callable[[Job], Result], jobs: list[Job]) -> Iterator[Result]:
      try:
        with _interrupts_wait():  # the processes start here, and none is to be interrupted
          results = pool.map(function, jobs)
        yield from _shown(label, results, len(jobs))
      except BaseException:
        # Nothing may still write into a folder that the caller is about to remove.
        pool.shutdown(cancel_futures=True)
        raise

    yield there


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[None]:
  """Delays Ctrl-C; a process that starts meanwhile never sees it, and its parent stops it."""
  before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker() -> None:
  def end_with_parent():
    # A worker whose parent was killed would otherwise wait for jobs for ever.
    multiprocessing.parent_process().join()
    os._exit(1)

  threading.Thread(target=end_with_parent, daemon=True).start()


def cores() -> int:
  """Cores this process may use, which a container can make fewer than the machine has."""
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def _shown(label: str, results: Iterable[Result], total: int) -> Iterator[Result]:
  # None: no bar where nobody watches.
  return iter(tqdm.tqdm(results, label, total, disable=None))


@contextlib.contextmanager
def beam(options: Sequence[str], shared: str) -> Iterator[Run]:
  """Runs jobs through Apache Beam, which knows many kinds of clusters.

  A job must leave what it makes in a folder that all machines share. A result that JSON can hold
  comes back as a file; for another, the function is called here once more, and should find it done.

  Args:
    options: Beam's own, such as `--runner=DirectRunner`.
    shared: a folder for those files, made and removed.

  Raises:
    Mistake: where Beam is not installed, or refuses its options, or a machine failed.
  """
  try:
    import apache_beam
  except ImportError:
    got, fix = 'no apache-beam', "pip install -e '.[beam]'"
    raise mistake('beam', got, 'it installed', fix) from None
  folder = pathlib.Path(shared).absolute()

  def run(label: str, function: Callable[[Job], Result], jobs: list[Job]) -> Iterator[Result]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    print(f'{label}: {len(jobs)} jobs by Beam', flush=True)
    what = 'another --config.beam, or --config.workers without it'
    with told_as('beam', 'a pipeline that runs', what, Exception):
      with apache_beam.Pipeline(argv=[*options]) as pipeline:
        numbered = pipeline | apache_beam.Create([*enumerate(jobs)])
        # Without it jobs may stay together on one machine.
        spread = numbered | apache_beam.Reshuffle()
        spread | apache_beam.Map(_do, function=function, folder=str(folder))
    for i, job in enumerate(jobs):
      result = folder / f'{i}.json'
      yield json.loads(result.read_text()) if result.exists() else function(job)

  try:
    yield run
  finally:
    shutil.rmtree(folder, ignore_errors=True)


def _do(numbered: tuple[int, Job], function: Callable[[Job], Result], folder: str) -> None:
  number, job = numbered
  try:
    result = function(job)
  except Mistake:
    return  # called again where it can be told, it raises there
  if isinstance(result, list | dict):
    files.write_whole(pathlib.Path(folder) / f'{number}.json', json.dumps(result))
