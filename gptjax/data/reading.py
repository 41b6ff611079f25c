"""The first half of a preparation: files to documents, sorted on disk by the shard they go to."""

import collections
import dataclasses
import json
import pathlib

from gptjax import files as whole_files
from gptjax.data import shards, sources, spool


def hash_files(files: tuple[str, ...]) -> list[str]:
  """Of each file, what decides its documents."""
  return [sources.hash_file(file) for file in files]


@dataclasses.dataclass(frozen=True)
class Part:
  """Files that one worker spools."""

  source: sources.Source
  files: tuple[str, ...]
  index: int
  spooled: str
  seed: int
  validation_fraction: float
  shards: int


def read(part: Part) -> collections.Counter[str]:
  """Reads a part's documents into the spool, one bucket per shard; returns what was skipped.

  A part that was read before is not read again.
  """
  done = pathlib.Path(part.spooled) / f'{part.index:05d}.read'
  if done.exists():
    return collections.Counter(json.loads(done.read_text()))
  skipped = collections.Counter()
  with spool.Writer(part.spooled, part.index) as writer:
    for file in part.files:
      for document in sources.read(part.source, file, skipped):
        text = document.text.encode()
        key = spool.key(text, part.seed)
        split, index = shards.place(key, part.validation_fraction, part.shards)
        writer.add(shards.bucket_name(split, index), key, text)
  whole_files.write_whole(done, json.dumps(skipped))
  return skipped


def deal(files: tuple[str, ...]) -> list[tuple[str, ...]]:
  """Deals files to at most 64 parts: enough to keep cores busy, few enough to open at once."""
  count = min(64, len(files))
  return [files[i::count] for i in range(count)]
