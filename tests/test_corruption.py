"""One wrong bit on one device is found, and a right machine is left alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import corruption, train
from gptjax.errors import Mistake
from tests import small
from tests.runs import config, records


def flipped(array, device, place=0, bit=0):
  """An array one copy of which has a wrong bit."""
  parts = []
  for shard in array.addressable_shards:
    data = np.asarray(shard.data).copy()
    if shard.device.id == device:
      data.view(np.uint32).reshape(-1)[place] ^= np.uint32(1 << bit)
    parts.append(jax.device_put(data, shard.device))
  return jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)


@pytest.mark.parametrize('mesh', [(8, 1, 1), (2, 2, 2), (4, 1, 2)])
@pytest.mark.parametrize('bit', [0, 13, 31])
def test_a_wrong_bit_in_a_copy_is_found_with_its_device(mesh, bit):
  with small.on(*mesh):
    state = small.init(small.program())
    check = corruption.comparing()
    check(state)
    for device in (0, 5):
      for name in ('embed', 'position'):
        params = state['params'] | {name: flipped(state['params'][name], device, 7, bit)}
        with pytest.raises(Mistake) as e:
          check(state | {'params': params})
        assert f"['params']['{name}']" in str(e.value)
        # Of two copies no one can say which is right.
        assert f'on [{device}] of' in str(e.value) or mesh != (8, 1, 1)


def test_words_that_change_places_are_seen():
  a = jnp.arange(12.0).reshape(3, 4)
  with small.on():
    others = a, a[::-1], a[:, ::-1], a.T.reshape(3, 4), a + 1
    assert len({int(jax.jit(corruption._sum)(x)) for x in others}) == 5


@pytest.mark.slow
def test_a_step_is_computed_twice():
  program = small.program()
  with small.on(2, 2, 2):
    state, rows = small.init(program), small.put(small.rows(3, 8))
    args = rows, np.int32(0), np.int32(24), np.float32(1e-3)
    check = corruption.repeating(program.train_step)
    check(state, *args)
    before = jax.tree.map(np.asarray, state)
    check(state, *args)
    jax.tree.map(np.testing.assert_array_equal, before, state)  # nothing was taken


def test_a_chip_that_errs_once_is_found(monkeypatch):
  """Its second result has one other bit."""
  real, results = jax.device_get, []

  def errs(tree):
    tree = real(tree)
    results.append(tree)
    if len(results) == 2:
      tree[0]['params']['embed'] = tree[0]['params']['embed'] ^ 1
    return tree

  check = corruption.repeating(lambda x: ({'params': {'embed': x}}, {}))
  with small.on():
    check(jnp.ones(4))
  monkeypatch.setattr(jax, 'device_get', errs)
  told = r"a step computed twice: got other bits in .*\['embed'\]"
  with small.on(), pytest.raises(Mistake, match=told):
    check(jnp.ones(4))


@pytest.mark.slow
def test_a_run_that_checks_itself_is_the_run_that_does_not(corpus, tmp_path, monkeypatch):
  settings = {'mesh__data': 2, 'mesh__fsdp': 2, 'mesh__tensor': 2, 'train_tokens': 2048.0}
  looked, check = [], corruption.comparing()
  both = lambda: lambda state: (looked.append(1), check(state))
  monkeypatch.setattr(corruption, 'comparing', both)
  train.main(config(tmp_path / 'a', corpus, **settings))
  assert not looked
  train.main(config(tmp_path / 'b', corpus, **settings, check__every_tokens=512.0))
  assert len(looked) == 3
  assert records(tmp_path / 'a') == records(tmp_path / 'b')
  assert records(tmp_path / 'a', 'validation') == records(tmp_path / 'b', 'validation')


def test_what_is_found_stops_a_run_before_it_saves(corpus, tmp_path, monkeypatch):
  def wrong(state):
    raise Mistake('copies of the state')

  monkeypatch.setattr(corruption, 'comparing', lambda: wrong)
  settings = {'mesh__data': 8, 'train_tokens': 2048.0, 'check__every_tokens': 512.0}
  with pytest.raises(Mistake, match='copies'):
    train.main(config(tmp_path, corpus, **settings))
  assert records(tmp_path)[-1]['sequences'] < 64 and not [*(tmp_path / 'checkpoints').iterdir()]
