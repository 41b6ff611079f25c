"""`python -m benchmarks.attention`: time and memory of attention from 1k to 32k tokens.

One dense and one banded layer, forward and backward, one row. Memory is what the compiled program
holds besides its inputs and outputs. With `--aot=v5p:2x2x2` or `--aot=h100:1x8` it compiles for a
machine that need not be there, and prints the memory alone.
"""

import argparse

import jax
import jax.numpy as jnp

from benchmarks.train_step import seconds
from gptjax import kernels, machines, sizes
from gptjax.errors import told_plainly

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)


def compiled(attend, window: int | None, operand: jax.ShapeDtypeStruct):
  """A program from q, k, v and the cotangent of o, all like the operand, to o, dq, dk, dv."""

  def run(q_blhk, k_bshk, v_bshk, do_blhk):
    o_blhk, pullback = jax.vjp(lambda *qkv: attend(*qkv, window), q_blhk, k_bshk, v_bshk)
    return o_blhk, *pullback(do_blhk)

  return jax.jit(run).lower(*[operand] * 4).compile()


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--aot', default='', help='compile for this machine and run nothing')
  parser.add_argument('--kernel', choices=('auto', *kernels.KERNELS), default='auto')
  parser.add_argument('--heads', type=int, default=12)
  parser.add_argument('--width', type=int, default=64, help='of a head')
  parser.add_argument('--window', type=int, default=256, help='of the banded layer')
  parser.add_argument('--longest', type=int, default=LENGTHS[-1], help='tokens')
  parser.add_argument('--repeats', type=int, default=3)
  a = parser.parse_args()
  if a.aot:
    jax.config.update('jax_platforms', 'cpu')
  device = machines.find(a.aot).devices[0] if a.aot else jax.devices()[0]
  dtype = jnp.dtype('float32' if device.platform == 'cpu' else 'bfloat16')
  if min(a.heads, a.width, a.window, a.repeats) < 1 or a.longest < LENGTHS[0]:
    parser.error(f'numbers must be 1 or more, and --longest {LENGTHS[0]} or more')
  layers = {'dense': None, 'banded': a.window}
  print(f'{a.heads} heads of {a.width}, {dtype.name}, window {a.window}, on {device.device_kind}')
  columns = [f'{layer} {unit}' for layer in layers for unit in ['MB'] + ['s'] * (not a.aot)]
  print(f'{"tokens":>8}' + ''.join(f'{column:>12}' for column in columns) + f'{"L × L MB":>12}')
  for L in (L for L in LENGTHS if L <= a.longest):
    shape = sizes.Shape(1, a.heads * a.width, a.heads, a.width, 1, L, 1, (None,))
    attend = kernels.choose(a.kernel, [device], shape, dtype, 0.0)
    print(f'{L:8}', end='', flush=True)
    for window in layers.values():
      sharding = jax.sharding.SingleDeviceSharding(device)
      operand = jax.ShapeDtypeStruct((1, L, a.heads, a.width), dtype, sharding=sharding)
      program = compiled(attend, window, operand)
      print(f'{program.memory_analysis().temp_size_in_bytes / 1e6:12,.1f}', end='', flush=True)
      if not a.aot:
        x = jax.random.normal(jax.random.key(L), operand.shape, dtype)
        print(f'{seconds(lambda: program(x, x, x, x), a.repeats):12.3f}', end='', flush=True)  # noqa: B023
    print(f'{a.heads * L * L * dtype.itemsize / 1e6:12,.0f}')


if __name__ == '__main__':
  with told_plainly():
    main()
