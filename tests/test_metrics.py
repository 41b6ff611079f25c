"""Records where they are asked for; numbers that are right or absent; a bar that is true."""

import io
import math
import struct
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboardX.proto.event_pb2 import Event

from gptjax import journal, metrics
from gptjax.errors import Mistake
from tests.test_journal import CONTEXT, train, validation


def write(workdir, records, resume_at=0, tensorboard=False):
  with metrics.MetricsWriter(workdir, resume_at=resume_at, tensorboard=tensorboard) as writer:
    for record in records:
      writer.write(record)


# Records.


def test_arrays_of_one_number_are_numbers_and_none_is_left_out(tmp_path):
  write(tmp_path, [train(2, a=jnp.float32(0.5), b=np.int64(7), c=np.float32('nan'), mfu=None)])
  record = journal.read(tmp_path)[0]
  assert (record['a'], record['b'], str(record['c'])) == (0.5, 7, 'nan')
  assert 'mfu' not in record


def test_a_writer_that_is_not_enabled_touches_nothing(tmp_path):
  with metrics.MetricsWriter(
    tmp_path / 'run', resume_at=0, tensorboard=True, wandb_project='x', enabled=False
  ) as writer:
    writer.write(train(2))
  assert list(tmp_path.iterdir()) == []


# TensorBoard and W&B.


def events(workdir):
  """TensorBoard's events in the order it reads them; a record is length, CRC, data, CRC."""
  found = []
  for path in sorted((workdir / 'tensorboard').iterdir()):
    data = path.read_bytes()
    while data:
      (size,) = struct.unpack('<Q', data[:8])
      found.append(Event.FromString(data[12 : 12 + size]))
      data = data[16 + size :]
  return found


def shown(workdir):
  """Tag → {tokens: value} as TensorBoard shows it: a START forgets what is at or after its step."""
  tags = {}
  for event in events(workdir):
    if event.HasField('session_log'):
      tags = {
        tag: {x: y for x, y in points.items() if x < event.step} for tag, points in tags.items()
      }
    for value in event.summary.value:
      points = tags.setdefault(value.tag, {})
      assert event.step not in points, f'{value.tag} twice at {event.step}'
      points[event.step] = value.simple_value
  return tags


def test_tensorboard_shows_every_number_against_tokens(tmp_path):
  write(tmp_path, [train(2, lr=0.5), validation(2), train(4, lr=0.25)], tensorboard=True)
  tags = shown(tmp_path)
  assert tags['train/lr'] == {2 * CONTEXT: 0.5, 4 * CONTEXT: 0.25}
  assert list(tags['validation/loss']) == [2 * CONTEXT]
  assert 'train/kind' not in tags and 'train/tokens' not in tags


@pytest.mark.parametrize('steps', [0, 1])
def test_tensorboard_is_imported_after_a_first_step_and_loses_nothing(tmp_path, run_python, steps):
  start = train(0) | {'kind': 'start', 'setup_seconds': 1.5}
  code = f"""
import pathlib, sys
from gptjax import metrics
with metrics.MetricsWriter(
  pathlib.Path({str(tmp_path)!r}), resume_at=0, tensorboard=True
) as writer:
  writer.write({start!r})
  assert 'tensorboardX' not in sys.modules
  for _ in range({steps}):
    writer.write({train(2)!r})
    assert 'tensorboardX' in sys.modules
"""
  run_python(code, timeout=60)
  tags = shown(tmp_path)
  assert tags['start/setup_seconds'] == {0: 1.5}
  assert list(tags.get('train/loss', {})) == [2 * CONTEXT] * steps


def test_tensorboard_takes_more_tokens_than_an_int32(tmp_path):
  write(tmp_path, [train(2, tokens=300 * 10**9)], tensorboard=True)
  assert list(shown(tmp_path)['train/loss']) == [300 * 10**9]


@pytest.mark.parametrize('resume_at', [0, 4, 8])
def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path, resume_at):
  write(tmp_path, [train(i) for i in (2, 4, 6, 8)], tensorboard=True)
  write(tmp_path, [train(i) for i in range(resume_at + 2, 13, 2)], resume_at, tensorboard=True)
  assert list(shown(tmp_path)['train/loss']) == [i * CONTEXT for i in (2, 4, 6, 8, 10, 12)]


def test_without_tensorboard_there_is_no_folder_of_it(tmp_path):
  write(tmp_path, [train(2)])
  assert not (tmp_path / 'tensorboard').exists()


def test_neither_tensorflow_nor_pytorch_is_imported(run_python, tmp_path):
  code = f"""
import pathlib, sys, gptjax.train
from gptjax import metrics
with metrics.MetricsWriter(pathlib.Path({str(tmp_path)!r}), resume_at=0, tensorboard=True) as w:
  w.write({train(2)!r})
print({{'tensorflow', 'torch'}} & {{*sys.modules}})
import torch
print(torch.tensor(1).item())
"""
  assert run_python(code, timeout=120).stdout == 'set()\n1\n'
  assert [*(tmp_path / 'tensorboard').iterdir()]


def test_wandb_that_is_missing_is_a_mistake_before_anything_is_written(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'wandb', None)
  with pytest.raises(Mistake, match=r'pip install -e'):
    metrics.MetricsWriter(tmp_path / 'run', resume_at=0, tensorboard=True, wandb_project='mine')
  assert list(tmp_path.iterdir()) == []


def test_wandb_gets_the_numbers_and_the_tokens_to_draw_them_against(tmp_path, monkeypatch):
  logged, settings, ended = [], {}, []
  run = types.SimpleNamespace(
    define_metric=lambda name, step_metric: settings.update({name: step_metric}),
    log=logged.append,
    finish=lambda: ended.append(True),
  )
  init = lambda project, name, dir: settings.update(project=project, name=name, dir=dir) or run
  monkeypatch.setitem(sys.modules, 'wandb', types.SimpleNamespace(init=init))
  with metrics.MetricsWriter(
    tmp_path / 'run', resume_at=0, tensorboard=False, wandb_project='mine'
  ) as writer:
    writer.write(train(2))
  assert settings == {'*': 'tokens', 'project': 'mine', 'name': 'run', 'dir': str(tmp_path / 'run')}
  wanted = {'train/step': 1, 'train/sequences': 2, 'train/loss': 4.98, 'tokens': 2 * CONTEXT}
  assert logged == [wanted]
  assert ended == [True]


# Peak, MFU, memory, throughput.


@pytest.mark.parametrize('kind', ['cpu', 'TPU v99', 'NVIDIA', 'NVIDIA H100', 'TPU', 'Tesla V100'])
def test_an_unknown_device_has_no_peak_and_no_mfu(kind):
  assert metrics.peak_flops(kind) is None
  assert metrics.mfu(1e9, 1e3, kind, 8) is None


def test_names_of_one_chip_have_one_peak_and_names_that_look_alike_may_not():
  peak = metrics.peak_flops
  assert peak('TPU v5 lite') == peak('TPU v5e') == 197e12
  assert peak('TPU v5') == peak('TPU v5p') == 459e12
  assert peak('TPU v6 lite') == peak('TPU v6e') == 918e12
  assert peak('NVIDIA H100 PCIe') < peak('NVIDIA H100 NVL') < peak('NVIDIA H100 80GB HBM3')


@given(flops=st.floats(1, 1e15), devices=st.integers(1, 10**5))
def test_mfu_is_1_at_the_peak_of_all_devices(flops, devices):
  rate = 459e12 * devices / flops
  assert metrics.mfu(flops, rate, 'TPU v5', devices) == pytest.approx(1)
  assert metrics.mfu(flops, rate / 2, 'TPU v5', devices) == pytest.approx(0.5)


def test_memory_is_the_largest_peak_of_the_devices_that_report_one(monkeypatch):
  stats = [{'peak_bytes_in_use': 5}, None, {'peak_bytes_in_use': 9, 'bytes_in_use': 11}, {}]
  devices = [types.SimpleNamespace(memory_stats=lambda s=s: s) for s in stats]
  monkeypatch.setattr(jax, 'local_devices', lambda: devices)
  assert metrics.peak_memory_bytes() == 9


def test_the_cpu_reports_no_memory():
  assert metrics.peak_memory_bytes() is None


def test_throughput_leaves_out_the_first_step_and_old_ones():
  throughput = metrics.Throughput(steps=2)
  assert throughput.add(100, 1000.0) is None  # it compiles
  assert throughput.add(100, 1.0) == 100
  assert throughput.add(200, 1.0) == 150
  assert throughput.add(200, 1.0) == 200


# The bar.


class Terminal(io.StringIO):
  def isatty(self):
    return True


class Clock:
  """A clock that stands still unless told."""

  def __init__(self):
    self.now = 1000.0

  def __call__(self):
    return self.now


def step(sequences, batch=10, seconds=1.0, **more):
  return {'sequences': sequences, 'batch': batch, 'seconds': seconds, 'loss': 3.25, **more}


def test_off_a_terminal_there_is_a_line_at_first_then_one_per_interval_then_the_last():
  file, clock = io.StringIO(), Clock()
  with metrics.ProgressBar(100, 0, CONTEXT, seconds=30, file=file, clock=clock) as bar:
    for i in range(1, 11):  # a step each 10 seconds
      bar.update(step(10 * i))
      clock.now += 10
  bar.close()
  lines = file.getvalue().splitlines()
  assert [line.split(',')[0] for line in lines] == ['10.0%', '40.0%', '70.0%', '100.0%']
  assert '\r' not in file.getvalue()


def test_what_a_line_says():
  file = io.StringIO()
  with metrics.ProgressBar(2000, 1000, CONTEXT, seconds=0, file=file) as bar:
    bar.update(step(1010, seconds=500.0))
    bar.update(step(1020, batch=10, seconds=2.0, mfu=0.412))
  first, second = file.getvalue().splitlines()
  assert first == '50.5%, 1,010 of 2,000 sequences, loss 3.2500'  # no rate: it compiled
  # 10 · 16 tokens in 2 s are 80 tokens/s, and 980 sequences take 196 s at that.
  wanted = '51.0%, 1,020 of 2,000 sequences, loss 3.2500, 80 tokens/s, MFU 41.2%, 03:16 left'
  assert second == wanted


@given(batches=st.lists(st.integers(1, 64), min_size=2, max_size=30))
def test_a_ramp_does_not_change_the_rate_nor_the_time_left(batches):
  file, total, position = io.StringIO(), 10_000, 0
  with metrics.ProgressBar(total, 0, CONTEXT, seconds=0, file=file) as bar:
    for batch in batches:  # each sequence takes half a second, whatever the batch
      position += batch
      bar.update(step(position, batch=batch, seconds=batch / 2))
  left = metrics.tqdm.tqdm.format_interval((total - position) / 2)
  assert file.getvalue().splitlines()[-1].endswith(f'{2 * CONTEXT} tokens/s, {left} left')


def test_on_a_terminal_it_is_a_bar_that_starts_where_the_run_does():
  file = Terminal()
  with metrics.ProgressBar(100, 40, CONTEXT, file=file) as bar:
    bar.update(step(50))
    bar.say('saved')
    bar.update(step(100, mfu=0.5))
  frames = file.getvalue().split('\r')
  assert ' 40%' in frames[1]
  assert any(frame.strip() == 'saved' for frame in file.getvalue().splitlines())
  assert '100%' in frames[-1] and '100/100 sequences' in frames[-1] and 'MFU 50.0%' in frames[-1]


@pytest.mark.parametrize('file', [io.StringIO(), Terminal()])
def test_a_bar_that_is_not_enabled_says_nothing(file):
  with metrics.ProgressBar(100, 0, CONTEXT, enabled=False, seconds=0, file=file) as bar:
    bar.update(step(10))
    bar.say('saved')
  assert file.getvalue() == ''


def test_a_loss_that_is_no_number_is_shown_as_it_is():
  file = io.StringIO()
  with metrics.ProgressBar(100, 0, CONTEXT, file=file) as bar:
    bar.update(step(10) | {'loss': math.nan})
  assert 'loss nan' in file.getvalue()
