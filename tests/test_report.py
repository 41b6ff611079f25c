"""The drawing holds the records' numbers, whatever the run went through."""

import math
import struct

import matplotlib.pyplot as plt
import numpy as np
import pytest

from gptjax import metrics, report
from gptjax.errors import Mistake

CONTEXT = 16


def records_of(losses, baseline=None, every=2):
  """A run of steps of a growing batch, with a validation every so many."""
  records, sequences = [], 0
  if baseline is not None:
    records.append(at('baseline', 0, 0, loss=baseline))
  for i, loss in enumerate(losses, 1):
    sequences += i
    rate = {'tokens_per_second': 1000.0 * i} if i > 1 else {}
    records.append(at('train', i, sequences, loss=loss, lr=i / 100, batch=i, **rate))
    if i % every == 0:
      records.append(at('validation', i, sequences, loss=loss + 1, bits_per_byte=loss / 2))
  return records


def at(kind, step, sequences, **more):
  position = {'step': step, 'sequences': sequences, 'tokens': sequences * CONTEXT}
  return {'kind': kind, **position, **more}


@pytest.fixture
def run(tmp_path):
  """run(name, losses) makes the metrics of a run and returns its workdir."""

  def make(name, losses, **more):
    workdir = tmp_path / name
    with metrics.MetricsWriter(workdir, resume_at=0, tensorboard=False) as writer:
      for record in records_of(losses, **more):
        writer.write(record)
    return workdir

  return make


@pytest.fixture(autouse=True)
def close_figures():
  yield
  plt.close('all')


def lines(axes):
  """The drawn lines of axes as lists of points."""
  return [np.asarray(line.get_xydata(), float).tolist() for line in axes.lines]


def png_size(path):
  data = path.read_bytes()
  assert data[:8] == b'\x89PNG\r\n\x1a\n'
  return struct.unpack('>II', data[16:24])


def test_every_number_is_drawn_against_tokens():
  losses = [5.0, 4.0, 3.5, 3.0]
  loss, lr, batch, rate = report.draw({'a': records_of(losses)}).axes
  tokens = [16.0, 48.0, 96.0, 160.0]
  train, validation = lines(loss)
  assert train == [list(point) for point in zip(tokens, losses, strict=True)]
  assert validation == [[48, 5], [160, 4]]
  assert lines(lr) == [[[t, (i + 1) / 100] for i, t in enumerate(tokens)]]
  assert lines(batch) == [[[t, i + 1] for i, t in enumerate(tokens)]]
  assert lines(rate) == [[[t, 1000.0 * (i + 2)] for i, t in enumerate(tokens[1:])]]


def test_runs_are_told_apart_by_colour_and_name():
  runs = {name: records_of([3.0, 2.0, i]) for i, name in enumerate(['a', 'b', 'c'])}
  figure = report.draw(runs)
  names = [text.get_text() for text in figure.legends[0].get_texts()]
  assert names == ['a', 'b', 'c']
  for axes in figure.axes:
    per_run = 2 if axes is figure.axes[0] else 1
    colours = [line.get_color() for line in axes.lines]
    assert len(colours) == 3 * per_run
    assert len(set(colours)) == 3


def test_losses_that_are_no_numbers_are_marked_where_they_are():
  losses = [5.0, math.nan, 4.0, math.inf, 3.0]
  figure = report.draw({'a': records_of(losses, every=10)})
  train, _, lost = lines(figure.axes[0])
  assert [x for x, _ in lost] == [48, 160]
  assert [math.isnan(y) for _, y in train] == [False, True, False, True, False]
  figure.canvas.draw()


def test_a_run_of_nothing_but_nan_is_drawn():
  report.draw({'a': records_of([math.nan] * 4)}).canvas.draw()


def test_the_points_of_a_run_of_one_step_are_seen():
  figure = report.draw({'a': records_of([5.0])})
  figure.canvas.draw()
  for axes in figure.axes[:3]:
    assert axes.lines[0].get_marker() == 'o'
  assert [text.get_text() for text in figure.axes[3].texts] == ['not measured']


def test_lines_have_no_dots_where_they_have_length():
  loss, *_ = report.draw({'a': records_of([5.0, 4.0])}).axes
  assert loss.lines[0].get_marker() in ('None', None, '')


def test_each_different_baseline_is_one_line():
  runs = {'a': records_of([5.0], 6.5), 'b': records_of([5.0], 6.5), 'c': records_of([5.0], 7.0)}
  loss = report.draw(runs).axes[0]
  dashed = [line for line in loss.lines if line.get_linestyle() == '--']
  assert [line.get_ydata()[0] for line in dashed] == [6.5, 7.0]
  assert [text.get_text() for text in loss.texts] == ['unigram model 6.50', 'unigram model 7.00']


def test_the_table_says_the_last_loss_the_best_validation_and_the_median_rate():
  records = records_of([5.0, math.nan, 3.0, 4.0, 2.0, 5.0, math.nan])
  records[-1]['tokens_per_second'] = 1e6
  head, row = report.table({'a': records}).splitlines()
  assert head.split('  ')[0] == 'run'
  # Validations: NaN, 5, 6. Rates: none, 2000 … 6000 and the million.
  assert row.split() == ['a', '448', '7', 'nan', '5.0000', '2.0000', '4,500']


def test_the_table_leaves_out_what_was_not_measured():
  assert report.table({'a': records_of([5.0])}).splitlines()[1].split()[-3:] == ['-', '-', '-']


def test_columns_of_the_table_line_up():
  rows = report.table({'a': records_of([5.0]), 'longer': records_of([5.0] * 40)}).splitlines()
  assert len({len(row) for row in rows}) == 1


@pytest.mark.parametrize(
  ('number', 'text'),
  [(0, '0'), (0.003, '0.003'), (999, '999'), (1500, '1.5k'), (2.5e6, '2.5M'), (3e11, '300B')],
)
def test_numbers_on_axes_are_short(number, text):
  assert report.short(number) == text


def test_one_run_is_drawn_into_its_workdir(run, capsys):
  workdir = run('tiny', [5.0, 4.0])
  report.main([str(workdir)])
  width, height = png_size(workdir / 'report.png')
  assert width > 1000 and height > 600
  out = capsys.readouterr().out
  assert 'tiny' in out and str(workdir / 'report.png') in out


def test_several_runs_are_drawn_here(run, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  report.main([str(run('a', [5.0])), str(run('b', [4.0]))])
  png_size(tmp_path / 'report.png')


def test_a_name_with_a_dollar_is_no_formula(run, tmp_path):
  report.main([str(run(r'a$\frac$', [5.0])), f'--out={tmp_path}/a.png'])


def test_out_says_where(run, tmp_path):
  report.main([str(run('a', [5.0])), f'--out={tmp_path}/else.png'])
  png_size(tmp_path / 'else.png')
  assert not (tmp_path / 'a' / 'report.png').exists()


def test_runs_of_one_name_are_called_by_their_paths(run):
  here, there = run('x/tiny', [5.0]), run('y/tiny', [5.0])
  assert list(report.load([here, there])) == [str(here), str(there)]


def test_a_run_given_twice_is_one(run):
  workdir = run('tiny', [5.0])
  assert list(report.load([workdir, f'{workdir}/'])) == ['tiny']


def test_all_runs_without_metrics_are_told_at_once(run, tmp_path):
  with pytest.raises(Mistake) as caught:
    report.main([str(tmp_path / 'no'), str(run('a', [5.0])), str(tmp_path / 'none')])
  assert str(tmp_path / 'no' / 'metrics.jsonl') in str(caught.value)
  assert str(tmp_path / 'none' / 'metrics.jsonl') in str(caught.value)


@pytest.mark.parametrize('out', ['report.pdf', 'nowhere/report.png'])
def test_an_out_that_cannot_be_is_a_mistake(run, tmp_path, out):
  with pytest.raises(Mistake, match='--out'):
    report.main([str(run('a', [5.0])), f'--out={tmp_path / out}'])


def test_a_picture_that_cannot_be_written_is_told_after_the_table(run, tmp_path, capsys):
  (tmp_path / 'a' / 'report.png').mkdir(parents=True)
  with pytest.raises(Mistake, match='report.png: got IsADirectoryError'):
    report.main([str(run('a', [5.0]))])
  assert 'train loss' in capsys.readouterr().out


def test_as_a_program_it_tells_a_mistake_plainly(run_python, tmp_path):
  done = run_python(['-m', 'gptjax.report', tmp_path / 'none'], timeout=120, code=2)
  assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1
