"""The scripts of launch/ run the commands that they say, and leave nothing behind that costs."""

import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time

import psutil
import pytest

from tests.conftest import ROOT

SCRIPTS = sorted((ROOT / 'launch').glob('*.sh'))
QUEUED = ['gcloud', 'compute', 'tpus', 'queued-resources']
POD = '--name=pod --zone=us-east5-a --type=v5p-32 --runtime=v2-alpha-tpuv5'.split()
TRAIN = ['--config=configs/gpt3.py:xl', '--config.workdir=/b/xl', '--config.data.sources=/b/a b']
XPK = ['--name=load', '--cluster=mine', '--type=v5p-32']

# What gcloud does, with a folder for the worker's disk: copies there, runs there. It writes its
# calls down, tells one state after another, and fails where a call contains REFUSE.
GCLOUD = r"""#!/usr/bin/env bash
printf '%q ' gcloud "$@" >>"$FAKE/calls"
echo >>"$FAKE/calls"
[[ -z "${REFUSE:-}" || "$*" != *"$REFUSE"* ]] || exit 9
case $4 in
  describe)
    head -n 1 "$FAKE/states"
    [ "$(wc -l <"$FAKE/states")" = 1 ] || sed -i 1d "$FAKE/states"
    ;;
  scp) cp "$5" "$FAKE/worker/${6#*:}" ;;
  ssh) cd "$FAKE/worker" && HOME=$PWD bash -c "${!##--command=}" ;;
esac
"""
# The worker's Python, which installs a uv that makes an environment whose Python is TRAINER.
PYTHON3 = r"""#!/usr/bin/env bash
mkdir -p ~/uv/bin
printf '#!/bin/sh\nmkdir -p .venv/bin && cp "$FAKE/trainer" .venv/bin/python\n' >~/uv/bin/uv
chmod +x ~/uv/bin/uv
"""
TRAINER = r"""#!/usr/bin/env bash
if [ "$1" = -c ]; then echo gpu && exit; fi
printf '%s\n' "$@" >"$FAKE/trained"
env >"$FAKE/environment"
echo 'step 1'
sleep "${TRAIN_SECONDS:-0}" &
echo $! >"$FAKE/sleeper" && wait $! && exit "${TRAIN_CODE:-0}"
"""
SRUN = r"""#!/usr/bin/env bash
while [[ "$1" == --* ]]; do printf '%s\n' "$1" >>"$FAKE/calls" && shift; done
exec "$@"
"""


def launch(script, *args, cwd=ROOT, **env):
  """Runs a script of launch/ to its end, outside of any job."""
  environment = {k: v for k, v in os.environ.items() if not k.startswith(('SLURM_', 'XLA_'))}
  return subprocess.run(
    [cwd / 'launch' / script, *args],
    cwd=cwd,
    env=environment | {'PYTHON': 'python'} | env,
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )


def said(script, *args, **env):
  """The commands of a dry run, as lists of words."""
  done = launch(script, '--dry-run', *args, **env)
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()
  assert all(line.startswith('+ ') for line in lines)
  return [shlex.split(line)[1:] for line in lines]


@pytest.fixture
def fake(tmp_path):
  """A folder with programs that this machine lacks, and the environment that finds them first."""
  folder = tmp_path / 'fake'
  (folder / 'worker').mkdir(parents=True)
  (folder / 'states').write_text('ACTIVE\n')
  programs = {'gcloud': GCLOUD, 'python3': PYTHON3, 'srun': SRUN, 'trainer': TRAINER}
  for name, text in programs.items():
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)
  path = f'{folder}{os.pathsep}{os.environ["PATH"]}'
  return folder, {'PATH': path, 'FAKE': str(folder), 'POLL_SECONDS': '0.05'}


@pytest.fixture
def repository(tmp_path):
  """A repository with the scripts and nothing else."""
  root = tmp_path / 'repository'
  shutil.copytree(ROOT / 'launch', root / 'launch')
  git = ['git', '-c', 'user.name=a', '-c', 'user.email=a@b.c']
  for command in (['init', '-q'], ['add', '.'], ['commit', '-q', '-m', 'a']):
    subprocess.run([*git, *command], cwd=root, check=True)
  return root


def verbs(folder):
  """What gcloud was asked for, in order, without the questions for the state."""
  calls = [shlex.split(line)[4] for line in (folder / 'calls').read_text().splitlines()]
  return [verb for verb in calls if verb != 'describe']


# All of them.


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: path.name)
def test_a_script_says_its_help(script):
  done = subprocess.run([script, '--help'], capture_output=True, text=True, check=True)
  lines = done.stdout.splitlines()
  assert lines[2].startswith(f'  {script.relative_to(ROOT)} ') and '#' not in done.stdout


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
  shellcheck = pathlib.Path(sysconfig.get_path('scripts'), 'shellcheck')
  done = subprocess.run([shellcheck, script], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
  ('script', 'args', 'told'),
  [
    ('local_processes.sh', ['two'], 'wanted PROCESSES DEVICES'),
    ('local_processes.sh', ['2', '4', '--dry-run', *TRAIN], 'wanted PROCESSES DEVICES --config=…'),
    ('gpu.sh', [*TRAIN, '--dry-run'], 'wanted [--dry-run] --config=…'),
    ('gpu_smoke.sh', ['--smoke'], "got '--smoke', wanted [--dry-run] --config.…"),
    ('slurm.sh', ['--nodes=2', *TRAIN], 'got no sbatch, wanted SLURM'),
    ('xpk.sh', [*XPK, *TRAIN], 'got no xpk'),
    ('gpu.sh', [], "got '', wanted [--dry-run] --config=…"),
    ('gpu.sh', ['--dry', *TRAIN], "got '--dry', wanted [--dry-run] --config=…"),
    ('gpu.sh', [*TRAIN, '--config.hosts=10.0.0.1:8476,2,0'], 'wanted --hosts before --config'),
    ('slurm.sh', ['--nodes=2'], 'wanted --NAME=VALUE … --config=…'),
    ('slurm.sh', ['-N', '2', *TRAIN], "got '-N', wanted --NAME=VALUE … --config=…"),
    ('xpk.sh', [*XPK[1:], *TRAIN], "--name: got '', wanted up to 40 of a-z, 0-9 and -"),
    ('xpk.sh', ['--name=' + 41 * 'a', *XPK[1:], *TRAIN], '--name: got'),
    ('xpk.sh', [XPK[0], XPK[2], *TRAIN], '--cluster: got none'),
    ('xpk.sh', [*XPK[:2], *TRAIN], '--type: got none'),
    ('xpk.sh', [*XPK, '--slices=two', *TRAIN], "--slices: got 'two', wanted a number from 1"),
    ('xpk.sh', [*XPK, '--slice=2', *TRAIN], "got '--slice=2', wanted an option"),
    ('xpk.sh', XPK, "got '', wanted --config=…"),
    ('xpk.sh', [*XPK, TRAIN[0], '--config.workdir=runs/a'], '--config.workdir: got none or a rel'),
    ('tpu_pod.sh', [*POD[1:], *TRAIN], "--name: got '', wanted a-z, 0-9 and -"),
    ('tpu_pod.sh', ['--name=../a', *POD[1:], *TRAIN], "--name: got '../a'"),
    ('tpu_pod.sh', [POD[0], *POD[2:], *TRAIN], '--zone: got none'),
    ('tpu_pod.sh', [*POD[:2], POD[3], *TRAIN], '--type: got none'),
    ('tpu_pod.sh', [*POD[:3], *TRAIN], '--runtime: got none'),
    ('tpu_pod.sh', [*POD, '--slices=0', *TRAIN], "--slices: got '0', wanted a number from 1"),
    ('tpu_pod.sh', [*POD, '--spot', *TRAIN], "got '--spot', wanted an option"),
    ('tpu_pod.sh', [*POD, 'here'], "got 'here', wanted --config=…"),
    (
      'tpu_pod.sh',
      [*POD, TRAIN[0], '--config.workdir=runs/a'],
      '--config.workdir: got none or a r',
    ),
  ],
)
def test_wrong_arguments_are_told_in_a_line(script, args, told, fake):
  folder, env = fake  # nothing of which is started
  done = launch(script, *args, **env)
  assert (done.returncode, done.stdout) == (2, '')
  assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1
  assert told in done.stderr and '; try ' in done.stderr
  assert not (folder / 'calls').exists() and not (folder / 'trained').exists()


# One machine.


def test_a_dry_run_of_local_processes_says_what_would_run():
  args = ['2', '4', '--config=configs/tiny.py', '--config.workdir=a b']
  cpu = ['JAX_PLATFORMS=cpu', 'XLA_FLAGS=--xla_force_host_platform_device_count=4']
  train = ['python', '-m', 'gptjax.train', *args[2:]]
  assert said('local_processes.sh', *args, PORT='1234') == [
    [*cpu, *train, f'--config.hosts=127.0.0.1:1234,2,{i}', '&'] for i in range(2)
  ]


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: path.name)
def test_a_script_finds_its_repository_through_a_link(script, tmp_path):
  (tmp_path / 'link').symlink_to(script)
  done = subprocess.run(
    [tmp_path / 'link'],
    cwd=tmp_path,
    env=os.environ | {'BASH_XTRACEFD': '2', 'SHELLOPTS': 'xtrace', 'PYTHON': 'no-python'},
    capture_output=True,
    text=True,
    check=False,
    timeout=60,
  )
  assert f'cd {ROOT}/launch/..' in done.stderr


def test_a_dry_run_on_gpus_says_what_would_run():
  train = ['python', '-m', 'gptjax.train', *TRAIN]
  memory = 'XLA_CLIENT_MEM_FRACTION=0.9'
  assert said('gpu.sh', *TRAIN) == [['env', memory, *train, '--config.hosts=one']]
  got = said('gpu.sh', *TRAIN, XLA_PYTHON_CLIENT_MEM_FRACTION='.5')
  assert got == [['env', *train, '--config.hosts=one']]
  got = said('gpu.sh', '--hosts=auto', *TRAIN)
  assert got == [['env', memory, *train, '--config.hosts=auto']]


def test_a_gpu_run_trains_with_the_settings(fake):
  folder, env = fake
  flags = {'XLA_FLAGS': '--a=1 --b=2'}
  done = launch('gpu.sh', *TRAIN, **env | flags, PYTHON=str(folder / 'trainer'), TRAIN_CODE='3')
  assert (done.returncode, done.stdout) == (3, 'step 1\n'), done.stderr
  trained = (folder / 'trained').read_text().splitlines()
  assert trained == ['-m', 'gptjax.train', *TRAIN, '--config.hosts=one']
  assert {'XLA_FLAGS=--a=1 --b=2', 'XLA_CLIENT_MEM_FRACTION=0.9'} <= set(
    (folder / 'environment').read_text().splitlines()
  )


def test_a_gpu_run_without_gpu_is_told():
  """By JAX itself, which ends at a flag of XLA that it does not know."""
  done = launch('gpu.sh', *TRAIN, PYTHON=sys.executable, JAX_PLATFORMS='cpu')
  assert (done.returncode, done.stdout) == (2, '')
  assert 'got cpu, wanted gpu; try nvidia-smi' in done.stderr
  done = launch('gpu.sh', *TRAIN, PYTHON='no-python')
  assert done.returncode == 2 and 'got none in no-python, wanted gpu' in done.stderr


def test_a_dry_run_of_the_gpu_smoke_run_says_what_would_run():
  prepare, train, generate, report = said('gpu_smoke.sh', '--config.seed=3')
  assert prepare[:3] == ['python', '-m', 'gptjax.prepare']
  assert train[:2] == ['launch/gpu.sh', '--config=configs/gpt3.py:125m']
  assert train[-1] == '--config.seed=3'
  assert generate[-1] == '--prompt=def main('
  assert report == ['python', '-m', 'gptjax.report', 'runs/gpu-smoke']


# SLURM.


def test_a_dry_run_under_slurm_says_what_would_run():
  submitted = ['sbatch', '--output=runs/slurm-%j.log', '--nodes=2', '--comment=a b']
  got = said('slurm.sh', '--nodes=2', '--comment=a b', *TRAIN)
  assert got == [[*submitted, 'launch/slurm.sh', *TRAIN]]
  step = ['srun', '--kill-on-bad-exit=0', '--cpu-bind=none', 'launch/gpu.sh', '--hosts=auto']
  got = said('slurm.sh', *TRAIN, SLURM_JOB_ID='7', SLURM_GPUS_ON_NODE='4')
  assert got == [[*step, *TRAIN]]


def test_slurm_starts_one_process_a_node_and_starts_it_again():
  head, _ = (ROOT / 'launch' / 'slurm.sh').read_text().split('set -euo')  # sbatch reads no further
  flags = {line.removeprefix('#SBATCH ') for line in head.splitlines()}
  assert {'--ntasks-per-node=1', '--gpus-per-node=8', '--requeue', '--open-mode=append'} <= flags
  assert '--signal=TERM@120' in flags


def test_a_job_of_slurm_trains_on_all_gpus_of_a_node(fake, tmp_path):
  """In a copy of the script that lies elsewhere, as sbatch makes one."""
  folder, env = fake
  env |= {'SLURM_JOB_ID': '7', 'SLURM_GPUS_ON_NODE': '2', 'PYTHON': str(folder / 'trainer')}
  command = ['bash', shutil.copy(ROOT / 'launch' / 'slurm.sh', tmp_path / 'script'), *TRAIN]
  job = lambda cwd, **more: subprocess.run(
    command, cwd=cwd, env=os.environ | env | more, capture_output=True, text=True, check=False
  )
  done = job(ROOT, TRAIN_CODE='5')
  assert (done.returncode, done.stdout) == (5, 'step 1\n'), done.stderr
  assert (folder / 'calls').read_text().split() == ['--kill-on-bad-exit=0', '--cpu-bind=none']
  trained = (folder / 'trained').read_text().splitlines()
  assert trained == ['-m', 'gptjax.train', *TRAIN, '--config.hosts=auto']
  (folder / 'scontrol').write_text(f'#!/bin/sh\necho "$@" >{folder}/asked\n')
  (folder / 'scontrol').chmod(0o755)
  assert job(ROOT, TRAIN_CODE='75').returncode == 75
  assert (folder / 'asked').read_text() == 'requeue 7\n'
  done = job(ROOT, SLURM_GPUS_ON_NODE='')
  assert done.returncode == 2 and 'got a job without GPUs' in done.stderr
  done = job(tmp_path)
  assert done.returncode == 2 and 'wanted the repository' in done.stderr


# GKE.


def test_a_dry_run_on_gke_says_what_would_run():
  where = ['--workload=load', '--cluster=mine', '--tpu-type=v5p-32']
  create = ['xpk', 'workload', 'create', *where]
  train = r'exec python -m gptjax.train --config=configs/gpt3.py:xl --config.workdir=/b/xl'
  train += r' --config.data.sources=/b/a\ b'
  install = "pip install -q -e '.[tpu,gcs]' -c constraints.txt && "
  folder = 'build/xpk-load'
  base = ['--base-docker-image=python:3.12', f'--script-dir={folder}']
  assert said('xpk.sh', *XPK, *TRAIN) == [
    ['rm', '-rf', folder],
    ['git', 'clone', '--quiet', '.', folder],
    [*create, '--num-slices=1', *base, f'--command={install}{train}'],
  ]
  more = ['--slices=2', '--image=registry/i', '--storage=s', '--xpk=--priority=high']
  image = ['--docker-image=registry/i', f'--command={train}', '--storage=s', '--priority=high']
  assert said('xpk.sh', *XPK, *more, *TRAIN) == [[*create, '--num-slices=2', *image]]


# A TPU pod.


def test_a_dry_run_on_a_pod_says_what_would_run(fake):
  folder, env = fake
  where = ['--zone=us-east5-a', '--quiet']
  workers = [*where, '--node=all', '--worker=all', '--batch-size=all']
  create = ['--accelerator-type=v5p-32', '--runtime-version=v2-alpha-tpuv5']
  bundle, made, asked, copied, installed, trained, deleted = said_on_pod(*POD, *TRAIN, **env)
  assert bundle == ['git', 'bundle', 'create', '--quiet', 'build/pod.bundle', 'HEAD']
  assert made == [*QUEUED, 'create', 'pod', *where, *create, '--node-id=pod']
  assert asked == [*QUEUED, 'describe', 'pod', *where, '--format=value(state.state)']
  assert copied == [*QUEUED, 'scp', 'build/pod.bundle', 'pod:gptjax.bundle', *workers]
  assert installed[:-1] == trained[:-1] == [*QUEUED, 'ssh', 'pod', *workers]
  assert installed[-1].endswith("/uv pip install -q -e '.[tpu,gcs]' -c constraints.txt")
  assert trained[-1] == (
    '--command=cd gptjax && exec .venv/bin/python -m gptjax.train --config=configs/gpt3.py:xl '
    r'--config.workdir=/b/xl --config.data.sources=/b/a\ b'
  )
  assert deleted == [*QUEUED, 'delete', 'pod', *where, '--force']
  more = ['--slices=4', '--project=mine', '--create=--spot', '--setup=mount a b']
  _, made, asked, setup, *_ = said_on_pod(*POD, *more, *TRAIN, **env)
  where.insert(1, '--project=mine')
  assert made == [*QUEUED, 'create', 'pod', *where, *create, '--node-count=4', '--spot']
  assert asked[4:8] == ['describe', 'pod', *where[:2]]
  assert setup == [*QUEUED, 'ssh', 'pod', *where, *workers[2:], '--command=mount a b']
  assert not (folder / 'calls').exists()


def said_on_pod(*args, **env):
  mkdir, *commands = said('tpu_pod.sh', *args, **env)
  assert mkdir == ['mkdir', '-p', 'build']
  return commands


def test_a_pod_is_waited_for_used_and_deleted(fake, repository):
  folder, env = fake
  (folder / 'states').write_text('WAITING_FOR_RESOURCES\n' * 3 + 'PROVISIONING\nACTIVE\n')
  setup = '--setup=echo set up on the worker && touch ~/mounted'
  done = launch('tpu_pod.sh', *POD, setup, *TRAIN, cwd=repository, **env)
  assert done.returncode == 0, done.stderr
  told = [line for line in done.stdout.splitlines() if not line.startswith('+ ')]
  assert told == [
    'tpu      pod is WAITING_FOR_RESOURCES after 0 min',
    'tpu      pod is PROVISIONING after 0 min',
    'tpu      pod is ACTIVE after 0 min',
    'set up on the worker',
    'step 1',
  ]
  assert verbs(folder) == ['create', 'ssh', 'scp', 'ssh', 'ssh', 'delete']
  trained = (folder / 'trained').read_text().splitlines()
  assert trained == ['-m', 'gptjax.train', *TRAIN]
  commit = lambda root: subprocess.check_output(['git', 'rev-parse', 'HEAD'], cwd=root)
  assert commit(folder / 'worker' / 'gptjax') == commit(repository)
  assert (folder / 'worker' / 'mounted').exists()


def test_a_pod_is_deleted_when_training_fails_and_the_code_is_its(fake, repository):
  folder, env = fake
  done = launch('tpu_pod.sh', *POD, *TRAIN, cwd=repository, **env, TRAIN_CODE='5')
  assert done.returncode == 5, done.stderr
  assert verbs(folder) == ['create', 'scp', 'ssh', 'ssh', 'delete']


@pytest.mark.parametrize('state', ['FAILED', 'SUSPENDING', 'SUSPENDED', 'DELETING'])
def test_a_pod_that_will_not_come_is_told_and_deleted(fake, repository, state):
  folder, env = fake
  (folder / 'states').write_text(f'WAITING_FOR_RESOURCES\n{state}\n')
  done = launch('tpu_pod.sh', *POD, *TRAIN, cwd=repository, **env)
  assert done.returncode == 1
  assert f'error: pod: got {state}, wanted ACTIVE; try gcloud compute tpus' in done.stderr
  assert verbs(folder) == ['create', 'delete']


def test_a_pod_whose_state_nobody_tells_is_deleted(fake, repository):
  folder, env = fake
  (folder / 'states').write_text('\n')
  done = launch('tpu_pod.sh', *POD, *TRAIN, cwd=repository, **env, REFUSE='describe')
  assert done.returncode == 1 and 'got no state, wanted ACTIVE' in done.stderr
  assert verbs(folder) == ['create', 'delete']
  assert (folder / 'calls').read_text().count(' describe ') == 5


def test_a_pod_that_was_refused_is_not_deleted(fake, repository):
  """It may be somebody's, of the same name."""
  folder, env = fake
  done = launch('tpu_pod.sh', *POD, *TRAIN, cwd=repository, **env, REFUSE='create')
  assert done.returncode == 9 and verbs(folder) == ['create']


def test_a_pod_that_could_not_be_deleted_is_told(fake, repository):
  folder, env = fake
  done = launch('tpu_pod.sh', *POD, *TRAIN, cwd=repository, **env, REFUSE='delete', TRAIN_CODE='5')
  assert done.returncode == 5
  assert 'error: pod may still be there, and cost; try gcloud compute tpus' in done.stderr


def test_a_pod_is_kept_and_used_again(fake, repository):
  folder, env = fake
  done = launch('tpu_pod.sh', *POD, '--keep', *TRAIN, cwd=repository, **env)
  assert done.returncode == 0 and verbs(folder) == ['create', 'scp', 'ssh', 'ssh']
  deletion = 'gcloud compute tpus queued-resources delete pod --zone=us-east5-a --quiet --force'
  assert f'pod is kept, and costs, until: {deletion}' in done.stdout
  (folder / 'calls').unlink()
  (folder / 'trained').unlink()
  done = launch('tpu_pod.sh', *POD, '--existing', *TRAIN, cwd=repository, **env)
  assert done.returncode == 0, done.stderr
  assert (folder / 'trained').exists() and verbs(folder) == ['scp', 'ssh', 'ssh', 'delete']


@pytest.mark.parametrize(('name', 'code'), [('SIGINT', 130), ('SIGTERM', 143), ('SIGHUP', 143)])
def test_a_pod_is_deleted_when_the_run_is_interrupted(fake, repository, name, code):
  """At once, and with all that the training command started."""
  folder, env = fake
  process = subprocess.Popen(
    [repository / 'launch' / 'tpu_pod.sh', *POD, *TRAIN],
    env=os.environ | env | {'TRAIN_SECONDS': '60'},
    stdout=subprocess.DEVNULL,
  )
  try:
    sleeper, end = folder / 'sleeper', time.monotonic() + 60
    while not (sleeper.exists() and sleeper.read_text()) and time.monotonic() < end:
      time.sleep(0.02)
    started = psutil.Process(process.pid).children(recursive=True)
    assert int(sleeper.read_text()) in [p.pid for p in started]
    process.send_signal(getattr(signal, name))
    assert process.wait(timeout=20) == code
  finally:
    process.kill()
  assert verbs(folder) == ['create', 'scp', 'ssh', 'ssh', 'delete']
  assert not psutil.wait_procs(started, timeout=10)[1]
