"""One live run in a workdir: a second one is refused, and one after a crash takes over.

Not a lock of the file system, which shared ones and buckets do not have: each run that wants a
workdir writes a claim of its own there, and then looks whether there are others. Of two that come
at once at least one sees the other, and who sees another goes back. The holder writes its claim
anew every few seconds; who finds one unchanged for long enough knows that its run is dead.
"""

import contextlib
import json
import os
import random
import re
import socket
import sys
import threading
import time
import uuid
from pathlib import Path

from etils import epath

from gptjax import files, process
from gptjax.errors import Mistake, mistake

NAME = 'lease.{}.json'
RENEWED = 5.0  # seconds after which the holder writes it anew
EXPIRES = 30.0  # seconds unchanged, after which its holder is dead
TOLD = 2.0  # seconds of waiting before it is said


class Lease:
  """Held from entering to leaving, by one process for its whole run.

  Raises:
    Mistake: on entering, if another run holds the workdir and is alive.
  """

  def __init__(self, workdir: str | os.PathLike, *, enabled: bool = True):
    """With `enabled` False, as in every process of a run but one, it does nothing."""
    self._workdir, self._enabled = epath.Path(workdir), enabled
    self._path = self._workdir / NAME.format(uuid.uuid4().hex)
    self._me = {'where': _here(), 'pid': os.getpid(), 'began': process.began()}
    self._left, self._thread = threading.Event(), None
    self._renewals, self._renewed = 0, time.monotonic()

  def __enter__(self) -> 'Lease':
    if self._enabled:
      while not self._claim():
        time.sleep(random.uniform(0, RENEWED / 10))  # so that they do not meet again
      self._thread = threading.Thread(target=self._renew, name='lease', daemon=True)
      self._thread.start()
    return self

  def __exit__(self, *_) -> None:
    if self._thread:
      self._left.set()
      self._thread.join()
      self._path.unlink(missing_ok=True)

  def _claim(self) -> bool:
    """Claims the workdir when nobody else does; returns whether it has it."""
    self._wait_for_others()
    self._write(holds=False)
    # Looked at again when it holds: one that was thought dead may have come back meanwhile.
    if self._others() or not self._write(holds=True) or self._holders():
      self._path.unlink(missing_ok=True)
      return False
    return True

  def _wait_for_others(self) -> None:
    """Returns when no other claim is there, once the dead ones are deleted."""
    seen, since, began = {}, {}, time.monotonic()
    while others := self._others():
      now = time.monotonic()
      for path, claim in others.items():
        if _dead(claim):
          path.unlink(missing_ok=True)
          continue
        changed = seen.get(path, claim) != claim
        if claim.get('holds') and (changed or claim['where'] == self._me['where']):
          raise self._refusal(claim)
        if changed or path not in seen:
          seen[path], since[path] = claim, now
        elif now - since[path] >= EXPIRES:
          path.unlink(missing_ok=True)
      if now - began > TOLD:
        began = now + EXPIRES
        told = ', '.join(map(_told, others.values()))
        print(
          f'lease    waiting up to {EXPIRES:.0f} s to see whether {told} still trains',
          file=sys.stderr,
          flush=True,
        )
      time.sleep(RENEWED / 50)

  def _refusal(self, claim: dict) -> Mistake:
    got = f'{self._workdir}, in which {_told(claim)} trains'
    return mistake('workdir', got, 'one run at a time', 'another workdir, or ending that run')

  def _renew(self) -> None:
    while not self._left.wait(RENEWED):
      # A store may be away for a moment; so long, its holder is not dead.
      with contextlib.suppress(Exception):
        if not self._path.exists() or not self._write(holds=True):
          print(
            f'error: workdir {self._workdir}: another run took it over, as this one seemed dead',
            file=sys.stderr,
            flush=True,
          )
          os._exit(1)  # without saving: the workdir is no longer its own

  def _write(self, *, holds: bool) -> bool:
    """Writes its claim; False if it came so late that another one took over meanwhile."""
    began, self._renewals = time.monotonic(), self._renewals + 1
    self._path.write_text(json.dumps(self._me | {'holds': holds, 'renewed': self._renewals}))
    # From when the last one was on its way until this one had come.
    before, self._renewed = self._renewed, began
    if time.monotonic() - before < EXPIRES or not holds or not self._holders():
      return True
    self._path.unlink(missing_ok=True)
    return False

  def _holders(self) -> bool:
    """Whether another one holds it, and is not dead."""
    return any(claim.get('holds') and not _dead(claim) for claim in self._others().values())

  def _others(self) -> dict[epath.Path, dict]:
    """The claims of others; one that is being written, or was cut, says nothing."""
    found = {}
    for name in files.names(self._workdir):
      path = self._workdir / name
      if re.fullmatch(NAME.format(r'\w+'), name) and path != self._path:
        with contextlib.suppress(FileNotFoundError):
          found[path] = _parsed(path.read_text())
    return found


def _parsed(text: str) -> dict:
  try:
    found = json.loads(text)
  except ValueError:
    return {}
  ours = isinstance(found, dict) and {'where', 'pid', 'began', 'holds'} <= found.keys()
  return found if ours else {}


def _told(claim: dict) -> str:
  return f'process {claim["pid"]} on {claim["where"][0]}' if claim else 'another run'


def _dead(claim: dict) -> bool:
  """Whether it ran on this machine and does no more."""
  if claim.get('where') != _here():
    return False
  try:
    return process.began(claim['pid']) != claim['began']
  except OSError:
    return True


def _here() -> list[str]:
  """This machine, and the process numbers that are valid in it."""
  boot = Path('/proc/sys/kernel/random/boot_id').read_text().strip()
  return [socket.gethostname(), boot, os.readlink('/proc/self/ns/pid')]
