"""`python benchmarks/train_step.py --size=125m --context=1024 --batch=1`: where a step's time goes.

Prints tokens/s, the parts of a step apart, and the fraction of the rate at which this machine
multiplies two large matrices, measured in the same process. One device. With `--against=torch` it
times the step beside PyTorch's instead (`benchmarks/against.py`).
"""

import argparse
import dataclasses
import functools
import pathlib
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from gptjax import compiler, flags, metrics, model, sharding, sizes
from gptjax.config import resolve
from gptjax.errors import mistake, told_plainly
from gptjax.step import Program

CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'
SQUARE = 4096  # rows of the matrices multiplied; larger ones run no faster on CPU, GPU or TPU


def seconds(run: Callable, repeats: int) -> float:
  """The median time of a call, after one that compiles; the call returns what to wait for."""
  jax.block_until_ready(run())
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(run())
    times.append(time.perf_counter() - start)
  return statistics.median(times)


def matmul_rate(dtype: jnp.dtype, repeats: int) -> float:
  """FLOP/s of one large product."""
  a = jnp.ones((SQUARE, SQUARE), dtype)
  # In f32, as sums of products are: only so are those of bf16 fast on a CPU.
  product = jax.jit(functools.partial(jnp.matmul, preferred_element_type=jnp.float32))
  return 2 * SQUARE**3 / seconds(lambda: product(a, a), repeats)


def measure(program: Program, batch: int, slices: int, repeats: int) -> dict[str, float]:
  """Seconds of a step and of its parts, for `batch` sequences in so many slices."""
  shape = program.shape
  state = jax.jit(lambda: program.init(jax.random.key(0)))()
  params, moments = state['params'], state['moments']
  random = np.random.default_rng(0)
  rows = (slices, batch // slices, shape.context + 1)
  token_gbl = jnp.asarray(random.integers(0, shape.vocab_size, rows).astype('uint16'))
  token_bl = token_gbl[0]
  weight_b = jnp.ones(rows[1])
  x_bld = jnp.ones((rows[1], shape.context, shape.d_model), program.numerics.between)
  e_vd = params['embed'].astype(program.numerics.between)

  def loss(x_bld, e_vd):
    return program.cross_entropy(x_bld, e_vd, token_bl, weight_b)

  forward = jax.jit(lambda params: program.hidden(params, token_bl[:, :-1])[0])
  head = jax.jit(jax.grad(loss, (0, 1)))
  gradients = jax.jit(program.gradients)
  update = jax.jit(program.optimizer.update)
  times = {
    'forward': slices * seconds(lambda: forward(params), repeats),
    'loss': slices * seconds(lambda: head(x_bld, e_vd), repeats),
    'gradients': seconds(lambda: gradients(params, token_gbl, 0, batch), repeats),
    'optimizer': seconds(lambda: update(params, moments, params, np.float32(1e-4), 1.0), repeats),
  }
  options = compiler.options(jax.default_backend())
  step = jax.jit(program.train_step, donate_argnums=0, compiler_options=options)
  box = [state]

  def whole():
    box[0], measured = step(box[0], token_gbl, 0, batch, np.float32(1e-4))
    return measured

  times['step'] = seconds(whole, repeats)
  times['backward'] = times.pop('gradients') - times['forward'] - times['loss']
  return times


def program_words(a: argparse.Namespace) -> list[str]:
  """The command line of a config with the program that is asked for, without a dtype."""
  knobs = {
    'model.n_layers': a.layers or sizes.GPT3[a.size].n_layers,
    'model.context': a.context,
    'train_tokens': float(a.context * a.batch),
    'batch.sequences': a.batch,
    'batch.ramp_tokens': 0.0,
    'compute.microbatch': a.batch // a.slices,
    'compute.remat': a.remat,
    'compute.layers': a.program,
    'compute.loss_chunk': a.loss_chunk,
  }
  words = [f'--config.{name}={value}' for name, value in knobs.items()]
  return [f'--config={CONFIGS / "gpt3.py"}:{a.size}', *words]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--size', choices=sizes.GPT3, default='125m')
  parser.add_argument('--context', type=int, default=2048)
  parser.add_argument('--batch', type=int, default=1, help='sequences of a step')
  parser.add_argument('--slices', type=int, default=1, help='slices of a step')
  parser.add_argument('--layers', type=int, default=0, help="0: the size's own")
  parser.add_argument('--dtype', choices=('float32', 'bfloat16'), help='default: float32')
  parser.add_argument('--remat', choices=model.REMAT, default='dots')
  parser.add_argument(
    '--program', choices=('auto', 'loop', 'apart'), default='auto', help='as config.compute.layers'
  )
  parser.add_argument('--loss_chunk', type=int, default=512)
  parser.add_argument('--repeats', type=int, default=3)
  parser.add_argument('--deterministic', action='store_true', help='as config.deterministic')
  beside = parser.add_argument_group("beside PyTorch's step")
  beside.add_argument('--against', choices=('torch',), help='time both, in float32 and bfloat16')
  beside.add_argument('--contenders', default='', help='default: all that the machine has')
  beside.add_argument('--steps', type=int, default=10, help='timed together on a GPU')
  beside.add_argument('--halve', action='store_true', help='--batch where a GPU lacks memory')
  beside.add_argument('--json', metavar='FILE', help='write the figures')
  a = parser.parse_args()
  if a.slices < 1 or a.batch % a.slices or a.repeats < 1 or a.steps < 1:
    parser.error('--slices must divide --batch, and they, --repeats and --steps be 1 or more')
  if not a.against and (a.contenders or a.halve or a.json):
    parser.error('--contenders, --halve and --json want --against=torch')
  if a.against and a.dtype:
    parser.error('--against times both dtypes; try --contenders=ours-bf16 instead of --dtype')
  compiler.fix_order(a.deterministic)
  words = program_words(a)
  if a.against:
    if not __package__:
      got, fix = 'a script, which finds no other', 'python -m benchmarks.train_step --against=torch'
      raise mistake('--against', got, 'the module', fix)
    from benchmarks import against  # which wants what the parts do not

    return against.main(a, words)
  dtype = a.dtype or 'float32'
  config = flags.parse(['', *words, f'--config.compute.dtype={dtype}'])
  device = jax.devices()[0]
  program = resolve(config, [device]).program
  shape, numerics = program.shape, program.numerics
  print(f'{shape.n_params:,} parameters, {a.batch} × {a.context} tokens in {a.slices} slice(s)')
  print(f'{dtype}, attention {numerics.attend.__name__}, remat {a.remat}, on {device.device_kind}')
  with jax.set_mesh(sharding.make_mesh(1, 1, 1, [device])):
    rate = matmul_rate(numerics.dtype, a.repeats)
    times = measure(program, a.batch, a.slices, a.repeats)
  tokens = a.batch * a.context
  flops = tokens * shape.train_flops
  head_flops = 6 * tokens * shape.vocab_size * shape.d_model
  body_flops = tokens * dataclasses.replace(shape, vocab_size=0).forward_flops
  counted = {
    'forward': body_flops,
    'loss': head_flops,
    'backward': 2 * body_flops,
    'optimizer': None,
    'step': flops,
  }
  print(f'matrix product {rate / 1e9:,.0f} GFLOP/s\n')
  print(f'{"":10}{"seconds":>10}{"share":>8}{"GFLOP/s":>10}{"of product":>12}')
  for name, count in counted.items():
    line = f'{name:10}{times[name]:10.3f}{times[name] / times["step"]:8.1%}'
    if count:
      line += f'{count / times[name] / 1e9:10,.0f}{count / times[name] / rate:12.1%}'
    print(line)
  print(f'\n{tokens / times["step"]:,.0f} tokens/s')
  used = metrics.mfu(shape.train_flops, tokens / times['step'], device.device_kind, 1)
  if used is not None:
    print(f'MFU {used:.1%}')


if __name__ == '__main__':
  with told_plainly():
    main()
