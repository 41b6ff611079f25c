"""Says where a run stands when it does not come on, and may end it so that it is started again."""

import faulthandler
import sys
import threading
import time

FIRST = 3600  # seconds for the first step, which compiles and in which machines find each other
LATER = 2  # seconds after the message: the stacks are written by C, even if Python is stuck


class Watchdog:
  """Wants to be told of every step, and speaks when none has come in time.

  Prints what the run was doing and the stacks of all threads on stderr, once for each time that it
  is stuck. With `ends` it then ends the process with code 1.
  """

  def __init__(self, seconds: float, *, ends: bool = False):
    """With 0 seconds it does nothing."""
    self._seconds, self._ends = seconds, ends
    self._timer: threading.Timer | None = None
    self._warm = False

  def beat(self, doing: str) -> None:
    """The run is alive, and goes on with what is said."""
    if not self._seconds:
      return
    limit = self._seconds if self._warm else max(self._seconds, FIRST)
    self.close()
    began = time.strftime('%H:%M:%S')
    self._timer = threading.Timer(limit, self._say, [limit, doing, began])
    self._timer.daemon = True
    self._timer.start()
    faulthandler.dump_traceback_later(limit + LATER, exit=self._ends, file=sys.__stderr__)

  def warm(self) -> None:
    """From here on steps are as long as they will be."""
    self._warm = True

  def close(self) -> None:
    """Ends the watch; may be called twice."""
    if self._timer:
      self._timer.cancel()
      faulthandler.cancel_dump_traceback_later()
    self._timer = None

  def _say(self, limit, doing, began) -> None:
    end = 'this process ends, to be started again' if self._ends else 'it may still come on'
    told = f'STUCK    for {limit:g} s, since {began}, in: {doing}; {end}'
    print(told, file=sys.__stderr__, flush=True)

  def __enter__(self) -> 'Watchdog':
    return self

  def __exit__(self, *_) -> None:
    self.close()
