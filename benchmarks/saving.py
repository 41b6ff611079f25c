"""`python -m benchmarks.saving [--size=125m]`: how long a checkpoint holds training up.

Takes steps, and saves after each of some: the time for which `save` holds the loop up, until the
state is copied, beside that of a step; then how long it is until the files are written and listed
with their hashes, in the background; and how long it takes to read and check them at a start.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from configs import gpt3
from gptjax import ahead, checkpoint, process
from gptjax.config import resolve
from gptjax.errors import told_plainly


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--size', default='125m')
  parser.add_argument('--layers', type=int, default=0, help='default: those of the size')
  parser.add_argument('--context', type=int, default=1024)
  parser.add_argument('--times', type=int, default=3)
  a = parser.parse_args()
  c = gpt3.get_config(a.size)
  c.model.context, c.model.n_layers = a.context, a.layers or c.model.n_layers
  c.compute.microbatch, c.batch.ramp_tokens = 1, 0.0
  devices = process.devices()
  c.batch.sequences = len(devices)
  run = resolve(c, devices)
  mesh = run.make_mesh()
  seconds = {'step': [], 'held up': [], 'until it is on disk': [], 'read and checked': []}

  def timed(name, function, *args):
    start = time.perf_counter()
    result = jax.block_until_ready(function(*args))
    seconds[name].append(time.perf_counter() - start)
    return result

  with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
    state = jax.jit(lambda: run.program.init(jax.random.key(0)))()
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    _, like, *_ = ahead.abstract_arguments(run)
    token_gbl = jax.device_put(np.zeros(like.shape, like.dtype), like.sharding)
    args = token_gbl, np.int32(0), np.int32(run.microbatch), np.float32(1e-4)
    step = ahead.step(run, mesh)
    state, _ = step(state, *args)
    checkpoints = checkpoint.Checkpoints(Path(folder), keep=1)
    for i in range(1, a.times + 1):
      state, _ = timed('step', step, state, *args)
      start = time.perf_counter()
      timed('held up', checkpoints.save, i, state, {})
      checkpoints.wait()
      seconds['until it is on disk'].append(time.perf_counter() - start)
      timed('read and checked', checkpoints.newest_whole)
    checkpoints.close()
  print(f'{run.program.shape.n_params:,} parameters, {size / 1e9:.2f} GB of state')
  usual = statistics.median(seconds['step'])
  for name, found in seconds.items():
    middle = statistics.median(found)
    print(f'{name:20} {middle:8.3f} s  {middle / usual:6.1%} of a step')


if __name__ == '__main__':
  with told_plainly():
    main()
