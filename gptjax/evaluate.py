"""`python -m gptjax.evaluate --workdir=runs/tiny --text=book.txt` says how likely a text is.

The loss in nats per token, the perplexity and the bits per byte: of documents (`--text`, all that
`gptjax.prepare` reads), each from an end-of-text to the next, or of a split of a prepared corpus
(`--data`), whose windows are read as in training.
"""

import argparse
import collections
import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from os.path import expanduser

import numpy as np
import tqdm
from etils import epath

from gptjax import scoring, trained
from gptjax.data import dataset, sources
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import mistake, raise_all, told_as, told_plainly

LARGEST = 4096  # windows at a time: more is a slip of the keyboard


@dataclasses.dataclass(frozen=True)
class Text:
  """What is scored at once."""

  name: str
  tokens: np.ndarray
  bytes: float  # of its text


def main(argv: Sequence[str] | None = None) -> None:
  """Scores what a command line names, and prints what that comes to.

  Raises:
    Mistake: with all that is wrong in it.
  """
  a = _parser().parse_args(argv)
  mistakes = [
    mistake(f'--{name}', getattr(a, name), f'{least} or more', f'--{name}={least}')
    for name, least in (('stride', 0), ('batch', 1), ('limit', 0))
    if getattr(a, name) < least
  ]
  if a.batch > LARGEST:
    mistakes.append(mistake('--batch', a.batch, f'at most {LARGEST}', '--batch=8'))
  raise_all(mistakes)
  model = trained.look(a.workdir or a.hf)
  text, context = model.tokenizer(), model.shape.context
  if a.stride > context:
    fix = f'--stride={context // 2}'
    raise mistake('--stride', a.stride, f'at most {context}, the context', fix)
  texts = _documents(a, text) if a.text is not None else _windows(a, text)
  part = log_probs = None
  if a.log_probs:
    with told_as(a.log_probs, 'a file to write', 'another place', OSError):
      if epath.Path(a.log_probs).is_dir():
        raise IsADirectoryError('a folder')
      part = epath.Path(f'{a.log_probs}.part')  # what is there stays until all is scored
      log_probs = part.open('w')
  counts, total = collections.Counter(), 0.0
  kept: collections.deque[Text] = collections.deque()

  def told():
    for each in texts:
      kept.append(each)
      yield each.tokens

  with trained.over(a.tensor, model.shape), tqdm.tqdm(unit='tokens', disable=None) as bar:
    stride = a.stride or max(1, context // 2)
    for log_p_t in scoring.score(model.program, model.params(), told(), stride, a.batch):
      each = kept.popleft()
      total -= log_p_t.sum()
      counts.update(texts=1, tokens=len(log_p_t), bytes=each.bytes)
      bar.update(len(log_p_t))
      if log_probs:
        log_probs.write(_line(text, each, log_p_t))
  if not math.isfinite(total):
    got, fix = 'tokens without a finite probability', 'another checkpoint'
    raise mistake(a.workdir or a.hf, got, 'a model whose weights are finite', fix)
  if log_probs:
    log_probs.close()
    part.replace(a.log_probs)
  if not counts['texts']:
    raise mistake('what to score', 'no text', 'some', 'another')
  _show(a, total, counts)


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='python -m gptjax.evaluate',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  which = parser.add_mutually_exclusive_group(required=True)
  which.add_argument('--workdir', type=expanduser, help='of the run whose last checkpoint is asked')
  which.add_argument(
    '--hf', type=expanduser, metavar='DIR', help='a GPT-2 or GPT-Neo of Hugging Face instead'
  )
  what = parser.add_mutually_exclusive_group(required=True)
  what.add_argument(
    '--text', type=expanduser, metavar='SOURCE', help='files, folders, globs; a document each'
  )
  what.add_argument('--data', type=expanduser, metavar='FOLDER', help='a prepared corpus')
  parser.add_argument(
    '--split', choices=(dataset.VALIDATION, dataset.TRAIN), default=dataset.VALIDATION
  )
  parser.add_argument('--text-column', default='text', help='of JSON lines and parquet (text)')
  parser.add_argument('--limit', type=int, default=0, help='documents or windows; 0: all')
  parser.add_argument(
    '--stride', type=int, default=0, help='of the window over a long text; 0: half the context'
  )
  parser.add_argument('--batch', type=int, default=8, help='windows at a time (8)')
  parser.add_argument('--tensor', type=int, default=1, help='devices that the model is split over')
  parser.add_argument(
    '--log-probs',
    type=expanduser,
    metavar='FILE.jsonl',
    help='gets those of all tokens, a text a line',
  )
  parser.add_argument('--json', action='store_true', help='prints the result as JSON')
  return parser


def _documents(a: argparse.Namespace, text: Tokenizer) -> Iterator[Text]:
  """Each document with an end-of-text before it, which is told, and one after it."""
  source = sources.find(a.text, a.text_column, a.workdir or a.hf, skip_bad_text=False)
  if a.log_probs in source.files:
    raise mistake('--log-probs', a.log_probs, 'a file that is not scored', 'another name')

  end, left = np.array([text.end_of_text], np.int32), a.limit or math.inf
  return _each(source, text, end, left)


def _each(source, text, end, left):
  for file in source.files:
    for document in sources.read(source, file, collections.Counter()):
      if not left:
        return
      left -= 1
      tokens = np.concatenate([end, text.encode(document.text), end])
      yield Text(document.name, tokens, len(document.text.encode()))


def _windows(a: argparse.Namespace, text: Tokenizer) -> Iterator[Text]:
  """Those of a corpus, of which each has as many bytes as another."""
  corpus = dataset.describe(a.data)
  if corpus.tokenizer != text.identity:
    got, wanted = 'another tokenizer than the model has', 'the same'
    fix = f'preparing it with --config.tokenizer={a.workdir or a.hf}'
    raise mistake(a.data, got, wanted, fix)
  opened = dataset.windows(corpus, a.split)
  size = getattr(corpus, a.split).bytes_per_token * corpus.context
  named = lambda i: f'{a.data}, {a.split} window {i}'
  count = min(len(opened), a.limit or len(opened))
  return (Text(named(i), opened[i].astype(np.int32), size) for i in range(count))


def _line(text: Tokenizer, each: Text, log_p_t: np.ndarray) -> str:
  told = each.tokens[1:].tolist()
  line = {
    'name': each.name,
    'tokens': told,
    'pieces': [text.decode([token]) for token in told],
    'log_probs': [round(float(log_p), 6) for log_p in log_p_t],
  }
  return json.dumps(line, ensure_ascii=False) + '\n'


def _show(a: argparse.Namespace, total: float, counts: collections.Counter) -> None:
  loss = total / counts['tokens']
  made = {
    'texts': counts['texts'],
    'tokens': counts['tokens'],
    'bytes': round(counts['bytes']),
    'loss': loss,
    'perplexity': math.exp(min(loss, 700)),
    'bits_per_byte': total / math.log(2) / counts['bytes'],
  }
  if a.json:
    print(json.dumps(made))
    return
  what = 'documents' if a.text is not None else 'windows'
  print(f'{what:14} {made["texts"]:>12,}')
  print(f'{"tokens":14} {made["tokens"]:>12,}')
  print(f'{"bytes":14} {made["bytes"]:>12,}')
  print(f'{"loss":14} {made["loss"]:>12.4f} nats per token')
  print(f'{"perplexity":14} {made["perplexity"]:>12.2f}')
  print(f'{"bits per byte":14} {made["bits_per_byte"]:>12.4f}')


if __name__ == '__main__':
  with told_plainly():
    main()
