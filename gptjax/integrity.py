"""Whether a folder of files is what was written: a list of their sizes and SHA-256, written last.

Each process lists the files that it wrote itself, so no one reads what others wrote. A check may be
shared among another number of processes.
"""

import hashlib
import json
import re

from etils import epath

from gptjax import files

LIST = 'sums.{index}-of-{count}.json'
UNFINISHED = 'it was not finished'
CHUNK = 2**24


def write_list(folder: epath.Path, index: int = 0, count: int = 1) -> None:
  """Lists what process `index` of `count` wrote in a folder that is complete."""
  mine = {name: _sum(folder / name) for name in _names(folder) if _writer(name) == index}
  text = json.dumps({'count': count, 'files': mine})
  files.write_whole(folder / LIST.format(index=index, count=count), text)


def complete(folder: epath.Path) -> bool:
  """Whether every process has listed what it wrote; nothing is read."""
  listed = _lists(folder)
  return bool(listed) and len(listed) == int(re.findall(r'\d+', listed[0])[1])


def damage(folder: epath.Path, index: int = 0, count: int = 1) -> str:
  """What is wrong with a folder, as far as process `index` of `count` looks; '' if nothing is.

  Process 0 looks for lists and files that are missing, and each one reads its share of the files.
  """
  listed = _lists(folder)
  if not listed:
    return f'no list of its files: {UNFINISHED}'
  wanted = {}
  try:
    lists = [json.loads((folder / name).read_text()) for name in listed]
    for each in lists:
      wanted |= each['files']
    lacking = lists[0]['count'] - len(lists)
  except (OSError, ValueError, KeyError, TypeError) as e:
    return f'a list of its files that cannot be read: {type(e).__name__}'
  if lacking:
    return f'{lacking} of {lists[0]["count"]} lists of its files are missing: {UNFINISHED}'
  there = set(_names(folder))
  if missing := sorted(wanted.keys() - there):
    return f'{missing[0]} is missing'
  if foreign := sorted(there - wanted.keys()):
    return f'{foreign[0]} was not written with it'
  for name in sorted(wanted)[index::count]:
    try:
      if _sum(folder / name) != wanted[name]:
        return f'{name} is not what was written'
    except OSError as e:
      return f'{name} cannot be read: {e.strerror}'
  return ''


def _lists(folder):
  return [n for n in files.names(folder) if re.fullmatch(r'sums\.\d+-of-\d+\.json', n)]


def _names(folder, inside=''):
  """Of all files in a folder, but the lists."""
  for path in sorted(folder.iterdir()):
    name = f'{inside}{path.name}'
    # Where others made the folder, in a bucket, by an empty object, it seems to be in itself.
    if path.name == folder.name and not path.exists():
      continue
    if path.is_dir():
      yield from _names(path, f'{name}/')
    elif not re.fullmatch(r'sums\.\d+-of-\d+\.json(\.incomplete)?', name):
      yield name


def _writer(name):
  """The process that wrote a file: Orbax names those of each, and the first writes the rest."""
  found = re.search(r'(?:ocdbt\.|array_metadatas/)process_(\d+)', name)
  return int(found[1]) if found else 0


def _sum(path):
  digest, size = hashlib.sha256(), 0
  with path.open('rb') as file:
    while chunk := file.read(CHUNK):
      digest.update(chunk)
      size += len(chunk)
  return [size, digest.hexdigest()]
