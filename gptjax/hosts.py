"""The processes of a run: how each finds the others, and that all of them run the same."""

import contextlib
import hashlib
import json
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Iterator

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from gptjax.errors import Mistake, mistake, told_as

AUTO, ONE = 'auto', 'one'
JOIN_SECONDS = 300  # to wait for the others at the start: a large machine boots unevenly


def join(where: str) -> None:
  """Joins the other processes, before anything else is asked of JAX.

  Args:
    where: 'auto' is the cluster that JAX finds (TPU pods, SLURM, Open MPI, GKE) and one process
      where it finds none; 'one' is one process; or 'address:port,processes,index'.

  Raises:
    Mistake: for what is none of these, or if the others cannot be reached.
  """
  if where == ONE or jax.distributed.is_initialized():
    return
  given = {}
  if where != AUTO:
    match = re.fullmatch(r'([^,]+:\d+),(\d+),(\d+)', where)
    if not match or int(match[3]) >= int(match[2]):
      wanted = f"'{AUTO}', '{ONE}' or 'address:port,processes,index'"
      raise mistake('hosts', repr(where), wanted, "--config.hosts='10.0.0.1:8476,2,0'")
    given = dict(
      coordinator_address=match[1], num_processes=int(match[2]), process_id=int(match[3])
    )
    if given['process_id']:
      _wait_for(where, match[1])
  try:
    jax.distributed.initialize(**given, initialization_timeout=JOIN_SECONDS)
  except ValueError as e:
    if given or 'coordinator_address' not in str(e):
      raise
  except RuntimeError as e:
    # JAX was asked for something before, as in a notebook: it is what it is.
    if given or 'before' not in str(e):
      raise


def _wait_for(where: str, address: str) -> None:
  """Until the first process listens. JAX would end this one with a stack trace if it never does."""
  host, port = address.rsplit(':', 1)
  end, fix = time.monotonic() + JOIN_SECONDS, 'starting it, at an address that all others reach'
  wanted = f'the first process to listen within {JOIN_SECONDS} s'
  with told_as(f'hosts {where!r}', wanted, fix, OSError, OverflowError, UnicodeError):
    while True:
      try:
        socket.create_connection((host, int(port)), timeout=5).close()
        return
      except OSError:
        if time.monotonic() > end:
          raise
        time.sleep(0.5)


def first() -> bool:
  """Whether this is the process that speaks and writes."""
  return jax.process_index() == 0


def say(*words: object) -> None:
  """Prints, in the first process."""
  if first():
    print(*words, flush=True)


def described() -> str:
  """The processes, for people; '' for one."""
  count = jax.process_count()
  return f'{count} processes of {jax.local_device_count()} devices' if count > 1 else ''


@contextlib.contextmanager
def leaving_at_once() -> Iterator[None]:
  """Ends this process at an error, though others are still there.

  JAX would wait for them at its exit, and they for this one in a collective.
  """
  if jax.process_count() == 1:
    yield
    return
  name = f'process {jax.process_index()} of {jax.process_count()}'
  try:
    yield
    return
  except Mistake as e:
    told, code = f'error: {name}: {e}', 2
  except KeyboardInterrupt:
    told, code = f'{name}: interrupted', 130
  except BaseException:
    told, code = f'{traceback.format_exc()}{name} ended', 1
  print(told, file=sys.stderr, flush=True)
  sys.stdout.flush()
  os._exit(code)


def check_alike(about: dict, workdir: epath.Path) -> None:
  """Waits for all processes, and raises unless all run the same in the same folder.

  Args:
    about: what must be equal: JSON.
    workdir: where the first one puts a file, which the others must see.
  """
  if jax.process_count() == 1:
    return
  digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).digest()
  all_digests = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))
  others = [i for i, d in enumerate(all_digests) if d.tobytes() != all_digests[0].tobytes()]
  if others:
    got = f'another config or another version of the code in {others}'
    raise mistake('processes', got, 'the same as in process 0', 'one command for all of them')
  token = workdir / f'.seen-{all_digests[0].tobytes().hex()[:16]}'
  if first():
    token.write_text('')
  multihost_utils.sync_global_devices('the first process wrote a file in the workdir')
  seen = multihost_utils.process_allgather(np.array(token.exists()))
  if first():
    token.unlink()
  if not seen.all():
    blind = [int(i) for i in np.flatnonzero(~seen)]
    got = f'{workdir}, which processes {blind} do not share'
    raise mistake('workdir', got, 'one folder that all processes see', 'a shared file system')
