"""The records of a run where it keeps them: lines of JSON, each position of its clock once.

On a disk they are one file that is appended to. A bucket cannot append: there they are parts, of
which the last is written anew as it grows.
"""

import json
import math
import os
import re
import time
from concurrent import futures

from etils import epath

from gptjax import files
from gptjax.errors import mistake, told_as

FILE = 'metrics.jsonl'
PARTS = 'metrics'  # a folder of a bucket
PART = '{:06d}-{:06d}.jsonl'  # which writing of all of them it belongs to, and its number there
PART_BYTES = 2**20
PART_SECONDS = 10.0  # between two writings of the last part
TIMED = {'time', 'seconds', 'tokens_per_second', 'mfu', 'peak_bytes'}
REQUIRED = {'kind': str, 'step': int, 'sequences': int, 'tokens': int}
NOT_NUMBERS = {'NaN': math.nan, 'Infinity': math.inf, '-Infinity': -math.inf}


class Journal:
  """What records are appended to.

  Whatever lies after `resume_at`, the sequences consumed at the checkpoint that is resumed from, is
  dropped first, and with 0 all is, but records of kind `start`: they tell of what was lost.

  Attributes:
    kept, dropped: records that were there before.

  Raises:
    Mistake: what is there is damaged.
  """

  def __init__(self, workdir: str | os.PathLike, resume_at: int):
    workdir = files.folder(workdir)
    self.kept, self.dropped = [], []
    # The baseline of a stage that begins here is written again when it does.
    again = {'kind': 'baseline', 'sequences': resume_at}.items()
    for r in _there(workdir):
      stays = 0 < resume_at and r['sequences'] <= resume_at and not again <= r.items()
      (self.kept if stays or r['kind'] == 'start' else self.dropped).append(r)
    kind = _Parts if files.in_bucket(workdir) else _File
    self._sink = kind(workdir, ''.join(map(_line, self.kept)))

  def append(self, record: dict) -> None:
    """Adds one. On a disk it outlives this process, and in a bucket soon does."""
    self._sink.write(_line(record))

  def sync(self) -> None:
    """Returns when all that was appended outlives this machine."""
    self._sink.sync()

  def close(self) -> None:
    """The same, for the last time."""
    self._sink.close()


class _File:
  """One file, whose new lines are on their way to the disk at once."""

  def __init__(self, workdir: epath.Path, text: str):
    files.make(workdir)
    if (workdir / FILE).exists():
      files.write_whole(workdir / FILE, text)
    self._file = open(workdir / FILE, 'a')

  def write(self, line: str) -> None:
    self._file.write(line)
    self._file.flush()

  def sync(self) -> None:
    os.fsync(self._file.fileno())

  def close(self) -> None:
    self._file.close()


class _Parts:
  """Objects in a folder of a bucket, written by a thread, since each takes a moment."""

  def __init__(self, workdir: epath.Path, text: str):
    self._folder = workdir / PARTS
    before = _parts(self._folder)
    self._writing = max((int(name[:6]) for name in before), default=-1) + 1
    self._number, self._text, self._at = 0, text, time.monotonic()
    self._thread = futures.ThreadPoolExecutor(1, 'metrics')
    self._unwritten: dict[epath.Path, str] = {}
    self.sync()
    # Not sooner: who dies here leaves both, and those of the last writing are what counts.
    for name in before:
      (self._folder / name).unlink()
    self._number, self._text = 1, ''

  def write(self, line: str) -> None:
    self._text += line
    full = len(self._text) >= PART_BYTES
    if full or time.monotonic() - self._at >= PART_SECONDS:
      self._put()
    if full:
      self._number, self._text = self._number + 1, ''

  def sync(self) -> None:
    self._put().result()

  def close(self) -> None:
    try:
      self.sync()
    finally:
      self._thread.shutdown()

  def _put(self) -> futures.Future:
    self._unwritten[self._folder / PART.format(self._writing, self._number)] = self._text
    self._at = time.monotonic()
    return self._thread.submit(self._write_all)

  def _write_all(self) -> None:
    """In order, and what failed again: no part is there whose predecessors are not all there."""
    for path, text in [*self._unwritten.items()]:
      files.write_whole(path, text)
      if self._unwritten[path] is text:
        del self._unwritten[path]


def read(workdir: str | os.PathLike) -> list[dict]:
  """The records of a run, in the order they were written.

  Raises:
    Mistake: there are none, or they are damaged elsewhere than in the last line of a file.
  """
  workdir = files.folder(workdir)
  found = _there(workdir)
  if not found:
    there = _places(workdir)
    raise mistake(
      there[0] if there else workdir / FILE,
      'no records' if there else 'no such file',
      'the metrics of a run',
      'the workdir of a run that has taken a step',
    )
  return found


def timeless(workdir: str | os.PathLike, kind: str) -> list[dict]:
  """The records of a kind, without what the speed of the machine is in."""
  found = [r for r in read(workdir) if r['kind'] == kind]
  return [{name: value for name, value in r.items() if name not in TIMED} for r in found]


def reached(workdir: str | os.PathLike) -> int:
  """The sequences consumed at the last record of a run; 0 if there is none.

  Raises:
    Mistake: they are damaged elsewhere than in the last line of a file.
  """
  found = _there(files.folder(workdir))
  return max((r['sequences'] for r in found if r['kind'] != 'start'), default=0)


def _there(workdir: epath.Path) -> list[dict]:
  return [record for path in _places(workdir) for record in _parse(path)]


def _places(workdir: epath.Path) -> list[epath.Path]:
  """What holds the records, in order."""
  if not files.in_bucket(workdir):
    path = workdir / FILE
    return [path] if path.exists() else []
  folder = workdir / PARTS
  there = _parts(folder)
  last = [name for name in there if name[:6] == there[-1][:6]]
  for number, name in enumerate(last):
    if name != PART.format(int(name[:6]), number):
      wanted = f'the parts before {name}'
      raise mistake(folder, 'some that are missing', wanted, 'putting them back')
  return [folder / name for name in last]


def _parts(folder: epath.Path) -> list[str]:
  return [name for name in files.names(folder) if re.fullmatch(r'\d{6}-\d{6}\.jsonl', name)]


def _parse(path: epath.Path) -> list[dict]:
  """All records of a file but a last one that was not written to its end."""
  records = []
  with told_as(path, 'a readable file', 'another workdir', OSError):
    lines = path.read_bytes().splitlines()
  for number, line in enumerate(lines, 1):
    try:
      record = json.loads(line)
      if not all(isinstance(record[name], kind) for name, kind in REQUIRED.items()):
        raise ValueError
      records.append({name: _decode(value) for name, value in record.items()})
    except (ValueError, KeyError, TypeError, AttributeError):
      if number < len(lines):
        raise mistake(
          f'{path}, line {number}', repr(line[:60]), 'a record of a run', 'removing that line'
        ) from None
  return records


def _line(record: dict) -> str:
  """A record in strict JSON, which knows no NaN and no infinity: these are words there."""
  encoded = {name: _encode(value) for name, value in record.items()}
  return json.dumps(encoded, allow_nan=False) + '\n'


def _encode(value):
  if isinstance(value, float) and not math.isfinite(value):
    return next(n for n, v in NOT_NUMBERS.items() if v == value or v != v and value != value)
  return value


def _decode(value):
  return NOT_NUMBERS.get(value, value) if isinstance(value, str) else value
