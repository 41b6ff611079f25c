"""`python -m gptjax.generate --workdir=runs/tiny --prompt='def main('` goes on from a prompt.

Tokens are shown as they come. Several prompts (`--prompts=FILE`, a line each, or JSON strings in a
.jsonl) or continuations are computed together. Without a prompt it is what comes on standard input,
and in a terminal the beginning of a document.
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from os.path import expanduser

from etils import epath

from gptjax import beams, decode, trained
from gptjax.config import check_seed
from gptjax.data.tokenizer import Tokenizer
from gptjax.decode import Decoder
from gptjax.errors import Mistake, mistake, raise_all, told_as, told_plainly
from gptjax.sampling import Sampling
from gptjax.spoken import Spoken

WARMTH = 0.8  # the temperature, where none is given
PENALTY = 0.6  # of length, likewise: Brown et al. 2020, 2.4
# More are slips of the keyboard.
LARGEST = 1_000_000
MOST_ROWS = 4096


@dataclasses.dataclass(frozen=True)
class Continuation:
  """What one prompt became."""

  prompt: str
  text: str  # that follows it
  ended: str  # 'end of text', 'stop' or 'length'
  score: float | None = None  # of a beam


def main(argv: Sequence[str] | None = None) -> None:
  """Continues the prompts of a command line.

  Raises:
    Mistake: with all that is wrong in it.
  """
  a = _parser().parse_args(argv)
  _check(a)
  prompts = [] if a.interactive else _prompts(a)
  model = trained.look(a.workdir or a.hf)
  text = model.tokenizer()
  with trained.over(a.tensor, model.shape):
    if a.interactive:
      return _converse(a, text, Decoder(model.program, model.params(), 1, dtype=a.dtype))
    rows = [[text.end_of_text, *text.encode(prompt)] for prompt in prompts]
    longest = max(map(len, rows))
    if longest > model.shape.context:
      told = f'its last {decode.seen(longest, model.shape.context)} of {longest} tokens'
      print(f'a prompt is longer than the context: the model sees {told}', file=sys.stderr)
    size = min(a.batch, len(rows) * (1 if a.beams > 1 else a.continuations))
    width = size * a.beams
    decoder = Decoder(model.program, model.params(), width, longest + a.tokens, a.dtype)
    alone = len(rows) * a.continuations == 1 and a.beams == 1 and not a.json
    say = (lambda piece: print(piece, end='', flush=True)) if alone else (lambda piece: None)
    say(prompts[0])
    for made in _continued(a, text, decoder, prompts, rows, size, say):
      if not alone:
        _show(a, made)
    if alone:
      print()


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='python -m gptjax.generate',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  which = parser.add_mutually_exclusive_group(required=True)
  which.add_argument('--workdir', type=expanduser, help='of the run whose last checkpoint speaks')
  which.add_argument(
    '--hf', type=expanduser, metavar='DIR', help='a GPT-2 or GPT-Neo of Hugging Face instead'
  )
  what = parser.add_mutually_exclusive_group()
  what.add_argument('--prompt', help='what to go on from')
  what.add_argument('--prompts', type=expanduser, metavar='FILE', help='many of them')
  what.add_argument('--interactive', action='store_true', help='asks for one after the other')
  parser.add_argument('--tokens', type=int, default=100, help='at most (100)')
  parser.add_argument('--temperature', type=float, help=f'0: always the likeliest ({WARMTH})')
  parser.add_argument('--top-k', type=int, default=0, help='of so many likeliest; 0: of all')
  parser.add_argument(
    '--top-p', type=float, default=1.0, help='of the fewest that are together as likely'
  )
  parser.add_argument(
    '--no-repeat', type=int, default=0, metavar='N', help='no N tokens twice; 0: as they come'
  )
  parser.add_argument('--beams', type=int, default=1, help='searches with so many; the paper: 4')
  parser.add_argument(
    '--length-penalty', type=float, help=f'of the search; more favours longer ({PENALTY})'
  )
  parser.add_argument(
    '--stop',
    action='append',
    default=[],
    help='ends before it (of beams: cut off after the search); may come again',
  )
  parser.add_argument('--seed', type=int, help='of what is drawn (0)')
  parser.add_argument('--continuations', type=int, default=1, help='of each prompt (1)')
  parser.add_argument('--batch', type=int, default=8, help='prompts at a time (8)')
  parser.add_argument('--tensor', type=int, default=1, help='devices that the model is split over')
  parser.add_argument(
    '--dtype',
    choices=('float32', 'bfloat16'),
    help="to compute in (the run's); bfloat16 is faster, on CPU too",
  )
  parser.add_argument('--json', action='store_true', help='a line of JSON for each continuation')
  return parser


def _check(a: argparse.Namespace) -> None:
  """Raises for all that makes no sense; fills in the temperature."""
  mistakes = []

  def want(holds: bool, name: str, wanted: str, fix: str):
    if not holds:
      got = getattr(a, name.replace('-', '_'))
      mistakes.append(mistake(f'--{name}', got, wanted, f'--{name}={fix}'))

  want(1 <= a.tokens <= LARGEST, 'tokens', f'1 to {LARGEST:,}', '100')
  warm = a.temperature is None or 0 <= a.temperature < math.inf
  want(warm, 'temperature', 'a finite number, 0 or more', '0.8')
  want(a.top_k >= 0, 'top-k', '0 or more', '40')
  want(0 < a.top_p <= 1, 'top-p', 'above 0, at most 1', '0.9')
  want(a.no_repeat >= 0, 'no-repeat', '0 or more', '3')
  want(1 <= a.beams <= MOST_ROWS, 'beams', f'1 to {MOST_ROWS}', '4')
  penalty = PENALTY if a.length_penalty is None else a.length_penalty
  want(-10 <= penalty <= 10, 'length-penalty', 'a number from -10 to 10', '0.6')
  want(all(a.stop), 'stop', 'some text', "'.'")
  want(1 <= a.continuations <= LARGEST, 'continuations', f'1 to {LARGEST:,}', '1')
  want(1 <= a.batch <= MOST_ROWS, 'batch', f'1 to {MOST_ROWS}', '8')
  if a.beams > 1:
    drawn = a.temperature or a.top_k or a.top_p < 1 or a.seed is not None
    want(not drawn, 'beams', 'no temperature, top-k, top-p or seed: a search draws nothing', '1')
    want(a.continuations <= a.beams, 'continuations', f'at most {a.beams}, the beams', str(a.beams))
  elif a.length_penalty is not None:
    want(False, 'length-penalty', 'beams, which it is for', '0.6 --beams=4')
  if a.interactive:
    plain = a.beams == 1 and a.continuations == 1 and not a.json
    want(plain, 'interactive', 'no beams, continuations or JSON with it', 'False')
  try:
    check_seed(a.seed or 0)
  except Mistake as e:
    mistakes.append(e)
  raise_all(mistakes)
  if a.temperature is None:
    a.temperature = 0.0 if a.beams > 1 else WARMTH
  a.seed = a.seed or 0
  a.length_penalty = PENALTY if a.length_penalty is None else a.length_penalty


def _prompts(a: argparse.Namespace) -> list[str]:
  """What to go on from, all that UTF-8 can hold."""
  prompts = [a.prompt or '']
  if a.prompts is not None:
    with told_as(a.prompts, 'a file of prompts', 'another file', OSError, UnicodeError):
      lines = epath.Path(a.prompts).read_text().split('\n')
    prompts = [line.removesuffix('\r') for line in lines if line.strip()]
    if a.prompts.endswith('.jsonl'):
      with told_as(
        a.prompts, 'a JSON string a line', 'a file of plain lines', ValueError, RecursionError
      ):
        prompts = [json.loads(line) for line in prompts]
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
      got = 'none' if not prompts else 'what is no text'
      raise mistake(a.prompts, got, 'a prompt a line', 'another file')
  elif a.prompt is None and not sys.stdin.isatty():
    with told_as('standard input', 'UTF-8 text', 'another text', UnicodeError):
      prompts = [sys.stdin.read()]
  with told_as('prompt', 'UTF-8 text', 'another one', UnicodeError):
    for prompt in prompts:
      prompt.encode()
  return prompts


def _continued(
  a: argparse.Namespace,
  text: Tokenizer,
  decoder: Decoder,
  prompts: Sequence[str],
  rows: Sequence[Sequence[int]],
  size: int,
  say: Callable[[str], None],
) -> Iterator[Continuation]:
  """All continuations, in order; the pieces of the first are said as they come."""
  each = 1 if a.beams > 1 else a.continuations
  numbers = [i for i in range(len(rows)) for _ in range(each)]
  for start in range(0, len(numbers), size):
    # The last group is filled up with what is not asked for, for the same program.
    group = [numbers[min(i, len(numbers) - 1)] for i in range(start, start + size)]
    asked = min(size, len(numbers) - start)
    told = [rows[number] for number in group]
    if a.beams > 1:
      found = beams.search(decoder, told, a.tokens, a.length_penalty, a.no_repeat, text.end_of_text)
      for number, best in zip(group[:asked], found[:asked], strict=True):
        for tokens, score in best[: a.continuations]:
          spoken = Spoken(text, a.stop)
          for token in tokens:
            spoken.add(token)
          spoken.end('length' if len(tokens) == a.tokens else 'end of text')
          yield Continuation(prompts[number], spoken.text, spoken.ended, score)
      continue
    spoken = [Spoken(text, a.stop) for _ in group]
    for extra in spoken[asked:]:
      extra.end('not asked for')
    places = [start + i for i in range(size)]
    for token_b in decode.sample(decoder, told, a.tokens, _how(a), a.seed, places):
      for one, token in zip(spoken, token_b.tolist(), strict=True):
        piece = one.add(token)
        if one is spoken[0]:
          say(piece)
      if all(one.ended for one in spoken):
        break
    say(spoken[0].end('length'))
    for number, one in zip(group[:asked], spoken[:asked], strict=True):
      one.end('length')
      yield Continuation(prompts[number], one.text, one.ended)


def _how(a: argparse.Namespace) -> Sampling:
  return Sampling(a.temperature, a.top_k, a.top_p, a.no_repeat)


def _show(a: argparse.Namespace, made: Continuation) -> None:
  if a.json:
    told = {name: v for name, v in dataclasses.asdict(made).items() if v is not None}
    print(json.dumps(told, ensure_ascii=False), flush=True)
  else:
    score = '' if made.score is None else f', score {made.score:.4f}'
    print(f'--- {made.ended}{score}\n{made.prompt}{made.text}', flush=True)


def _converse(a: argparse.Namespace, text: Tokenizer, decoder: Decoder) -> None:
  """Asks for prompts until there are no more; an empty one goes on from what was said."""
  print('A prompt, or nothing to hear more; Ctrl-D ends.', file=sys.stderr)
  tokens = [text.end_of_text]
  for turn in range(sys.maxsize):
    with told_as('prompt', 'UTF-8 text', 'another one', UnicodeError):
      try:
        line = input('> ')
      except EOFError:
        print()
        return
      if line:
        tokens = [text.end_of_text, *text.encode(line)]
    if line:
      print(line, end='', flush=True)
    spoken = Spoken(text, a.stop)
    for (token,) in decode.sample(decoder, [tokens], a.tokens, _how(a), a.seed, [turn]):
      print(spoken.add(int(token)), end='', flush=True)
      if spoken.ended:
        break
    print(spoken.end('length'))
    tokens += spoken.tokens


if __name__ == '__main__':
  with told_plainly():
    main()
