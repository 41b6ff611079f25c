"""What a run says of itself: before its first step, and after its last."""

import math
from collections.abc import Mapping, Sequence

import jax
from etils import epath

from gptjax import hosts, journal
from gptjax.config import Run
from gptjax.data.corpora import Corpora
from gptjax.data.mixture import Mixture


def describe(
  run: Run,
  mesh: jax.sharding.Mesh,
  corpora: Corpora,
  mixed: Mixture,
  start: int,
  taken: int,
  skipped: Sequence[range],
) -> str:
  """What is about to run after `start` sequences and so many steps, in a few lines."""
  shape, numerics, ramp = run.program.shape, run.program.numerics, run.ramp
  batches = [rung.batch for rung in ramp.rungs]
  ramped = f'{batches[0]} … {batches[-1]}' if batches[1:] else f'{batches[-1]}'
  rungs = f'{len(batches)} rung' + 's' * bool(batches[1:])
  computed, surplus = ramp.slots(run.microbatch)
  steps = range(taken + 1, taken + ramp.steps_left(start, skipped) + 1)
  lines = {
    'model': f'{shape.n_params:,} parameters, {shape.n_layers} layers, context {shape.context}',
    'data': '\n         '.join(corpora.table(mixed, ramp.total)),
    'length': f'{ramp.total * shape.context:,} tokens = {ramp.total:,} sequences, '
    f'{taken + len(steps):,} steps',
    'batch': f'{ramped} sequences in {rungs}, in slices of {run.microbatch}; '
    f'{surplus / computed:.2%} of rows computed only fill up slices',
    'mesh': in_axes(run.mesh)
    + ' on '
    + ', '.join(filter(None, (mesh.devices.flat[0].device_kind, hosts.described()))),
    **links(run, [device.id for device in mesh.devices.flat]),
    'compute': f'{numerics.dtype.name}, remat {numerics.remat}, '
    f'layers {"apart" if numerics.apart else "in a loop"}, attention {numerics.attend.__name__}'
    + ', compiled ahead'
    * bool(run.compiled),
  }
  if (stages := run.mesh['stage']) > 1:
    idle = 2 * (stages - 1)
    lines['stages'] = (
      f'{shape.n_layers // stages} layers each, 1F1B; of {run.slices + idle} ticks in a full batch '
      f'a stage idles {idle}: {idle / (run.slices + idle):.0%}'
    )
  if start < ramp.total:
    new = f'the weights of {run.init_from}' if run.init_from else 'from scratch'
    lines['start'] = f'sequence {start:,}, step {steps.start:,}' if start else new
  if skipped:
    lines['skipped'] = 'sequences ' + ' '.join(f'{r.start:,}–{r.stop - 1:,}' for r in skipped)
  if mixed.stages[1:]:
    since = mixed.stages[-1].start
    lines['stage'] = f'{len(mixed.stages)} of the mixture, from sequence {since:,} on' + (
      ': its sources or their weights are others than before' * (since == start)
    )
  if run.profile:
    traced = range(max(run.profile.start, steps.start), min(run.profile.stop, steps.stop))
    none = f'no step: they are {steps.start:,} … {steps.stop - 1:,}'
    lines['profile'] = f'steps {traced.start} … {traced.stop - 1}' if traced else none
  return '\n'.join(f'{name:8} {line}' for name, line in lines.items())


def links(run: Run, order: Sequence[int]) -> dict[str, str]:
  """Lines on how a mesh lies on several nodes, with the ids of its devices in order."""
  if not run.across:
    return {}
  count = math.prod(run.across.values())
  parts = lambda sizes: in_axes({axis: size for axis, size in sizes.items() if size > 1})
  within = {axis: size // run.across[axis] for axis, size in run.mesh.items()}
  told = f'{parts(run.across)} over the slow links between {count} nodes'
  lines = {
    'links': f'{told}; within each {parts(within) or "one device"}',
    'order': f'of devices {in_ranges(order)}',
  }
  if run.across['tensor'] > 1:
    lines['warning'] = (
      'tensor exchanges activations several times in every layer, and here over slow links: '
      f'--config.mesh.tensor={within["tensor"]} would keep it within a node'
    )
  return lines


def in_axes(sizes: Mapping[str, int]) -> str:
  """Sizes of axes as 'data 2 · fsdp 4'."""
  return ' · '.join(f'{axis} {size}' for axis, size in sizes.items())


def in_ranges(numbers: Sequence[int]) -> str:
  """1, 2, 3, 8 as '1–3 8'."""
  runs = []
  for n in numbers:
    if runs and n == runs[-1][1] + 1:
      runs[-1][1] = n
    else:
      runs.append([n, n])
  return ' '.join(f'{a}–{b}' if b > a else f'{a}' for a, b in runs)


def verdict(workdir: epath.Path, corpora: Corpora) -> str:
  """The last held-out losses beside those of unigram models of the same tokens."""
  unigram = corpora.unigram_nats
  held_out = [r for r in journal.read(workdir) if r['kind'] == 'validation']
  if not held_out:
    return f'held-out loss  not in {journal.FILE}'
  last, rows = held_out[-1], []
  there = sum(map(len, corpora.held_out.values()))
  part = f', over {last["windows"]:,} of {there:,} windows' * (last['windows'] < there)
  told = lambda nats, bits: f'{nats:.4f} nats per token, {bits:.4f} bits per byte'
  rows.append(f'held-out loss  {told(last["loss"], last["bits_per_byte"])}{part}')
  mean, bits = corpora.mean(unigram), corpora.bits_per_byte(unigram)
  rows.append(f'unigram model  {told(mean, bits)}')
  for name in unigram:
    if f'loss/{name}' in last:
      loss = last[f'loss/{name}']
      rows.append(f'  {name}: {loss:.4f} nats per token, unigram model {unigram[name]:.4f}')
  return '\n'.join(rows)
