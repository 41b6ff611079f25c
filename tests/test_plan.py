"""A plan is made, searched for and mended for machines that are not there, and told plainly."""

import dataclasses
import json
import re

import pytest

from gptjax import ahead, cost, machines, plan, train
from gptjax.errors import Mistake
from tests import plans, runs, small

MESH = {'mesh__data': 2, 'mesh__fsdp': 2, 'mesh__tensor': 2}
LARGE = {'model__n_layers': 8, 'model__context': 128, 'model__d_ff': 512, 'train_tokens': 49152.0}


@pytest.fixture
def here(monkeypatch):
  """The CPU devices of the tests stand for every machine; `here(bytes)` says how much they hold."""
  held = {'memory': plans.CHIP.usable}
  chip = lambda: dataclasses.replace(plans.CHIP, usable=held['memory'])
  monkeypatch.setattr(machines, 'find', lambda topology: plans.machine(chip()))

  def machine(memory):
    held['memory'] = memory
    return plans.machine(chip())

  return machine


def options(**given):
  return plan.OPTIONS.parse_args([f'--{name}={value}' for name, value in given.items()])


def test_a_plan_is_printed_written_and_its_step_trained_with(here, corpus, tmp_path, capsys):
  c = runs.config(tmp_path / 'run', corpus, **MESH, train_tokens=1024.0)
  plan.main(c, options(json=tmp_path / 'plan.json', save=tmp_path / 'step'))
  told = capsys.readouterr()
  assert 'compiling the step for 8 × TPU v4 …' in told.err
  found = json.loads((tmp_path / 'plan.json').read_text())
  assert found['fits'] and 'here: 8 × TPU v4; stage 1 · data 2 · fsdp 2 · tensor 2' in told.out
  assert re.search(r'/step holds the step, \d+\.\d MB', told.out)
  c.compute.compiled = str(tmp_path / 'step')
  train.main(c)
  assert 'compiled ahead' in capsys.readouterr().out
  assert runs.records(tmp_path / 'run')[-1]['sequences'] == 32


@pytest.mark.slow
def test_a_search_ranks_what_it_compiled(here, capsys):
  machine = here(plans.CHIP.memory)
  made = plan.best(plans.config(batch__sequences=32), machine, 3)
  lines = capsys.readouterr().out.splitlines()
  assert lines[0].startswith('stage·data·fsdp·tensor') and len(lines) == 1 + 3 + 1
  days = [[float(n) for n in re.findall(r'[\d.]+', line)[-2:]] for line in lines[1:4]]
  rows = [line.split()[0] for line in lines[1:4]]
  assert len(set(rows)) == 3 and '1·8·1·1' in rows
  assert list(map(sum, days)) == sorted(map(sum, days))
  assert rows[0] == made.settings.shape and made.fits


def test_a_search_that_finds_nothing_is_told(here, capsys):
  """Whatever mesh the config has: it is not looked at."""
  here(10**5)
  with pytest.raises(SystemExit, match='1'):
    plan.main(plans.config(mesh__data=3), options(search=2))
  told = capsys.readouterr().out
  assert '--search: got no mesh that fits' in told
  assert 'no mesh, microbatch or remat policy was found' in told


@pytest.mark.slow
def test_what_does_not_fit_is_told_with_settings_that_do(here, tmp_path, capsys):
  """And with them it does."""
  c = plans.config(**MESH, **LARGE, compute__microbatch=3)
  whole = cost.plan_for(plans.run_of(**MESH, **LARGE, compute__microbatch=3), here(10**9))
  memory = int(0.7 * whole.memory.held)
  here(memory)
  with pytest.raises(SystemExit) as e:
    plan.main(c, options(json=tmp_path / 'plan.json', save=tmp_path / 'step'))
  assert e.value.code == 1 and not (tmp_path / 'step').exists()
  told = capsys.readouterr().out
  assert 'GB too much' in told and '/step was not written' in told
  assert not json.loads((tmp_path / 'plan.json').read_text())['fits']
  (words,) = re.findall(r'it would fit, with [\d.]+ GB held: (.*)', told)
  knobs = dict(word.removeprefix('--config.').split('=') for word in words.split())
  typed = {name: value if name == 'compute.remat' else int(value) for name, value in knobs.items()}
  mended = {name.replace('.', '__'): value for name, value in typed.items()}
  assert cost.plan_for(plans.run_of(**LARGE | mended), here(memory)).fits


@pytest.mark.parametrize('layers, first', [('loop', 'dots'), ('apart', 'none')])
def test_all_is_kept_only_where_layers_are_compiled_apart(here, layers, first):
  runs_of_a_mesh = next(plan.candidates(plans.config(compute__layers=layers), here(10**9)))
  assert next(runs_of_a_mesh).program.numerics.remat == first


def test_what_never_fits_is_told(here, capsys):
  c = plans.config(**MESH)
  assert plan.cure(c, here(10**4)).startswith('no mesh, microbatch or remat policy was found')
  assert 'up to 3 to compile' in capsys.readouterr().err


def test_what_the_compiler_refuses_is_a_plan_that_does_not_fit(here, tmp_path, capsys, monkeypatch):
  def refuse(run, mesh):
    raise ahead.DoesNotFit('memory of a device: 2 GB wanted, 1 GB there: 1 GB too much')

  monkeypatch.setattr(ahead, 'compile_step', refuse)
  with pytest.raises(SystemExit):
    plan.main(plans.config(**MESH), options(json=tmp_path / 'plan.json'))
  found = json.loads((tmp_path / 'plan.json').read_text())
  assert found == {'topology': '', 'fits': False, 'why': found['why']}
  assert found['why'] in capsys.readouterr().out


@pytest.mark.parametrize('name', ['json', 'save'])
def test_a_file_that_cannot_be_is_told_before_anything_is_compiled(name, tmp_path):
  with pytest.raises(Mistake, match=f'--{name}: got .*a folder that can be written'):
    plan.main(plans.config(), options(**{name: tmp_path / 'none' / 'file'}))


@pytest.mark.parametrize('search', ['-1', 'two', '1.5'])
def test_a_search_is_for_a_number_of_meshes(search):
  with pytest.raises(Mistake, match=f'--search: got {search}, wanted how many'):
    plan.main(plans.config(), options(search=search))


def test_help_is_for_its_own_options_too(run_python):
  told = run_python(['-m', 'gptjax.plan', '--topology=v5e:2x4', '--search=2', '--help'], timeout=60)
  assert '--topology=…' in told.stdout and 'Add --config' in told.stdout


@pytest.mark.slow
def test_a_topology_comes_before_all_else(run_python):
  command = ['-m', 'gptjax.plan', '--config=configs/gpt3.py:125m']
  assert 'error: --topology: got' in run_python(command, timeout=60, code=2).stderr
  told = run_python([*command, '--topology=v5x:2x2'], timeout=60, code=2).stderr
  assert 'v5p' in told and 'h100' in told
  for word in ('--topologie=a', '--config.topology=a'):
    assert 'try --topology' in run_python([*command, word], timeout=60, code=2).stderr


@pytest.mark.slow
@pytest.mark.parametrize('topology', ['v5e:2x4', 'h100:1x8'])
def test_a_plan_is_made_for_a_machine_that_is_not_there(corpus, tmp_path, run_python, topology):
  chip = small.machine_or_skip(topology).chip
  path, step = tmp_path / 'plan.json', tmp_path / 'step'
  few = ['--config.model.n_layers=4', '--config.mesh.fsdp=4', '--config.mesh.tensor=2']
  command = ['-m', 'gptjax.plan', '--config=configs/gpt3.py:125m', f'--topology={topology}', *few]
  done = run_python([*command, f'--json={path}', f'--save={step}'], timeout=300)
  found = json.loads(path.read_text())
  assert found['fits'] and chip.kind in done.stdout
  assert done.stderr == f'compiling the step for 8 × {chip.kind} …\n'
  # dots computes no product of a layer again but attention's.
  assert 1.0 < found['step']['flops'] / found['step']['model_flops'] < 1.2
  run_python([*command, '--config.mesh.fsdp=3'], timeout=60, code=2)
  # It is for that machine alone.
  refused = runs.args(tmp_path / 'run', corpus, compute__compiled=step)
  told = run_python(refused, timeout=60, code=2).stderr
  assert f'device {chip.kind}' in told and 'device cpu' in told


@pytest.mark.slow
def test_what_does_not_fit_is_what_the_compiler_refuses(run_python):
  small.machine_or_skip('v5e:2x4')
  large = ['--config=configs/gpt3.py:6.7b', '--config.mesh.fsdp=8', '--config.model.n_layers=32']
  command = ['-m', 'gptjax.plan', *large, '--topology=v5e:2x4', '--config.compute.remat=none']
  done = run_python(command, timeout=500, code=1)
  assert 'memory of a device: ' in done.stdout and 'GB too much' in done.stdout
  assert 'it would fit' in done.stdout or 'no mesh, microbatch or remat' in done.stdout
  assert 'Traceback' not in done.stderr
