"""SIGTERM, by which a scheduler takes a machine back: save after this step, and go."""

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator

AGAIN = 75  # the exit code for 'start me again' (EX_TEMPFAIL of sysexits.h)


class Preempted(Exception):
  """All was saved, since the machine is taken back."""


class Notice:
  """Whether SIGTERM came, and when."""

  def __init__(self):
    self.at: float | None = None  # of `time.time`, which other machines know too

  def _hear(self, *_) -> None:
    self.at = time.time()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    told = 'SIGTERM: saving after the step that runs; once more ends at once'
    with contextlib.suppress(OSError, RuntimeError):  # nobody reads it, or it came amid a line
      print(told, file=sys.stderr, flush=True)


@contextlib.contextmanager
def listening() -> Iterator[Notice]:
  """Hears of SIGTERM while inside, if this is the main thread: no other may."""
  notice = Notice()
  if threading.current_thread() is not threading.main_thread():
    yield notice
    return
  before = signal.signal(signal.SIGTERM, notice._hear)
  try:
    yield notice
  finally:
    signal.signal(signal.SIGTERM, before)
