"""The processes of a run: how each finds the others, and that all of them run the same."""

import contextlib
import hashlib
import json
import os
import re
import sys
import threading
import traceback
from collections.abc import Iterator

import jax
import numpy as np
from etils import epath
from jax._src.clusters import ClusterEnv
from jax.experimental import multihost_utils

from gptjax.errors import Mistake, mistake, told_as

AUTO, ONE = 'auto', 'one'
JOIN_SECONDS = 300  # to wait for the others at the start: a large machine boots unevenly
# How JAX names the clusters that it finds, and how people do.
CLUSTERS = {
  'GceTpuCluster': 'the metadata of TPU VMs',
  'GkeTpuCluster': 'the TPUs of GKE',
  'K8sCluster': 'Kubernetes',
  'SlurmCluster': 'SLURM',
  'OmpiCluster': 'Open MPI',
}


def join(where: str) -> str:
  """Joins the other processes, before anything else is asked of JAX, and returns how; '' for none.

  Args:
    where: 'auto' is the cluster that JAX finds (TPU pods, GKE, SLURM, Open MPI) and one process
      where it finds none; 'one' is one process; or 'address:port,processes,index'.

  Raises:
    Mistake: for what is none of these, or a cluster that cannot be joined. Where the others do not
      come in time it ends this process, since JAX cannot be stopped waiting.
  """
  if where == ONE or jax.distributed.is_initialized():
    return ''
  if where == AUTO:
    given, found = {}, _cluster()
    if not found:
      return ''
    at = f'found through {CLUSTERS.get(found, found)}'
  else:
    given, at = _parsed(where), f'at {where.split(",")[0]}'
  wanted = 'processes that find each other'
  fix = "--config.hosts='ADDRESS:PORT,PROCESSES,INDEX', or one"
  with _giving_up(f'hosts {where!r}, {at}'):
    with told_as(f'hosts {where!r}, {at}', wanted, fix, ValueError, RuntimeError, KeyError):
      # Later than ours, which is told and not a stack trace of C++.
      jax.distributed.initialize(**given, initialization_timeout=2 * JOIN_SECONDS)
  if not given and 'JAX_LOCAL_DEVICE_IDS' not in os.environ and _alone_on_its_machine():
    # JAX gives a process under SLURM and Open MPI one GPU, even where no other uses the rest.
    jax.config.update('jax_cuda_visible_devices', 'all')
    jax.config.update('jax_rocm_visible_devices', 'all')
  return at


def _cluster() -> str:
  """JAX's name for the cluster that it would join; '' if there is none."""
  # Not public, but asked in the same way by `jax.distributed.initialize`, which tells nobody.
  for cluster in ClusterEnv._cluster_types:
    if not cluster.opt_in_only_method and cluster.is_env_present():
      return cluster.__name__
  return ''


def _parsed(where: str) -> dict:
  match = re.fullmatch(r'([^,]+:(\d+)),(\d+),(\d+)', where)
  if not match or int(match[4]) >= int(match[3]) or not 0 < int(match[2]) < 2**16:
    wanted = f"'{AUTO}', '{ONE}' or 'address:port,processes,index'"
    raise mistake('hosts', repr(where), wanted, "--config.hosts='10.0.0.1:8476,2,0'")
  address, _, processes, index = match.groups()
  return {
    'coordinator_address': address,
    'num_processes': int(processes),
    'process_id': int(index),
  }


def _alone_on_its_machine() -> bool:
  env = os.environ
  nodes = env.get('SLURM_STEP_NUM_NODES')
  return (nodes is not None and nodes == env.get('SLURM_STEP_NUM_TASKS')) or env.get(
    'OMPI_COMM_WORLD_LOCAL_SIZE'
  ) == '1'


@contextlib.contextmanager
def _giving_up(what: str) -> Iterator[None]:
  """Ends this process if what is inside takes longer than all may wait for each other."""

  def leave():
    fix = 'starting all, at an address that all reach'
    told = mistake(what, f'not all there after {JOIN_SECONDS} s', 'all processes', fix)
    print(f'error: {told}', file=sys.stderr, flush=True)
    os._exit(2)

  timer = threading.Timer(JOIN_SECONDS, leave)
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


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
