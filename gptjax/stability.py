"""Steps that are not taken: what is not finite, or a spike, and when to give a state up."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

GOOD, NOT_FINITE, LOSS_SPIKE, NORM_SPIKE = range(4)
TOLD = {
  NOT_FINITE: 'loss or gradient is not finite',
  LOSS_SPIKE: 'spike of the loss',
  NORM_SPIKE: 'spike of the gradient',
}
# As a share of the median: what is steadier than that has no larger deviation to be measured by.
STEADIEST = {'loss': 0.01, 'grad_norm': 0.1}
FROM_MAD = 1.4826  # the standard deviation of a normal distribution whose median deviation is 1


@dataclasses.dataclass(frozen=True)
class Guard:
  """Judges each step by the good ones before it, within the compiled step.

  What it knows lies in the state, as `health`: of the last good steps the logarithms of loss and
  gradient norm, how many there were, and of a streak of bad steps its length and where it began.
  """

  spike: float  # robust standard deviations above the median; 0: only what is not finite is bad
  window: int  # good steps to judge by; before there were so many, no spike is seen

  def init(self) -> dict:
    """Of a run that has taken no step."""
    values = {name: jnp.zeros(self.window, jnp.float32) for name in STEADIEST}
    return values | {name: jnp.int32(0) for name in ('good', 'streak', 'since')}

  def judge(self, health: dict, loss: jax.Array, grad_norm: jax.Array) -> jax.Array:
    """GOOD, or what is wrong with a step.

    The update is not asked for: of a gradient that is finite, clipped and divided by an epsilon it
    is finite too, and to know the verdict before it spares a pass over all moments.
    """
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    judged = jnp.where(finite, GOOD, NOT_FINITE)
    if not self.spike:
      return judged
    measured = {'loss': (loss, LOSS_SPIKE), 'grad_norm': (grad_norm, NORM_SPIKE)}
    for name, (value, spike) in measured.items():
      high = jnp.log(value) > self._highest(health[name], STEADIEST[name])
      seen = (health['good'] >= self.window) & (judged == GOOD)
      judged = jnp.where(high & seen, spike, judged)
    return judged

  def _highest(self, logs, steadiest):
    median = jnp.median(logs)
    deviation = FROM_MAD * jnp.median(jnp.abs(logs - median))
    return median + self.spike * jnp.maximum(deviation, steadiest)

  def after(
    self, health: dict, judged: jax.Array, start: jax.Array, loss: jax.Array, grad_norm: jax.Array
  ) -> dict:
    """The health after a step that began at `start` sequences."""
    place = health['good'] % self.window
    add = lambda logs, value: lax.dynamic_update_index_in_dim(logs, jnp.log(value), place, 0)
    good = health | {
      'loss': add(health['loss'], loss),
      'grad_norm': add(health['grad_norm'], grad_norm),
      'good': health['good'] + 1,
      'streak': jnp.int32(0),
    }
    first = health['streak'] == 0
    bad = health | {
      'streak': health['streak'] + 1,
      'since': jnp.where(first, start, health['since']),
    }
    return choose(judged == GOOD, good, bad)


def choose(condition: jax.Array, one: dict, other: dict) -> dict:
  """One tree or the other."""
  return jax.tree.map(lambda a, b: jnp.where(condition, a, b), one, other)
