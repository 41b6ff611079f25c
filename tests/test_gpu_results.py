"""benchmarks/gpu.sh runs its parts whatever becomes of one, and its figures become tables."""

import json
import os
import pathlib
import shlex
import subprocess
import sys
import sysconfig

import jax
import pytest

from benchmarks import against, gpu_results
from gptjax import flags
from gptjax.config import resolve
from tests import small
from tests.conftest import ROOT

SCRIPT = ROOT / 'benchmarks' / 'gpu.sh'
H100 = 'NVIDIA H100 80GB HBM3'
# A Python that measures nothing: it writes down what it is asked for, and leaves figures.
FAKE = r"""#!/usr/bin/env bash
printf '%s\n' "$*" >>"$FAKE/calls"
for word in "$@"; do [[ $word != --json=* ]] || json=${word#--json=}; done
case "$2 $3" in
  'benchmarks.gpu_results --seen') echo "$SEEN"; exit "${SEEN_CODE:-0}" ;;
  'benchmarks.gpu_results '*) exec "$REAL" "$@" ;;
  'pytest '*) echo 'a test fails'; exit 3 ;;
  'benchmarks.attention '*) exit 124 ;;
  'gptjax.prepare '*) echo prepared ;;
  *) cp "$FAKE/figures" "$json" ;;
esac
"""


def row(seconds, each, **more):
  return {
    'each': each,
    'seconds': seconds,
    'product': 7e14,
    'kind': H100,
    'peak_bytes': 5e9,
    **more,
  }


def figures():
  rows = {
    'ours-bf16': row(0.5, 16, first_loss=5.5),
    'torch-compiled-bf16': row(0.4, 8, first_loss=5.5),
    'torch-flex-bf16': {'each': 8, 'failed': 'error', 'told': 'no kernel'},
  }
  rows = against.judged(rows, small.SHAPE, 1)
  return {'parameters': 1, 'on': f'{H100}, 16 cores', 'losses_apart': [], 'rows': rows}


def run(*args, **env):
  return subprocess.run(
    [SCRIPT, *args],
    env=os.environ | {'PYTHON': 'python'} | env,
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )


@pytest.fixture
def fake(tmp_path):
  (tmp_path / 'python').write_text(FAKE)
  (tmp_path / 'python').chmod(0o755)
  (tmp_path / 'figures').write_text(json.dumps(figures()))
  return {
    'PYTHON': str(tmp_path / 'python'),
    'FAKE': str(tmp_path),
    'REAL': sys.executable,
    'SEEN': 'torch',
  }


def calls(fake):
  return pathlib.Path(fake['FAKE'], 'calls').read_text().splitlines()


def test_shellcheck_finds_nothing():
  shellcheck = pathlib.Path(sysconfig.get_path('scripts'), 'shellcheck')
  done = subprocess.run([shellcheck, SCRIPT], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize('args, told', [
  (['125m'], "got '125m', wanted --NAME=VALUE"),
  (['--parts=tests,1b'], "--parts: got '1b', wanted tests, attention, curve or a size"),
  (['--seconds=soon'], "--seconds: got 'soon', wanted a number from 1"),
  (['--batch=0'], "--batch: got '0', wanted a number from 1"),
])  # fmt: skip
def test_wrong_arguments_are_told_in_a_line(args, told):
  done = run(*args)
  assert (done.returncode, done.stdout) == (2, '')
  assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1
  assert told in done.stderr and '; try benchmarks/gpu.sh' in done.stderr


def test_a_dry_run_says_what_would_run():
  lines = run('--dry-run', '--parts=tests,350m,curve', '--batch=4').stdout.splitlines()
  tests, size, prepare, curve, table = (shlex.split(line)[1:] for line in lines)
  assert tests[:3] == ['timeout', '--kill-after=10', '120'] and tests[-1] == 'tests/test_kernels.py'
  assert {'--against=torch', '--size=350m', '--context=2048', '--batch=4', '--halve'} <= set(size)
  assert 'gptjax.prepare' in prepare and 'benchmarks.curve' in curve
  words = [word for word in curve if word.startswith('--config')]
  planned = resolve(flags.parse(['', *words]), jax.devices()[:1])
  assert planned.ramp.steps_left() == 100 and planned.slices == 1
  assert '--config.vocab_size=32768' in prepare  # as the model has
  assert planned.program.shape.vocab_size == 32768 and planned.program.shape.context == 2048
  assert table == ['python', '-m', 'benchmarks.gpu_results', 'MADE', 'runs/gpu']


def test_a_part_that_fails_stops_no_other_and_is_told(fake, tmp_path):
  out = tmp_path / 'out'
  done = run(f'--out={out}', '--parts=tests,125m,attention,350m', **fake)
  assert done.returncode == 1
  assert done.stdout.splitlines()[-2:] == [
    'failed   tests: code 3',
    'failed   attention: not done in 60 s',
  ]
  found = json.loads((out / 'results.json').read_text())
  assert [(part, about['code']) for part, about in found.items()] == [
    ('tests', 3), ('125m', 0), ('attention', 124), ('350m', 0)
  ]  # fmt: skip
  assert found['350m']['rows'] == figures()['rows']
  assert 'a test fails' in (out / 'log.txt').read_text()
  assert '| 125m | ours-bf16 | 16 | ' in (out / 'results.md').read_text()
  assert sum('--size=' in call for call in calls(fake)) == 2


def test_all_done_is_code_0_and_time_that_is_over_is_told(fake, tmp_path):
  done = run(f'--out={tmp_path / "a"}', '--parts=125m', **fake)
  assert done.returncode == 0 and 'failed' not in done.stdout.replace('| error', '')
  done = run(f'--out={tmp_path / "b"}', '--parts=125m', '--seconds=5', **fake)
  assert done.returncode == 1 and 'failed   125m: no time was left' in done.stdout
  assert sum('--size=' in call for call in calls(fake)) == 1


def test_without_torch_ours_is_measured_alone_and_that_is_told(fake, tmp_path):
  out = f'--out={tmp_path / "out"}'
  done = run(out, '--parts=125m', **fake | {'SEEN': ''})
  assert done.returncode == 1
  assert 'failed   a torch for this GPU: ours was measured alone' in done.stdout
  assert '--contenders=ours-bf16 ' in calls(fake)[1]
  done = run(out, '--parts=125m', '--contenders=ours-bf16', **fake | {'SEEN': ''})
  assert done.returncode == 0


def test_without_a_gpu_nothing_is_measured(fake, tmp_path):
  done = run(f'--out={tmp_path / "out"}', **fake | {'SEEN': '', 'SEEN_CODE': '1'})
  assert done.returncode == 2 and 'got no JAX with a GPU' in done.stderr
  assert len(calls(fake)) == 1 and not (tmp_path / 'out').exists()


def test_a_corpus_is_prepared_where_there_is_none(fake, tmp_path):
  corpus = tmp_path / 'corpus'
  args = [f'--out={tmp_path / "out"}', '--parts=curve', f'--corpus={corpus}']
  run(*args, **fake)
  assert any(f'--config.out={corpus}' in call for call in calls(fake))
  corpus.mkdir()
  pathlib.Path(fake['FAKE'], 'calls').unlink()
  run(*args, **fake)
  assert not any('gptjax.prepare' in call for call in calls(fake))
  assert any(f'--config.data.sources={corpus}' in call for call in calls(fake))


def test_what_there_is_is_said(run_python):
  done = run_python(['-m', 'benchmarks.gpu_results', '--seen'], timeout=100, code=1)
  assert done.stdout == '' and 'on cpu' in done.stderr


def test_tables_have_all_figures():
  layers = [
    {'tokens': L, 'layer': layer, 'seconds': seconds}
    for L, layer, seconds in ((1024, 'dense', 1e-3), (1024, 'banded', 5e-4))
  ]
  text = gpu_results.markdown({
    '125m': {'code': 0, 'seconds': 60} | figures() | {'losses_apart': ['a 5 beside b 6']},
    'attention': {'code': 0, 'seconds': 9, 'on': 'H100', 'rows': 4, 'layers': layers},
    'curve': {'code': 1, 'seconds': 7, 'losses': {'ours': [6.0, 5.5]}, 'apart': {'torch': 0.02}},
  })  # fmt: skip
  ours = 16 * small.SHAPE.context / 0.5
  mfu = ours * small.SHAPE.train_flops / 989.4e12
  assert f'| 125m | ours-bf16 | 16 | {ours:,.0f} | {mfu:.1%} | 5.0 |  |' in text
  assert '| 125m | torch-compiled-bf16 | 8 | 320 |' in text and '| 1.60 × |' in text
  assert '| 125m | torch-flex-bf16 | 8 | error: no kernel |  |  |  |' in text
  assert 'the first losses differ | a 5 beside b 6' in text
  assert '| 1,024 | 1.000 | 0.500 | 2.00 × |' in text
  assert 'ours ends at 5.5000 nats; torch is at most 0.02 apart' in text
  assert '| curve | 7 s | code 1 |' in text and '| 125m | 60 s | done |' in text
