"""What a plan says is held is what a run holds."""

import dataclasses

import jax
import pytest

from gptjax import ahead, memory
from tests import plans, small


@pytest.fixture(scope='module')
def made():
  return plans.planned(mesh__data=2, mesh__fsdp=2, mesh__tensor=2)


def test_state_is_as_large_as_the_real_one(made):
  with jax.set_mesh(made.mesh):
    state = small.init(made.run.program)
  here = lambda tree: sum(a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(tree))
  assert made.memory.parameters == here(state['params'])
  assert made.memory.optimizer == here(state['moments'])


def test_all_that_the_compiler_says_is_held_is_accounted_for(made):
  stats = ahead.compile_step(made.run, made.mesh).memory_analysis()
  held = stats.argument_size_in_bytes + stats.temp_size_in_bytes
  # Outputs take the place of inputs, but for the metrics.
  assert made.memory.held - stats.generated_code_size_in_bytes == pytest.approx(held, abs=1000)
  assert min(dataclasses.astuple(made.memory)) >= 0


def test_what_is_known_without_compiling_is_part_of_it(made):
  m = made.memory
  least = memory.at_least(made.run, made.mesh)
  assert m.parameters + m.optimizer + m.gradients < least <= m.held


def test_remat_keeps_less():
  run = plans.run_of(mesh__fsdp=2, mesh__data=4)
  kept = []
  for remat in ('none', 'weights', 'dots', 'full'):
    numerics = dataclasses.replace(run.program.numerics, remat=remat)
    with jax.set_mesh(run.make_mesh()):
      program = dataclasses.replace(run.program, numerics=numerics)
      kept.append(memory.kept_activations(dataclasses.replace(run, program=program)))
  assert kept == sorted(kept, reverse=True) and len(set(kept)) == 4


def test_a_cpu_keeps_the_bf16_of_a_product_and_of_attention_and_nothing_twice():
  """What `dots` keeps of two layers, by the sizes of what they name."""
  kept = []
  for layers in (4, 6):
    run = plans.run_of(
      mesh__data=8, model__n_layers=layers, compute__dtype='bfloat16', compute__remat='dots'
    )
    with jax.set_mesh(run.make_mesh()):
      kept.append(memory.kept_activations(run))
  D, H, F = 32, 4, 64  # n_heads · d_head is D
  results, attended = 3 * D + D + F, D
  log_sum_exp, between, stream = 4 * H, 2 * D, 4 * D  # between the layers, and into the first
  wanted = 2 * (2 * (results + attended) + log_sum_exp) + between + stream
  assert kept[1] - kept[0] == wanted * 32


def test_a_pipeline_keeps_its_inputs():
  run = plans.run_of(mesh__stage=2, mesh__data=4, model__n_layers=4, compute__microbatch=2)
  with jax.set_mesh(run.make_mesh()):
    inputs = 3 * 2 * 32 * 32 * 4  # of two stages, two rows of 32 tokens of width 32 in f32
    assert memory.kept_activations(run) == inputs
