"""What a plan says is what the run would hold, compute and take."""

import dataclasses
import json

import jax
import pytest

from gptjax import machines, plan, sharding
from gptjax.config import resolve
from gptjax.machines import Chip
from tests import runs, small

CHIP = Chip('TPU v4', memory=10**9, bandwidth=1e12, fast=1e11, slow=1e9, source='none')


def config(**settings):
  return runs.config('runs/x', 'data/x', **{'batch__ramp_tokens': 0.0} | settings)


def planned(**settings):
  run = resolve(config(**settings), jax.devices())
  return plan.plan_for(run, jax.devices(), CHIP, 'here')


@pytest.fixture(scope='module')
def made():
  return planned(mesh__data=2, mesh__fsdp=2, mesh__tensor=2)


def test_state_is_as_large_as_the_real_one(made):
  with jax.set_mesh(sharding.make_mesh(**made.run.mesh)):
    state = small.init(made.run.program)
  here = lambda tree: sum(a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(tree))
  assert made.memory.parameters == here(state['params'])
  assert made.memory.optimizer == here(state['moments'])


def test_all_that_the_compiler_says_is_held_is_accounted_for(made):
  mesh = sharding.make_mesh(**made.run.mesh)
  stats = plan.compile_step(made.run, mesh).memory_analysis()
  held = stats.argument_size_in_bytes + stats.temp_size_in_bytes
  # Outputs take the place of inputs, but for the metrics.
  assert made.memory.held - stats.generated_code_size_in_bytes == pytest.approx(held, abs=1000)
  assert min(dataclasses.astuple(made.memory)) >= 0


def test_a_step_is_its_slices_and_the_model_is_in_it(made):
  slices = made.run.slices
  assert made.step.flops == made.besides.flops + slices * made.each.flops
  # Attention in chunks computes scores of keys that are not seen, and remat some things twice.
  assert 1.0 < made.step.flops / made.model_flops < 1.6
  assert ('all-reduce', ('data',)) in made.besides.sent
  assert not [axes for _, axes in made.each.sent if axes == ('data',)]


def test_remat_keeps_less_and_computes_more():
  run = resolve(config(mesh__fsdp=2, mesh__data=4), jax.devices())
  kept = []
  for remat in ('none', 'weights', 'dots', 'full'):
    numerics = dataclasses.replace(run.program.numerics, remat=remat)
    with jax.set_mesh(sharding.make_mesh(**run.mesh)):
      program = dataclasses.replace(run.program, numerics=numerics)
      kept.append(plan.kept_activations(dataclasses.replace(run, program=program)))
  assert kept == sorted(kept, reverse=True) and len(set(kept)) == 4


def test_a_pipeline_idles_and_keeps_its_inputs():
  made = planned(mesh__stage=2, mesh__data=4, model__n_layers=4, compute__microbatch=2)
  assert made.turns == 2
  inputs = 3 * 2 * 32 * 32 * 4  # of two stages, two rows of 32 tokens of width 32 in f32
  assert made.memory.activations == inputs
  told = plan.table(made)
  assert f'pipeline       {2 / (made.run.slices + 2):12.1%}' in told
  assert made.step.flops == pytest.approx(
    made.besides.flops + (made.run.slices + 2) * made.each.flops
  )


def test_the_table_and_the_json_say_the_same(made):
  told, found = plan.table(made), plan.as_json(made)
  assert json.loads(json.dumps(found)) == found
  assert found['fits'] and 'fits, with ' in told
  assert f'{found["estimate"]["step"][0]:12.3f} s at best' in told
  assert f'{found["step"]["flops"] / 1e12:12,.1f} TFLOP' in told
  assert found['memory']['held'] == sum(
    size for name, size in found['memory'].items() if name not in ('held', 'there')
  )
  too_small = dataclasses.replace(made.memory, there=made.memory.held - 10**7)
  less = dataclasses.replace(made, memory=too_small)
  assert '0.01 GB too much' in plan.table(less) and not plan.as_json(less)['fits']


def test_a_topology_comes_before_all_else(run_python):
  command = ['-m', 'gptjax.plan', '--config=configs/gpt3.py:125m']
  assert 'error: --topology: got' in run_python(command, timeout=60, code=2).stderr
  told = run_python([*command, '--topology=v5x:2x2'], timeout=60, code=2).stderr
  assert 'v5p' in told and 'h100' in told
  assert '--topologie' in run_python([*command, '--topologie=a'], timeout=60, code=2).stderr


@pytest.mark.slow
@pytest.mark.parametrize('topology', ['v5e:2x4', 'h100:1x8'])
def test_a_plan_is_made_for_a_machine_that_is_not_there(tmp_path, run_python, topology):
  small.devices_or_skip(topology)
  path = tmp_path / 'plan.json'
  few = ['--config.model.n_layers=4', '--config.mesh.fsdp=4', '--config.mesh.tensor=2']
  command = ['-m', 'gptjax.plan', '--config=configs/gpt3.py:125m', f'--topology={topology}', *few]
  done = run_python([*command, f'--json={path}'], timeout=300, env={'JAX_PLATFORMS': 'cpu'})
  found = json.loads(path.read_text())
  assert found['fits'] and machines.chip(topology).kind in done.stdout
  # dots computes no product of a layer again but attention's.
  assert 1.0 < found['step']['flops'] / found['step']['model_flops'] < 1.2
  run_python([*command, '--config.mesh.fsdp=3'], timeout=60, code=2)


@pytest.mark.slow
def test_what_does_not_fit_is_what_the_compiler_refuses(run_python):
  small.devices_or_skip('v5e:2x4')
  large = ['--config=configs/gpt3.py:6.7b', '--config.mesh.fsdp=8', '--config.model.n_layers=32']
  command = ['-m', 'gptjax.plan', *large, '--topology=v5e:2x4', '--config.compute.remat=none']
  done = run_python(command, timeout=500, code=1, env={'JAX_PLATFORMS': 'cpu'})
  assert 'memory of a device: ' in done.stdout and 'GB too much' in done.stdout
  assert 'it would fit' in done.stdout or 'no mesh, microbatch or remat' in done.stdout
  assert 'Traceback' not in done.stderr
