"""What XLA is asked for is in one place, reaches every step, and yields to the user's own flags."""

import dataclasses
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import ahead, compiler, cost
from gptjax.config import resolve
from gptjax.errors import Mistake
from tests import plans, small

PLATFORMS = {'tpu': 'v5e:2x4', 'gpu': 'h100:1x8'}


@pytest.fixture
def options(monkeypatch):
  """Two options of a CPU, and no flags."""
  for variable in compiler.SAID_IN:
    monkeypatch.delenv(variable, raising=False)
  wanted = {'xla_cpu_enable_fast_min_max': True, 'xla_llvm_disable_expensive_passes': True}
  monkeypatch.setitem(compiler.OPTIONS, 'cpu', wanted)
  return wanted


@pytest.mark.parametrize('variable', compiler.SAID_IN)
@pytest.mark.parametrize('said', ['--{}=false', '--a=1 --{}', '--{} --b=2'])
def test_what_the_user_says_wins(options, monkeypatch, variable, said):
  first, second = options
  assert compiler.options('cpu') == options
  monkeypatch.setenv(variable, said.format(first))
  assert compiler.options('cpu') == {second: True}
  monkeypatch.setenv(variable, f'{said.format(first)} --{second}=true')
  assert compiler.options('cpu') is None
  monkeypatch.setenv(variable, f'--{first}_2=false --{first[:-1]}=false')
  assert compiler.options('cpu') == options


def test_flags_in_a_file_are_the_users_too(options, monkeypatch, tmp_path):
  (tmp_path / 'flags').write_text('--b=2\n--xla_cpu_enable_fast_min_max=false\n')
  monkeypatch.setenv('XLA_FLAGS', str(tmp_path / 'flags'))
  assert list(compiler.options('cpu')) == ['xla_llvm_disable_expensive_passes']
  assert compiler.flags('XLA_FLAGS') == '--b=2 --xla_cpu_enable_fast_min_max=false'


def test_a_platform_without_options_has_none():
  assert compiler.options('toaster') is None


def test_cpus_that_train_together_are_compiled_for_as_by_default(options, monkeypatch):
  """Else their collectives do not match; for accelerators it makes no difference."""
  of_a_tpu = compiler.options('tpu')
  monkeypatch.setattr(jax.distributed, 'is_initialized', lambda: True)
  assert compiler.options('cpu') is None and compiler.options('tpu') == of_a_tpu


def test_options_reach_the_compiler(monkeypatch):
  """It refuses one that it does not know, whoever asks for the step."""
  run = plans.run_of()
  mesh = run.make_mesh()
  monkeypatch.setitem(compiler.OPTIONS, 'cpu', {'xla_no_such_option': True})
  with pytest.raises(Mistake, match='xla_no_such_option'):
    ahead.compile_step(run, mesh)
  with jax.set_mesh(mesh), pytest.raises(jax.errors.JaxRuntimeError, match='xla_no_such_option'):
    ahead.jitted(run, mesh).lower(*ahead.abstract_arguments(run)).compile()
  step = ahead.step(run, mesh)  # whose thread is refused too, and who calls is told
  with pytest.raises(jax.errors.JaxRuntimeError, match='xla_no_such_option'):
    step()


@pytest.mark.parametrize('in_a_file', [False, True])
def test_one_order_of_sums_is_a_flag_that_is_asked_for_once(monkeypatch, tmp_path, in_a_file):
  (tmp_path / 'flags').write_text('--a=1\n')
  said = str(tmp_path / 'flags') if in_a_file else '--a=1'
  monkeypatch.setenv('XLA_FLAGS', said)
  compiler.fix_order(False)
  assert os.environ['XLA_FLAGS'] == said
  for _ in range(2):
    compiler.fix_order(True)
    assert os.environ['XLA_FLAGS'] == '--a=1 --xla_gpu_deterministic_ops=true'


@pytest.mark.slow
@pytest.mark.parametrize('platform', PLATFORMS)
def test_a_compiler_takes_its_options(platform):
  """And sees them: one that it does not know is refused."""
  machine = small.machine_or_skip(PLATFORMS[platform])
  mesh = jax.sharding.Mesh(np.array(machine.devices[:1]), 'x')
  x = jax.ShapeDtypeStruct((128, 128), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P()))
  square = lambda options: jax.jit(lambda x: x @ x, compiler_options=options).lower(x).compile()
  assert square(compiler.options(platform))
  with pytest.raises(Exception, match='xla_no_such_option'):
    square({'xla_no_such_option': True})


def test_what_is_apart_is_computed_before():
  """Else XLA would compute the hyperbolic tangent in the loop that transposes it."""

  def is_within(transpose):
    text = jax.jit(lambda x: transpose(jnp.tanh(x))).lower(x).compile().as_text()
    (found,) = [computation for computation in text.split('\n\n') if ' tanh(' in computation]
    return ' transpose(' in found

  x = jnp.arange(64.0).reshape(4, 16)
  np.testing.assert_array_equal(compiler.apart(jnp.transpose)(x), x.T)
  assert is_within(jnp.transpose)
  assert not is_within(compiler.apart(jnp.transpose))


def test_a_gpu_writes_what_it_then_sums_and_others_need_not():
  summed = jax.jit(lambda x: compiler.written({'x': x})[0]['x'].sum()).trace(jnp.ones(8))
  told = {
    name: summed.lower(lowering_platforms=(name,)).as_text() for name in ('cuda', 'cpu', 'tpu')
  }
  assert [name for name, text in told.items() if 'optimization_barrier' in text] == ['cuda']


@pytest.mark.slow
def test_a_gpu_copies_no_params_and_no_moments():
  machine = small.machine_or_skip(PLATFORMS['gpu'])
  one = dataclasses.replace(machine, devices=machine.devices[:1])
  wide = {'model__d_model': 256, 'model__d_ff': 8192, 'compute__microbatch': 24}
  run = resolve(plans.config(compute__dtype='bfloat16', **wide), one.devices)
  text = cost.plan_for(run, one).compiled.as_text()
  up = re.escape('f32[2,256,8192]{2,1,0}')
  assert re.search(rf'= {up} parameter\(', text) and not re.search(rf'= {up} copy\(', text)
