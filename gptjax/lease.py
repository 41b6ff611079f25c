"""One live run in a workdir: a second one is refused, and one after a crash takes over.

Not a lock of the file system, which many of those that machines share do not have: the holder
writes a file anew every few seconds, and who finds it unchanged for long enough takes it.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from pathlib import Path

from etils import epath

from gptjax import files, process
from gptjax.errors import mistake

FILE = 'lease.json'
RENEWED = 5.0  # seconds after which the holder writes it anew
EXPIRES = 30.0  # seconds unchanged, after which its holder is dead


class Lease:
  """Held from entering to leaving, by one process for its whole run.

  Raises:
    Mistake: on entering, if another run holds the workdir and is alive.
  """

  def __init__(self, workdir: epath.Path, *, enabled: bool = True):
    """With `enabled` False, as in every process of a run but one, it does nothing."""
    self._path, self._enabled = epath.Path(workdir) / FILE, enabled
    self._me = {
      'id': uuid.uuid4().hex,
      'where': _here(),
      'pid': os.getpid(),
      'began': process.began(),
    }
    self._left, self._thread = threading.Event(), None
    self._renewals = 0

  def __enter__(self) -> 'Lease':
    if self._enabled:
      while not self._take(self._dead_holder()):
        pass
      self._thread = threading.Thread(target=self._renew, name='lease', daemon=True)
      self._thread.start()
    return self

  def __exit__(self, *_) -> None:
    if self._thread:
      self._left.set()
      self._thread.join()
      if (holder := self._read()) and holder['id'] == self._me['id']:
        self._path.unlink()

  def _dead_holder(self) -> dict | None:
    """The one that had it and is dead, if need be after waiting for that; None if nobody had it."""
    seen, since = self._read(), time.monotonic()
    while seen and not _dead(seen):
      if seen['where'] == self._me['where']:
        raise self._refusal(seen)
      if time.monotonic() - since >= EXPIRES:
        break
      time.sleep(RENEWED / 10)
      now = self._read()
      if now and now != seen:
        raise self._refusal(now)
      seen = now
    return seen

  def _take(self, dead: dict | None) -> bool:
    """Takes the place of a dead holder, or none, unless somebody else did before."""
    mine, taking = Path(f'{self._path}.{self._me["id"]}'), Path(f'{self._path}.taking')
    mine.write_text(json.dumps(self._me | {'renewed': 0}))
    try:
      os.link(mine, taking)  # one at a time: it fails if there is one
    except FileExistsError:
      mine.unlink()
      self._forget(taking)
      return False
    try:
      if self._read() != dead:
        return False
      os.replace(mine, self._path)
    finally:
      mine.unlink(missing_ok=True)
      taking.unlink()
    return True

  def _forget(self, taking: Path) -> None:
    """Waits a moment for who takes it now, whose mark goes if it died with it."""
    time.sleep(RENEWED / 100)
    with contextlib.suppress(FileNotFoundError):
      other = _parsed(taking.read_text())
      if not other or _dead(other) or time.time() - taking.stat().st_mtime > EXPIRES:
        taking.unlink()

  def _refusal(self, holder):
    got = f'{self._path.parent}, in which process {holder["pid"]} on {holder["where"][0]} trains'
    return mistake('workdir', got, 'one run at a time', 'another workdir, or ending that run')

  def _renew(self) -> None:
    while not self._left.wait(RENEWED):
      try:
        holder = self._read()
        if holder and holder['id'] != self._me['id']:
          break
        self._write()
      except OSError:
        continue  # a store that is away for a moment: its holder is not dead yet
    else:
      return
    told = f'error: {self._refusal(holder)}; it took over, as this one seemed dead'
    print(told, file=sys.stderr, flush=True)
    os._exit(1)  # without saving: the workdir is no longer its own

  def _write(self) -> None:
    self._renewals += 1
    files.write_whole(self._path, json.dumps(self._me | {'renewed': self._renewals}))

  def _read(self) -> dict | None:
    try:
      return _parsed(self._path.read_text())
    except FileNotFoundError:
      return None


def _parsed(text: str) -> dict | None:
  """What a file tells of its holder; None if it was cut, or is none of ours."""
  try:
    found = json.loads(text)
  except ValueError:
    return None
  ours = isinstance(found, dict) and {'id', 'where', 'pid', 'began'} <= found.keys()
  return found if ours else None


def _dead(holder: dict) -> bool:
  """Whether it ran on this machine and does no more."""
  if holder['where'] != _here():
    return False
  try:
    return process.began(holder['pid']) != holder['began']
  except OSError:
    return True


def _here() -> list[str]:
  """This machine, and the process numbers that are valid in it."""
  boot = Path('/proc/sys/kernel/random/boot_id').read_text().strip()
  return [socket.gethostname(), boot, os.readlink('/proc/self/ns/pid')]
