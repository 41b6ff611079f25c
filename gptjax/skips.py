"""Stretches of the stream that a run leaves out: asked for, or given up when it rolled back.

A skip is a jump of the clock: rate, ramp and data go on behind it as if it had been trained on.
"""

import dataclasses
import json
import re
from collections.abc import Iterable

from etils import epath

from gptjax import files
from gptjax.errors import mistake, told_as

FILE = 'skips.json'


@dataclasses.dataclass(frozen=True)
class Rollback:
  """A stretch on which a state went bad, after which the run went on from before it."""

  start: int  # sequences consumed before its first step
  stop: int  # and after its last
  why: str


def parse(text: str) -> list[range]:
  """'1000-1999,5000-5009', the first and the last sequence of each stretch, from 0."""
  found = [first_to_last(part.strip()) for part in filter(None, text.split(','))]
  if not all(found):
    wanted = 'first-last, from 0, with commas between'
    raise mistake('skip_sequences', text, wanted, "--config.skip_sequences='1000-1999'")
  return found


def first_to_last(text: str) -> range:
  """The numbers from the first to the last of '20-22'; none for what is written otherwise."""
  match = re.fullmatch(r'(\d+)-(\d+)', text)
  return range(int(match[1]), int(match[2]) + 1) if match else range(0)


def union(ranges: Iterable[range]) -> tuple[range, ...]:
  """The same numbers in ranges that are apart and in order."""
  joined: list[range] = []
  for one in sorted(ranges, key=lambda r: r.start):
    if joined and one.start <= joined[-1].stop:
      joined[-1] = range(joined[-1].start, max(joined[-1].stop, one.stop))
    else:
      joined.append(one)
  return tuple(joined)


def read(workdir: epath.Path) -> list[Rollback]:
  """The rollbacks of a run."""
  path = workdir / FILE
  if not path.exists():
    return []
  with told_as(path, 'what a run wrote', 'putting it back as it was', Exception):
    return [Rollback(**each) for each in json.loads(path.read_text())]


def add(workdir: epath.Path, rollback: Rollback) -> None:
  """Writes one more; it is on disk when this returns."""
  every = [*read(workdir), rollback]
  text = json.dumps([dataclasses.asdict(each) for each in every], indent=2)
  files.write_whole(workdir / FILE, text)
