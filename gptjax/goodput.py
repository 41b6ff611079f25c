"""Where the time of a run went, over all its starts: what trained it, and what did not."""

import itertools
import statistics
from collections.abc import Sequence

# In the order in which they are told.
PARTS = {
  'training': 'steps that count',
  'starting': 'from the start of the process to its first step, without what follows',
  'restoring': 'reading checkpoints',
  'compiling': 'the first step of each start, beyond what steps take',
  'validating': 'held-out losses',
  'saving': 'holding up training for checkpoints',
  'skipped': 'steps that were not taken',
  'repeated': 'steps that were lost and taken again',
  'down': 'between the last that was heard and the next start',
  'other': 'reading data, and all else',
}


def account(records: Sequence[dict]) -> dict[str, float]:
  """Seconds of each part, from the records of a run; empty for one that does not tell times."""
  timed = (r for r in records if 'time' in r)
  records = [*itertools.dropwhile(lambda r: r['kind'] != 'start', timed)]
  if not records:
    return {}
  spent = dict.fromkeys(PARTS, 0.0)
  bad = {r['step'] for r in records if r['kind'] == 'skip'}
  usual = [r['seconds'] for r in records if r['kind'] == 'train' and 'tokens_per_second' in r]
  usual = statistics.median(usual) if usual else 0.0
  heard = None  # when the last record was written
  for r in records:
    if r['kind'] == 'start':
      began = r['time'] - r['setup_seconds']
      spent['starting'] += r['setup_seconds'] - r['restore_seconds']
      spent['restoring'] += r['restore_seconds']
      if heard is not None:
        # Of what was lost, only when it ended is known.
        last = max(heard, r.get('heard') or heard)
        spent['repeated'] += last - heard
        spent['down'] += max(0.0, began - last)
    elif r['kind'] == 'train':
      first = 'tokens_per_second' not in r
      extra = max(0.0, r['seconds'] - usual) if first else 0.0
      spent['compiling'] += extra
      spent['skipped' if r['step'] in bad else 'training'] += r['seconds'] - extra
    elif r['kind'] in ('validation', 'save'):
      spent['validating' if r['kind'] == 'validation' else 'saving'] += r['seconds']
    heard = r['time']
  whole = records[-1]['time'] - (records[0]['time'] - records[0]['setup_seconds'])
  spent['other'] = max(0.0, whole - sum(spent.values()))
  return spent


def table(records: Sequence[dict]) -> str:
  """The account for people; '' if there is none."""
  spent = account(records)
  whole = sum(spent.values())
  if not whole:
    return ''
  starts = sum(r['kind'] == 'start' for r in records)
  share = spent['training'] / whole
  head = f'goodput   {share:.1%} of {whole:,.0f} s in {starts} start{"s" * (starts > 1)}'
  row = lambda part, s: f'  {part:10}  {s:10,.1f} s  {s / whole:6.1%}  {PARTS[part]}'
  return '\n'.join([head, *(row(part, s) for part, s in spent.items() if s >= 0.0005 * whole)])
