"""A model small enough to compile in seconds, and meshes of the CPU devices that tests have."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import attention, machines, products, sharding
from gptjax.decode import Decoder
from gptjax.model import Numerics
from gptjax.optimizer import AdamW
from gptjax.sizes import Shape
from gptjax.stability import Guard
from gptjax.step import Program

# Three layers: one period of the pattern, and one layer left over. n_heads · d_head ≠ d_model, and
# the vocabulary is padded.
SHAPE = Shape(3, 32, 4, 6, 64, 16, 250, (None, 5))
F32 = jnp.dtype('float32')
NUMERICS = Numerics(F32, F32, attention.reference, products.plainly, 'none', False, 0.0)
ADAMW = AdamW(0.9, 0.95, 1e-8, 0.1, 1.0)
GUARD = Guard(10.0, 16)
MESHES = [(8, 1, 1), (1, 8, 1), (1, 2, 4), (2, 2, 2)]


@dataclasses.dataclass(frozen=True)
class Device:
  """Of a machine that the tests do not have."""

  platform: str
  device_kind: str = ''
  compute_capability: str = ''
  id: int = 0
  slice_index: int = 0
  process_index: int = 0


def machine_or_skip(topology: str) -> machines.Machine:
  """A machine that is not there; skips the test where its compiler is not installed."""
  if missing := machines.lacking(topology.partition(':')[0]):
    pytest.skip(f'not installed: {missing}')
  return machines.find(topology)


def program(
  shape: Shape = SHAPE, loss_chunk: int = 6, seed: int = 0, guard: Guard = GUARD, **numerics
) -> Program:
  """A program; keywords replace what is in NUMERICS."""
  return Program(shape, dataclasses.replace(NUMERICS, **numerics), ADAMW, loss_chunk, seed, guard)


def on(data: int = 1, fsdp: int = 1, tensor: int = 1, stage: int = 1):
  """Sets a mesh of as many devices as it takes, for a `with`."""
  devices = jax.devices()[: math.prod((data, fsdp, tensor, stage))]
  return jax.set_mesh(sharding.make_mesh(data, fsdp, tensor, devices, stage=stage))


def rows(slices: int, b: int, seed: int = 0, shape: Shape = SHAPE) -> np.ndarray:
  """Random windows [g, b, context + 1]."""
  random = np.random.default_rng(seed)
  return random.integers(0, shape.vocab_size, (slices, b, shape.context + 1)).astype('uint16')


def put(token_gbl: np.ndarray) -> jax.Array:
  """Windows on the mesh that is set."""
  return jax.device_put(token_gbl, sharding.computed('gbl'))


def init(program: Program) -> dict:
  """A new state of a program on the mesh that is set."""
  layout = jax.tree.map(lambda a: a.sharding, program.abstract_state())
  return jax.device_put(_initial(program.shape, program.guard), layout)


def laid(program: Program, params: dict) -> dict:
  """Params on the mesh that is set."""
  like = program.abstract_state()['params']
  return jax.tree.map(lambda a, like: jax.device_put(a, like.sharding), params, like)


def decoder(model: tuple[Program, dict], rows: int, positions: int | None = None) -> Decoder:
  """Of a program and its params, on the mesh that is set."""
  return Decoder(model[0], laid(*model), rows, positions)


@functools.cache
def _initial(shape: Shape, guard: Guard) -> dict:
  # Compiled once for all tests: test_sharding shows that the mesh does not matter.
  with on():
    state = jax.jit(lambda: program(shape, guard=guard).init(jax.random.key(0)))()
  return jax.tree.map(np.asarray, state)


def assert_close(a, b, rtol: float = 1e-4, atol: float = 1e-6) -> None:
  """Compares two trees leaf by leaf and names the leaf that differs."""
  a, b = jax.tree_util.tree_leaves_with_path(a), jax.tree_util.tree_leaves_with_path(b)
  assert [path for path, _ in a] == [path for path, _ in b]
  for (path, x), (_, y) in zip(a, b, strict=True):
    name = jax.tree_util.keystr(path)
    np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol, atol, err_msg=name)
