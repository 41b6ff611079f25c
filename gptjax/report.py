"""`python -m gptjax.report runs/tiny [runs/other …] [--out=FILE.png]` draws and sums up runs."""

import argparse
import io
import math
import os
import pathlib
import statistics
from collections.abc import Sequence

import matplotlib

matplotlib.use('Agg')  # before pyplot: a machine that trains has no screen

import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import FuncFormatter, MaxNLocator  # noqa: E402

from gptjax import files, goodput, journal  # noqa: E402
from gptjax.errors import Mistake, mistake, raise_all, told_as, told_plainly  # noqa: E402

# Okabe & Ito 2008: told apart by colour-blind readers too. Their yellow is too pale for a line.
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')
INK, FAINT = '#333333', '#DDDDDD'

STYLE = {
  'figure.dpi': 150,
  'font.size': 9,
  'text.color': INK,
  'axes.edgecolor': '#999999',
  'axes.labelcolor': INK,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.grid': True,
  'axes.axisbelow': True,
  'axes.titlesize': 10,
  'axes.titleweight': 'bold',
  'axes.titlelocation': 'left',
  'grid.color': FAINT,
  'grid.linewidth': 0.6,
  'xtick.color': INK,
  'ytick.color': INK,
  'legend.frameon': False,
}


def main(argv: Sequence[str] | None = None) -> None:
  """Draws the runs of a command line into one picture and prints a table of them.

  Raises:
    Mistake: with all of the runs that have no metrics.
  """
  parser = argparse.ArgumentParser(prog='python -m gptjax.report', description=__doc__)
  parser.add_argument(
    'workdirs', type=os.path.expanduser, nargs='+', metavar='WORKDIR', help='the workdir of a run'
  )
  parser.add_argument(
    '--out',
    type=os.path.expanduser,
    metavar='FILE.png',
    help='default: report.png, in the workdir if there is but one',
  )
  args = parser.parse_args(argv)
  runs = load(args.workdirs)
  own = len(args.workdirs) == 1 and not files.in_bucket(args.workdirs[0])
  out = pathlib.Path(args.out or pathlib.Path(args.workdirs[0] if own else '') / 'report.png')
  if out.suffix != '.png':
    raise mistake('--out', out, 'a file named .png', f'--out={out}.png')
  if not out.parent.is_dir():
    raise mistake('--out', out, 'a file in a folder that exists', f'mkdir -p {out.parent}')
  figure = draw(runs)
  print(table(runs))
  for name, records in runs.items():
    if told := goodput.table(records):
      print(f'{name}:\n{told}' if len(runs) > 1 else told)
  image = io.BytesIO()
  figure.savefig(image)
  with told_as(out, 'a place to write to', '--out=report.png', OSError):
    files.write_whole(out, image.getvalue())
  plt.close(figure)
  print(f'drawn in {out}')


def load(workdirs: Sequence[str]) -> dict[str, list[dict]]:
  """The records of each run, by its name: the last part of its path where that tells it apart."""
  paths = list(dict.fromkeys(files.folder(workdir) for workdir in workdirs))
  # A dollar would begin a formula in the legend.
  names = [path.name.replace('$', r'\$') for path in paths]
  runs, mistakes = {}, []
  for path, name in zip(paths, names, strict=True):
    try:
      records = journal.read(path)
    except Mistake as e:
      mistakes.append(e)
    else:
      runs[name if names.count(name) == 1 else str(path)] = records
  raise_all(mistakes)
  return runs


def draw(runs: dict[str, list[dict]]) -> Figure:
  """Loss, learning rate, batch and throughput of each run against the tokens consumed."""
  with plt.rc_context(STYLE):
    figure = plt.figure(figsize=(10, 6.4), layout='constrained')
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    grid = figure.add_gridspec(2, 3, height_ratios=(2, 1))
    loss = figure.add_subplot(grid[0, :])
    below = [figure.add_subplot(grid[1, i], sharex=loss) for i in range(3)]
    for i, (name, records) in enumerate(runs.items()):
      colour = COLOURS[i % len(COLOURS)]
      _draw_loss(loss, records, name, colour)
      # Where the plans of runs agree, the earlier ones show at the edges of the later.
      wide = 1.2 + 0.8 * min(len(runs) - 1 - i, 4)
      widths = {'lr': wide, 'batch': wide, 'tokens_per_second': 0.8}
      for axes, (key, width) in zip(below, widths.items(), strict=True):
        _line(axes, series(records, 'train', key), {'color': colour, 'linewidth': width})
    _draw_baselines(loss, runs)
    loss.set_xlim(0, 1.02 * max(r['tokens'] for records in runs.values() for r in records) or 1)
    loss.set_title('Loss in nats per token: training thin, validation with dots')
    # Outside, where no curve can run under it.
    figure.legend(loc='outside upper left', ncols=min(4, len(loss.get_legend_handles_labels()[0])))
    titles = ('Learning rate', 'Batch (sequences)', 'Throughput (tokens/s)')
    for axes, title in zip(below, titles, strict=True):
      axes.set_title(title)
      axes.set_ylim(bottom=0)
      if not axes.lines:
        axes.text(0.5, 0.5, 'not measured', transform=axes.transAxes, ha='center', color='#777777')
        axes.set_yticks([])
    for axes in (loss, *below):
      axes.set_xlabel('tokens')
      axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))
      axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: short(y)))
    # Axes that share x share their ticks too: as many as the narrow ones have room for.
    loss.xaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)))
  return figure


def table(runs: dict[str, list[dict]]) -> str:
  """A line for each run; `-` stands for what was not measured."""
  rows = [('run', 'tokens', 'steps', 'train loss', 'best validation', 'bits/byte', 'tokens/s')]
  for name, records in runs.items():
    losses = series(records, 'train', 'loss')[1]
    validation = [loss for loss in series(records, 'validation', 'loss')[1] if math.isfinite(loss)]
    bits = [b for b in series(records, 'validation', 'bits_per_byte')[1] if math.isfinite(b)]
    rates = series(records, 'train', 'tokens_per_second')[1]
    rows.append(
      (
        name,
        f'{max(r["tokens"] for r in records):,}',
        f'{max(r["step"] for r in records):,}',
        f'{losses[-1]:.4f}' if losses else '-',
        f'{min(validation):.4f}' if validation else '-',
        f'{min(bits):.4f}' if bits else '-',
        f'{statistics.median(rates):,.0f}' if rates else '-',
      )
    )
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  line = lambda row: '  '.join(
    cell.rjust(width) if i else cell.ljust(width)
    for i, (cell, width) in enumerate(zip(row, widths, strict=True))
  )
  return '\n'.join(line(row) for row in rows)


def series(records: list[dict], kind: str, key: str) -> tuple[list[int], list[float]]:
  """The tokens and the values of a key, from the records of a kind that have it."""
  found = [(r['tokens'], r[key]) for r in records if r['kind'] == kind and key in r]
  return [tokens for tokens, _ in found], [value for _, value in found]


def short(number: float) -> str:
  """1500000 as 1.5M."""
  for unit, letter in ((1e12, 'T'), (1e9, 'B'), (1e6, 'M'), (1e3, 'k')):
    if abs(number) >= unit:
      return f'{number / unit:.4g}{letter}'
  return f'{number:.4g}'


def _draw_loss(axes: Axes, records: list[dict], name: str, colour: str) -> None:
  """Training thin, validation with dots; a cross on the floor where a loss is no number, and a
  stroke at the ceiling where a step was left out.
  """
  train = series(records, 'train', 'loss')
  _line(axes, train, {'color': colour, 'linewidth': 0.7, 'alpha': 0.55})
  held_out = series(records, 'validation', 'loss')
  dots = {'marker': 'o', 'markersize': 4.5, 'markeredgecolor': 'white', 'markeredgewidth': 0.6}
  axes.plot(*held_out, color=colour, linewidth=1.6, zorder=3, label=name, **dots)
  pairs = zip(train[0] + held_out[0], train[1] + held_out[1], strict=True)
  lost = [at for at, loss in pairs if not math.isfinite(loss)]
  if lost:
    floor = axes.get_xaxis_transform()
    label = f'{name}: NaN or infinite'
    axes.plot(lost, [0.03] * len(lost), 'x', color=colour, mew=1.5, transform=floor, label=label)
  left_out = [r['tokens'] for r in records if r['kind'] == 'skip']
  if left_out:
    ceiling, label = axes.get_xaxis_transform(), f'{name}: steps that were left out'
    at = [0.99] * len(left_out)
    axes.plot(left_out, at, '|', color=colour, ms=9, mew=1.2, transform=ceiling, label=label)


def _line(axes: Axes, points: tuple[list[int], list[float]], style: dict) -> None:
  """A line through the finite values; a lone one is a dot, since a line of one point is unseen."""
  tokens, values = points
  if not values:
    return
  finite = [value if math.isfinite(value) else math.nan for value in values]
  alone = sum(map(math.isfinite, finite)) == 1
  axes.plot(tokens, finite, marker='o' if alone else None, markersize=4, **style)


def _draw_baselines(axes: Axes, runs: dict[str, list[dict]]) -> None:
  """A dashed line at each different loss that a trivial model reaches."""
  losses = {round(loss, 6) for r in runs.values() for loss in series(r, 'baseline', 'loss')[1]}
  for i, loss in enumerate(sorted(losses)):
    axes.axhline(loss, color='#777777', linestyle='--', linewidth=1)
    axes.annotate(
      f'unigram model {loss:.2f}',
      (0.2 + 0.2 * (i % 4), loss),  # side by side, as similar ones would lie on each other
      xycoords=('axes fraction', 'data'),
      xytext=(4, 3),
      textcoords='offset points',
      color='#777777',
      fontsize=8,
    )


if __name__ == '__main__':
  with told_plainly():
    main()
