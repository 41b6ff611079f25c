"""The order of the data is a function of two integers, and rows land where they belong."""

import argparse
import json
import subprocess
import threading

import jax
import numpy as np
import pytest

from gptjax.data import loader
from gptjax.data.mixture import Mixture, Stage
from gptjax.errors import Mistake
from tests import runs, small


class Source:
  """A source of n windows, each of them its own index."""

  blank = np.zeros(17, 'uint16')

  def __init__(self, n):
    self.n = n

  def __len__(self):
    return self.n

  def __getitem__(self, index):
    return np.full(17, index, 'uint16')


class Numbered(Source):
  """The same, counted from another number on."""

  def __init__(self, n, first):
    super().__init__(n)
    self.first = first

  def __getitem__(self, index):
    return super().__getitem__(self.first + index)


SIZES = {'a': 60, 'b': 17, 'c': 30}


def stream(source, seed):
  return loader.Stream({'a': source}, Mixture([Stage(0, {'a': 1})]), seed)


def order(stream, indices):
  return [int(stream[i][0]) for i in indices]


@pytest.mark.parametrize('epoch', [0, 1, 5, 10**9])
def test_an_epoch_is_a_permutation(epoch):
  n = 50
  windows = stream(Source(n), 3)
  assert sorted(order(windows, range(epoch * n, (epoch + 1) * n))) == list(range(n))


def test_epochs_and_seeds_differ():
  windows, other = stream(Source(50), 3), stream(Source(50), 4)
  first = order(windows, range(50))
  assert first != list(range(50))
  assert first != order(windows, range(50, 100))
  assert first != order(other, range(50))


def test_an_element_does_not_depend_on_what_was_read_before():
  walked = order(stream(Source(50), 3), range(120))
  assert [order(stream(Source(50), 3), [i])[0] for i in (119, 7, 60)] == [
    walked[i] for i in (119, 7, 60)
  ]


def test_a_source_is_seen_whole_in_each_of_its_epochs_whatever_it_is_mixed_with():
  """Through a change of the weights and a source that joins."""
  sources = {name: Numbered(n, 1000 * i) for i, (name, n) in enumerate(SIZES.items())}
  stages = [Stage(0, {'a': 3, 'b': 1}), Stage(70, {'a': 1, 'b': 1, 'c': 2})]
  windows = loader.Stream(sources, Mixture(stages), seed=0)
  seen = order(windows, range(400))
  for i, (name, n) in enumerate(SIZES.items()):
    mine = [token - 1000 * i for token in seen if token // 1000 == i]
    epochs = [mine[j : j + n] for j in range(0, len(mine) - n + 1, n)]
    assert len(epochs) > 1, name
    assert all(sorted(epoch) == [*range(n)] for epoch in epochs)
    assert epochs[0] != epochs[1]
  share = [sum(token // 1000 == i for token in seen[:70]) for i in range(3)]
  assert share == [pytest.approx(52.5, abs=1), pytest.approx(17.5, abs=1), 0]


def test_sources_of_one_length_are_shuffled_apart():
  sources = {name: Source(40) for name in 'ab'}
  windows = loader.Stream(sources, Mixture([Stage(0, {'a': 1, 'b': 1})]), seed=0)
  seen = order(windows, range(80))
  assert seen[::2] != seen[1::2] and sorted(seen[::2]) == sorted(seen[1::2])


def test_a_place_a_million_million_sequences_away_is_as_near_as_any(monkeypatch):
  """What is read to get there is that one window."""
  source, read = Source(2**31), []
  monkeypatch.setattr(Source, '__getitem__', lambda self, i: read.append(i) or np.full(17, 1))
  stream(source, 0)[10**12]
  assert len(read) == 1 and 0 <= read[0] < 2**31


# What one of several processes does: it lays the rows of some steps on a mesh over all devices, and
# says which sequence lies in each row that it holds, and its hash.
PROCESS = """
import hashlib, json, sys
import jax, numpy as np
from gptjax import schedule, sharding
from gptjax.data import dataset, loader
from gptjax.data.mixture import Mixture, Stage

address, count, index, first, end, data, fsdp, folders = json.loads(sys.argv[1])
if count > 1:
  jax.distributed.initialize(address, count, index)
class Watched(loader.Stream):
  read = []
  def __getitem__(self, index):
    self.read.append(index)
    return super().__getitem__(index)

sources = {name: dataset.open_split(folder, 'train') for name, folder in folders.items()}
stream = Watched(sources, Mixture([Stage(0, {'a': 3, 'b': 1})]), seed=5)
mesh = sharding.make_mesh(data, fsdp, 8 // (data * fsdp))
ramp, microbatch = schedule.Ramp.linear(8, 32, 8, 64, 10**6), 8
for step in ramp.steps(first):
  if step.start >= end:
    break
  stream.read.clear()
  token_gbl = loader.place(stream, step.start, step.rows, 4, microbatch, mesh)
  held = set()
  for shard in token_gbl.addressable_shards:
    rows = np.asarray(shard.data)
    g, b = (range(*s.indices(n)) for s, n in zip(shard.index[:2], token_gbl.shape[:2]))
    for i, slot in enumerate(g):
      for j, row in enumerate(b):
        at = slot * microbatch + row
        if at < step.rows:
          held.add(step.start + at)
          print(step.start + at, hashlib.sha256(rows[i, j].tobytes()).hexdigest())
  assert sorted(stream.read) == sorted(held), 'rows of others were read, or some twice'
"""


@pytest.mark.slow
def test_stream_is_the_same_from_any_number_of_processes_on_any_mesh(
  corpus, tmp_path_factory, start_python, free_port
):
  """One process; and four, stopped in the ramp, gone on with by two on another mesh."""
  other = runs.make_corpus(tmp_path_factory.mktemp('other') / 'x', [argparse, threading])

  def said(processes, first, end, data, fsdp):
    at = f'127.0.0.1:{free_port()}'
    plan = lambda i: [at, processes, i, first, end, data, fsdp, {'a': corpus, 'b': other}]
    devices = 8 // processes
    started = [
      start_python(['-c', PROCESS, json.dumps(plan(i))], devices, stdout=subprocess.PIPE)
      for i in range(processes)
    ]
    rows = {}
    for process in started:
      out, err = process.communicate(timeout=120)
      assert process.returncode == 0, err[-2000:]
      # Devices that differ along `tensor` hold the same rows.
      rows |= dict(line.split() for line in out.splitlines())
    return {int(i): digest for i, digest in rows.items()}

  whole = said(1, 0, 200, data=8, fsdp=1)
  assert [*sorted(whole)] == [*range(len(whole))] and len(whole) >= 200
  assert len(set(whole.values())) > 100
  stopped = said(4, 0, 48, data=2, fsdp=2)
  resumed = said(2, len(stopped), 200, data=1, fsdp=4)
  assert not stopped.keys() & resumed.keys()
  assert stopped | resumed == whole


def test_a_source_too_long_to_shuffle_is_refused():
  stream(Source(2**32 - 1), 0)
  with pytest.raises(Mistake, match='got 4294967296, wanted at most 4294967295'):
    stream(Source(2**32), 0)


@pytest.mark.parametrize('mesh', [(1, 1, 1), *small.MESHES])
def test_rows_are_in_order_on_any_mesh_and_zeros_after(mesh):
  with small.on(*mesh):
    token_gbl = loader.place(Source(1000), 100, 13, 2, 8, jax.sharding.get_mesh())
  expect = [*range(100, 113), 0, 0, 0]
  assert np.asarray(token_gbl)[..., 0].ravel().tolist() == expect
  assert token_gbl.dtype == 'uint16'


def test_no_row_is_read_twice_for_devices_that_share_it():
  class Counting(Source):
    read = []

    def __getitem__(self, index):
      self.read.append(index)
      return super().__getitem__(index)

  with small.on(2, 1, 4):
    loader.place(Counting(100), 0, 8, 1, 8, jax.sharding.get_mesh())
  assert sorted(Counting.read) == [*range(8)]


def test_prefetch_keeps_order_and_raises_what_making_raised():
  assert list(loader.prefetch(lambda i: i * i, range(5), 2)) == [(i, i * i) for i in range(5)]
  assert list(loader.prefetch(lambda i: i, [], 2)) == []

  def break_at_3(i):
    if i == 3:
      raise KeyError(i)
    return i

  got = loader.prefetch(break_at_3, range(9), 2)
  assert [next(got)[1] for _ in range(3)] == [0, 1, 2]
  with pytest.raises(KeyError):
    next(got)


@pytest.mark.parametrize('depth', [0, 1, 3])
def test_prefetch_works_ahead_as_far_as_told(depth):
  asked = []
  items = (asked.append(i) or i for i in range(100))
  ahead = loader.prefetch(lambda i: i, items, depth)
  for i in range(4):
    next(ahead)
    assert len(asked) == i + 1 + depth
  ahead.close()


def test_prefetch_makes_in_another_thread():
  made = dict(loader.prefetch(lambda i: threading.current_thread(), range(3), 1))
  assert threading.current_thread() not in made.values()
