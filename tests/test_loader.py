"""The order of the data is a function of two integers, and rows land where they belong."""

import threading

import jax
import numpy as np
import pytest

from gptjax.data import loader
from tests import small


class Source:
  """A source of n windows, each of them its own index."""

  def __init__(self, n):
    self.n = n

  def __len__(self):
    return self.n

  def __getitem__(self, index):
    return np.full(17, index, 'uint16')


def order(stream, indices):
  return [int(stream[i][0]) for i in indices]


@pytest.mark.parametrize('epoch', [0, 1, 5, 10**9])
def test_an_epoch_is_a_permutation(epoch):
  n = 50
  stream = loader.stream(Source(n), seed=3)
  assert sorted(order(stream, range(epoch * n, (epoch + 1) * n))) == list(range(n))


def test_epochs_and_seeds_differ():
  stream, other = loader.stream(Source(50), seed=3), loader.stream(Source(50), seed=4)
  first = order(stream, range(50))
  assert first != list(range(50))
  assert first != order(stream, range(50, 100))
  assert first != order(other, range(50))


def test_an_element_does_not_depend_on_what_was_read_before():
  walked = order(loader.stream(Source(50), seed=3), range(120))
  assert [order(loader.stream(Source(50), seed=3), [i])[0] for i in (119, 7, 60)] == [
    walked[i] for i in (119, 7, 60)
  ]


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
