"""`python -m benchmarks.attention`: time and memory of attention from 1k to 32k tokens.

One dense and one banded layer, forward and backward. Memory is what the compiled program holds
besides its inputs and outputs; a time is the median of some, on a GPU each of many calls that are
dispatched together, since one would be over before its dispatch. With `--aot=v5p:2x2x2` or
`--aot=h100:1x8` it compiles for a machine that need not be there, and prints the memory alone.
"""

import argparse
import json

import jax
import jax.numpy as jnp

from benchmarks.train_step import seconds
from gptjax import files, kernels, machines, sizes
from gptjax.errors import told_as, told_plainly

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
  parser.add_argument('--rows', type=int, default=1)
  parser.add_argument('--repeats', type=int, default=3)
  parser.add_argument('--calls', type=int, default=0, help='0: 1 on a CPU, 20 elsewhere')
  parser.add_argument('--json', metavar='FILE', help='write the figures')
  a = parser.parse_args()
  if a.aot:
    jax.config.update('jax_platforms', 'cpu')
  device = machines.find(a.aot).devices[0] if a.aot else jax.devices()[0]
  dtype = jnp.dtype('float32' if device.platform == 'cpu' else 'bfloat16')
  numbers = a.heads, a.width, a.window, a.rows, a.repeats
  if min(numbers) < 1 or a.calls < 0 or a.longest < LENGTHS[0]:
    parser.error(f'numbers must be 1 or more, and --longest {LENGTHS[0]} or more')
  calls = a.calls or (1 if device.platform == 'cpu' else 20)
  layers = {'dense': None, 'banded': a.window}
  on = f'{a.heads} heads of {a.width}, {dtype.name}, window {a.window}, on {device.device_kind}'
  print(f'{a.rows} row(s), {on}')
  found = []
  columns = [f'{layer} {unit}' for layer in layers for unit in ['MB'] + ['s'] * (not a.aot)]
  print(f'{"tokens":>8}' + ''.join(f'{column:>12}' for column in columns) + f'{"L × L MB":>12}')
  for L in (L for L in LENGTHS if L <= a.longest):
    shape = sizes.Shape(1, a.heads * a.width, a.heads, a.width, 1, L, 1, (None,))
    attend = kernels.choose(a.kernel, [device], shape, dtype, 0.0)
    print(f'{L:8}', end='', flush=True)
    for layer, window in layers.items():
      sharding = jax.sharding.SingleDeviceSharding(device)
      operand = jax.ShapeDtypeStruct((a.rows, L, a.heads, a.width), dtype, sharding=sharding)
      program = compiled(attend, window, operand)
      held = program.memory_analysis().temp_size_in_bytes
      found.append({'tokens': L, 'layer': layer, 'held_bytes': held})
      print(f'{held / 1e6:12,.1f}', end='', flush=True)
      if not a.aot:
        x = jax.random.normal(jax.random.key(L), operand.shape, dtype)
        run = lambda: [program(x, x, x, x) for _ in range(calls)][-1]  # noqa: B023
        found[-1]['seconds'] = seconds(run, a.repeats) / calls
        print(f'{found[-1]["seconds"]:12.6f}', end='', flush=True)
    print(f'{a.rows * a.heads * L * L * dtype.itemsize / 1e6:12,.0f}')
  if a.json:
    with told_as(a.json, 'a place to write to', '--json=attention.json', OSError):
      files.write_whole(a.json, json.dumps({'on': on, 'rows': a.rows, 'layers': found}))


if __name__ == '__main__':
  with told_plainly():
    main()
