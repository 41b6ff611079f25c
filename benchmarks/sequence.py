"""`python -m benchmarks.sequence --aot=h100:1x8`: what sequence parallelism saves.

Compiles the training step of a size for a machine that need not be there, with the residual's
positions split over `tensor` and without, and prints what a device holds besides inputs and
outputs.
"""

import argparse

import jax

from configs import gpt3
from gptjax import ahead, machines, sharding, sizes
from gptjax.config import Run, resolve
from gptjax.errors import told_plainly
from gptjax.model import REMAT


def run_of(a: argparse.Namespace, devices, remat: str, tensor: int) -> Run:
  """Steps of one slice, over `tensor` and of the rest `fsdp`."""
  c, fsdp = gpt3.get_config(a.size), len(devices) // tensor
  c.model.n_layers = a.layers or c.model.n_layers
  c.mesh.fsdp, c.mesh.tensor = fsdp, tensor
  c.compute.microbatch, c.compute.remat = a.rows, remat
  c.batch.sequences, c.batch.ramp_tokens = a.rows * fsdp, 0.0
  return resolve(c, devices)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--aot', default='h100:1x8', help='the machine, of eight devices')
  parser.add_argument('--size', choices=sizes.GPT3, default='6.7b')
  parser.add_argument('--layers', type=int, help='other than the size has')
  parser.add_argument('--rows', type=int, default=1, help='sequences for each part of fsdp')
  parser.add_argument('--remat', choices=REMAT, nargs='+', default=['weights', 'dots'])
  a = parser.parse_args()
  jax.config.update('jax_platforms', 'cpu')
  devices = machines.find(a.aot).devices
  print(f'{a.size}, {a.rows} × 2048 tokens a device of fsdp, on 8 {devices[0].device_kind}')
  split = sharding.COMPUTE['t']
  print(f'{"remat":10}{"tensor":>8}{"whole MB":>12}{"split MB":>12}')
  for remat in a.remat:
    for tensor in (2, 4, 8):
      print(f'{remat:10}{tensor:8}', end='', flush=True)
      run = run_of(a, devices, remat, tensor)
      mesh = run.make_mesh(devices)
      for sharding.COMPUTE['t'] in (None, split):
        held = ahead.compile_step(run, mesh).memory_analysis().temp_size_in_bytes
        print(f'{held / 1e6:12,.0f}', end='', flush=True)
      print()


if __name__ == '__main__':
  with told_plainly():
    main()
