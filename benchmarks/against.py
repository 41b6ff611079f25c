"""`python -m benchmarks.train_step --against=torch`: our step beside PyTorch's, in turns.

Each contender is a process of its own (`benchmarks.contender`) that is kept alive and asked for a
step when it is its turn. All have the same weights and tokens; the losses of their first steps must
agree. On a GPU, whose memory each of them needs, one runs after another.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from gptjax import files, metrics
from gptjax.errors import Mistake, mistake, needs, raise_all, told_as
from gptjax.sizes import Shape

ROOT = pathlib.Path(__file__).parents[1]
# How far the losses of first steps may be apart, as a share: by what they are computed in.
AGREE = {'float32': 1e-5, 'bfloat16': 5e-3}
WARM = 2  # steps before those that are timed: the first compiles
REST = 0.3  # seconds between turns, after which the last one's threads sleep
PRODUCTS = 5  # large products, of which the fastest is what a machine can do
LR = 1e-4
# Of a GPU's memory, for JAX, as in launch/gpu.sh; PyTorch takes what it needs.
FRACTION = {'XLA_CLIENT_MEM_FRACTION': '0.9'}


@dataclasses.dataclass(frozen=True)
class Contender:
  """One way to take a step."""

  who: str  # ours or torch
  dtype: str
  compiled: bool = True
  bands: str = 'mask'


CONTENDERS = {
  'ours-f32': Contender('ours', 'float32'),
  'ours-bf16': Contender('ours', 'bfloat16'),
  'torch-eager-f32': Contender('torch', 'float32', compiled=False),
  'torch-compiled-f32': Contender('torch', 'float32'),
  'torch-compiled-bf16': Contender('torch', 'bfloat16'),
  'torch-eager-bf16': Contender('torch', 'bfloat16', compiled=False),
  # PyTorch's other way to a band, which has no backward pass on a CPU.
  'torch-flex-bf16': Contender('torch', 'bfloat16', bands='flex'),
}
OURS = {'float32': 'ours-f32', 'bfloat16': 'ours-bf16'}
ON_CPU = [name for name in CONTENDERS if name not in ('torch-eager-bf16', 'torch-flex-bf16')]
ELSEWHERE = ['ours-bf16', 'torch-compiled-bf16']


class Failed(Exception):
  """A contender has no answer."""

  def __init__(self, kind: str, told: str):
    super().__init__(told)
    self.kind = kind  # memory, lacks, mistake, error or ended
    self.record = {'failed': kind, 'told': told}


class Worker:
  """A contender's process."""

  def __init__(self, job: Mapping, env: Mapping[str, str], log: pathlib.Path):
    """Starts it on a job, and writes what it says besides its answers to a log."""
    self._log = log
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    with open(log, 'ab') as err:
      self._process = subprocess.Popen(
        [sys.executable, '-m', 'benchmarks.contender'],
        env=os.environ | env | {'PYTHONPATH': path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=err,
        text=True,
      )
    self._say(json.dumps(job))

  def _say(self, line):
    with contextlib.suppress(BrokenPipeError):  # that it ended is told where its answer is read
      print(line, file=self._process.stdin, flush=True)

  def answer(self) -> dict:
    """The next one. Raises Failed where there is none."""
    line = self._process.stdout.readline()
    if not line:
      code = self._process.wait()
      kind = 'memory' if code == -9 else 'ended'  # who kills so is the kernel that lacks memory
      raise Failed(kind, ': '.join([f'ended with code {code}', *self._last()[-1:]]))
    found = json.loads(line)
    if found.get('failed') == 'error':
      print(*self._last(), sep='\n', file=sys.stderr)
    if 'failed' in found:
      raise Failed(found['failed'], found['told'])
    return found

  def _last(self):
    return self._log.read_text(errors='replace').strip().splitlines()[-30:]

  def steps(self, count: int) -> dict:
    """Takes so many; seconds of each, their losses, peak_bytes so far."""
    self._say(count)
    return self.answer()

  def close(self) -> None:
    """Ends it, and returns when its memory is free."""
    with contextlib.suppress(BrokenPipeError):  # a line that it did not live to read
      self._process.stdin.close()
    try:
      self._process.wait(20)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()
    self._process.stdout.close()


class Race:
  """Contenders on one model, with the files that they begin with."""

  def __init__(self, folder: pathlib.Path, words: Sequence[str]):
    """Draws the weights.

    Args:
      folder: for files.
      words: the command line that asks for our program, without a dtype.
    """
    self.folder, self.words = folder, [*words]
    drawn = self._draw()
    self.platform: str = drawn['platform']
    self.kind: str = drawn['kind']
    self.shape = Shape(**drawn['shape'] | {'windows': tuple(drawn['shape']['windows'])})

  def _draw(self):
    job = {'who': 'weights', 'words': self.words, 'folder': str(self.folder)}
    drawing = Worker(job, {}, self.folder / 'weights.log')
    try:
      return drawing.answer()
    except Failed as e:
      raise Mistake(str(e)) from None
    finally:
      drawing.close()

  def give(self, token_sgbl: np.ndarray, rows: Sequence[int], rates: Sequence[float]) -> None:
    """Says what the steps s read: windows in slices, how many rows of them count, their rates."""
    for name, array in (('tokens', token_sgbl), ('rows', rows), ('rates', rates)):
      np.save(self.folder / f'{name}.npy', np.asarray(array))

  def start(self, name: str, each: int | None = None, products: int = 0) -> tuple[Worker, dict]:
    """A contender that is ready for its first step, and what it told of itself.

    Args:
      name: in CONTENDERS.
      each: rows of a slice; None for all there are.
      products: how many large products to time before.
    """
    contender = CONTENDERS[name]
    job = {
      **dataclasses.asdict(contender),
      'words': [*self.words, f'--config.compute.dtype={contender.dtype}'],
      'shape': dataclasses.asdict(self.shape),
      'folder': str(self.folder),
      'platform': self.platform,
      'each': each,
      'products': products,
    }
    # Under its old name too it may be set, and JAX refuses both.
    given = {*FRACTION, 'XLA_PYTHON_CLIENT_MEM_FRACTION'} & os.environ.keys()
    env = {} if given else FRACTION
    worker = Worker(job, env, self.folder / f'{name}.log')
    try:
      return worker, worker.answer()
    except BaseException:
      worker.close()
      raise


def check_installed(names: Iterable[str]) -> None:
  """Raises a Mistake if what contenders want, or all if there are none yet, is not there."""
  names = list(names) or CONTENDERS
  if any(CONTENDERS[name].who == 'torch' for name in names):
    with needs('torch', 'test'):
      if importlib.util.find_spec('torch') is None:
        raise ImportError


def alone(race: Race, name: str, each: int, repeats: int, steps: int, halve: bool) -> dict:
  """What a contender does when no other is there.

  Args:
    race: that it is in.
    name: in CONTENDERS.
    each: rows of a slice.
    repeats: how often it is timed.
    steps: over how many.
    halve: where memory is short, try half of the rows, and half of these.
  """
  while True:
    worker = None
    try:
      worker, about = _warm(race, name, each)
      answers = [worker.steps(steps) for _ in range(repeats)]
      return {'each': each} | about | _summed(answers)
    except Failed as e:
      if e.kind != 'memory' or not halve or each == 1:
        return {'each': each} | e.record
      print(f'{name}: {each} rows are too many, {each // 2} are tried', flush=True)
      each //= 2
    finally:
      if worker:
        worker.close()


def in_turns(race: Race, names: Sequence[str], each: int, repeats: int) -> dict[str, dict]:
  """What contenders do that take a step each in rotation; `each` is the rows of a slice."""
  workers, rows, answers = {}, {}, {}
  try:
    for name in names:
      try:
        workers[name], rows[name] = _warm(race, name, each)
        answers[name] = []
      except Failed as e:
        rows[name] = e.record
    for _ in range(repeats):
      for name in [*answers]:
        time.sleep(REST)
        try:
          answers[name].append(workers[name].steps(1))
        except Failed as e:
          rows[name] = e.record
          del answers[name]
  finally:
    for worker in workers.values():
      worker.close()
  summed = {name: _summed(found) for name, found in answers.items()}
  return {name: {'each': each} | row | summed.get(name, {}) for name, row in rows.items()}


def _warm(race, name, each):
  """A contender that has taken its first steps, and what is known of it."""
  start = time.perf_counter()
  worker, about = race.start(name, each, PRODUCTS)
  try:
    losses = worker.steps(WARM)['losses']
  except BaseException:
    worker.close()
    raise
  return worker, about | {'first_loss': losses[0], 'start_seconds': time.perf_counter() - start}


def _summed(answers):
  seconds = [answer['seconds'] for answer in answers]
  return {
    'seconds': statistics.median(seconds),
    'all_seconds': seconds,
    'last_loss': answers[-1]['losses'][-1],
    'peak_bytes': answers[-1]['peak_bytes'],
  }


def judged(rows: Mapping[str, dict], shape: Shape, slices: int) -> dict[str, dict]:
  """Rows with rates, with shares of what the machine can do, and with ours beside theirs."""
  fastest, speed, found = {}, {}, {}
  for name, row in rows.items():
    dtype = CONTENDERS[name].dtype
    fastest[dtype] = max(fastest.get(dtype, 0.0), row.get('product') or 0.0)
    if 'seconds' in row:
      speed[name] = slices * row['each'] * shape.context / row['seconds']
  for name, row in rows.items():
    contender = CONTENDERS[name]
    found[name] = dataclasses.asdict(contender) | row | {'rows': slices * row['each']}
    if name not in speed:
      continue
    ours = speed.get(OURS[contender.dtype]) if contender.who != 'ours' else None
    flops = shape.train_flops * speed[name]
    found[name] |= {
      'tokens_per_second': speed[name],
      'flops': flops,
      'machine_product': fastest[contender.dtype],
      'of_product': flops / fastest[contender.dtype],
      'mfu': metrics.mfu(shape.train_flops, speed[name], row['kind'], 1),
      'ours_over_theirs': ours / speed[name] if ours else None,
    }
  return found


def table(rows: Mapping[str, dict]) -> str:
  """What `judged` found, in lines."""
  columns = ('rows', 's a step', 'tokens/s', 'GFLOP/s', 'of product', 'MFU', 'peak GB', 'ours is')
  lines = [f'{"":20}' + ''.join(f'{c:>11}' for c in columns)]
  share = lambda value: '' if value is None else f'{value:.1%}'
  for name, row in rows.items():
    if 'failed' in row:
      lines.append(f'{name:20}{row["rows"]:11}  {row["failed"]}: {row["told"]}')
      continue
    ratio = row['ours_over_theirs']
    cells = (
      f'{row["rows"]}',
      f'{row["seconds"]:.4g}',
      f'{row["tokens_per_second"]:,.0f}',
      f'{row["flops"] / 1e9:,.0f}',
      share(row['of_product']),
      share(row['mfu']),
      f'{row["peak_bytes"] / 1e9:.2f}',
      f'{ratio:.2f} ×' if ratio else '',
    )
    lines.append(f'{name:20}' + ''.join(f'{cell:>11}' for cell in cells))
  return '\n'.join(lines)


def disagreeing(rows: Mapping[str, dict]) -> list[str]:
  """Contenders whose first loss is too far from that of the first one of all."""
  losses = {name: row['first_loss'] for name, row in rows.items() if 'first_loss' in row}
  if not losses:
    return []
  reference, wanted = next(iter(losses.items()))
  wide = lambda name: max(AGREE[CONTENDERS[n].dtype] for n in (name, reference))
  return [
    f'{name} {loss:.6f} beside {reference} {wanted:.6f}'
    for name, loss in losses.items()
    if not abs(loss - wanted) <= wide(name) * abs(wanted)
  ]


def chosen(text: str) -> list[str]:
  """Contenders by name; none for ''. Raises a Mistake for others."""
  names = text.split(',') if text else []
  unknown = [name for name in names if name not in CONTENDERS]
  if unknown or len({*names}) < len(names):
    wanted = f'some of {",".join(CONTENDERS)}'
    raise mistake('--contenders', text, wanted, f'--contenders={",".join(ELSEWHERE)}')
  return names


def main(a: argparse.Namespace, words: Sequence[str]) -> None:
  """Prints how fast each contender is.

  Args:
    a: the options of benchmarks.train_step.
    words: the command line that asks for our program, without a dtype.

  Raises:
    Mistake: if a contender has failed, or what they compute is not the same.
  """
  names = chosen(a.contenders)
  check_installed(names)
  with tempfile.TemporaryDirectory(prefix='gptjax-against-') as folder:
    race = Race(pathlib.Path(folder), words)
    shape, each = race.shape, a.batch // a.slices
    names = names or (ON_CPU if race.platform == 'cpu' else ELSEWHERE)
    random = np.random.default_rng(0)
    rows = (1, a.slices, each, shape.context + 1)
    race.give(random.integers(0, shape.vocab_size, rows).astype('uint16'), [a.batch], [LR])
    on = f'{race.kind}, {os.cpu_count()} cores'
    print(f'{shape.n_params:,} parameters, {a.batch} × {a.context} tokens in {a.slices} slice(s)')
    print(f'ours with remat {a.remat}, on {on}', flush=True)
    about = {'options': vars(a), 'parameters': shape.n_params, 'platform': race.platform, 'on': on}
    if race.platform == 'cpu':
      found = judged(in_turns(race, names, each, a.repeats), shape, a.slices)
      write(a.json, about, found)
    else:
      measured, found = {}, {}
      for name in names:
        measured[name] = alone(race, name, each, a.repeats, a.steps, a.halve)
        found = judged(measured, shape, a.slices)
        write(a.json, about, found)  # one by one: the next may take too long
  print(f'\n{table(found)}\n')
  for dtype, peak in {row['dtype']: row.get('machine_product') for row in found.values()}.items():
    if peak:
      print(f'matrix product in {dtype} {peak / 1e9:,.0f} GFLOP/s, the faster of both libraries')
  apart = disagreeing(found)
  losses = ', '.join(f'{row["first_loss"]:.5f}' for row in found.values() if 'first_loss' in row)
  told = ', '.join(f'{share:g} in {dtype}' for dtype, share in AGREE.items())
  print(f'losses of the first step {losses}: {"not " * bool(apart)}the same to {told}')
  mistakes = [Mistake(f'{name}: {row["told"]}') for name, row in found.items() if 'failed' in row]
  if apart:
    wanted = 'the same loss from the same weights and tokens'
    mistakes.append(mistake('first losses', '; '.join(apart), wanted, 'tests/test_torch_gpt.py'))
  raise_all(mistakes)


def write(path: str | None, about: Mapping, found: Mapping[str, dict]) -> None:
  """Writes what is known of a comparison, if a file is wanted."""
  if path:
    text = json.dumps({**about, 'losses_apart': disagreeing(found), 'rows': found}, indent=1)
    with told_as(path, 'a place to write to', '--json=against.json', OSError):
      files.write_whole(path, text)
