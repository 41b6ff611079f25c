"""`python -m benchmarks.loop --config=configs/tiny.py …`: what the loop adds to the steps it takes.

Trains as gptjax.train does, through its loop, loader, prefetching and metrics, and in turns with
that takes the same compiled step, in the same process, with one batch that lies on the device
already, and reads nothing between. Takes what gptjax.train takes; leaves out the ramp, saves and
validations.
"""

import argparse
import io
import itertools
import tempfile
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
from etils import epath

from gptjax import ahead, checkpoint, flags, metrics, process
from gptjax.config import resolve
from gptjax.data.corpora import open_all
from gptjax.data.mixture import Mixture, Stage
from gptjax.errors import told_plainly
from gptjax.loop import Trainer
from gptjax.preemption import Notice
from gptjax.saver import Saver
from gptjax.watchdog import Watchdog


class Turns:
  """A step for the loop to call that now and then takes steps of its own, with the first batch.

  Attributes:
    constant, loop: seconds of a step in each turn, and those of all processors; one of `loop` lies
      between two of `constant`.
  """

  def __init__(self, step: Callable, steps: int):
    """`steps` is how many make a turn."""
    self._step, self._steps, self._taken = step, steps, 0
    self._batch, self._began = (), None
    self.constant, self.loop = [], []

  def __call__(self, state: dict, *batch) -> tuple[dict, dict]:
    if self._taken % self._steps == 0:
      jax.block_until_ready(state)
      if self._taken:
        self.loop.append((clocks() - self._began) / self._steps)
      # A rate of 0, so that no batch is learned by heart and the others are no spikes.
      self._batch = self._batch or (*batch[:-1], np.float32(0))
      began = clocks()
      for _ in range(self._steps):
        state, _ = self._step(state, *self._batch)
      jax.block_until_ready(state)
      self._began = clocks()
      self.constant.append((self._began - began) / self._steps)
    self._taken += 1
    return self._step(state, *batch)


def clocks() -> np.ndarray:
  """Seconds, and seconds that this process has had of all processors."""
  return np.array([time.perf_counter(), time.process_time()])


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--steps', type=int, default=10, help='of a turn')
  parser.add_argument('--repeats', type=int, default=10, help='turns of each')
  a, words = parser.parse_known_args(argv)
  if a.steps < 1 or a.repeats < 1:
    parser.error('--steps and --repeats must be 1 or more')
  # One turn compiles, and one step ends the last.
  count = a.steps * (a.repeats + 1) + 1
  c = flags.parse(['', *words])
  c.batch.ramp_tokens = c.eval.every_tokens = c.save.every_tokens = 0.0
  # The last step of a run saves and validates: it is not reached.
  c.train_tokens = float((count + 1) * c.batch.sequences * c.model.context)
  run = resolve(c, process.devices())
  shape, mesh = run.program.shape, run.make_mesh()
  corpora = open_all(c.data.sources, shape)
  mixed = Mixture([Stage(0, corpora.stage)])
  with (
    jax.set_mesh(mesh),
    tempfile.TemporaryDirectory() as folder,
    checkpoint.Checkpoints(epath.Path(folder) / 'checkpoints', run.save_keep) as checkpoints,
    metrics.MetricsWriter(folder, resume_at=0, tensorboard=c.log.tensorboard) as writer,
    # Its rates count the other turns in, and nobody shall see them.
    metrics.ProgressBar(run.ramp.total, 0, shape.context, file=io.StringIO()) as bar,
    Watchdog(c.watchdog.seconds) as watchdog,
  ):
    turns = Turns(ahead.step(run, mesh), a.steps)
    trainer = Trainer(run, turns, corpora, mixed, mesh, writer, bar, epath.Path(folder))
    saver = Saver(checkpoints, {}, run.save_failures, bar.say)
    state = jax.jit(lambda: run.program.init(jax.random.key(c.seed)))()
    steps = itertools.islice(run.ramp.steps(), count)
    trainer.train(state, steps, 0, run.ramp.end(), saver, Notice(), watchdog)
  constant, loop = np.array(turns.constant[1:]), np.array(turns.loop[1:])
  # Beside the turns before and after it, as the machine is not as fast in all minutes.
  ratio = loop / ((constant[:-1] + constant[1:]) / 2)
  print(
    f'{shape.n_params:,} parameters, {c.batch.sequences} × {shape.context} tokens a step, '
    f'{run.program.numerics.dtype.name}, on {jax.default_backend()}; {a.repeats} turns of {a.steps}'
  )
  print(f'{"medians":16}{"s a step":>10}{"of processors":>15}')
  for name, found in (('constant batch', constant), ('loop', loop), ('ratio', ratio)):
    seconds, processors = np.median(found, axis=0)
    print(f'{name:16}{seconds:10.4f}{processors:15.4f}')
  print('ratios from {:.4f} to {:.4f}'.format(*np.quantile(ratio[:, 0], (0.25, 0.75))))


if __name__ == '__main__':
  with told_plainly():
    main()
