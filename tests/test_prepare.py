"""The entry as a user runs it: real processes, small corpora, every mistake with its message."""

import argparse
import contextlib
import dataclasses
import gzip
import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from gptjax import flags, prepare
from gptjax.data import dataset, engines
from gptjax.errors import Mistake
from tests.test_sources import json_lines
from tests.texts import RECIPE

ROOT = pathlib.Path(prepare.__file__).parents[1]
# Small and quick unless a test says otherwise.
KNOBS = {
  'tokenizer': 'bytes',
  'context': 32,
  'shards': 2,
  'workers': 1,
  'validation_fraction': 0.2,
}


def command(**knobs):
  words = [f'--config.{k}={v}' for k, v in (KNOBS | knobs).items()]
  return [sys.executable, '-m', 'gptjax.prepare', f'--config={ROOT}/configs/corpus.py', *words]


ENV = os.environ | {'PYTHONPATH': str(ROOT)}


def run(**knobs):
  return subprocess.run(command(**knobs), capture_output=True, text=True, env=ENV, timeout=120)


@pytest.fixture
def refused(monkeypatch, capsys):
  """What the entry says of a mistake, in this process."""

  def told(**knobs):
    monkeypatch.setattr(sys, 'argv', command(**knobs)[2:])
    with pytest.raises(SystemExit) as ended:
      flags.run(prepare.main, prepare.__doc__)
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith('error: ') and 'Traceback' not in err
    assert not os.path.exists(f'{knobs.get("out")}.incomplete')
    return err

  return told


@pytest.fixture(scope='module')
def texts():
  files = sorted(pathlib.Path(json.__file__).parent.glob('*.py'))
  lines = ''.join(f.read_text('utf-8') for f in files).split('\n\n')
  return sorted(set(lines) - {''})


@pytest.fixture
def folder(tmp_path, texts):
  """Text files, one document each."""
  (tmp_path / 'texts').mkdir()
  for i, text in enumerate(texts):
    (tmp_path / 'texts' / f'{i}.txt').write_text(text)
  return tmp_path / 'texts'


def test_every_format_gives_the_same_corpus(tmp_path, folder, texts):
  lines = ''.join(json.dumps({'body': t}) + '\n' for t in texts).encode()
  (tmp_path / 'a.jsonl').write_bytes(lines)
  (tmp_path / 'a.jsonl.gz').write_bytes(gzip.compress(lines))
  (tmp_path / 'a.jsonl.zst').write_bytes(zstandard.compress(lines))
  pq.write_table(pa.table({'body': texts}), tmp_path / 'a.parquet')
  corpora = []
  for source in ('texts', 'texts/*.txt', 'a.jsonl', 'a.jsonl.gz', 'a.jsonl.zst', 'a.parquet'):
    out = tmp_path / 'out' / source.replace('/', '-')
    done = run(source=tmp_path / source, text_column='body', out=out)
    assert done.returncode == 0, done.stderr
    corpora.append(dataset.describe(out))
  assert len({c.digest for c in corpora}) == 1
  assert corpora[0].train.documents + corpora[0].validation.documents == len(texts)


def test_report_training_and_rerun(tmp_path, folder, refused):
  (folder / 'again.txt').write_text((folder / '0.txt').read_text())
  (folder / 'empty.txt').write_text('')
  (folder / 'bad.txt').write_bytes(b'\xff')
  (folder / 'README.md').write_text('not read')
  knobs = dict(
    source=folder, out=tmp_path / 'out', tokenizer='train', vocab_size=400, on_bad_text='skip'
  )
  done = run(**knobs, workers=2)
  assert done.returncode == 0, done.stderr
  corpus = dataset.describe(tmp_path / 'out')
  told = {line[:28].strip(): line[28:].split() for line in done.stdout.splitlines()}
  for label, of in (
    ('documents', lambda s: f'{s.documents:,}'),
    ('bytes', lambda s: f'{s.bytes:,}'),
    ('tokens', lambda s: f'{s.tokens:,}'),
    ('bytes per token', lambda s: f'{s.bytes / s.tokens:.3f}'),
    ('windows of 32', lambda s: f'{s.windows:,}'),
    ('tail tokens (in no window)', lambda s: f'{s.tail_tokens:,}'),
  ):
    assert told[label] == [of(corpus.train), of(corpus.validation)]
  assert told['duplicates left out'] == ['1'] and corpus.duplicates == 1
  assert ' '.join(told['skipped']) == '3 (1 another kind of file, 1 empty, 1 not UTF-8)'
  assert told['vocabulary'] == ['400'] and corpus.vocab_size == 400
  bits = corpus.unigram_nats / math.log(2) * corpus.validation.tokens / corpus.validation.bytes
  nats, per_byte = (told['unigram baseline'][i] for i in (0, 4))
  assert (nats, per_byte) == (f'{corpus.unigram_nats:.4f}', f'{bits:.4f}')

  before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / 'out').iterdir()}
  again = run(**knobs)
  assert again.returncode == 0 and 'already prepared: nothing to do' in again.stdout
  assert again.stdout.splitlines()[1:] == done.stdout.splitlines()[1:]
  assert before == {p.name: p.stat().st_mtime_ns for p in (tmp_path / 'out').iterdir()}

  message = refused(**(knobs | {'seed': 5, 'context': 16}))
  assert 'context 32 there, 16 now; seed 0 there, 5 now' in message
  (folder / '0.txt').write_text('changed')
  assert 'made differently (files ' in refused(**knobs)
  assert before == {p.name: p.stat().st_mtime_ns for p in (tmp_path / 'out').iterdir()}

  other = run(**(knobs | {'out': tmp_path / 'other', 'tokenizer': tmp_path / 'out'}))
  assert other.returncode == 0, other.stderr
  assert dataset.describe(tmp_path / 'other').tokenizer == corpus.tokenizer


def test_a_killed_run_leaves_nothing_that_looks_complete_and_runs_again(tmp_path):
  out = tmp_path / 'out'
  # A few megabytes, so that there is time to kill it between the first shard and the last.
  source = pathlib.Path(argparse.__file__).parent / '[a-i]*.py'
  knobs = dict(source=source, out=out, workers=2, shards=16)
  running = subprocess.Popen(command(**knobs), env=ENV, stderr=subprocess.DEVNULL)
  work = tmp_path / 'out.incomplete'
  while not list((work / 'spool').glob('*.made')):
    assert running.poll() is None, 'ended before it could be killed'
    time.sleep(0.01)
  workers = psutil.Process(running.pid).children(recursive=True)
  running.send_signal(signal.SIGKILL)
  running.wait()
  assert not out.exists() and work.exists() and workers
  with pytest.raises(Mistake, match='unfinished preparation lies beside it'):
    dataset.describe(out)
  _, alive = psutil.wait_procs(workers, timeout=30)
  assert not alive  # no orphan waits for jobs for ever
  finished = {p.name[:-5] for p in (work / 'spool').glob('*.made')}
  times = {p.name: p.stat().st_mtime_ns for p in work.glob('corpus-*')}
  done = run(**knobs)
  assert done.returncode == 0, done.stderr
  assert 'going on with the unfinished' in done.stdout
  assert not work.exists() and dataset.describe(out).train.windows > 0
  assert finished  # and they were not made again
  for name in finished:
    (file,) = out.glob(f'corpus-{name.replace("-", ".array_record-")}-of-*')
    assert file.stat().st_mtime_ns == times[file.name]
  assert run(**knobs | {'out': tmp_path / 'straight'}).returncode == 0
  assert contents(out) == contents(tmp_path / 'straight')


def contents(folder):
  return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_unfinished_work_of_another_recipe_is_not_taken_over(tmp_path, folder):
  assert run(source=folder, out=tmp_path / 'straight', seed=1).returncode == 0
  work = tmp_path / 'out.incomplete'
  (work / 'spool').mkdir(parents=True)
  (work / 'asked.json').write_text('{"seed": 0}')
  (work / 'spool' / '00000.read').write_text('{}')
  (work / 'corpus-train.array_record-00000-of-00002').write_bytes(b'old')
  done = run(source=folder, out=tmp_path / 'out', seed=1)
  assert done.returncode == 0 and 'going on' not in done.stdout
  assert contents(tmp_path / 'out') == contents(tmp_path / 'straight')


def test_a_full_disk_is_told_and_the_next_run_completes_it(tmp_path):
  """No file may grow beyond some size, which is told as a full disk is: at the first shard."""
  source = pathlib.Path(argparse.__file__).parent / '[a-c]*.py'
  knobs = dict(source=source, out=tmp_path / 'out', shards=4)
  program = [sys.executable, '-c', LIMITED, *command(**knobs)[2:]]
  done = subprocess.run(program, capture_output=True, text=True, env=ENV, timeout=120)
  assert done.returncode == 2 and 'Traceback' not in done.stderr, done.stderr
  assert 'wanted a folder that can be made; try more room' in done.stderr
  assert not (tmp_path / 'out').exists()
  done = run(**knobs)
  assert done.returncode == 0 and 'going on with the unfinished' in done.stdout
  assert run(**knobs | {'out': tmp_path / 'straight'}).returncode == 0
  assert contents(tmp_path / 'out') == contents(tmp_path / 'straight')


LIMITED = """
import resource, runpy, sys
from gptjax.data import shards
make = shards.make_shard
def limited(shard):
  resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
  return make(shard)
shards.make_shard = limited
sys.argv[0] = 'prepare'
runpy.run_module(sys.argv.pop(1), run_name='__main__')
"""


@pytest.mark.slow
def test_interrupted_run_is_gone_on_with(tmp_path):
  source = pathlib.Path(argparse.__file__).parent / '[a-i]*.py'
  knobs = dict(source=source, out=tmp_path / 'out', workers=2, shards=400)
  running = subprocess.Popen(
    command(**knobs),
    env=ENV,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )
  # Hundreds of shards are still to come when the work has begun.
  while not (tmp_path / 'out.incomplete' / 'spool').exists():
    assert running.poll() is None, 'ended before it could be interrupted'
    time.sleep(0.01)
  os.killpg(running.pid, signal.SIGINT)  # as a terminal does: to the workers too
  _, told = running.communicate(timeout=120)
  assert running.returncode == 130 and told.endswith('interrupted\n')
  assert os.listdir(tmp_path) == ['out.incomplete']
  assert run(**knobs).returncode == 0
  assert os.listdir(tmp_path) == ['out']


def test_a_part_is_gone_on_with_only_while_the_files_are_dealt_alike(tmp_path, folder):
  """The same files under names in another order: parts that were read are not what they were."""
  recipe = dataclasses.replace(RECIPE, source=str(folder))
  engine = lambda: engines.processes(1)
  want, _ = prepare.prepare(recipe, str(tmp_path / 'straight'), engine())

  class Stopped(BaseException):
    pass

  @contextlib.contextmanager
  def dies_after_reading():
    with engine() as run:

      def dying(name, job, parts):
        if name == 'packing':
          raise Stopped
        return run(name, job, parts[: len(parts) // 2] if name == 'reading' else parts)

      yield dying

  with pytest.raises(Stopped):
    prepare.prepare(recipe, str(tmp_path / 'out'), dies_after_reading())
  other = tmp_path / 'other'
  other.mkdir()
  files = sorted(folder.iterdir())
  for i, file in enumerate(files):
    shutil.copy(file, other / f'{len(files) - i:05d}.txt')
  recipe = dataclasses.replace(recipe, source=str(other))
  got, _ = prepare.prepare(recipe, str(tmp_path / 'out'), engine())
  assert got.digest == want.digest and got.train.documents == want.train.documents


def test_what_is_not_ours_is_left_alone(tmp_path, folder):
  mine = tmp_path / 'out.incomplete'
  mine.mkdir()
  (mine / 'thesis.txt').write_text('years of work')
  done = run(source=folder, out=tmp_path / 'out')
  assert done.returncode == 2 and 'wanted unfinished work or nothing' in done.stderr
  assert os.listdir(mine) == ['thesis.txt']
  # Nor where the mistake is another one.
  (tmp_path / 'out').write_text('')
  assert run(source=folder, out=tmp_path / 'out').returncode == 2
  assert os.listdir(mine) == ['thesis.txt']
  (tmp_path / 'empty').mkdir()
  (tmp_path / 'link').symlink_to(tmp_path / 'empty')
  assert run(source=folder, out=tmp_path / 'link').returncode == 0
  assert dataset.describe(tmp_path / 'empty').train.windows > 0


def test_the_same_bytes_read_otherwise_are_another_corpus(tmp_path, folder, texts, refused):
  for suffix in ('jsonl', 'txt'):
    (tmp_path / suffix).mkdir()
    for i in range(9):
      lines = json_lines(texts[i::9])
      (tmp_path / suffix / f'{i}.{suffix}').write_text(lines)
  assert run(source=tmp_path / 'jsonl', out=tmp_path / 'out').returncode == 0
  assert 'made differently (files' in refused(source=tmp_path / 'txt', out=tmp_path / 'out')


def test_out_that_holds_something_else(tmp_path, folder, refused):
  (tmp_path / 'out').mkdir()
  assert run(source=folder, out=tmp_path / 'out').returncode == 0  # empty: welcome
  (tmp_path / 'mine').mkdir()
  (tmp_path / 'mine' / 'thesis.txt').write_text('years of work')
  message = refused(source=folder, out=tmp_path / 'mine')
  assert 'holds something else' in message
  assert os.listdir(tmp_path / 'mine') == ['thesis.txt']
  assert 'holds something else' in refused(source=folder, out=tmp_path / 'mine' / 'thesis.txt')


def test_a_config_of_another_program_is_told(run_python):
  command = ['-m', 'gptjax.prepare', '--config=configs/tiny.py']
  told = run_python(command, timeout=60, code=2).stderr
  assert 'wanted a config of beam, context, ' in told and 'try --config=configs/corpus.py' in told


def test_wrong_knobs_are_told_together(tmp_path, folder, refused):
  message = refused(
    source=folder,
    out=tmp_path / 'out',
    context=0,
    validation_fraction=1.0,
    shards=-1,
    seed=-1,
    on_bad_text='ignore',
  )
  for knob in ('context', 'validation_fraction', 'shards', 'seed', 'on_bad_text'):
    assert f'{knob}: got' in message
  assert '5 mistakes' in message


@pytest.mark.parametrize(
  ('knobs', 'message'),
  [
    ({'sorce': 'x'}, '--config.sorce: got an unknown key.*try --config.source'),
    ({'context': 'long'}, '--config.context=long: got .* wanted int'),
    ({'out': ''}, 'out: got none'),
    ({'out': 'a=b'}, 'out: got a=b, wanted the local folder to make'),
    ({'out': 'gs://b/c'}, 'out: got gs://b/c, wanted the local folder'),
    ({'out': f'{"x" * 300}/out'}, 'out .*: got OSError'),
    ({'out': '/'}, 'out: got /, wanted a folder to make'),
    ({'out': '.'}, 'which holds something else'),
    ({'out': 'good.jsonl/out'}, "out 'good.jsonl/out': got NotADirectoryError"),
    ({'source': ''}, 'source: got none'),
    ({'workers': -1}, 'workers: got -1'),
    ({'source': 'nowhere'}, "corpus: got 'nowhere', which does not exist"),
    ({'source': 'empty'}, "corpus: got 'empty' without a file to read"),
    ({'source': 'blank.txt'}, r"'blank.txt' without a document \(skipped: {'empty': 1}\)"),
    ({'source': 'bad.jsonl'}, 'bad.jsonl:2: got bad JSON'),
    ({'source': 'bad.jsonl', 'workers': 2}, 'bad.jsonl:2: got bad JSON'),
    ({'source': 'bad.txt'}, 'bad.txt: got not UTF-8'),
    ({'source': 'a.parquet', 'text_column': 'test'}, "no text column .*nearest 'text'"),
    ({'tokenizer': 'nowhere'}, 'tokenizer: got nowhere, which does not exist'),
    ({'tokenizer': 'train', 'vocab_size': 10}, 'vocab_size .*got 10, wanted at least'),
    ({'tokenizer': 'train', 'vocab_size': 10**6}, 'vocab_size .*got 1000000, wanted at most'),
    ({'context': 10**7}, 'train split: got no window of 10000000 tokens'),
  ],
  ids=lambda x: str(x)[:40] if isinstance(x, dict) else '',
)
def test_bad_input(tmp_path, texts, monkeypatch, knobs, message, refused):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'empty').mkdir()
  (tmp_path / 'blank.txt').write_text('')
  (tmp_path / 'bad.txt').write_bytes(b'\xff\xfe')
  (tmp_path / 'bad.jsonl').write_text('{"text": "fine"}\n{"text": \n')
  (tmp_path / 'good.jsonl').write_text(''.join(json.dumps({'text': t}) + '\n' for t in texts))
  pq.write_table(pa.table({'text': texts}), tmp_path / 'a.parquet')
  told = refused(**({'source': 'good.jsonl', 'out': 'out'} | knobs))
  assert re.search(message, told), told
  assert not (tmp_path / 'out').exists() and not (tmp_path / 'out.incomplete').exists()


def test_help():
  done = subprocess.run([*command(), '--help'], capture_output=True, text=True, env=ENV)
  assert done.returncode == 0 and '--config.context=32' in done.stdout
  assert 'packed windows' in done.stdout
