"""This process: when it was started, its devices, and the memory that it keeps."""

import ctypes
import os
import pathlib
import time

import jax


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


# Of mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def devices() -> list[jax.Device]:
  """All that JAX finds; one CPU computes in the calling thread, and keeps what that takes.

  A step takes as much memory each time. By its defaults malloc gives it back to Linux, which then
  gives it again page by page, each filled with zeros. It can keep large pieces of the process's
  main thread alone.
  """
  jax.config.update('jax_cpu_enable_async_dispatch', False)
  found = jax.devices()
  mallopt = _libc('mallopt')
  if found[0].platform == 'cpu' and mallopt:
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)
  return found


def give_memory_back() -> None:
  """Gives Linux what is free now, as after a compilation, where malloc would hold it."""
  if trim := _libc('malloc_trim'):
    trim(0)


def _libc(name):
  """A function of glibc; None where there is another library."""
  try:
    return getattr(ctypes.CDLL(None), name, None)
  except (OSError, TypeError):
    return None
