"""The door: every config there is builds, every knob is read, every mistake is told at once."""

import ast
import importlib
import pathlib

import jax
import pytest
from ml_collections import ConfigDict

from configs import gpt2, gpt3, mixtures, tiny
from gptjax import checkpoint, schedule, sizes
from gptjax.config import check_knobs, resolve
from gptjax.data import mixture
from gptjax.errors import Mistake
from gptjax.optimizer import AdamW
from tests import small
from tests.runs import dotted

ROOT = pathlib.Path(__file__).parents[1]


def changed(config=None, **settings) -> ConfigDict:
  config = config or tiny.get_config()
  config.update_from_flattened_dict(dotted(settings))
  return config


@pytest.mark.parametrize('name', sizes.GPT3)
def test_every_gpt3_builds_on_a_mesh_that_divides_it(name):
  config = changed(gpt3.get_config(name), mesh__tensor=2, mesh__fsdp=4)
  run = resolve(config, jax.devices())
  with small.on(1, 4, 2):
    state = run.program.abstract_state()
  assert len(jax.tree.leaves(state)) > 40
  assert run.microbatch * run.slices == config.batch.sequences
  assert run.ramp.total == 146_484_375


def test_tiny_is_the_recipe_in_small_with_the_same_knobs():
  small_one, large = tiny.get_config(), gpt3.get_config()
  names = lambda config: set(checkpoint.flatten(config.to_dict()))
  assert names(small_one) == names(large)
  assert small_one.model.pattern == large.model.pattern
  assert small_one.adamw == large.adamw
  assert small_one.batch.ramp_from < small_one.batch.sequences


@pytest.mark.parametrize('module', [gpt3, tiny])
def test_a_config_file_has_all_knobs_and_no_other(module):
  check_knobs(module.get_config())
  config = module.get_config()
  config.mesh.fdsp = 2
  del config.batch['ramp_from']
  config.lr.peak = float('nan')
  with pytest.raises(Mistake, match='3 mistakes') as e:
    resolve(config, jax.devices())
  assert 'config.mesh.fdsp: got an unknown knob, wanted a known one; try mesh.fsdp' in str(e.value)
  assert 'config.batch.ramp_from: got no such knob' in str(e.value)
  assert 'lr.peak: got nan' in str(e.value)


def test_the_mixture_of_gpt3_is_that_of_its_table():
  """Table 2.2: the shares of each source, whose weights sum to 101."""
  config = mixtures.get_config('gpt3:13b')
  assert config.model.n_layers == 40
  shares = mixture.shares(mixture.parse(config.data.sources))
  assert shares == {
    'data/common_crawl': 60,
    'data/webtext2': 22,
    'data/books1': 8,
    'data/books2': 8,
    'data/wikipedia': 3,
  }
  total = resolve(config, jax.devices()).ramp.total
  counts = mixture.Mixture([mixture.Stage(0, shares)]).counts(total)
  assert counts['data/common_crawl'] == pytest.approx(60 / 101 * total, abs=5)
  with pytest.raises(Mistake, match='mixture: got gpt9'):
    mixtures.get_config('gpt9')


def test_unknown_size_lists_the_known():
  with pytest.raises(Mistake, match='got 3b, wanted one of 125m 350m'):
    gpt3.get_config('3b')


def chains(tree):
  """Every dotted chain of names in a module, such as config.mesh.fsdp."""
  return {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def knobs_read(source):
  """Dotted names under `config` that a module reads, and others that are no knobs."""
  tree = ast.parse(source)
  found = {chain.removeprefix('config.') for chain in chains(tree)}
  # `c = config.model` and then `c.d_model`, or a loop over names given as strings.
  for function in ast.walk(tree):
    if not isinstance(function, ast.FunctionDef):
      continue
    short = {
      ast.unparse(n.targets[0]): ast.unparse(n.value).removeprefix('config.')
      for n in ast.walk(function)
      if isinstance(n, ast.Assign) and ast.unparse(n.value).startswith('config.')
    }
    for chain in chains(function):
      head, _, rest = chain.partition('.')
      if head in short:
        found.add(f'{short[head]}.{rest}')
    for node in ast.walk(function):
      if isinstance(node, ast.Constant) and isinstance(node.value, str):
        found |= {f'{group}.{node.value}' for group in short.values()}
  return found


def test_every_knob_is_read():
  sources = [(ROOT / 'gptjax' / f'{name}.py').read_text() for name in ('config', 'train')]
  knobs = set(checkpoint.flatten(gpt3.get_config().to_dict()))
  assert knobs - set().union(*map(knobs_read, sources)) == set()


def test_a_knob_that_nobody_reads_would_be_found():
  source = 'def f(config):\n  c = config.mesh\n  return c.data, config.lr.peak'
  read = knobs_read(source)
  assert {'mesh.data', 'lr.peak'} <= read
  assert not {'mesh.fsdp', 'lr.warmup_tokens'} & read


def test_a_run_is_what_the_knobs_say():
  config = changed(
    adamw__b1=0.8,
    adamw__b2=0.85,
    adamw__eps=1e-5,
    adamw__weight_decay=0.3,
    adamw__clip_norm=2.0,
    batch__sequences=64,
    batch__ramp_from=16,
    batch__ramp_step=24,
    batch__ramp_tokens=25600.0,
    compute__microbatch=2,
    compute__loss_chunk=7,
    compute__remat='dots',
    compute__layers='apart',
    compute__dtype='bfloat16',
    eval__every_tokens=2560.0,
    eval__sequences=11,
    lr__peak=0.5,
    lr__warmup_tokens=2560.0,
    lr__decay_tokens=25600.0,
    lr__final_fraction=0.3,
    mesh__fsdp=2,
    model__dropout=0.2,
    model__pattern=('banded', 'dense', 'banded'),
    model__window=9,
    save__every_tokens=5120.0,
    seed=7,
    train_tokens=51200.0,
  )
  run = resolve(config, jax.devices())
  program, numerics = run.program, run.program.numerics
  assert program.optimizer == AdamW(0.8, 0.85, 1e-5, 0.3, 2.0)
  assert program.shape == sizes.Shape(4, 128, 4, 32, 512, 256, 4096, (9, None, 9))
  assert (program.loss_chunk, program.seed) == (7, 7)
  assert (numerics.remat, numerics.dtype, numerics.dropout) == ('dots', jax.numpy.bfloat16, 0.2)
  assert numerics.apart
  assert run.ramp == schedule.Ramp.linear(16, 64, 24, 100, 200)
  assert run.mesh == {'stage': 1, 'data': 4, 'fsdp': 2, 'tensor': 1}
  assert (run.microbatch, run.slices) == (16, 4)
  assert (run.eval_every, run.eval_sequences, run.save_every) == (10, 11, 20)
  rates = [float(schedule.at(run.lr, sequences)) for sequences in (5, 10, 100, 200)]
  assert rates == pytest.approx([0.25, 0.5, 0.15, 0.15])


@pytest.mark.parametrize(
  'settings, told',
  [
    ({'batch__sequences': 0}, '^batch.sequences: got 0, wanted 1 or more'),
    ({'batch__sequences': 2**63 - 1}, '^batch.sequences: got .*, wanted 1048576 or less'),
    ({'compute__microbatch': 2**40}, 'batch.sequences over data·fsdp·microbatch'),
    ({'model__d_ff': 2**63 - 1}, 'model.d_ff: got .*, wanted 1048576 or less'),
    ({'model__context': 0}, 'model.context: got 0'),
    ({'workdir': 'w\udcff'}, 'workdir: got UnicodeEncodeError'),
    ({'mesh__fsdp': 3}, 'd_model over the mesh axis fsdp: got 128 over 3'),
    ({'mesh__tensor': 8}, 'n_heads over the mesh axis tensor: got 4 over 8'),
    ({'mesh__data': 4}, 'got 1·4·1·1 = 4 devices, wanted 8, all there are'),
    ({'mesh__fsdp': 0}, 'mesh.fsdp: got 0'),
    ({'batch__sequences': 80}, r'got 80 over 8·1·4 = 32.*batch.sequences=96 or .*microbatch=2'),
    ({'batch__ramp_from': 99}, 'batch: got from 99'),
    ({'compute__dtype': 'float16'}, "compute.dtype: got float16, wanted one of .'auto'"),
    ({'compute__remat': 'some'}, 'compute.remat: got some'),
    ({'compute__layers': 'some'}, 'compute.layers: got some'),
    ({'compute__attention': 'fast'}, 'fast'),
    ({'compute__loss_chunk': 0}, 'loss_chunk: got 0'),
    ({'model__pattern': ('dense', 'sparse')}, 'model.pattern'),
    ({'model__window': 0}, 'model.window: got 0'),
    ({'model__dropout': 1.0}, 'model.dropout: got 1.0'),
    ({'model__n_layers': 0}, 'model.n_layers: got 0'),
    ({'model__vocab_size': 100, 'mesh__tensor': 3}, 'padded vocabulary'),
    ({'train_tokens': 1e14}, 'try --config.train_tokens=300000000000.0'),
    ({'train_tokens': 3e11, 'model__context': 1}, 'try --config.train_tokens=2147483647.0'),
    ({'train_tokens': 0.0}, 'train_tokens'),
    ({'lr__peak': 0.0}, 'a peak above 0'),
    ({'lr__decay_tokens': 1.0}, 'warmup_tokens'),
    ({'adamw__b1': 1.0}, 'adamw.b1: got 1.0'),
    ({'adamw__clip_norm': 0.0}, 'clip_norm'),
    ({'profile': '3'}, 'profile: got 3'),
    ({'save__keep': 0}, 'save.keep: got 0'),
    ({'save__failures': 0}, 'save.failures: got 0'),
    ({'stability__window': 1}, 'stability.window: got 1'),
    ({'stability__spike': -1.0}, 'stability.spike: got -1.0'),
    ({'skip_sequences': '9-5'}, 'skip_sequences: got 9-5, wanted first-last'),
    ({'watchdog__seconds': -1.0}, 'watchdog.seconds: got -1.0'),
    ({'seed': -1}, 'seed: got -1'),
    ({'data__sources': 'a=-1'}, 'data.sources: got a=-1'),
    ({'seed': 2**32}, 'seed: got 4294967296, wanted less than'),
    ({'workdir': ''}, 'workdir: got none'),
  ],
)
def test_a_mistake_is_told(settings, told):
  with pytest.raises(Mistake, match=told):
    resolve(changed(**settings), jax.devices())


def test_a_window_longer_than_the_context_sees_all_of_it():
  run = resolve(changed(model__window=2**40), jax.devices())
  assert run.program.shape.windows == (None, 256)


def test_without_a_ramp_its_start_does_not_matter():
  config = changed(batch__sequences=8, batch__ramp_tokens=0.0, compute__microbatch=1)
  config.batch.ramp_from = 16
  assert [rung.batch for rung in resolve(config, jax.devices()).ramp.rungs] == [8]


def test_all_mistakes_are_told_at_once():
  config = changed(mesh__fsdp=3, compute__remat='some', lr__peak=-1.0, save__keep=0)
  with pytest.raises(Mistake) as e:
    resolve(config, jax.devices())
  for word in ('fsdp', 'remat', 'lr: got peak', 'save.keep'):
    assert word in str(e.value)


def test_what_hangs_on_another_knob_is_told_beside_it():
  wrong = {'compute__dtype': 'f8', 'compute__attention': 'flash', 'compute__microbatch': 0}
  with pytest.raises(Mistake, match='4 mistakes') as e:
    resolve(changed(batch__sequences=0, **wrong), jax.devices())
  for word in ('dtype: got f8', "attention: got 'flash'", 'microbatch: got 0', 'sequences: got 0'):
    assert word in str(e.value)


def test_a_mesh_of_too_many_devices_asks_for_no_other_batch():
  with pytest.raises(Mistake, match='^mesh of stage·data·fsdp·tensor: got [^\\n]*$'):
    resolve(changed(mesh__data=9), jax.devices())


@pytest.mark.parametrize(
  'platform, remat, layers, apart',
  [
    ('cpu', 'none', 4, False),
    ('gpu', 'dots', 24, True),
    ('gpu', 'dots', 26, False),
    ('tpu', 'none', 24, True),
    ('tpu', 'none', 26, False),
    ('tpu', 'dots', 4, False),
  ],
)
def test_layers_are_compiled_apart_where_it_pays(platform, remat, layers, apart):
  config = changed(compute__remat=remat, model__n_layers=layers, compute__attention='chunked')
  assert resolve(config, [small.Device(platform)]).program.numerics.apart == apart


@pytest.mark.parametrize('platform, dtype', [('cpu', 'float32'), ('gpu', 'bfloat16')])
def test_dtype_follows_the_machine(platform, dtype):
  config = changed(compute__attention='chunked')
  assert resolve(config, [small.Device(platform)]).program.numerics.dtype == dtype


def test_what_a_kernel_cannot_do_is_told_with_all_other_mistakes():
  devices = [small.Device('gpu', 'NVIDIA H100 80GB HBM3', '9.0')]
  run = resolve(changed(), devices)
  assert run.program.numerics.attend.__name__ == 'cudnn'
  config = changed(compute__dtype='float32', model__dropout=0.1, save__keep=0)
  with pytest.raises(Mistake) as e:
    resolve(config, devices)
  for told in ('compute.dtype: got float32', 'model.dropout: got 0.1', 'save.keep: got 0'):
    assert told in str(e.value)
  config.compute.attention, config.save.keep = 'chunked', 1
  assert resolve(config, devices).program.numerics.attend.__name__ == 'chunked'


def test_a_step_is_computed_twice_only_where_it_comes_out_the_same():
  devices = [small.Device('gpu', 'NVIDIA H100 80GB HBM3', '9.0')]
  twice = {'check__every_tokens': 1e6}
  with pytest.raises(Mistake, match='check.every_tokens: got .*try --config.deterministic, or'):
    resolve(changed(**twice), devices)
  assert resolve(changed(deterministic=True, **twice), devices).check_every == 3906
  assert resolve(changed(**twice), jax.devices()).check_every == 3906


def test_profile_names_steps():
  assert resolve(changed(profile='3-5'), jax.devices()).profile == range(3, 6)


@pytest.mark.parametrize('path', sorted((ROOT / 'configs').glob('*.py')), ids=lambda p: p.stem)
def test_every_config_file_gives_a_config(path):
  config = importlib.import_module(f'configs.{path.stem}').get_config()
  assert isinstance(config, ConfigDict)


# As published: the parameters of OpenAI's weights, all 50257 tokens and 1024 positions counted.
@pytest.mark.parametrize(
  'size, n_params',
  [('124m', 124_439_808), ('355m', 354_823_168), ('774m', 774_030_080), ('1558m', 1_557_611_200)],
)
def test_gpt2s_sizes_are_those_of_its_weights(size, n_params):
  run = resolve(gpt2.get_config(size), jax.devices()[:1])
  assert run.program.shape.n_params == n_params
  assert run.program.shape.windows == (None,)


def test_a_size_that_gpt2_has_not_is_told():
  with pytest.raises(Mistake, match='size of GPT-2: got 125m, wanted one of 124m'):
    gpt2.get_config('125m')
