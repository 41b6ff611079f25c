"""`python -m benchmarks.chaos --kills=200 --config=configs/tiny.py …`: kills a run again and again.

Trains once undisturbed and once killed at random moments, and compares: every record of the metrics
but its times, and every bit of the last checkpoint. Prints what each kill hit. Wants what
`gptjax.train` wants but a workdir; a short run with many saves and validations meets more.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
import tqdm

from gptjax import checkpoint, flags, journal, schedule, sharding
from gptjax.config import Run, resolve
from gptjax.errors import mistake, told_plainly

MOMENTS = ('starting', 'a step', 'a save', 'its listing', 'a validation')


class Storm:
  """A run in a workdir that is killed at random moments."""

  def __init__(self, command: Sequence[str], workdir: Path, run: Run, seed: int):
    """`command` is what starts the run, and again after each kill."""
    self._command, self._workdir, self._run = [*map(str, command)], Path(workdir), run
    self._random = random.Random(seed)
    self._longest_start = 5.0

  def kill(self) -> str:
    """Starts the run and kills it at some moment, which is returned; '' if it was done before."""
    moment = self._random.choice(MOMENTS)
    process, began, before = self._start(), time.monotonic(), self._records()
    more = self._random.randint(1, 6)
    until = began + self._random.uniform(0, self._longest_start)
    there = {
      'starting': lambda: time.monotonic() > until,
      'a step': lambda: self._records() >= before + more,
      'a save': lambda: [*self._checkpoints.glob('*tmp*')],
      'its listing': lambda: any(
        p.name.isdigit() and not [*p.glob('sums*')] for p in self._checkpoints.glob('*')
      ),
      'a validation': lambda: self._records() >= before + more and self._validates(),
    }[moment]
    known = False
    while process.poll() is None and not there():
      if not known and self._records() != before:
        self._longest_start, known = max(self._longest_start, time.monotonic() - began), True
      time.sleep(0.001)
    time.sleep(self._random.uniform(0, 0.02))
    process.kill()
    process.communicate()
    return moment if process.returncode == -signal.SIGKILL else ''

  def calm(self) -> None:
    """Lets the run go on to its end."""
    process = self._start()
    _, err = process.communicate()
    if process.returncode:
      raise mistake('the run', f'code {process.returncode}: {err[-2000:]}', 'its end', 'the log')

  def _start(self):
    return subprocess.Popen(
      self._command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )

  @property
  def _checkpoints(self):
    return self._workdir / 'checkpoints'

  def _lines(self):
    path = self._workdir / journal.FILE
    return path.read_bytes().splitlines() if path.exists() else []

  def _records(self):
    return len(self._lines())

  def _validates(self):
    """Whether the last record is that of a step after which there is a validation."""
    steps = [r for r in journal.read(self._workdir) if r['kind'] == 'train']
    if not steps or b'"train"' not in self._lines()[-1]:
      return False
    last = steps[-1]
    return schedule.due(self._run.eval_every, last['sequences'] - last['batch'], last['sequences'])


def end_of(workdir: Path, run: Run) -> tuple[int, dict, dict]:
  """Where the last checkpoint of a run is, its state as NumPy, and its record."""
  with checkpoint.Checkpoints(workdir / 'checkpoints', keep=99) as checkpoints:
    sequences = checkpoints.newest_whole()
    with jax.set_mesh(sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])):
      state = checkpoints.restore(sequences, run.program.abstract_state())
    return sequences, jax.tree.map(np.asarray, state), checkpoints.record(sequences)


def differences(a: Path, b: Path, run: Run) -> list[str]:
  """What is not the same at the end of two runs."""
  found = []
  for kind in ('train', 'validation', 'baseline', 'skip'):
    one, other = (journal.timeless(workdir, kind) for workdir in (a, b))
    if repr(one) != repr(other):
      found.append(f'{len(one)} and {len(other)} records of kind {kind}')
  states = [end_of(workdir, run)[1] for workdir in (a, b)]
  same = jax.tree_util.tree_leaves_with_path(jax.tree.map(np.array_equal, *states))
  return found + [jax.tree_util.keystr(path) for path, equal in same if not equal]


def weather(
  command: Callable[[Path], Sequence[str]],
  folder: Path,
  run: Run,
  kills: int,
  seed: int,
  tell: Callable[[str], None] = lambda told: None,
) -> list[str]:
  """Kills a run so often, and returns the moments that were hit.

  Args:
    command: what trains in a workdir.
    folder: for the workdir, `stormy`.
    run: as the config of the command has it.
    kills: how many; fewer if the run is done before.
    seed: of the moments.
    tell: hears of each kill.
  """
  workdir, hit = folder / 'stormy', []
  storm = Storm(command(workdir), workdir, run, seed)
  while len(hit) < kills and (moment := storm.kill()):
    hit.append(moment)
    tell(moment)
  storm.calm()
  return hit


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--kills', type=int, default=200)
  parser.add_argument('--seed', type=int, default=random.randrange(2**32))
  a, given = parser.parse_known_args()
  config = flags.parse(['chaos', *given])
  run = resolve(config, jax.devices())
  command = lambda workdir: [
    sys.executable, '-m', 'gptjax.train', *given, f'--config.workdir={workdir}'
  ]  # fmt: skip
  print(f'seed {a.seed}', flush=True)
  with tempfile.TemporaryDirectory() as folder:
    folder = Path(folder)
    os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(folder / 'compiled'))
    Storm(command(folder / 'calm'), folder / 'calm', run, 0).calm()
    with tqdm.tqdm(total=a.kills, unit='kill') as bar:
      hit = weather(command, folder, run, a.kills, a.seed, lambda moment: bar.update())
    told = ', '.join(f'{hit.count(moment)} in {moment}' for moment in MOMENTS)
    print(f'{len(hit)} kills: {told}')
    starts = sum(r['kind'] == 'start' for r in journal.read(folder / 'stormy'))
    print(f'{starts} starts reached a step')
    if found := differences(folder / 'calm', folder / 'stormy', run):
      raise mistake('the two runs', ', '.join(found), 'no difference', f'--seed={a.seed}')
    print('no difference: every record, and every bit of the last checkpoint')


if __name__ == '__main__':
  with told_plainly():
    main()
