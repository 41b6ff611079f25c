"""Processes that train together are one run, and when one ends the others do."""

import re
import signal
import subprocess

import psutil
import pytest

from gptjax import checkpoint, hosts, train
from gptjax.errors import Mistake
from tests.conftest import ROOT
from tests.runs import args, config, records, wait_for_records


def finished(process, code=0, timeout=300):
  out, err = process.communicate(timeout=timeout)
  assert process.returncode == code, without_stacks(err)[:8000]
  return out, err


def without_stacks(err):
  """What people said, and not the C++ stacks of those who lost the one that said it."""
  lines = err.splitlines()
  return '\n'.join(line[:1000] for line in lines if not re.match(r'[EF]\d{4} |\s+@ ', line))


def test_two_processes_are_one_run_that_one_goes_on_with(straight, corpus, tmp_path, together):
  """Each step and each line of metrics once, the losses those of one process on one device."""
  half = {'train_tokens': 1024.0, 'mesh__fsdp': 2, 'mesh__tensor': 2}
  out, _ = finished(together(2, 2, args(tmp_path, corpus, **half)))
  assert out.count('model    26,400 parameters') == 1 and out.count('held-out loss') == 1
  assert 'tensor 2 on cpu, 2 processes of 2 devices' in out
  assert 'hosts    2, at 127.0.0.1:' in out
  # JAX numbers the devices of the second process from 2048.
  assert 'fsdp 2 over the slow links between 2 nodes; within each tensor 2' in out
  assert 'order    of devices 0–1 2048–2049\n' in out
  train.main(config(tmp_path, corpus, train_tokens=2048.0, resume__accept_changes=True))
  got = records(tmp_path)
  wanted = [r for r in records(straight[0]) if r['sequences'] <= 64]
  assert len(got) == len(wanted) > 5 and got[-1]['sequences'] == 64
  clock = lambda records: [(r['step'], r['sequences'], r['batch'], r['lr']) for r in records]
  assert clock(got) == clock(wanted)
  for a, b in zip(got, wanted, strict=True):
    assert a['loss'] == pytest.approx(b['loss'], rel=1e-3)


@pytest.mark.slow
def test_two_processes_train_a_model_that_is_not_small(tmp_path, standard_library, together):
  """As in the README: with options that a CPU alone is compiled for it ended amid a collective."""
  flags = [f'workdir={tmp_path}', f'data.sources={standard_library}', 'mesh.fsdp=4']
  program = ['-m', 'gptjax.train', '--config=configs/tiny.py', '--config.train_tokens=5e3']
  process = together(2, 4, [*program, *(f'--config.{flag}' for flag in flags)])
  out, _ = finished(process, timeout=500)
  assert 'held-out loss' in out


@pytest.mark.slow
@pytest.mark.parametrize(
  'mesh', [{'mesh__data': 4}, {'mesh__fsdp': 4}, {'mesh__tensor': 4}, {'mesh__stage': 2}]
)
def test_any_axis_may_cross_the_processes(corpus, tmp_path, together, mesh):
  settings = {'train_tokens': 2048.0, 'model__n_layers': 4}
  train.main(config(tmp_path / 'one', corpus, mesh__data=8, **settings))
  out, _ = finished(together(4, 1, args(tmp_path / 'four', corpus, **settings, **mesh)))
  assert ('warning  tensor exchanges activations' in out) == ('mesh__tensor' in mesh)
  for kind in ('train', 'validation'):
    got, want = (records(tmp_path / name, kind) for name in ('four', 'one'))
    assert [r['sequences'] for r in got] == [r['sequences'] for r in want]
    for a, b in zip(got, want, strict=True):
      assert a['loss'] == pytest.approx(b['loss'], rel=1e-3)


LATE = """
import sys, time
import jax
from jax import P, lax
from gptjax import hosts, sharding

hosts.join(sys.argv[1])
jax.set_mesh(sharding.make_mesh(1, 2, 1))

def scattered(x):
  if hosts.first():
    time.sleep(40)  # as if it took that long to compile
  return lax.psum_scatter(x, 'fsdp', tiled=True)

jitted = jax.jit(jax.shard_map(scattered, in_specs=P(), out_specs=P('fsdp'), check_vma=False))
scatter = hosts.compiled_by_all(jitted)
(part,) = scatter(jax.numpy.ones(8)).addressable_shards
assert part.data.tolist() == [2] * 4
"""


@pytest.mark.slow
def test_who_compiles_for_long_is_waited_for(start_python, free_port):
  """Gloo's sums that are scattered give up after half a minute."""
  at = f'127.0.0.1:{free_port()},2'
  processes = [start_python(['-c', LATE, f'{at},{i}']) for i in range(2)]
  for process in processes:
    finished(process)


@pytest.mark.slow
@pytest.mark.parametrize('processes, devices', [(2, 2), (1, 4)])
def test_four_processes_are_gone_on_with_by_fewer(
  straight, corpus, tmp_path, together, processes, devices
):
  half = {'train_tokens': 1024.0, 'mesh__fsdp': 2, 'mesh__tensor': 2}
  finished(together(4, 1, args(tmp_path, corpus, **half)))
  whole = {'train_tokens': 2048.0, 'mesh__fsdp': 4, 'resume__accept_changes': True}
  finished(together(processes, devices, args(tmp_path, corpus, **whole)))
  for got, want in zip(records(tmp_path), records(straight[0]), strict=False):
    assert [got[k] for k in ('step', 'sequences', 'lr')] == [
      want[k] for k in ('step', 'sequences', 'lr')
    ]
    assert got['loss'] == pytest.approx(want['loss'], rel=1e-3)
  assert got['sequences'] == 64


@pytest.mark.slow
def test_a_process_that_dies_is_named_and_a_relaunch_goes_on(corpus, tmp_path, together):
  settings = {'mesh__fsdp': 2, 'train_tokens': 6144.0}
  finished(together(2, 1, args(tmp_path / 'straight', corpus, **settings)))
  process = together(2, 1, args(tmp_path / 'run', corpus, **settings))
  wait_for_steps(tmp_path / 'run', process)
  ranks = psutil.Process(process.pid).children()
  (second,) = [p for p in ranks if any(w.endswith(',2,1') for w in p.cmdline())]
  second.kill()
  _, err = finished(process, code=137, timeout=60)  # and not after minutes at a barrier
  assert 'process 1 ended first, with code 137' in err
  assert not psutil.wait_procs(ranks, timeout=10)[1]
  finished(together(2, 1, args(tmp_path / 'run', corpus, **settings)))
  got, want = records(tmp_path / 'run'), records(tmp_path / 'straight')
  bits = lambda records: [(r['sequences'], r['loss'], r['grad_norm'], r['lr']) for r in records]
  assert bits(got) == bits(want)


@pytest.mark.slow
@pytest.mark.parametrize(
  'name, twice, code',
  [('SIGINT', False, 130), ('SIGTERM', False, 75), ('SIGHUP', False, 143), ('SIGINT', True, 130)],
)
def test_a_launcher_that_is_stopped_leaves_nobody_behind(
  corpus, tmp_path, together, name, twice, code
):
  """Each process hears of it and says from where it goes on, but for an impatient user."""
  process = together(2, 1, args(tmp_path, corpus, mesh__fsdp=2, train_tokens=1e6))
  wait_for_steps(tmp_path, process)
  ranks = psutil.Process(process.pid).children()
  process.send_signal(getattr(signal, name))
  if twice:
    process.send_signal(getattr(signal, name))
  _, err = finished(process, code=code, timeout=60)
  assert not psutil.wait_procs(ranks, timeout=5)[1]
  if name == 'SIGTERM':
    assert 'ended    SIGTERM: sequence ' in err and 'the same command goes on from there' in err
  elif not twice:
    assert 'the same command goes on from ' in err and 'interrupted' in err
  assert 'ended first' not in err


def wait_for_steps(workdir, process):
  wait_for_records(workdir, process, 8)
  assert process.poll() is None, process.communicate()


@pytest.mark.slow
def test_after_sigterm_to_one_process_all_save_the_same_step(corpus, tmp_path, together):
  last = terminated(tmp_path, corpus, together)
  assert checkpoint.Checkpoints(tmp_path / 'checkpoints', keep=9).newest_whole() == last


@pytest.mark.slow
def test_and_the_same_command_goes_on_to_the_same_bits(corpus, tmp_path, together):
  finished(together(2, 1, args(tmp_path / 'straight', corpus, **LONG)))
  last = terminated(tmp_path / 'run', corpus, together)
  out, _ = finished(together(2, 1, args(tmp_path / 'run', corpus, **LONG)))
  assert f'start    sequence {last}, step ' in out
  assert records(tmp_path / 'run') == records(tmp_path / 'straight')


LONG = {'mesh__fsdp': 2, 'train_tokens': 6144.0}


def terminated(workdir, corpus, together):
  """The sequence at which two processes saved, of which one heard SIGTERM."""
  process = together(2, 1, args(workdir, corpus, **LONG))
  wait_for_steps(workdir, process)
  ranks = psutil.Process(process.pid).children()
  ranks[1].terminate()
  _, err = finished(process, code=75, timeout=60)
  assert err.count('ended    SIGTERM: sequence ') == 1 and 'ended first' not in err
  assert not psutil.wait_procs(ranks, timeout=5)[1]
  last = records(workdir)[-1]['sequences']
  assert f'sequence {last} was saved' in err and last < 192
  return last


@pytest.mark.parametrize('wrong', [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_process_that_finds_a_mistake_tells_the_others(
  corpus, tmp_path, free_port, start_python, wrong
):
  at, processes = f'127.0.0.1:{free_port()},2', []
  for i in range(2):
    sources = corpus if i != wrong else '/nowhere'
    settings = {'hosts': f'{at},{i}', 'data__sources': sources, 'mesh__fsdp': 2}
    processes.append(start_python(args(tmp_path, corpus, **settings)))
  said = []
  for process in processes:
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2, err
    said.append(err)
  assert f'error: process {wrong} of 2: corpus' in said[wrong]
  told = f'error: process {1 - wrong} of 2: process {wrong}: got its end: corpus'
  assert told in said[1 - wrong] and 'Traceback' not in said[1 - wrong]


WAITS = """
import sys, time
import jax
from gptjax import hosts

hosts.ASK_SECONDS = hosts.END_SECONDS = 1
index, leaving = map(int, sys.argv[2:])
hosts.join(f'{sys.argv[1]},2,{index}')
jax.devices()
with hosts.leaving_at_once():
  time.sleep(3)  # while nobody leaves, nothing happens
  if index == leaving:
    raise KeyboardInterrupt
  hosts._client().wait_at_barrier('that the other never comes to', 90_000)
"""


@pytest.mark.parametrize('leaving', [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_process_that_waits_in_a_barrier_for_one_that_left_ends(start_python, free_port, leaving):
  at, waiting = f'127.0.0.1:{free_port()}', 1 - leaving
  processes = [start_python(['-c', WAITS, at, str(i), str(leaving)]) for i in range(2)]
  _, err = finished(processes[leaving], code=130, timeout=60)
  assert f'process {leaving} of 2: interrupted' in err
  _, err = finished(processes[waiting], code=1, timeout=30)  # long before heartbeats are missed
  told = f'process {waiting} of 2 ended, since process {leaving} did: interrupted; the same command'
  assert told in err


def test_processes_that_differ_are_refused(corpus, tmp_path, free_port, start_python):
  at = f'127.0.0.1:{free_port()},2'
  processes = [
    start_python(args(tmp_path, corpus, hosts=f'{at},{i}', seed=i, mesh__fsdp=2)) for i in range(2)
  ]
  for i, process in enumerate(processes):
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    told = f'error: process {i} of 2: processes: got another config or another version of the code'
    assert told in err and 'in [1], wanted the same as in process 0' in err
  assert not (tmp_path / 'metrics.jsonl').exists()


@pytest.mark.slow
def test_a_workdir_that_a_process_does_not_see_is_told(corpus, tmp_path, free_port, start_python):
  """Its path is the same for all, and leads to another folder in one."""
  at, processes = f'127.0.0.1:{free_port()},2', []
  for i in range(2):
    _, module, file, *rest = args('run', corpus, hosts=f'{at},{i}', mesh__fsdp=2)
    command = ['-m', module, f'--config={ROOT}/{file.removeprefix("--config=")}', *rest]
    (tmp_path / str(i)).mkdir()
    env = {'PYTHONPATH': str(ROOT)}
    processes.append(start_python(command, env=env, cwd=tmp_path / str(i)))
  for i, process in enumerate(processes):
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    told = f'workdir: got {tmp_path / str(i)}/run, which processes [1] do not share'
    assert f'error: process {i} of 2: {told}' in err
  assert not list(tmp_path.rglob('.seen-*'))


@pytest.mark.parametrize(
  'where',
  [
    '',
    'nowhere',
    '10.0.0.1,2,0',
    '10.0.0.1:80,2,2',
    'a:1,2',
    'a b:80,2,0',
    'http://a:80,2,0',
    '::1:80,2,0',
    'a:80,99999999999,0',
    'a:99999,2,0',
  ],
)
def test_what_names_no_hosts_is_told(where):
  with pytest.raises(Mistake, match="hosts: got '.*', wanted 'auto', 'one' or 'address:port"):
    hosts.join(where)


SLURM = {
  'SLURM_JOB_ID': '7',
  'SLURM_STEP_NODELIST': 'localhost',
  'SLURM_NTASKS': '2',
  'SLURM_STEP_NUM_TASKS': '2',
}


@pytest.mark.parametrize('nodes, gpus', [('2', ['all', 'all']), ('1', ['0', '1'])])
def test_a_cluster_is_found_and_a_process_has_the_gpus_that_no_other_uses(
  start_python, free_port, nodes, gpus
):
  """As srun starts them: one on each node, or two on one."""
  code = """
import jax
from gptjax import hosts
found = hosts.join('auto')
print(found, jax.process_index(), jax.process_count(), jax.config.read('jax_cuda_visible_devices'))
"""
  port = str(free_port())
  tasks = []
  for i in '01':
    env = SLURM | {'SLURM_STEP_NUM_NODES': nodes, 'JAX_COORDINATOR_PORT': port}
    env |= {'SLURM_PROCID': i, 'SLURM_LOCALID': i}
    tasks.append(start_python(['-c', code], stdout=subprocess.PIPE, env=env))
  for i, task in enumerate(tasks):
    out, err = finished(task, timeout=100)
    assert out == f'found through SLURM {i} 2 {gpus[i]}\n', err


def test_hosts_that_cannot_be_reached_are_told(run_python, free_port):
  code = f"""
from gptjax import errors, hosts
hosts.JOIN_SECONDS = 3
with errors.told_plainly():
  hosts.join('127.0.0.1:{free_port()},2,1')
"""
  done = run_python(code, timeout=120, code=2)
  assert "error: hosts '127.0.0.1:" in done.stderr and 'not all there after 3 s' in done.stderr


def test_what_is_asked_for_is_done_once_after_the_step():
  assert hosts.all_say('a') == ['a']
  request = hosts.Request('something')
  assert request.due(1) == ''
  request.ask(3, 'because')
  assert [request.due(step) for step in (2, 3, 4)] == ['', 'because', '']
  request.ask(5, 'again')
  assert request.due(9) == 'again' and request.due(10) == ''
