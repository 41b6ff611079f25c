"""What Linux tells of a process: when it was started, and whether it still runs."""

import os
import pathlib
import time


def began(pid: int | str = 'self') -> str:
  """When a process was started, in ticks since the machine was: process numbers come again.

  Raises:
    OSError: for one that is gone.
  """
  fields = pathlib.Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()
  if fields[0] == 'Z':
    raise ProcessLookupError(pid)
  return fields[19]


def age() -> float:
  """Seconds since this process was started, all imports included."""
  return time.clock_gettime(time.CLOCK_BOOTTIME) - int(began()) / os.sysconf('SC_CLK_TCK')
