"""Real runs on real text: what they leave behind, and what a kill, a resume and a ramp change."""

import argparse
import dataclasses
import json
import pathlib
import re
import shutil
import signal
import threading
import time

import jax
import numpy as np
import pytest
from etils import epath
from jax._src.array import ArrayImpl

from benchmarks import chaos
from configs import tiny
from gptjax import (
  checkpoint,
  export,
  flags,
  integrity,
  machines,
  process,
  schedule,
  sharding,
  train,
)
from gptjax.config import resolve
from gptjax.data import corpora, dataset, loader, mixture
from gptjax.data.mixture import Mixture, Stage
from gptjax.errors import Mistake
from tests import small
from tests.runs import CONTEXT, args, config, make_corpus, records, wait_for_records


def state_of(workdir):
  """The last checkpoint as NumPy, and its record."""
  run = resolve(config(workdir, 'data/x', mesh__data=1), jax.devices()[:1])
  return chaos.end_of(workdir, run)[1:]


def test_run_says_and_leaves_what_it_should(straight, corpus):
  workdir, printed = straight
  steps = records(workdir)
  run = resolve(config(workdir, corpus, mesh__data=1), jax.devices()[:1])
  expected = list(run.ramp.steps())
  assert [(r['step'], r['sequences'], r['batch']) for r in steps] == [
    (s.number, s.end, s.rows) for s in expected
  ]
  assert {r['batch'] for r in steps} >= {8, 16, 24}
  for r in steps:
    assert r['lr'] == schedule.at(run.lr, r['sequences']) > 0
    assert r['tokens'] == r['sequences'] * CONTEXT
    assert min(r['grad_norm'], r['param_norm'], r['update_norm']) > 0
  assert np.mean([r['loss'] for r in steps[-3:]]) < steps[0]['loss'] - 1
  held_out = records(workdir, 'validation')
  assert [r['sequences'] for r in held_out] == [
    s.end for s in expected if schedule.due(128, s.start, s.end) or s.end == 384
  ]
  assert f'held-out loss  {held_out[-1]["loss"]:.4f} nats per token' in printed
  assert 'unigram model  ' in printed and 'bits per byte' in printed
  assert 'only fill up slices' in printed
  assert json.loads((workdir / 'config.json').read_text())['model']['d_model'] == 32
  assert json.loads((workdir / 'record.json').read_text())['settings']['seed'] == 0
  assert (workdir / 'tokenizer.json').exists()


def test_validation_is_the_mean_over_the_held_out_windows(straight, corpus):
  workdir, _ = straight
  state, _ = state_of(workdir)
  run = resolve(config(workdir, corpus, mesh__data=1), jax.devices()[:1])
  windows = dataset.open_split(corpus, 'validation')
  rows = np.stack([windows[i] for i in range(min(20, len(windows)))])
  with small.on():
    total = jax.jit(run.program.eval_step)(state['params'], rows[None], len(rows))
  want = float(total) / (len(rows) * CONTEXT)
  assert records(workdir, 'validation')[-1]['loss'] == pytest.approx(want, rel=1e-5)


def test_killed_run_goes_on_bit_for_bit(straight, corpus, tmp_path, start_python, run_python):
  workdir, _ = straight
  process = start_python(args(tmp_path, corpus))
  try:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
      saved = list((tmp_path / 'checkpoints').glob('[0-9]*/_CHECKPOINT_METADATA'))
      path = tmp_path / 'metrics.jsonl'
      if saved and path.exists() and len(path.read_bytes().splitlines()) > 12:
        break
      time.sleep(0.02)
  finally:
    process.kill()
    process.wait()
  assert process.returncode == -signal.SIGKILL  # it was not done
  resumed = run_python(args(tmp_path, corpus), timeout=200).stdout
  assert 'start    sequence' in resumed
  assert records(tmp_path) == records(workdir)
  assert records(tmp_path, 'validation') == records(workdir, 'validation')
  want, got = state_of(workdir)[0], state_of(tmp_path)[0]
  jax.tree.map(np.testing.assert_array_equal, got, want)


def test_finished_run_does_nothing_more(straight, corpus, run_python):
  workdir, _ = straight
  files = lambda: {p: p.stat().st_mtime_ns for p in workdir.rglob('*') if p.is_file()}
  before = files()
  again = run_python(args(workdir, corpus), timeout=100).stdout
  assert 'nothing is left to train' in again and 'held-out loss' in again
  assert files() == before


def test_resume_on_another_mesh_and_in_other_slices_is_the_same_run(
  straight, corpus, tmp_path, capsys
):
  """Half on eight devices, half on another mesh of them; and the length, a recipe, is asked for."""
  workdir, _ = straight
  first = config(tmp_path, corpus, train_tokens=6656.0, mesh__data=2, mesh__tensor=4)
  train.main(first)
  second = {'mesh__data': 1, 'mesh__fsdp': 4, 'mesh__tensor': 2, 'compute__microbatch': 2}
  with pytest.raises(Mistake, match='train_tokens: got 12288.0, wanted 6656.0'):
    train.main(config(tmp_path, corpus, **second))
  train.main(config(tmp_path, corpus, resume__accept_changes=True, **second))
  assert 'change   train_tokens was 6656.0, is 12288.0 from here on' in capsys.readouterr().out
  got, want = records(tmp_path), records(workdir)
  clock = lambda records: [(r['step'], r['sequences'], r['batch'], r['lr']) for r in records]
  assert clock(got) == clock(want)
  for a, b in zip(got, want, strict=True):
    assert a['loss'] == pytest.approx(b['loss'], rel=1e-3)
  starts = state_of(tmp_path)[1]['starts']
  assert [(start['sequences'], start['changes']) for start in starts] == [
    (0, []),
    (208, [{'setting': 'train_tokens', 'before': 6656.0, 'after': 12288.0}]),
  ]


@pytest.mark.slow
def test_a_run_goes_from_a_pipeline_to_none_and_back(corpus, tmp_path, capsys):
  settings = {'model__n_layers': 4, 'resume__accept_changes': True}
  run = lambda name, tokens, **mesh: train.main(
    config(tmp_path / name, corpus, train_tokens=tokens, **settings, **mesh)
  )
  run('straight', 3072.0, mesh__data=8)
  staged = {'mesh__stage': 2, 'mesh__data': 2, 'mesh__tensor': 2}
  run('run', 1024.0, **staged)
  told = capsys.readouterr().out
  assert 'mesh     stage 2 · data 2 · fsdp 1 · tensor 2' in told
  # 24 sequences, 4 at a time, in 6 ticks and 2 to fill the stages and empty them.
  assert '2 layers each, 1F1B; of 14 ticks in a full batch a stage idles 2: 14%' in told
  run('run', 2048.0, mesh__fsdp=4)
  run('run', 3072.0, **staged)
  for kind in ('train', 'validation'):
    got, want = (records(tmp_path / name, kind) for name in ('run', 'straight'))
    want = {r['sequences']: r for r in want}
    for record in got:
      if record['sequences'] in want:
        assert record['loss'] == pytest.approx(want[record['sequences']]['loss'], rel=1e-3)
    assert record['sequences'] == 96


@pytest.mark.parametrize('waits', [False, True])
def test_ramp_compiles_once_and_no_step_waits_for_a_reader(
  corpus, tmp_path, monkeypatch, compiled, waits
):
  """Steps are read one behind; where they are done when the call returns, at once."""
  monkeypatch.setattr(process, 'waits_for', lambda device: waits)
  events = []

  class Watched(train.Trainer):
    def __init__(self, *args):
      super().__init__(*args)
      step = self.train_step

      def dispatch(state, *batch):
        out = step(state, *batch)
        events.append(('dispatch', int(batch[1])))
        compilations.append(len(compiled))
        return out

      self.train_step = dispatch

  def read(tree):
    events.append(('read', len([e for e in events if e[0] == 'read'])))
    return get(tree)

  compilations, get = [], jax.device_get
  monkeypatch.setattr(train, 'Trainer', Watched)
  monkeypatch.setattr(jax, 'device_get', read)
  # Every way to a device's values leads through this property. The prefetch has its own thread.
  value, reads = ArrayImpl._value.fget, []

  def counted(array):
    if threading.current_thread() is threading.main_thread():
      reads.append(len(compilations))  # steps dispatched so far
    return value(array)

  monkeypatch.setattr(ArrayImpl, '_value', property(counted))
  train.main(config(tmp_path, corpus, eval__every_tokens=0.0, save__every_tokens=0.0))
  monkeypatch.undo()

  starts = [start for kind, start in events if kind == 'dispatch']
  batches = np.diff([*starts, 384])
  assert set(batches) >= {8, 16, 24}  # the ramp was walked
  assert len(set(compilations)) == 1 and compilations[0] > 0
  # dispatch 0, dispatch 1, read 0, dispatch 2, read 1, … : one step runs while one is read.
  kinds = ''.join(kind[0] for kind, _ in events)
  n = len(starts)
  assert kinds == ('dr' * n if waits else 'd' + 'dr' * (n - 1) + 'r')
  # Seven numbers each time, and no other look at a device until the last step was dispatched.
  none = 1 if waits else 2
  assert [reads.count(i) for i in range(n)] == [0] * none + [7] * (n - none)


def test_stream_of_a_run_is_the_order_of_the_clock(corpus):
  """What steps are fed is f(seed, sequence index), in whatever batches."""
  run = resolve(config('x', corpus), jax.devices())
  opened = corpora.open_all(corpus, run.program.shape)
  stream = opened.stream(Mixture([Stage(0, opened.stage)]), seed=0)
  with small.on(8) as _:
    mesh = sharding.make_mesh(8, 1, 1)
    for step in list(run.ramp.steps())[:9]:
      token_gbl = loader.place(stream, step.start, step.rows, run.slices, run.microbatch, mesh)
      rows = np.asarray(token_gbl).reshape(-1, CONTEXT + 1)
      for i in range(step.rows):
        np.testing.assert_array_equal(rows[i], stream[step.start + i])
      assert (rows[step.rows :] == 0).all()


def test_what_a_run_does_at_its_marks(corpus, tmp_path, monkeypatch):
  """A trace of the steps named; no checkpoint ahead of the metrics on disk; the newest are kept."""
  saved, save = [], checkpoint.Checkpoints.save

  def watched(self, sequences, state, record):
    last = records(tmp_path)[-1]
    assert (last['sequences'], last['step']) == (sequences, record['step'])
    saved.append(sequences)
    save(self, sequences, state, record)

  depths, prefetch = [], loader.prefetch
  ahead = lambda make, items, depth: depths.append(depth) or prefetch(make, items, depth)
  monkeypatch.setattr(checkpoint.Checkpoints, 'save', watched)
  monkeypatch.setattr(loader, 'prefetch', ahead)
  settings = {'save__every_tokens': 512.0, 'save__keep': 3, 'train_tokens': 2048.0}
  train.main(config(tmp_path, corpus, profile='3-4', data__prefetch=1, **settings))
  assert depths == [1]
  assert list((tmp_path / 'profile').rglob('*.xplane.pb'))
  assert saved == [16, 32, 48, 64]
  kept = sorted(int(p.name) for p in (tmp_path / 'checkpoints').iterdir())
  assert kept == [32, 48, 64]


def test_steps_are_counted_on_through_a_change_of_the_ramp(corpus, tmp_path):
  """Another ramp has taken other steps to the same place, but a run has taken those it took."""
  train.main(config(tmp_path, corpus, train_tokens=1024.0))
  longer = {'train_tokens': 2048.0, 'batch__ramp_tokens': 0.0, 'resume__accept_changes': True}
  train.main(config(tmp_path, corpus, **longer))
  assert [(r['step'], r['batch']) for r in records(tmp_path)] == [
    (1, 8),
    (2, 8),
    (3, 8),
    (4, 8),
    (5, 24),
    (6, 8),
  ]
  # Once more from there: nothing is left, and the number of steps is that of the checkpoint.
  assert state_of(tmp_path)[1]['step'] == 6


def test_metrics_whose_checkpoints_are_gone_are_not_erased(straight, corpus, tmp_path):
  shutil.copytree(straight[0], tmp_path / 'run')
  shutil.rmtree(tmp_path / 'run' / 'checkpoints')
  before = (tmp_path / 'run' / 'metrics.jsonl').read_bytes()
  with pytest.raises(Mistake, match='without checkpoints, and metrics up to sequence 384'):
    train.main(config(tmp_path / 'run', corpus))
  assert (tmp_path / 'run' / 'metrics.jsonl').read_bytes() == before


def test_metrics_that_were_cut_are_told(straight, corpus, tmp_path, capsys):
  shutil.copytree(straight[0], tmp_path / 'run')
  path = tmp_path / 'run' / 'metrics.jsonl'
  path.write_bytes(b''.join(path.read_bytes().splitlines(True)[:5]))
  train.main(config(tmp_path / 'run', corpus))
  assert 'metrics  none from sequence 24 to 384: metrics.jsonl was cut' in capsys.readouterr().out
  path.unlink()
  path.mkdir()
  with pytest.raises(Mistake, match='metrics.jsonl: got IsADirectoryError'):
    train.main(config(tmp_path / 'run', corpus))


@pytest.mark.parametrize('record', ['{}', '[]', '{"settings": 1}', '{"step": "x"}'])
def test_a_record_of_another_shape_is_a_damaged_checkpoint(straight, corpus, tmp_path, record):
  shutil.copytree(straight[0], tmp_path / 'run')
  path = tmp_path / 'run' / 'checkpoints' / '384' / 'record' / 'metadata'
  if record.startswith('{"'):
    record = json.dumps(json.loads(path.read_text()) | json.loads(record))
  path.write_text(record)
  (tmp_path / 'run' / 'checkpoints' / '384' / 'sums.0-of-1.json').unlink()
  integrity.write_list(epath.Path(tmp_path / 'run' / 'checkpoints' / '384'))  # as if it were so
  with pytest.raises(Mistake, match='384: got .*wanted a whole checkpoint'):
    train.main(config(tmp_path / 'run', corpus))


# No file may grow beyond some size, which is told as a full disk is.
LIMITED = """
import resource, runpy, sys
from gptjax import checkpoint
init, most = checkpoint.Checkpoints.__init__, int(sys.argv.pop(1))
def limited(*args):
  init(*args)
  resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
checkpoint.Checkpoints.__init__ = limited
runpy.run_module('gptjax.train', run_name='__main__')
"""


@pytest.mark.parametrize(
  'most', [pytest.param(500, marks=pytest.mark.slow), 20_000], ids=['config', 'checkpoint']
)
def test_a_full_disk_ends_a_run_plainly(corpus, tmp_path, run_python, most):
  command = ['-c', LIMITED, str(most), *args(tmp_path, corpus)[2:]]
  done = run_python(command, timeout=100, code=2)
  # Orbax's threads log what failed as well, before and after.
  (told,) = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
  assert 'room' in told and 'never retrieved' not in done.stderr


@pytest.mark.parametrize(
  'platform, got', [('abacus', 'RuntimeError'), ('cuda', r'(AssertionError|RuntimeError)')]
)
def test_a_platform_that_is_not_there_is_told(run_python, platform, got):
  if platform == 'cuda' and not machines.lacking('h100'):
    pytest.skip('a plugin for it is here')
  command = ['-m', 'gptjax.train', '--config=configs/tiny.py']
  done = run_python(command, timeout=120, code=2, env={'JAX_PLATFORMS': platform})
  assert re.search(f'error: devices: got {got}', done.stderr) and 'Traceback' not in done.stderr


def test_a_damaged_checkpoint_loses_nothing(straight, corpus, tmp_path, capsys):
  """It is told, and training goes on from the one before and comes to the same end."""
  workdir = tmp_path / 'run'
  shutil.copytree(straight[0], workdir)
  shutil.rmtree(workdir / 'checkpoints' / '384' / 'record')
  train.main(config(workdir, corpus, mesh__data=8))
  told = capsys.readouterr().out
  assert 'DAMAGED  checkpoint 384: record/' in told and 'it is now damaged/384.0' in told
  assert (workdir / 'damaged' / '384.0' / 'state').exists()
  clock = lambda records: [(r['step'], r['sequences'], r['lr']) for r in records]
  assert clock(records(workdir)) == clock(records(straight[0]))
  last, wanted = records(workdir)[-1]['loss'], records(straight[0])[-1]['loss']
  assert last == pytest.approx(wanted, rel=1e-3)


@pytest.mark.slow
def test_a_mixture_goes_on_through_a_change_of_its_weights(corpus, tmp_path, monkeypatch):
  """Each sequence fed is that of the mixture; validation is of each source and of their mean."""
  other = make_corpus(tmp_path / 'other', [argparse, dataclasses])
  other = shutil.move(other, tmp_path / 'more')
  fed, place = [], loader.place

  def watched(windows, start, count, *args):
    if isinstance(windows, loader.Stream):
      fed.extend((i, windows[i].tobytes()) for i in range(start, start + count))
    return place(windows, start, count, *args)

  monkeypatch.setattr(loader, 'place', watched)
  name = mixture.name_of(corpus)
  start = lambda sources, **settings: train.main(config(tmp_path / 'run', sources, **settings))
  start(f'{corpus}=3,{other}=1', train_tokens=1024.0)
  told = f'corpus.sources: got more 1/2 .*, {name} 1/2 .*, wanted more 1/4 .*, {name} 3/4'
  with pytest.raises(Mistake, match=told):
    start(f'{corpus}=1,{other}=1', train_tokens=1024.0)
  start(f'{corpus}=1,{other}=1', train_tokens=2048.0, resume__accept_changes=True)

  a, b = (dataset.describe(folder).digest for folder in (corpus, other))
  stages = [{'start': 0, 'weights': {a: 3, b: 1}}, {'start': 32, 'weights': {a: 1, b: 1}}]
  assert state_of(tmp_path / 'run')[1]['stages'] == stages
  mixed = Mixture([Stage(**stage) for stage in stages])
  sources = {d: dataset.open_split(f, 'train') for d, f in ((a, corpus), (b, other))}
  wanted = loader.Stream(sources, mixed, seed=0)
  assert fed == [(i, wanted[i].tobytes()) for i in range(64)]
  assert mixed.counts(64) == {a: 40, b: 24}

  # A new mixture has a baseline of its own, once however often it starts.
  start(f'{corpus}=1,{other}=1', train_tokens=2080.0, resume__accept_changes=True)
  baselines = records(tmp_path / 'run', 'baseline')
  assert [r['sequences'] for r in baselines] == [0, 32]
  assert baselines[0]['loss'] != baselines[1]['loss']

  held_out = records(tmp_path / 'run', 'validation')
  for record, share in ((held_out[0], 0.75), (held_out[-1], 0.5)):
    mean = share * record[f'loss/{name}'] + (1 - share) * record['loss/more']
    assert record['loss'] == pytest.approx(mean)


def test_damaged_text_ends_a_run_plainly(corpus, tmp_path):
  folder = tmp_path / 'data'
  shutil.copytree(corpus, folder)
  for shard in folder.glob('corpus-train*'):
    data = bytearray(shard.read_bytes())
    data[100::50] = bytes(len(data[100::50]))
    shard.write_bytes(data)
  with pytest.raises(Mistake, match='record [0-9]+: got .*wanted a readable one'):
    train.main(config(tmp_path / 'run', str(folder)))


@pytest.mark.parametrize(
  'settings, told',
  [
    ({'data__sources': 'nowhere'}, 'nowhere'),
    ({'model__context': 64}, 'context of the windows .*got 32, wanted 64'),
    ({'model__vocab_size': 300}, 'vocabulary .*got 257, wanted 300'),
    ({'mesh__fsdp': 3}, 'mesh axis fsdp'),
    ({'log__wandb': 'project'}, 'wandb is asked for and not installed'),
  ],
)
def test_mistakes_are_told_and_nothing_is_made(corpus, tmp_path, settings, told):
  with pytest.raises(Mistake, match=told):
    train.main(config(tmp_path / 'run', corpus, **settings))
  assert not (tmp_path / 'run').exists()


def test_workdir_that_is_a_file_is_told_and_kept(corpus, tmp_path):
  (tmp_path / 'notes').write_text('mine')
  for workdir in (tmp_path / 'notes', tmp_path / 'notes' / 'run'):
    with pytest.raises(
      Mistake, match='workdir .*notes.*: got .*wanted a folder to read and write in'
    ):
      train.main(config(workdir, corpus))
  assert (tmp_path / 'notes').read_text() == 'mine'


def test_commit_is_that_of_the_checkout(monkeypatch):
  here = pathlib.Path(train.__file__).parents[1]
  assert (len(train.git_commit()) >= 40) == (here / '.git').exists()
  monkeypatch.setenv('PATH', '')  # a machine without git
  assert train.git_commit() == ''


def test_unknown_key_names_the_nearest(run_python):
  done = run_python(
    ['-m', 'gptjax.train', '--config=configs/tiny.py', '--config.mesh.fdsp=2'], timeout=120, code=2
  )
  assert 'mesh.fsdp' in done.stderr and 'Traceback' not in done.stderr


def test_config_of_another_program_is_told(monkeypatch, capsys):
  monkeypatch.setattr('sys.argv', ['train', '--config=configs/corpus.py'])
  with pytest.raises(SystemExit, match='2'):
    flags.run(train.main, train.__doc__)
  assert 'wanted a training config' in capsys.readouterr().err


# A start, the baseline, and then the first step compiles; a save is a record too.
@pytest.mark.parametrize(
  'count',
  [2, pytest.param(3, marks=pytest.mark.slow), 12],
  ids=['compiling', 'before a save', 'after a save'],
)
def test_interrupt_ends_without_a_traceback(corpus, tmp_path, start_python, count):
  process = start_python(args(tmp_path, corpus, train_tokens=1e6))  # longer than the test waits
  wait_for_records(tmp_path, process, count)
  process.send_signal(signal.SIGINT)
  _, told = process.communicate(timeout=120)
  assert process.returncode == 130, told
  assert 'interrupted' in told and 'Traceback' not in told
  last = checkpoint.Checkpoints(tmp_path / 'checkpoints', keep=9).latest() or 0
  where = f'last checkpoint, sequence {last:,}' if last else 'start: none was saved yet'
  assert f'stopped; the same command goes on from the {where}' in told
  assert bool(last) == (count == 12)


def test_another_seed_or_model_never_resumes(straight, corpus):
  workdir, _ = straight
  with pytest.raises(Mistake, match='2 mistakes'):
    train.main(config(workdir, corpus, seed=1, model__window=9, resume__accept_changes=True))


@pytest.mark.slow
def test_a_run_begins_with_the_weights_of_another(straight, corpus, tmp_path, capsys):
  """Of a run, and of what was exported of it, whose biases were folded into others."""
  new = records(straight[0])[0]['loss']
  export.main([f'--workdir={straight[0]}', f'--out={tmp_path / "out"}'])
  begun = {}
  for origin, biases in ((straight[0], True), (tmp_path / 'out', False)):
    workdir = tmp_path / f'from-{origin.name}'
    settings = {'init_from': str(origin), 'model__qkv_bias': biases, 'train_tokens': 2048.0}
    train.main(config(workdir, corpus, **settings))
    assert f'start    the weights of {origin}' in capsys.readouterr().out
    first = records(workdir)[0]
    assert first['loss'] < new - 1
    begun[biases] = first['loss']
    # What it went on from may be gone, but is no other.
    train.main(config(workdir, corpus, **settings | {'train_tokens': 2048.0}))
    assert 'nothing is left to train' in capsys.readouterr().out
    with pytest.raises(Mistake, match='init_from: got none'):
      train.main(config(workdir, corpus, **settings | {'init_from': ''}))
  assert begun[True] == pytest.approx(begun[False], rel=1e-4)


def test_weights_of_another_model_are_refused(straight, corpus, tmp_path):
  settings = {'init_from': str(straight[0]), 'model__n_layers': 4, 'model__window': 9}
  with pytest.raises(Mistake, match='2 mistakes') as caught:
    train.main(config(tmp_path / 'run', corpus, **settings))
  assert 'n_layers of ' in str(caught.value) and 'windows of ' in str(caught.value)


# The first losses of configs/tiny.py on rows drawn by NumPy's generator. Whoever changes them
# changed what is trained: say why in the commit, and print the new ones with this test.
GOLDEN = [
  8.250872,
  7.726544,
  7.450072,
  7.323008,
  7.210920,
]


def test_golden_losses_of_tiny():
  program = resolve(tiny.get_config(), jax.devices()[:1]).program
  random = np.random.default_rng(0)
  losses = []
  with small.on():
    state = jax.jit(lambda: program.init(jax.random.key(0)))()
    step = jax.jit(program.train_step, donate_argnums=0)
    for i in range(len(GOLDEN)):
      token_gbl = (random.zipf(1.3, (2, 4, 257)) % 4096).astype('uint16')
      state, measured = step(state, token_gbl, 8 * i, 8, 1e-3)
      losses.append(float(measured['loss']))
  assert losses == pytest.approx(GOLDEN, rel=1e-4), ' '.join(map(repr, losses))


@pytest.mark.slow
def test_tiny_learns_more_of_the_standard_library_than_its_unigrams(
  tmp_path, standard_library, run_python
):
  workdir = tmp_path / 'run'
  knobs = [
    f'--config.data.sources={standard_library}',
    f'--config.workdir={workdir}',
    '--config.train_tokens=4e5',
  ]
  # It computes for minutes: as users have it compiled, and not as quickly as can be.
  program = ['-m', 'gptjax.train', '--config=configs/tiny.py', *knobs]
  run_python(program, timeout=600, env={'XLA_FLAGS': ''})
  (baseline,) = records(workdir, 'baseline')
  assert records(workdir, 'validation')[-1]['loss'] < baseline['loss'] - 0.5
