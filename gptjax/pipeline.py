"""Layers in stages, one behind the other along the mesh axis `stage`: 1F1B, and GPipe.

Arrays of a stage each have a leading dim p, split over `stage`, and a stage's work is a `vmap` over
it, so all else stays as it is without a pipeline: the types, the tables, the kernels. In a tick
every stage works on another slice of the batch and hands its result to the next.

Embedding and output matrix belong to no stage: their vocabulary is split over `stage` as it is over
`tensor` (COMPUTE['v']), so each stage does its share of them in every tick and none waits for them.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from gptjax import sharding


@dataclasses.dataclass(frozen=True)
class Parts:
  """A model cut into what a pipeline runs. g counts the slices of a batch.

  A slice that there is not (g < 0 or too large) must be computed all the same, and weigh nothing
  in the loss: its gradients are then zero.
  """

  first: Callable  # (outer, g) -> x_btd, the input of the first layer
  layers: Callable  # (blocks, x_btd, g, number of the first of them) -> x_btd
  last: Callable  # (outer, x_btd, g) -> the loss of the slice


def one_f_one_b(
  parts: Parts, outer: dict, blocks: dict, slices: jax.Array
) -> tuple[jax.Array, dict, dict]:
  """The loss summed over slices, and its gradients for `outer` and `blocks`, not yet reduced.

  One forward, one backward (Narayanan et al. 2019, "PipeDream"; 2021, "Megatron-LM"), in lockstep.
  In tick t stage p runs slice t - p forward and slice t - (2(S-1) - p) backward, from its input,
  which it kept: at most 2S - 1 inputs, however many slices. The gradient is made by hand inside
  the loop, so the number of slices may be traced and one compilation serves a whole ramp.

  Args:
    parts: the model.
    outer: params of what is before and behind the layers; reduced types are kept.
    blocks: params of the layers [n, …], n split over `stage`.
    slices: how many.
  """
  stages = _Stages(parts, outer, blocks)
  S = stages.count
  ring_size = 2 * S - 1

  def tick(t, carry):
    x_pbtd, dy_pbtd, ring_rpbtd, d_outer, d_blocks, total = carry
    x_pbtd = stages.put(x_pbtd, 0, parts.first(outer, t))
    ring_rpbtd = lax.dynamic_update_index_in_dim(ring_rpbtd, x_pbtd, t % ring_size, 0)
    y_pbtd = stages.forward(x_pbtd, t - stages.index_p)

    last = lambda outer, y_btd: parts.last(outer, y_btd, t - (S - 1))
    value, (d_last, dy_btd) = jax.value_and_grad(last, (0, 1))(outer, stages.take(y_pbtd, S - 1))

    dy_pbtd = stages.put(dy_pbtd, S - 1, dy_btd)
    # When the slice that now comes back to stage p was here: it went on through S - 1 - p stages.
    then_p = t - 2 * (S - 1 - stages.index_p)
    input_pbtd = _at(ring_rpbtd, then_p % ring_size)
    d_layers, dx_pbtd = stages.backward(input_pbtd, dy_pbtd, then_p - stages.index_p)

    first = lambda outer: parts.first(outer, t - 2 * (S - 1))
    (d_first,) = jax.vjp(first, outer)[1](stages.take(dx_pbtd, 0))

    d_outer = jax.tree.map(lambda *d: d[0] + d[1] + d[2], d_outer, d_last, d_first)
    d_blocks = jax.tree.map(jnp.add, d_blocks, d_layers)
    return _pass(y_pbtd, 1), _pass(dx_pbtd, -1), ring_rpbtd, d_outer, d_blocks, total + value

  zeros_pbtd, zeros_rpbtd = stages.zeros(), stages.zeros(ring_size)
  d_outer = sharding.deferred_zeros(outer)
  carry = zeros_pbtd, zeros_pbtd, zeros_rpbtd, d_outer, stages.zero_gradients(), jnp.float32(0)
  *_, d_outer, d_blocks, total = lax.fori_loop(0, slices + 2 * (S - 1), tick, carry)
  return total, d_outer, jax.tree.map(sharding.join_leading, d_blocks)


def gpipe(parts: Parts, outer: dict, blocks: dict, slices: jax.Array | int) -> jax.Array:
  """The loss summed over slices, forward only: for evaluation.

  With a number of slices that is not traced it can be differentiated, and then is GPipe (Huang et
  al. 2019), whose memory grows with the slices.
  """
  stages = _Stages(parts, outer, blocks)
  S = stages.count

  @jax.checkpoint  # what is kept are the stages' inputs, as 1F1B keeps them
  def tick(t, carry):
    x_pbtd, total = carry
    x_pbtd = stages.put(x_pbtd, 0, parts.first(outer, t))
    y_pbtd = stages.forward(x_pbtd, t - stages.index_p)
    value = parts.last(outer, stages.take(y_pbtd, S - 1), t - (S - 1))
    return _pass(y_pbtd, 1), total + value

  _, total = lax.fori_loop(0, slices + S - 1, tick, (stages.zeros(), jnp.float32(0)))
  return total


class _Stages:
  """What all stages do at once."""

  def __init__(self, parts: Parts, outer: dict, blocks: dict):
    self.count = S = sharding.stages()
    self.index_p = jnp.arange(S, out_sharding=sharding.computed('p'))
    n = jax.tree.leaves(blocks)[0].shape[0] // S
    self._number_p = self.index_p * n  # of each one's first layer
    self._blocks = jax.tree.map(lambda w: sharding.split_leading(w, n), blocks)
    self._parts = parts
    self._input = jax.eval_shape(parts.first, outer, 0)

  def forward(self, x_pbtd, g_p):
    """Each stage's layers, on its slice g."""
    run = jax.vmap(self._parts.layers, spmd_axis_name='stage')
    return run(self._blocks, x_pbtd, g_p, self._number_p)

  def backward(self, x_pbtd, dy_pbtd, g_p):
    """Gradients for the layers, to be summed over the batch, and for their input."""

    def pull(blocks, x_btd, dy_btd, g, number):
      layers = lambda blocks, x_btd: self._parts.layers(blocks, x_btd, g, number)
      # Deferred here, since `vmap` does not take a `reduced` array as its argument.
      return jax.vjp(layers, sharding.defer(blocks), x_btd)[1](dy_btd)

    run = jax.vmap(pull, spmd_axis_name='stage')
    return run(self._blocks, x_pbtd, dy_pbtd, g_p, self._number_p)

  def zero_gradients(self):
    """What gradients for the layers are added to."""
    return sharding.deferred_zeros(sharding.defer(self._blocks))

  def put(self, x_pbtd, stage, x_btd):
    """With x_btd at one stage."""
    return jnp.where(self._is(stage), x_btd[None], x_pbtd)

  def take(self, x_pbtd, stage):
    """What one stage has, for all of them."""
    return jnp.where(self._is(stage), x_pbtd, 0).sum(0)

  def zeros(self, *r):
    """An array [*r, p, b, l, d] like the stages' inputs."""
    layout = sharding.computed('r' * len(r) + 'pbtd')
    shape = *r, self.count, *self._input.shape
    return jnp.zeros(shape, self._input.dtype, out_sharding=layout)

  def _is(self, stage):
    return (self.index_p == stage)[:, None, None, None]


def _at(ring_rpbtd, slot_p):
  """Each stage's own slot of the ring."""
  read = lambda ring_rbtd, slot: lax.dynamic_index_in_dim(ring_rbtd, slot, keepdims=False)
  return jax.vmap(read, in_axes=(1, 0), spmd_axis_name='stage')(ring_rpbtd, slot_p)


def _pass(x_pbtd, by):
  """What each stage has to the stage `by` further on; the ends meet."""
  S, spec = x_pbtd.shape[0], jax.typeof(x_pbtd).sharding.spec
  to = [(p, (p + by) % S) for p in range(S)]
  move = lambda x_pbtd: lax.ppermute(x_pbtd, 'stage', to)
  return jax.shard_map(move, in_specs=spec, out_specs=spec, check_vma=False)(x_pbtd)
