"""`python -m benchmarks.start --config=configs/tiny.py …`: how long a start takes, cold and warm.

Starts gptjax.train in a new workdir (cold), ends it with SIGTERM, which saves, and starts it again
(warm: what was compiled is in the workdir, and a checkpoint is restored). Tells how long it is from
the start of each process to the end of its first step, by the run's own records, and what of that
is what. Takes what gptjax.train takes but a workdir.
"""

import argparse
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence

from gptjax import flags, journal, preemption
from gptjax.errors import Mistake, mistake, told_plainly

STEPS = 3  # that a start takes before it is ended, so that it tells what a usual one takes
PARTS = {
  'importing': 'all that gptjax.train imports, in a process of its own',
  'preparing': 'from the start of the process to the first step, without restoring',
  'restoring': 'a checkpoint, once it was checked',
  'compiling': 'the first step, beyond what the next ones take',
  'step': 'a usual one',
  'together': 'from the start of the process to the end of its first step',
}


def imports(environment: Mapping[str, str]) -> float:
  """Seconds of a process that imports what a run does, and ends."""
  start = time.perf_counter()
  command = [sys.executable, '-m', 'gptjax.train', '--help']
  subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
  return time.perf_counter() - start


def take(words: Sequence[str], workdir: str, environment: Mapping[str, str]) -> dict[str, float]:
  """Starts a run until it has taken some steps, ends it, and returns the seconds of each part."""
  command = [sys.executable, '-m', 'gptjax.train', *words, f'--config.workdir={workdir}']
  before = len(of_last_start(workdir)[0])
  with tempfile.TemporaryFile('w+') as err:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=err, env=environment)
    try:
      while process.poll() is None:
        starts, steps = of_last_start(workdir)
        if len(starts) > before and len(steps) >= STEPS:
          process.send_signal(signal.SIGTERM)
          break
        time.sleep(0.05)
      code = process.wait()
    finally:
      process.kill()
    err.seek(0)
    told = err.read()[-2000:]
  if code != preemption.AGAIN:
    wanted = f'{preemption.AGAIN}, after SIGTERM'
    fix = 'what it says' if code else 'a longer --config.train_tokens'
    raise mistake('the run', f'code {code}: {told}', wanted, fix)
  starts, steps = of_last_start(workdir)
  began, usual = starts[-1], statistics.median(s['seconds'] for s in steps[1:])
  first = steps[0]['time'] - began['time']
  return {
    'preparing': began['setup_seconds'] - began['restore_seconds'],
    'restoring': began['restore_seconds'],
    'compiling': first - usual,
    'step': usual,
    'together': began['setup_seconds'] + first,
  }


def of_last_start(workdir: str) -> tuple[list[dict], list[dict]]:
  """The records of all starts of a run, and those of the steps since the last."""
  starts, steps, found = [], [], []
  with contextlib.suppress(Mistake):  # none was written yet
    found = journal.read(workdir)
  for r in found:
    if r['kind'] == 'start':
      starts, steps = [*starts, r], []
    elif r['kind'] == 'train':
      steps.append(r)
  return starts, steps


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--repeats', type=int, default=3)
  a, words = parser.parse_known_args(argv)
  if a.repeats < 1:
    parser.error('--repeats must be 1 or more')
  flags.parse(['', *words])
  environment = {**os.environ}
  environment.pop('JAX_COMPILATION_CACHE_DIR', None)  # which other runs have filled
  imports(environment)  # Python compiles the modules, and the disk is read
  cold, warm, importing = [], [], []
  for _ in range(a.repeats):
    importing.append(imports(environment))
    with tempfile.TemporaryDirectory() as workdir:
      for found in (cold, warm):
        found.append(take(words, workdir, environment))
  print(f'{"seconds":10}{"cold":>8}{"warm":>8}{"ratio":>8}')
  for name, told in PARTS.items():
    if name == 'importing':
      print(f'{name:10}{statistics.median(importing):8.2f}{"":16}  {told}')
      continue
    one, other = (statistics.median(s[name] for s in found) for found in (cold, warm))
    ratio = f'{other / one:8.2f}' if one else ' ' * 8
    print(f'{name:10}{one:8.2f}{other:8.2f}{ratio}  {told}')


if __name__ == '__main__':
  with told_plainly():
    main()
