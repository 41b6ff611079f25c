"""AdamW as GPT-3 was trained with it, its state a plain dict (Brown et al. 2020, appendix B)."""

import dataclasses

import jax
import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True)
class AdamW:
  """Adam with decoupled weight decay on matrices, after a clip of the gradient's global norm.

  What `optax.chain` of its clip, Adam and decay computes, which the tests see to. It is written out
  because of `take`: chosen after an update, old or new moments cost a second pass over all of them.
  """

  b1: float
  b2: float
  eps: float
  weight_decay: float
  clip_norm: float

  def init(self, params: dict) -> dict:
    """Moments `mu` and `nu`, shaped and split like the params, and the `count` of updates."""
    return optax.scale_by_adam().init(params)._asdict()

  def update(
    self,
    grads: dict,
    moments: dict,
    params: dict,
    lr: jax.Array,
    norm: jax.Array,
    take: jax.Array | bool = True,
    tokens: jax.Array | float = 1.0,
  ) -> tuple[dict, dict]:
    """The change of the params at learning rate `lr`, and the moments after it.

    Args:
      grads: of the params, each a sum over `tokens`.
      moments: from `init` or the update before.
      params: which of them decay is told by their names.
      lr: the learning rate.
      norm: the global norm of the mean gradients.
      take: if False nothing changes, whatever the grads are.
      tokens: to divide grads by them before costs a pass over all of them.
    """
    scale = 1 / (tokens * jnp.maximum(1, norm / self.clip_norm))
    rate = jnp.where(take, lr, 0)  # a number, and no pass over all updates
    count = moments['count'] + 1
    unbias = 1 - self.b1**count, 1 - self.b2**count

    def average(decay, old, new):
      return jnp.where(take, decay * old + (1 - decay) * new, old)

    def change(mu, nu, w, decays):
      root = jnp.sqrt(nu / unbias[1]) + self.eps
      # Divided last of all: what ends in a division XLA's CPU backend computes once, and other
      # things anew for each use, for which it first copies the params.
      push = mu / unbias[0] + (self.weight_decay * w * root if decays else 0)
      return -rate * push / root

    first = lambda mu, g: average(self.b1, mu, g * scale)
    second = lambda nu, g: average(self.b2, nu, jnp.square(g * scale))
    mu, nu = jax.tree.map(first, moments['mu'], grads), jax.tree.map(second, moments['nu'], grads)
    updates = jax.tree.map(change, mu, nu, params, decays(params))
    return updates, {'mu': mu, 'nu': nu, 'count': jnp.where(take, count, moments['count'])}


def decays(params: dict) -> dict:
  """Which params decay: matrices, not biases nor LayerNorms (the GPT-2 practice)."""
  return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in MATRICES, params)


# By name and not by rank: on disk a block's bias has a dim for the layers and is a matrix by rank.
MATRICES = ('embed', 'position', 'qkv', 'out', 'up', 'down')
