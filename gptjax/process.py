"""This process: when it was started, its devices, and the memory that it keeps."""

import ctypes
import os
import pathlib
import time

import jax

from gptjax.errors import told_as

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt(3)


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


def found() -> list[jax.Device]:
  """All devices that JAX finds.

  Raises:
    Mistake: if there are none of the platform that it is asked for.
  """
  kinds = RuntimeError, AssertionError  # the second for CUDA without its plugin
  with told_as('devices', 'some that JAX finds', 'another JAX_PLATFORMS', *kinds):
    return jax.devices()


def devices() -> list[jax.Device]:
  """The same; a CPU computes in the thread that asks it to, for `keep_memory`.

  Not where processes train together: it would wait in a collective for one that has ended.
  """
  if not jax.distributed.is_initialized():
    jax.config.update('jax_cpu_enable_async_dispatch', False)
  return found()


def waits_for(device: jax.Device) -> bool:
  """Whether what this device is asked for is done when the call returns: see `devices`."""
  return device.platform == 'cpu' and not jax.distributed.is_initialized()


def keep_memory() -> None:
  """Has malloc keep what is freed from now on: for steps, which take as much again each time.

  Else it gives it back to Linux, which then gives it again page by page, each filled with zeros.
  Large pieces are kept for the process's main thread alone.
  """
  if mallopt := _libc('mallopt'):
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)


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
