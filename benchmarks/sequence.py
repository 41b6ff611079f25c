"""`python -m benchmarks.sequence --aot=h100:1x8`: what sequence parallelism saves.

Compiles the training step of a size for a machine that need not be there, with the residual's
positions split over `tensor` and without, and prints what a device holds besides inputs and
outputs.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from gptjax import kernels, machines, sharding, sizes
from gptjax.errors import told_plainly
from gptjax.model import REMAT, Numerics
from gptjax.optimizer import AdamW
from gptjax.step import Program


def compiled(a: argparse.Namespace, devices, remat: str, tensor: int):
  """The training step of one slice, over `tensor` and of the rest `fsdp`."""
  row = sizes.GPT3[a.size]
  shape = sizes.Shape(
    a.layers or row.n_layers,
    row.d_model,
    row.n_heads,
    row.d_head,
    4 * row.d_model,
    2048,
    50257,
    (None, 256),
  )
  sizes_of_mesh = {'stage': 1, 'data': 1, 'fsdp': len(devices) // tensor, 'tensor': tensor}
  dtype = jnp.dtype('bfloat16')
  attend = kernels.choose('auto', devices, shape, dtype, 0.0)
  adamw = AdamW(0.9, 0.95, 1e-8, 0.1, 1.0)
  program = Program(shape, Numerics(dtype, attend, remat, 0.0), adamw, 512, 0)
  with jax.set_mesh(sharding.make_mesh(devices=devices, **sizes_of_mesh)):
    rows = a.rows * sizes_of_mesh['fsdp']
    layout = jax.NamedSharding(jax.sharding.get_mesh(), sharding.computed('gbl'))
    token_gbl = jax.ShapeDtypeStruct((1, rows, shape.context + 1), jnp.uint16, sharding=layout)
    step = jax.jit(program.train_step, donate_argnums=0)
    args = program.abstract_state(), token_gbl, np.int32(0), np.int32(rows), np.float32(1e-4)
    return step.lower(*args).compile()


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--aot', default='h100:1x8', help='the machine, of eight devices')
  parser.add_argument('--size', choices=sizes.GPT3, default='6.7b')
  parser.add_argument('--layers', type=int, help='other than the size has')
  parser.add_argument('--rows', type=int, default=1, help='sequences for each part of fsdp')
  parser.add_argument('--remat', choices=REMAT, nargs='+', default=['weights', 'dots'])
  a = parser.parse_args()
  jax.config.update('jax_platforms', 'cpu')
  devices = machines.devices(a.aot)
  print(f'{a.size}, {a.rows} × 2048 tokens a device of fsdp, on 8 {devices[0].device_kind}')
  split = sharding.COMPUTE['t']
  print(f'{"remat":10}{"tensor":>8}{"whole MB":>12}{"split MB":>12}')
  for remat in a.remat:
    for tensor in (2, 4, 8):
      print(f'{remat:10}{tensor:8}', end='', flush=True)
      for sharding.COMPUTE['t'] in (None, split):
        held = compiled(a, devices, remat, tensor).memory_analysis().temp_size_in_bytes
        print(f'{held / 1e6:12,.0f}', end='', flush=True)
      print()


if __name__ == '__main__':
  with told_plainly():
    main()
