"""What a device holds while it trains: what the compiler counts, in parts that have names."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from gptjax import sharding
from gptjax.config import Run


@dataclasses.dataclass(frozen=True)
class Memory:
  """What a device holds while it trains, in bytes."""

  parameters: int
  optimizer: int
  gradients: int
  activations: int  # kept for the backward pass of a slice
  temporaries: int  # all else that the compiler keeps
  program: int
  there: int

  @property
  def held(self) -> int:
    return sum(dataclasses.astuple(self)[:-1])


def of(run: Run, mesh: jax.sharding.Mesh, compiled: jax.stages.Compiled, there: int) -> Memory:
  """What the compiled step holds on each device, of so many bytes that are there."""
  stats = compiled.memory_analysis()
  with jax.set_mesh(mesh):
    state = run.program.abstract_state()
    activations = kept_activations(run)
  parameters, moments = _bytes(state['params']), _bytes(state['moments'])
  held = (
    stats.argument_size_in_bytes
    + stats.output_size_in_bytes
    - stats.alias_size_in_bytes
    + stats.temp_size_in_bytes
  )
  if mesh.devices.flat[0].platform == 'tpu':
    # Its temporaries lie where donated arguments did, and the sum counts those twice.
    held = min(held, stats.peak_memory_in_bytes or held)
  # A gradient is summed in f32 where its parameter lies.
  gradients = parameters
  rest = held - parameters - moments - gradients
  activations = min(activations, rest)
  return Memory(
    parameters=parameters,
    optimizer=moments,
    gradients=gradients,
    activations=activations,
    temporaries=rest - activations,
    program=stats.generated_code_size_in_bytes,
    there=there,
  )


def at_least(run: Run, mesh: jax.sharding.Mesh) -> int:
  """Bytes that are known without compiling: the state, its gradients, what is kept of a slice."""
  with jax.set_mesh(mesh):
    state = run.program.abstract_state()
    return _bytes(state) + _bytes(state['params']) + kept_activations(run)


def kept_activations(run: Run) -> int:
  """Bytes on each device that the forward pass of a slice leaves for the backward pass.

  In a pipeline these are the inputs that each stage keeps: its layers run again.
  """
  program, shape = run.program, run.program.shape
  if run.mesh['stage'] > 1:
    size, dtype = (run.microbatch, shape.context, shape.d_model), program.numerics.between
    one = jax.ShapeDtypeStruct(size, dtype, sharding=_layout('btd'))
    return _bytes(one) * (2 * run.mesh['stage'] - 1)
  params = jax.eval_shape(sharding.defer, program.abstract_state()['params'])
  token_bl = jax.ShapeDtypeStruct(
    (run.microbatch, shape.context + 1), np.int32, sharding=_layout('bl')
  )
  weight_b = jax.ShapeDtypeStruct((run.microbatch,), np.float32, sharding=_layout('b'))

  def residuals(params, token_bl, weight_b):
    loss = lambda params: program.loss(params, token_bl, weight_b)
    return jax.tree.leaves(jax.vjp(loss, params)[1])

  made = jax.make_jaxpr(residuals)(params, token_bl, weight_b).jaxpr
  given = {*made.invars, *made.constvars}
  for eqn in made.eqns:
    if eqn.primitive.name == 'reshape' and eqn.invars[0] in given:  # weights, as a loop takes them
      given |= {*eqn.outvars}
  new = {v for v in made.outvars if not isinstance(v, jax.extend.core.Literal)} - given
  return _bytes([v.aval for v in new])


def _layout(dims):
  return jax.NamedSharding(jax.sharding.get_mesh(), sharding.computed(dims))


def _bytes(tree) -> int:
  """Bytes of abstract arrays on each device."""
  share = lambda a: math.prod(a.sharding.shard_shape(a.shape)) * jnp.dtype(a.dtype).itemsize
  return sum(share(a) for a in jax.tree.leaves(tree))
