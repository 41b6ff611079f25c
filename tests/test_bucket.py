"""A workdir in a bucket is one on a disk: a real client, a real store over loopback."""

import contextlib
import json
import os
import signal
import socket
import time

import fsspec
import jax
import numpy as np
import pytest
from etils import epath

from benchmarks import chaos
from gptjax import files, generate, integrity, journal, lease, metrics, report
from gptjax.checkpoint import Checkpoints
from gptjax.config import resolve
from gptjax.errors import Mistake
from gptjax.lease import Lease
from tests.runs import args, config, records
from tests.test_journal import train


@pytest.fixture(scope='module')
def store(start_python, free_port):
  """The environment of those who find the bucket `runs` there."""
  port = free_port()
  process = start_python(['-m', 'tests.gcs', str(port)])
  url = f'http://127.0.0.1:{port}'
  while process.poll() is None:
    with contextlib.suppress(OSError), socket.create_connection(('127.0.0.1', port)):
      break
    time.sleep(0.05)
  yield {
    'STORAGE_EMULATOR_HOST': url,  # gcsfs
    'TENSORSTORE_GCS_HTTP_URL': url,  # Orbax
    'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'anyone',
    'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',
  }
  process.kill()
  process.communicate()


@pytest.fixture(scope='module')
def runs(store):
  """The bucket, as this process sees it."""
  with pytest.MonkeyPatch.context() as patch:
    for name, value in store.items():
      patch.setenv(name, value)
    import gcsfs  # which reads some of it now

    forget = (
      epath.backend.fsspec_backend._get_filesystem.cache_clear,
      gcsfs.GCSFileSystem.clear_instance_cache,
    )
    for each in forget:
      each()
    yield epath.Path('gs://runs')
    for each in forget:
      each()


@pytest.fixture
def bucket(runs, request):
  """A folder of it for one test."""
  return files.folder(runs / request.node.name)


def tree(folder):
  """The names of all files in a folder and in those in it."""
  start = str(folder).removeprefix('gs://')
  return {path.removeprefix(f'{start}/') for path in fsspec.filesystem('gs').find(start)}


@pytest.mark.slow
def test_a_run_in_a_bucket_is_the_run_on_a_disk(
  bucket, straight, corpus, start_python, run_python, tmp_path, monkeypatch, capsys
):
  command = args(bucket, corpus, log__tensorboard=True, profile='3-3')
  for _ in range(3):  # it is killed while it saves
    process, before = start_python(command), {*files.names(bucket / 'checkpoints')}
    while process.poll() is None and {*files.names(bucket / 'checkpoints')} <= before:
      time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
  printed = run_python(command, timeout=200).stdout
  assert printed.splitlines()[-2:] == straight[1].splitlines()[-2:]
  same_run(bucket, straight, corpus)
  # All of it is there, and no lease is left.
  there = files.names(bucket)
  assert {'checkpoints', 'config.json', 'metrics', 'record.json', 'tensorboard'} <= {*there}
  assert not [name for name in there if name.startswith('lease')]
  assert [path for path in bucket.glob('profile/plugins/profile/*/*') if 'xplane' in path.name]
  # Its tools take it as they take a folder.
  monkeypatch.chdir(tmp_path)
  report.main([str(bucket)])
  generate.main([f'--workdir={bucket}', '--prompt=def ', '--tokens=5'])
  told = capsys.readouterr().out
  assert 'drawn in report.png' in told and 'def ' in told
  assert [path.name for path in tmp_path.iterdir()] == ['report.png']
  # What is damaged goes aside.
  last = bucket / 'checkpoints' / '384'
  (broken,) = last.glob('state/d/*')
  data = broken.read_bytes()
  broken.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
  told = run_python(args(bucket, corpus), timeout=200).stdout
  assert 'is not what was written; it is now damaged/384.0' in told
  assert 'state' in files.names(bucket / 'damaged' / '384.0') and last.exists()
  assert 'is not what was written' in (bucket / 'damaged' / '384.0.txt').read_text()
  same_run(bucket, straight, corpus)


def test_what_was_not_finished_there_goes_aside_and_is_not_deleted(bucket, capsys):
  folder = bucket / 'checkpoints'
  (folder / '64' / 'state' / 'd' / 'part').write_bytes(b'part')
  state = {'x': np.arange(4)}
  with Checkpoints(folder, keep=2) as checkpoints:
    checkpoints.save(32, state, {})  # whatever Orbax does to what is there it does before
    checkpoints.wait()
    assert tree(folder / '64') == {'state/d/part'}
    assert checkpoints.newest_whole() == 32
  assert 'aside    checkpoint 64: ' in capsys.readouterr().out
  assert files.names(folder) == ['32']
  assert tree(bucket / 'damaged') == {'64.unfinished/state/d/part', '64.unfinished.txt'}


def test_what_a_console_calls_a_folder_is_no_damage(bucket):
  folder, state = bucket / 'checkpoints', {'x': np.arange(4)}
  with Checkpoints(folder, keep=2) as checkpoints:
    checkpoints.save(8, state, {})
    assert checkpoints.wait() == 8
    for name in ('8', '8/state'):
      fsspec.filesystem('gs').pipe_file(f'{folder}/{name}/', b'')
    assert checkpoints.newest_whole() == 8


def test_a_save_that_failed_is_tried_again_when_the_bucket_is_back(bucket, monkeypatch):
  folder, state = bucket / 'checkpoints', {'x': np.arange(4)}
  write_list, names, away = integrity.write_list, files.names, []

  def if_there(function):
    def called(*args):
      if away:
        raise gcsfs.retry.HttpError({'code': 503, 'message': 'away'})
      return function(*args)

    return called

  import gcsfs.retry

  with Checkpoints(folder, keep=2) as checkpoints:
    checkpoints.save(8, state, {})
    checkpoints.wait()
    monkeypatch.setattr(integrity, 'write_list', if_there(write_list))
    monkeypatch.setattr(files, 'names', if_there(names))
    monkeypatch.setattr(checkpoints._manager, 'reload', if_there(checkpoints._manager.reload))
    away.append(True)
    checkpoints.save(16, state, {})
    for _ in range(2):  # the second is not even begun
      with pytest.raises(Mistake, match='got HttpError: away'):
        checkpoints.save(16, state, {})
    away.clear()
    checkpoints.save(16, state, {})
    assert checkpoints.wait() == checkpoints.newest_whole() == 16
    away.append(True)  # which does not matter to one that is done
  assert gcsfs.retry.HttpError in files.failures()


def same_run(bucket, straight, corpus):
  run = resolve(config(straight[0], corpus), jax.devices()[:1])
  for kind in ('train', 'validation'):
    assert records(bucket, kind) == records(straight[0], kind)
  ends = [chaos.end_of(folder, run) for folder in (epath.Path(straight[0]), bucket)]
  assert ends[0][0] == ends[1][0]
  jax.tree.map(np.testing.assert_array_equal, ends[0][1], ends[1][1])


@pytest.mark.slow
def test_processes_share_it_and_one_goes_on(bucket, straight, corpus, together, run_python):
  half = {'train_tokens': 1024.0, 'mesh__fsdp': 2}
  out, err = together(2, 1, args(bucket, corpus, **half)).communicate(timeout=300)
  assert 'mesh' in out, err
  run_python(args(bucket, corpus, resume__accept_changes=True), timeout=200)
  for got, want in zip(records(bucket), records(straight[0]), strict=True):
    assert (got['step'], got['sequences']) == (want['step'], want['sequences'])
    assert got['loss'] == pytest.approx(want['loss'], rel=1e-3)


def test_one_run_at_a_time(bucket, monkeypatch):
  monkeypatch.setattr(lease, 'RENEWED', 0.1)
  monkeypatch.setattr(lease, 'EXPIRES', 1.0)
  other = {'where': ['other', 'boot', 'pid:[1]'], 'pid': 7, 'began': '1', 'holds': True}
  (bucket / 'lease.1234.json').write_text(json.dumps(other))
  since = time.monotonic()
  with Lease(bucket):
    assert time.monotonic() - since >= 1.0
    with pytest.raises(Mistake, match=f'in which process {os.getpid()} on .* trains'):
      Lease(bucket).__enter__()
  assert not files.names(bucket)


def test_records_are_parts_and_each_step_is_there_once(bucket, monkeypatch):
  monkeypatch.setattr(journal, 'PART_BYTES', 1000)
  opened = journal.Journal(bucket, 0)
  for i in range(1, 31):
    opened.append(train(2 * i))
  opened.sync()
  assert len(files.names(bucket / journal.PARTS)) > 3
  assert journal.read(bucket) == [train(2 * i) for i in range(1, 31)]
  # It is killed here, and goes on from an earlier checkpoint.
  again = journal.Journal(bucket, 20)
  assert again.dropped == [train(2 * i) for i in range(11, 31)]
  again.append(train(22))
  again.close()
  assert journal.read(bucket) == [train(2 * i) for i in range(1, 12)]
  assert all(name.startswith('000001-') for name in files.names(bucket / journal.PARTS))
  # Another is killed when it has written all anew, before it deletes what was there.
  files.write_whole(bucket / journal.PARTS / journal.PART.format(2, 0), json.dumps(train(2)))
  assert journal.read(bucket) == [train(2)]
  (bucket / journal.PARTS / journal.PART.format(2, 0)).unlink()
  (bucket / journal.PARTS / journal.PART.format(1, 0)).unlink()
  with pytest.raises(Mistake, match='some that are missing, wanted the parts before 000001-000001'):
    journal.read(bucket)


def test_a_part_that_could_not_be_written_is_written_before_the_next(bucket, monkeypatch):
  """None is there without those before it, whenever the run is killed."""
  opened = journal.Journal(bucket, 0)
  monkeypatch.setattr(journal, 'PART_SECONDS', 0.0)
  monkeypatch.setattr(journal, 'PART_BYTES', 1)
  write_whole, away = files.write_whole, [True]

  def broken(path, data):
    if away[0]:
      raise OSError('away')
    write_whole(path, data)

  monkeypatch.setattr(files, 'write_whole', broken)
  opened.append(train(2))
  opened.append(train(4))
  with pytest.raises(OSError, match='away'):
    opened.sync()
  assert len(files.names(bucket / journal.PARTS)) == 1
  away.clear()
  away.append(False)
  opened.append(train(6))
  opened.close()
  assert journal.read(bucket) == [train(2), train(4), train(6)]


def test_tensorboard_has_short_files_there(bucket, monkeypatch):
  monkeypatch.setattr(metrics, 'EVENTS_PER_FILE', 6)
  monkeypatch.setattr(metrics, 'SEND_SECONDS', 0.0)
  copy, times = files.copy, []

  def away_at_first(*where):
    times.append(1)
    if len(times) < 3:
      raise OSError('away')
    copy(*where)

  monkeypatch.setattr(files, 'copy', away_at_first)
  with metrics.MetricsWriter(bucket, resume_at=0, tensorboard=True) as writer:
    for i in range(1, 9):
      writer.write(train(2 * i))
      while writer._tensorboard._sending and not writer._tensorboard._sending.done():
        time.sleep(0.01)
    folder = writer._tensorboard._folder
    assert len(os.listdir(folder)) == 1  # what was sent and is full is not kept
  assert not os.path.exists(folder)
  there = files.names(bucket / 'tensorboard')
  assert len(there) >= 3
  every = b''.join((bucket / 'tensorboard' / name).read_bytes() for name in there)
  assert every.count(b'train/loss') == 8


@pytest.mark.parametrize(
  'path, told',
  [
    (
      'gs://none-of-this-name/run',
      'this-name/run: got FileNotFoundError: .*, wanted a bucket that',
    ),
    ('gs://runs', 'got gs://runs, wanted one of this machine, or gs://bucket/folder'),
    ('s3://runs/a', 'got s3://runs/a, wanted one of this machine, or gs://bucket/folder'),
  ],
)
def test_what_is_no_place_in_a_bucket_is_told(bucket, path, told):
  with pytest.raises(Mistake, match=told):
    files.folder(path)
