"""Folders on disks and in buckets, and files that are there whole or not at all."""

import functools
import logging
import os
import pathlib
import re
import socket
import sys
import urllib.request

import fsspec
from etils import epath

from gptjax.errors import mistake, told_as

STORE = 'storage.googleapis.com', 443
TIMEOUT = 120  # seconds that a store may take to answer, of which gcsfs asks six times


def folder(path: str | os.PathLike) -> epath.Path:
  """What a path names: a folder of this machine, absolute, or one in a bucket of GCS.

  Raises:
    Mistake: for another kind of bucket, or one that cannot be reached.
  """
  path = os.fspath(path)
  if not in_bucket(path):
    return epath.Path(path).absolute()
  if not re.fullmatch(r'gs://[^/]+/.*[^/].*', path):
    raise mistake('folder', path, 'one of this machine, or gs://bucket/folder', 'runs/…')
  # Other processes write there too, and TensorFlow, where it is installed, keeps what it read.
  fsspec.config.conf.setdefault('gs', {}).update(
    {'use_listings_cache': False, 'requests_timeout': TIMEOUT}
  )
  os.environ['EPATH_USE_TF'] = '0'
  logging.getLogger('gcsfs').setLevel(logging.CRITICAL)  # what it logs it raises too
  wanted = 'a bucket that can be reached'
  fix = "the network, its name, gcloud auth application-default login, or pip install -e '.[gcs]'"
  with told_as(path, wanted, fix, Exception):
    _reach('/'.join(path.split('/')[:3]))
  return epath.Path(path)


@functools.cache  # many ask for folders of one bucket
def _reach(bucket: str) -> None:
  if not ('STORAGE_EMULATOR_HOST' in os.environ or urllib.request.getproxies()):
    socket.create_connection(STORE, timeout=10).close()  # gcsfs would try for a minute
  if not epath.Path(bucket).exists():
    raise FileNotFoundError(bucket)


def in_bucket(path: str | os.PathLike) -> bool:
  """Whether a path names what is in no folder of this machine."""
  return '://' in os.fspath(path)


def failures() -> tuple[type[Exception], ...]:
  """What is raised by a folder that cannot be read or written: buckets have a kind of their own."""
  client = sys.modules.get('gcsfs.retry')
  return (OSError, client.HttpError) if client else (OSError,)


def make(folder: epath.Path) -> None:
  """Makes a folder and those that it is in. A bucket has none: what it holds have long names."""
  if not in_bucket(folder):
    folder.mkdir(parents=True, exist_ok=True)


def remove(folder: epath.Path) -> None:
  """Deletes a folder that was made, and what is in it. In a bucket there may be nothing yet."""
  if not in_bucket(folder) or names(folder):
    folder.rmtree()


def names(folder: epath.Path) -> list[str]:
  """Of what is in a folder, in order; none where there is no such folder."""
  try:
    return sorted(path.name for path in folder.iterdir())
  except FileNotFoundError:
    return []


def write_whole(path: str | os.PathLike, data: str | bytes) -> None:
  """Writes a file beside its place and moves it there: dying on the way leaves what was before."""
  data = data.encode() if isinstance(data, str) else data
  if in_bucket(path):
    epath.Path(path).write_bytes(data)  # it is there when all of it has come
    return
  path = pathlib.Path(path)
  beside = path.with_name(f'{path.name}.incomplete')
  with beside.open('wb') as file:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())
  beside.replace(path)


def move(folder: epath.Path, to: epath.Path) -> None:
  """Moves a folder to a place where there is none. In a bucket who dies on the way leaves both."""
  if not in_bucket(folder):
    make(to.parent)
    folder.rename(to)
    return
  store = fsspec.filesystem('gs')  # it copies by itself, and epath through this machine
  here = str(folder).removeprefix('gs://')
  for path in store.find(here):
    store.cp_file(path, f'{to}{path.removeprefix(here)}')
  folder.rmtree()


def copy(folder: str | os.PathLike, to: epath.Path) -> None:
  """Copies all files of a folder of this machine."""
  for path in sorted(pathlib.Path(folder).rglob('*')):
    if path.is_file():
      target = to / str(path.relative_to(folder))
      make(target.parent)
      write_whole(target, path.read_bytes())
