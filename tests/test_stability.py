"""A bad step changes nothing but the clock, and is told from a good one by those before it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import stability
from gptjax.stability import Guard
from tests import small

GUARD = Guard(spike=10.0, window=8)
NAN, INF = float('nan'), float('inf')
ODD = np.array([-0.0, 1e-40, -1e-42], np.float32)


def judged(values, guard=GUARD):
  """What the guard says to each loss or (loss, norm), in turn, and the health after all."""
  health, said = guard.init(), []
  for i, value in enumerate(values):
    loss, norm = value if isinstance(value, tuple) else (value, 1.0)
    loss, norm = jnp.float32(loss), jnp.float32(norm)
    said.append(int(guard.judge(health, loss, norm)))
    health = guard.after(health, jnp.int32(said[-1]), jnp.int32(10 * i), loss, norm)
  return said, {name: np.asarray(value) for name, value in health.items()}


STEADY = [3.0 + 0.01 * (i % 3) for i in range(8)]


@pytest.mark.parametrize('bad', [NAN, INF, -INF, (3.0, NAN), (3.0, INF), (NAN, 1.0)])
def test_what_is_not_finite_is_bad_from_the_first_step(bad):
  assert judged([bad])[0] == [stability.NOT_FINITE]
  assert judged([bad], Guard(0.0, 8))[0] == [stability.NOT_FINITE]


@pytest.mark.parametrize(
  'value, want',
  [
    (3.2, stability.GOOD),
    (4.5, stability.LOSS_SPIKE),
    (0.1, stability.GOOD),  # what falls is no spike
    ((3.0, 2.0), stability.GOOD),  # gradients vary more
    ((3.0, 50.0), stability.NORM_SPIKE),
    ((4.5, 50.0), stability.LOSS_SPIKE),
    ((3.0, 0.0), stability.GOOD),
  ],
)
def test_a_spike_is_far_above_the_good_steps_before_it(value, want):
  assert judged([*STEADY, value])[0] == [0] * 8 + [want]
  assert judged([*STEADY[1:], value])[0] == [0] * 8  # too few to judge by
  assert judged([*STEADY, value], Guard(0.0, 8))[0] == [0] * 9


def test_a_noisy_run_has_higher_spikes_than_a_steady_one():
  noisy = [3.0 + 0.5 * (i % 3 - 1) for i in range(8)]
  assert judged([*noisy, 4.5])[0][-1] == stability.GOOD
  assert judged([*noisy, 3e6])[0][-1] == stability.LOSS_SPIKE


def test_a_falling_loss_is_never_a_spike():
  """From the first step of a model to its last, as steeply as they fall."""
  losses = 8 * np.exp(-np.arange(200) / 20) + 2 + np.random.default_rng(0).normal(0, 0.05, 200)
  norms = np.random.default_rng(1).lognormal(0, 0.5, 200)
  assert set(judged(zip(losses, norms, strict=True))[0]) == {stability.GOOD}


def test_bad_steps_leave_no_trace_in_what_is_judged_by():
  clean, dirty = judged(STEADY)[1], judged([*STEADY[:4], NAN, (1.0, INF), *STEADY[4:]])[1]
  for name in ('loss', 'grad_norm', 'good', 'streak'):
    np.testing.assert_array_equal(clean[name], dirty[name])
  _, health = judged([*STEADY, NAN, 9.0, NAN])
  assert (health['streak'], health['since'], health['good']) == (3, 80, 8)


def test_the_oldest_good_step_is_forgotten():
  climbing = [3.0 * 1.05**i for i in range(40)]
  assert set(judged(climbing)[0]) == {stability.GOOD}
  assert np.exp(judged(climbing)[1]['loss']).min() == pytest.approx(climbing[-8], rel=1e-5)


ONE, EIGHT, SLOW = (1, 1, 1), (2, 2, 2), pytest.mark.slow


@pytest.mark.parametrize(
  'mesh, factors',
  [
    pytest.param(ONE, (NAN, 1.0), marks=SLOW),
    (EIGHT, (1.0, NAN)),
    pytest.param(EIGHT, (9.0, 1.0), marks=SLOW),
    *(
      pytest.param(ONE, bad, marks=SLOW) for bad in ((1.0, NAN), (1.0, INF), (9.0, 1.0), (1.0, 1e6))
    ),
    *(pytest.param(EIGHT, bad, marks=SLOW) for bad in ((NAN, 1.0), (1.0, INF), (1.0, 1e6))),
  ],
)
def test_a_bad_step_leaves_params_and_moments_as_they_were(poisoned, factors, mesh):
  poisoned.append((range(240, 264), *factors))
  program = small.program(guard=Guard(10.0, 4))
  with small.on(*mesh):
    state, step = small.init(program), jax.jit(program.train_step)
    # Bits that a sum with 0 would change.
    norm = state['params']['norm']
    bias = np.array(norm['bias'])
    bias[:3] = ODD
    norm['bias'] = jax.device_put(bias, norm['bias'].sharding)
    for i in range(12):
      before = jax.tree.map(np.asarray, state)
      state, measured = step(state, small.put(small.rows(3, 8)), 24 * i, 24, 1e-3)
      bad = i == 10
      assert (int(measured['judged']) != 0, int(measured['streak'])) == (bad, bad)
      same = lambda a, b: all(
        jax.tree.leaves(jax.tree.map(lambda a, b: a.tobytes() == np.asarray(b).tobytes(), a, b))
      )
      assert same(before['params'], state['params']) == bad
      assert same(before['moments'], state['moments']) == bad
      assert (float(measured['update_norm']) == 0) == bad
    assert int(measured['since']) == 240
