"""A step from a file is the step, and a file that was made from anything else is refused."""

import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest

from configs import gpt3
from gptjax import ahead, compiler, garbage, process, train
from gptjax.config import resolve
from gptjax.errors import Mistake
from tests import plans, runs, small
from tests.conftest import DEVICES, FAST

MESHES = [
  {'mesh__data': 2, 'mesh__fsdp': 2, 'mesh__tensor': 2},
  {'mesh__stage': 2, 'mesh__data': 4, 'model__n_layers': 4},
]


def kept(path, **settings):
  """The run and the mesh whose step is now in a file."""
  run = plans.run_of(**settings)
  mesh = run.make_mesh()
  size = ahead.save(path, ahead.compile_step(run, mesh), run, mesh)
  assert path.stat().st_size == size
  return run, mesh


@pytest.fixture(scope='module')
def one(tmp_path_factory):
  path = tmp_path_factory.mktemp('ahead') / 'step'
  return path, *kept(path, **MESHES[0])


def taken(step, run, mesh):
  """The state and the metrics after two steps."""
  with jax.set_mesh(mesh):
    _, like, *_ = ahead.abstract_arguments(run)
    draw = np.random.default_rng(0).integers(0, run.program.shape.vocab_size, like.shape)
    token_gbl = jax.device_put(draw.astype(like.dtype), like.sharding)
    state = small.init(run.program)
    for start in (0, 20):
      state, metrics = step(state, token_gbl, np.int32(start), np.int32(20), np.float32(1e-3))
  return jax.tree.map(np.asarray, (state, metrics))


CUT = """
import os, pathlib, sys
import jax
import numpy as np
from etils import epath
from gptjax import ahead

del os.environ['JAX_COMPILATION_CACHE_DIR']
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
workdir = epath.Path(sys.argv[1])

def start(keeps=None):
  ahead.cache_in(workdir, True)
  jax.jit(lambda x: x * 3 + 1).lower(np.float32(1)).compile()
  (path,) = (workdir / 'cache').glob('jit*')
  data = path.read_bytes()
  if keeps is not None:
    path.write_bytes(data[:int(keeps * len(data))])
  return data

whole = start()
(workdir / 'cache' / 'of_xla-cache').mkdir()
(workdir / 'cache' / 'notes').write_text('mine')
assert start(0.5) == whole
assert len(start(0.0)) > len(whole) / 2 and len(start()) > len(whole) / 2
ahead.cache_in(workdir / 'other', False)
jax.jit(lambda x: x * 5 + 1).lower(np.float32(1)).compile()
assert not (workdir / 'other').exists() and len([*(workdir / 'cache').iterdir()]) == 3
"""


def test_what_was_cut_in_the_cache_is_compiled_again(tmp_path, run_python):
  """Whoever wrote it was killed; JAX would complain at each start, and never replace it."""
  done = run_python(['-W', 'error', '-c', CUT, tmp_path], timeout=60)
  assert done.stdout.count('was cut, and is compiled again') == 2


def assert_the_step_itself(path, run, mesh):
  got = taken(ahead.load(str(path), run, mesh), run, mesh)
  jax.tree.map(np.testing.assert_array_equal, got, taken(ahead.step(run, mesh), run, mesh))


def test_a_step_from_a_file_is_the_step_itself(one):
  assert_the_step_itself(*one)


@pytest.mark.slow
def test_a_step_of_a_pipeline_from_a_file_is_the_step_itself(tmp_path):
  path = tmp_path / 'step'
  assert_the_step_itself(path, *kept(path, **MESHES[1]))


def test_memory_is_kept_for_a_step_from_a_file_too(one, monkeypatch):
  path, run, mesh = one
  called = []
  for name in ('give_memory_back', 'keep_memory'):
    monkeypatch.setattr(process, name, lambda name=name: called.append(name))
  monkeypatch.setattr(garbage, 'look_as_usual', lambda: called.append('garbage'))
  taken(ahead.step(dataclasses.replace(run, compiled=str(path)), mesh), run, mesh)
  assert called == ['garbage', 'give_memory_back', 'keep_memory']


@pytest.mark.parametrize(
  'setting, value, told',
  [
    ('model__d_ff', 96, 'model.d_ff 64.*model.d_ff 96'),
    ('model__window', 4, r'model.windows \[None, 8\].*\[None, 4\]'),
    ('adamw__b2', 0.9, 'adamw.b2 0.95.*adamw.b2 0.9'),
    ('stability__spike', 0.0, 'stability.spike 10.0.*stability.spike 0.0'),
    ('stability__window', 16, 'stability.window 128.*stability.window 16'),
    ('compute__remat', 'full', 'numerics.remat none.*numerics.remat full'),
    ('compute__dtype', 'bfloat16', 'numerics.dtype float32.*numerics.dtype bfloat16'),
    ('compute__attention', 'reference', 'numerics.attend chunked.*numerics.attend reference'),
    ('compute__microbatch', 2, 'microbatch 4, slices 6.*microbatch 8, slices 3'),
    ('compute__loss_chunk', 16, 'loss_chunk 128.*loss_chunk 16'),
    ('batch__sequences', 48, 'slices 6.*slices 12'),
    ('mesh__tensor', 1, 'mesh.data 2, mesh.tensor 2.*mesh.data 4, mesh.tensor 1'),
  ],
)
def test_a_step_of_another_config_is_refused(one, setting, value, told):
  path, *_ = one
  settings = MESHES[0] | {'mesh__data': -1, setting: value}
  run = plans.run_of(**settings)
  with pytest.raises(Mistake, match=f'compute.compiled=.*got a step made from .*{told}.* as here'):
    ahead.load(str(path), run, run.make_mesh())


def test_what_the_step_does_not_know_may_differ(one):
  path, _, mesh = one
  free = {'lr__peak': 0.5, 'train_tokens': 99999.0, 'save__keep': 7, 'batch__ramp_tokens': 2048.0}
  assert ahead.load(str(path), plans.run_of(**MESHES[0], **free), mesh)


def test_other_code_versions_flags_or_devices_are_refused(one, monkeypatch):
  path, run, mesh = one
  with monkeypatch.context() as m:
    m.setattr(ahead, '_code', lambda: 'other')
    with pytest.raises(Mistake, match='made from code [0-9a-f]{16}, wanted code other as here'):
      ahead.load(str(path), run, mesh)
  with monkeypatch.context() as m:
    m.setattr(ahead, '_version', lambda package: '0.0.1')
    with pytest.raises(Mistake, match=f'version.jax {jax.__version__}.*version.jax 0.0.1'):
      ahead.load(str(path), run, mesh)
  with monkeypatch.context() as m:
    m.setenv('XLA_FLAGS', '--xla_force_host_platform_device_count=4 --xla_other=1')
    with pytest.raises(Mistake, match='flags.XLA_FLAGS .*wanted flags.XLA_FLAGS --xla_other=1 as'):
      ahead.load(str(path), run, mesh)
  with monkeypatch.context() as m:
    m.setitem(compiler.OPTIONS['cpu'], 'xla_cpu_enable_fast_min_max', True)
    with pytest.raises(Mistake, match='options.xla_cpu_enable_fast_min_max none.*max True as here'):
      ahead.load(str(path), run, mesh)
  turned = run.make_mesh(jax.devices()[::-1])
  with pytest.raises(Mistake, match=r'devices in order \[0, 1, .*, wanted devices in order \[7, 6'):
    ahead.load(str(path), run, turned)


def test_every_file_of_the_code_is_in_its_hash(tmp_path, monkeypatch):
  (tmp_path / 'data').mkdir()
  deep, source = tmp_path / 'data' / 'deep.py', tmp_path / 'ahead.py'
  deep.write_text('a = 1\n')
  source.write_text('')
  monkeypatch.setattr(ahead, '__file__', str(source))
  before = ahead._code()
  assert ahead._code() == before
  deep.write_text('a = 2\n')
  assert ahead._code() != before


def test_a_damaged_file_is_refused_and_not_run(one, tmp_path):
  path, run, mesh = one
  whole = path.read_bytes()
  head, payload = whole.split(b'\n', 1)
  flipped = bytearray(whole)
  flipped[-1000] ^= 1
  future = json.dumps(json.loads(head) | {'kind': 'a training step of gptjax, 9'}).encode()
  broken = {
    'cut or changed': [whole[:-1], bytes(flipped), whole + b'x', head + b'\n'],
    'a training step of gptjax, 9': [future + b'\n' + payload],
    'wanted a step that gptjax.plan --save wrote; try compiling it again, or --config.compute.': [
      b'',
      b'text',
      b'[]\n',
      b'{}\n',
      json.dumps({k: v for k, v in json.loads(head).items() if k != 'metrics'}).encode() + b'\n',
      b'\x80\n\x80',
    ],
  }
  monkey = tmp_path / 'broken'
  for told, files in broken.items():
    for data in files:
      monkey.write_bytes(data)
      with pytest.raises(Mistake, match=re.escape(told)):
        ahead.load(str(monkey), run, mesh)
  with pytest.raises(Mistake, match='FileNotFoundError'):
    ahead.load(str(tmp_path / 'none'), run, mesh)


@pytest.mark.slow
def test_train_runs_what_is_in_the_file(corpus, tmp_path, capsys):
  settings = {'mesh__fsdp': 4, 'train_tokens': 1024.0}
  c = runs.config(tmp_path / 'plain', corpus, **settings)
  train.main(c)
  run, mesh = kept(tmp_path / 'step', **settings, batch__ramp_tokens=2048.0)
  from_file = {'compute__compiled': str(tmp_path / 'step')}
  train.main(runs.config(tmp_path / 'same', corpus, **settings, **from_file))
  assert capsys.readouterr().out.count('attention chunked, compiled ahead\n') == 1
  assert runs.records(tmp_path / 'same') == runs.records(tmp_path / 'plain')
  # And not what it would compile itself: a file that lies about what is in it.
  other = plans.run_of(**settings, adamw__b2=0.5)
  ahead.save(tmp_path / 'step', ahead.compile_step(other, mesh), run, mesh)
  train.main(runs.config(tmp_path / 'other', corpus, **settings, **from_file))
  assert runs.records(tmp_path / 'other') != runs.records(tmp_path / 'plain')


SAVE = """
import sys, jax
from gptjax import ahead, hosts, sharding
from tests import plans
hosts.join(sys.argv[1])
run = plans.run_of(mesh__fsdp=2, mesh__tensor=2)
mesh = run.make_mesh()
compiled = ahead.compile_step(run, mesh)
if hosts.first():
  ahead.save(sys.argv[2], compiled, run, mesh)
hosts.meet()
"""


@pytest.mark.slow
def test_every_process_of_a_run_loads_it(corpus, tmp_path, start_python, free_port, together):
  path = tmp_path / 'step'
  # With the flags of `together`.
  at, env = f'127.0.0.1:{free_port()},2', {'XLA_FLAGS': f'{FAST} {DEVICES}=2'}
  started = [start_python(['-c', SAVE, f'{at},{i}', path], env=env) for i in (0, 1)]
  assert [process.wait(timeout=200) for process in started] == [0, 0]
  settings = {'mesh__fsdp': 2, 'mesh__tensor': 2, 'train_tokens': 1024.0}
  for name, compiled in (('plain', ''), ('same', path)):
    flags = runs.args(tmp_path / name, corpus, **settings, compute__compiled=compiled)
    _, err = together(2, 2, flags).communicate(timeout=300)
    assert (tmp_path / name / 'metrics.jsonl').exists(), err[-3000:]
  assert runs.records(tmp_path / 'same') == runs.records(tmp_path / 'plain') != []


@pytest.mark.slow
def test_a_width_that_no_power_of_two_divides_compiles():
  """XLA for GPUs has no tiles for a product as wide as the positions of 13B are long."""
  machine = small.machine_or_skip('h100:1x8')
  c = gpt3.get_config('13b')
  c.model.n_layers, c.mesh.fsdp, c.mesh.tensor = 2, 4, 2
  run = resolve(c, machine.devices)
  assert run.program.shape.d_model == 5140
  mesh = run.make_mesh(machine.devices)
  assert ahead.compile_step(run, mesh).memory_analysis().temp_size_in_bytes > 0


def test_a_refused_file_leaves_a_run_as_it_was(straight, corpus, tmp_path):
  shutil.copytree(straight[0], tmp_path / 'run')
  here = lambda: {
    path: path.read_bytes() for path in (tmp_path / 'run').rglob('*') if path.is_file()
  }
  before = here()
  (tmp_path / 'step').write_text('no step')
  longer = {'mesh__fsdp': 4, 'train_tokens': 16384.0, 'resume__accept_changes': True}
  with pytest.raises(Mistake, match='compute.compiled='):
    train.main(
      runs.config(tmp_path / 'run', corpus, compute__compiled=str(tmp_path / 'step'), **longer)
    )
  assert here() == before


@pytest.mark.parametrize(
  'said, told',
  [
    ('RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nand where', Mistake),
    ('INTERNAL: Gloo', jax.errors.JaxRuntimeError),
  ],
)
def test_a_step_that_lacks_memory_is_told_with_what_to_do(one, monkeypatch, said, told):
  _, run, mesh = one

  def lacks(*_):
    raise jax.errors.JaxRuntimeError(said)

  monkeypatch.setattr(ahead, '_compile', lambda *_: lacks)
  with pytest.raises(told, match=re.escape(said.splitlines()[0])) as caught:
    ahead.step(run, mesh)({})
  assert ('a smaller --config.compute.microbatch' in str(caught.value)) == (told is Mistake)


def test_a_refusal_for_memory_is_told_from_others():
  used = 'RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 33.25G of 31.25G hbm.'
  assert ahead.out_of_memory(used) == (33.25 * 2**30, 31.25 * 2**30)
  total = 'the total memory required for HLO temporaries (204.5G) exceeds available HBM (15.75G).'
  assert ahead.out_of_memory(total) == (204.5 * 2**30, 15.75 * 2**30)
  assert ahead.out_of_memory('INTERNAL: Mosaic failed') is None
