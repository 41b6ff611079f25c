"""`python benchmarks/data.py`: how fast text becomes windows, and windows become batches.

The text is this Python's standard library, 1, 4 and 16 times with every document made different, in
a temporary folder. Preparing is timed as a user runs it, from a command to a finished corpus, and
its memory is that of its largest process. Reading takes windows of 2048 tokens into batches on one
device.
"""

import argparse
import collections
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import jax
import psutil

from gptjax import sharding
from gptjax.data import dataset, loader, sources
from gptjax.data.mixture import Mixture, Stage
from gptjax.errors import told_plainly

ROOT = pathlib.Path(__file__).parents[1]


def write_text(path: pathlib.Path, times: int) -> int:
  """Writes the standard library so many times as 16 files of JSON lines; returns its bytes."""
  found = sources.find('stdlib', 'text', 'train', True)
  texts = [d.text for file in found.files for d in sources.read(found, file, collections.Counter())]
  path.mkdir()
  total = 0
  for part in range(16):
    with (path / f'{part}.jsonl').open('w') as f:
      for i in range(times):
        for text in texts[part::16]:
          different = f'{i}\n{text}'  # a duplicate would be left out
          total += len(different.encode())
          f.write(json.dumps({'text': different}) + '\n')
  return total


def prepare(text: pathlib.Path, out: pathlib.Path, knobs: list[str]) -> tuple[float, int]:
  """Seconds, and bytes of the largest process, of a preparation."""
  command = [sys.executable, '-m', 'gptjax.prepare', f'--config={ROOT}/configs/corpus.py']
  command += [f'--config.source={text}', f'--config.out={out}', *knobs]
  start, largest = time.perf_counter(), 0
  silent = subprocess.DEVNULL
  process = subprocess.Popen(command, stdout=silent, env=os.environ | {'PYTHONPATH': str(ROOT)})
  while process.poll() is None:
    largest = max([largest, *memory(process.pid)])
    time.sleep(0.05)
  seconds = time.perf_counter() - start
  if process.returncode:
    sys.exit(process.returncode)
  return seconds, largest


def memory(pid: int) -> Iterator[int]:
  """Bytes of a process and of those it started."""
  try:
    process = psutil.Process(pid)
    for one in (process, *process.children(recursive=True)):
      yield one.memory_info().rss
  except psutil.NoSuchProcess:
    return


def read(folder: pathlib.Path, batch: int, seconds: float) -> float:
  """Tokens a second into batches on a device, in the order of training."""
  windows = dataset.open_split(str(folder), dataset.TRAIN)
  stream = loader.Stream({'a': windows}, Mixture([Stage(0, {'a': 1})]), seed=0)
  mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
  context, done, start = len(windows.blank) - 1, 0, time.perf_counter()
  while time.perf_counter() - start < seconds:
    jax.block_until_ready(loader.place(stream, done, batch, 1, batch, mesh))
    done += batch
  return done * context / (time.perf_counter() - start)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('tokenizer', help="a folder with GPT-2's encoder.json and vocab.bpe")
  parser.add_argument('--batch', type=int, default=256, help='sequences')
  parser.add_argument('--workers', type=int, default=0, help='0: one per core')
  parser.add_argument('--largest', type=int, default=16, help='times the standard library')
  a = parser.parse_args()
  if a.batch < 1 or a.workers < 0 or a.largest < 1:
    parser.error('--batch and --largest must be 1 or more, --workers 0 or more')
  knobs = [f'--config.tokenizer={pathlib.Path(a.tokenizer).absolute()}']
  knobs += [f'--config.workers={a.workers}', '--config.context=2048']
  with tempfile.TemporaryDirectory() as folder:
    place = pathlib.Path(folder)
    print(f'{"MB":>8}{"seconds":>10}{"MB/s":>8}{"largest process, MB":>22}')
    for times in (n for n in (1, 4, 16) if n <= a.largest):
      text, out = place / f'text{times}', place / f'out{times}'
      size = write_text(text, times) / 1e6
      seconds, largest = prepare(text, out, knobs)
      print(f'{size:8.1f}{seconds:10.1f}{size / seconds:8.1f}{largest / 1e6:22.0f}', flush=True)
    rate = read(out, a.batch, seconds=5)
  print(f'\nreading: {rate / 1e6:.1f} M tokens/s into batches of {a.batch} × 2048')


if __name__ == '__main__':
  with told_plainly():
    main()
