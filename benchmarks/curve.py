"""`python -m benchmarks.curve --config=configs/tiny.py`: our loss and PyTorch's, step by step.

Both begin with the same weights and read the same windows of the config's corpora, through our
loader, at the same rates of the clock; on a CPU in float32, elsewhere in bfloat16. Draws both
curves into one picture and prints the largest difference. Takes what gptjax.train takes.
"""

import argparse
import itertools
import json
import pathlib
import statistics
import tempfile
from collections.abc import Sequence

import jax
import numpy as np
from matplotlib.figure import Figure

from benchmarks import against
from gptjax import files, flags, report, schedule
from gptjax.config import resolve
from gptjax.data import loader
from gptjax.data.corpora import open_all
from gptjax.data.mixture import Mixture, Stage
from gptjax.errors import Mistake, mistake, told_as, told_plainly

# A compiler would take longer than the steps.
ON_CPU, ELSEWHERE = ['ours-f32', 'torch-eager-f32'], ['ours-bf16', 'torch-eager-bf16']


def windows(words: Sequence[str], count: int) -> tuple[np.ndarray, list[int], list[np.float32]]:
  """The first steps of a run: windows [s, g, b, context + 1], rows that count, rates.

  Args:
    words: the command line of the run.
    count: of steps.
  """
  devices = jax.devices('cpu')[:1]
  config = flags.parse(['', *words, '--config.compute.attention=chunked'])
  run = resolve(config, devices)
  corpora = open_all(config.data.sources, run.program.shape)
  mixed = Mixture([Stage(0, corpora.stage)])
  stream, mesh = corpora.stream(mixed, run.program.seed), run.make_mesh(devices)
  steps = [*itertools.islice(run.ramp.steps(0, 0, run.skipped), count)]
  if len(steps) < count:
    fix = f'--steps={len(steps)}, or a longer --config.train_tokens'
    raise mistake('--steps', count, f'at most {len(steps)}, all of the run', fix)
  place = lambda step: loader.place(
    stream, step.start, step.rows, run.slices, run.microbatch, mesh
  )  # fmt: skip
  token_sgbl = np.stack([np.asarray(place(step)) for step in steps])
  return token_sgbl, [s.rows for s in steps], [schedule.at(run.lr, s.end) for s in steps]


def losses(race: against.Race, name: str, count: int) -> list[float]:
  """Of a contender's first steps. Raises a Mistake where it has failed."""
  try:
    worker, _ = race.start(name)
    try:
      return worker.steps(count)['losses']
    finally:
      worker.close()
  except against.Failed as e:
    raise Mistake(f'{name}: {e}') from None


def draw(found: dict[str, list[float]]) -> Figure:
  """All curves, and below them how far they are from the first."""
  with report.plt.rc_context(report.STYLE):
    figure = report.plt.figure(figsize=(8, 5.4), layout='constrained')
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    (first, reference), *others = found.items()
    steps = np.arange(1, len(reference) + 1)
    above.plot(steps, reference, color=report.COLOURS[0], linewidth=2.4, label=first)
    for colour, (name, curve) in zip(report.COLOURS[1:], others, strict=False):
      above.plot(steps, curve, color=colour, linewidth=0.9, label=name)
      below.plot(steps, np.subtract(curve, reference), color=colour, linewidth=0.9)
    above.legend()
    above.set_title('Loss in nats per token')
    below.set_title(f'Difference from {first}')
    below.set_xlabel('step')
  return figure


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--steps', type=int, default=100)
  parser.add_argument('--out', default='curve.png', metavar='FILE.png')
  parser.add_argument('--json', metavar='FILE', help='write the losses')
  parser.add_argument(
    '--contenders', default='', help='of benchmarks.train_step; the first is ours'
  )
  a, words = parser.parse_known_args(argv)
  if a.steps < 1 or not a.out.endswith('.png'):
    parser.error('--steps must be 1 or more, and --out a name.png')
  names = against.chosen(a.contenders)
  against.check_installed(names)
  # This process reads; what it would take of a GPU's memory is for the contenders.
  jax.config.update('jax_platforms', 'cpu')
  token_sgbl, rows, rates = windows(words, a.steps)
  with tempfile.TemporaryDirectory(prefix='gptjax-curve-') as folder:
    race = against.Race(pathlib.Path(folder), words)
    race.give(token_sgbl, rows, rates)
    names = names or (ON_CPU if race.platform == 'cpu' else ELSEWHERE)
    found = {name: losses(race, name, a.steps) for name in names}
  reference = found[names[0]]
  print(f'{"step":>6}{"rows":>6}' + ''.join(f'{name:>22}' for name in names))
  for s in sorted({0, *range(9, a.steps, max(1, a.steps // 10)), a.steps - 1}):
    print(f'{s + 1:6}{rows[s]:6}' + ''.join(f'{found[name][s]:22.5f}' for name in names))
  apart = {}
  for name in names[1:]:
    gaps = np.abs(np.subtract(found[name], reference))
    apart[name] = float(gaps.max())
    mean = statistics.mean(gaps)
    print(
      f'{name} and {names[0]}: at most {apart[name]:.2g} nats apart, at step {gaps.argmax() + 1}; '
      f'{mean:.2g} on average'
    )
  figure = draw(found)
  with told_as(a.out, 'a place to write to', '--out=curve.png', OSError):
    figure.savefig(a.out)
    if a.json:
      record = {'platform': race.platform, 'on': race.kind, 'losses': found, 'apart': apart}
      files.write_whole(a.json, json.dumps(record))
  print(f'drawn in {a.out}')


if __name__ == '__main__':
  with told_plainly():
    main()
