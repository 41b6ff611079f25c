"""The processes of a run: how each finds the others, and that all of them run the same."""

import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator

import jax
from etils import epath
from jax._src import distributed
from jax._src.clusters import ClusterEnv

from gptjax.errors import Mistake, mistake, told_as

AUTO, ONE = 'auto', 'one'
JOIN_SECONDS = 300  # to wait for the others at the start: a large machine boots unevenly
TELL_SECONDS = 10  # before it is said that they are waited for
READ_SECONDS = 6  # in which the others learn why the first process ends, and end
ASK_SECONDS = 2  # between questions whether one has ended
END_SECONDS = 15  # in which a process ends itself when another one has
LEFT = 'gptjax/left'  # under which a process says why it ends
AGAIN = 'the same command goes on from the last checkpoint'
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
  # It would catch SIGTERM, and tell nobody who does not ask.
  jax.config.update('jax_enable_preemption_service', False)
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
  match = re.fullmatch(r'((?:[\w.-]+|\[[\w:.%]+\]):(\d+)),(\d{1,7}),(\d{1,7})', where)
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
    fix = 'starting all, each with its own index, at an address that all reach'
    told = mistake(what, f'not all there after {JOIN_SECONDS} s', 'all processes', fix)
    print(f'error: {told}', file=sys.stderr, flush=True)
    os._exit(2)

  wait = f'{what}: waiting for all processes, at most {JOIN_SECONDS} s'
  tell = functools.partial(print, wait, file=sys.stderr, flush=True)
  timers = [threading.Timer(JOIN_SECONDS, leave), threading.Timer(TELL_SECONDS, tell)]
  for timer in timers:
    timer.daemon = True
    timer.start()
  try:
    yield
  finally:
    for timer in timers:
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
    with _ending_after_others(name):
      yield
    return
  except Mistake as e:
    why, told, code = str(e), f'error: {name}: {e}', 2
  except KeyboardInterrupt:
    why, told, code = 'interrupted', f'{name}: interrupted', 130
  except BaseException as e:
    why, told, code = repr(e), f'{traceback.format_exc()}{name} ended', 1
    if lost_a_peer(e):
      told += f', since another one did or cannot be reached; {AGAIN}'
  print(told, file=sys.stderr, flush=True)
  sys.stdout.flush()
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    _client().key_value_set(f'{LEFT}/{jax.process_index()}', why[:1000], True)
    if first():
      time.sleep(READ_SECONDS)  # for the others to read it: this process keeps what they say
  os._exit(code)


@contextlib.contextmanager
def _ending_after_others(name: str) -> Iterator[None]:
  """Ends this process soon after another one said that it ends.

  What is inside may wait for the other in C++, as in a barrier of Orbax's: not even Ctrl-C ends
  that before the other's heartbeats are missed.
  """
  done = threading.Event()

  def follow():
    left = []
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # the first is gone: JAX ends this one
      while not left and not done.wait(ASK_SECONDS):
        left = _left()
    # When the first one is gone too, JAX ends this one, and says nothing but its own stack.
    soon = '0' in dict(left)
    if left and not done.wait(ASK_SECONDS if soon else END_SECONDS):
      told = '; '.join(f'process {index} did: {why}' for index, why in left)
      print(f'{name} ended, since {told}; {AGAIN}', file=sys.stderr, flush=True)
      os._exit(1)

  following = threading.Thread(target=follow, name='following', daemon=True)
  following.start()
  try:
    yield
  finally:
    done.set()
    following.join()


def lost_a_peer(e: BaseException) -> bool:
  """Whether JAX raised this because another process is gone."""
  return bool(re.search(r'Gloo|[Cc]oordination ?[Ss]ervice|NCCL|Connection (reset|closed)', str(e)))


def meet() -> None:
  """Waits until all processes came as far as this, before the first collective.

  Raises:
    Mistake: with what another process said when it ended.
  """
  all_say('here')


def all_say(mine: str) -> list[str]:
  """What each process says, in their order. All must ask at the same place."""
  return _exchange(mine) if jax.process_count() > 1 else [mine]


def compiled_by_all(jitted: Callable) -> Callable:
  """The same function of one kind of arguments, called when all processes have compiled it."""
  if jax.process_count() == 1:
    return jitted
  return called_together(lambda *args: jitted.lower(*args).compile())


def called_together(compiled_for: Callable[..., Callable]) -> Callable:
  """The function that `compiled_for` gives for its first arguments, when all processes have it.

  Gloo waits for half a minute (jax-ml/jax issue 40831), and a compilation may take longer.
  """
  compiled = None

  def call(*args):
    nonlocal compiled
    if not compiled:
      compiled = compiled_for(*args)
      meet()
    return compiled(*args)

  return call


AHEAD = 3  # steps: who has read the metrics of one knows that all others have begun it


class Request:
  """What all processes do after the same step, though only one of them knows why."""

  def __init__(self, what: str):
    self._what, self._round, self._mine = what, 0, None

  def ask(self, step: int, why: str) -> None:
    """Asks for it after step `step`, or soon after it where others must hear of it first."""
    if jax.process_count() == 1:
      self._mine = step, why
      return
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one has asked already
      _client().key_value_set(self._key, json.dumps([step + AHEAD, why]))

  def due(self, step: int) -> str:
    """Why it is to be done after this step, or ''. Every process asks after every step."""
    asked = self._mine if jax.process_count() == 1 else self._heard()
    if not asked or step < asked[0]:
      return ''
    self._round, self._mine = self._round + 1, None
    return asked[1]

  @property
  def _key(self):
    return f'gptjax/asked/{self._what}/{self._round}'

  def _heard(self):
    try:
      return json.loads(_client().key_value_try_get(self._key))
    except jax.errors.JaxRuntimeError as e:
      if 'NOT_FOUND' not in str(e):
        raise
      return None


def check_alike(about: dict, workdir: epath.Path) -> None:
  """Waits for all processes, and raises unless all run the same in the same folder.

  Args:
    about: what must be equal: JSON.
    workdir: where the first one puts a file, which the others must see.

  Raises:
    Mistake: also with what another process said when it ended.
  """
  if jax.process_count() == 1:
    return
  digests = _exchange(hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest())
  others = [i for i, digest in enumerate(digests) if digest != digests[0]]
  if others:
    got = f'another config or another version of the code in {others}'
    raise mistake('processes', got, 'the same as in process 0', 'one command for all of them')
  token = workdir / f'.seen-{digests[0][:16]}'
  if first():
    token.write_text('')
  _exchange('the first process wrote it')
  blind = [i for i, seen in enumerate(_exchange(str(token.exists()))) if seen != 'True']
  if first():
    token.unlink()
  if blind:
    got = f'{workdir}, which processes {blind} do not share'
    raise mistake('workdir', got, 'one folder that all processes see', 'a shared file system')


_topics = itertools.count()  # all processes ask the same in the same order


def _exchange(mine: str) -> list[str]:
  """What each process says.

  Not by a collective of JAX's: those wait less for who opens large corpora, and nobody learns from
  them why another one has ended.
  """
  topic, end = f'gptjax/said/{next(_topics)}', time.monotonic() + JOIN_SECONDS
  _client().key_value_set(f'{topic}/{jax.process_index()}', mine)
  return [_heard(topic, i, end) for i in range(jax.process_count())]


def _heard(topic, index, end):
  while True:
    try:
      return _client().blocking_key_value_get(f'{topic}/{index}', 1000)
    except jax.errors.JaxRuntimeError as e:
      if 'DEADLINE_EXCEEDED' not in str(e):
        raise
    for who, why in _left():
      fix = 'what it says, and starting all again'
      raise mistake(f'process {who}', f'its end: {why}', 'all to run', fix)
    if time.monotonic() > end:
      got, fix = f'no word for {JOIN_SECONDS} s after it joined', 'looking at what it does'
      raise mistake(f'process {index}', got, 'one', fix)


def _left() -> list[tuple[str, str]]:
  """Which processes said that they end, and why."""
  return [(key.rsplit('/', 1)[1], why) for key, why in _client().key_value_dir_get(LEFT)]


def _client():
  return distributed.global_state.client
