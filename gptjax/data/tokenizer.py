"""Text to tokens and back, exactly: SentencePiece, GPT-2's BPE or bytes, behind one protocol."""

import base64
import functools
import hashlib
import io
import itertools
import json
import operator
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

import numpy as np
import sentencepiece
import tiktoken
from etils import epath

from gptjax import files
from gptjax.errors import mistake, told_as

END_OF_TEXT = '<|endoftext|>'
SPACE = '\u2581'  # as SentencePiece writes one
CARD = 'tokenizer.json'  # kind and identity, beside whatever files the kind needs
MODEL = 'tokenizer.model'
RANKS = 'tokenizer.tiktoken'

# How GPT-2's files write a byte: those that do not print, as the characters from U+0100 on.
_PRINTING = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [b for b in range(256) if b not in _PRINTING]
BYTES_THERE = {b: chr(b) for b in _PRINTING} | {b: chr(256 + i) for i, b in enumerate(_OTHERS)}


class Tokenizer(Protocol):
  """What the rest of the house knows of a tokenizer.

  `decode(encode(text)) == text` for every text that UTF-8 can hold. `end_of_text` never comes
  out of `encode`, whatever the text says, and decodes to nothing.
  """

  vocab_size: int
  end_of_text: int
  identity: str  # SHA-256 (hex) of the kind and the model's content

  def encode(self, text: str) -> np.ndarray:
    """Text to int32 [tokens]."""

  def decode(self, tokens: Iterable[int]) -> str:
    """Tokens to text; bytes that are not UTF-8 become U+FFFD. IndexError on an unknown token."""

  def save(self, folder: str) -> None:
    """Writes what `load(folder)` needs."""


class Bytes:
  """One token per UTF-8 byte, and end-of-text."""

  vocab_size = 257
  end_of_text = 256
  identity = hashlib.sha256(b'bytes\0').hexdigest()

  def encode(self, text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

  def decode(self, tokens: Iterable[int]) -> str:
    tokens = np.asarray(list(tokens), np.int64)
    if np.any((tokens < 0) | (tokens >= self.vocab_size)):
      raise IndexError(f'token out of range [0, {self.vocab_size})')
    return tokens[tokens != self.end_of_text].astype(np.uint8).tobytes().decode(errors='replace')

  def save(self, folder: str) -> None:
    _save_card(folder, 'bytes', self.identity)


class SentencePiece:
  """A SentencePiece model with byte fallback that changes no character of the text.

  Raises Mistake if `model` (the serialized proto) has no `<|endoftext|>` control symbol or does
  not give texts back as they were.
  """

  # Long texts are encoded in stretches of about this many characters, cut where no piece of the
  # model reaches across, so the tokens are the same, and memory stays small.
  _stretch = 4000
  _probe = '  \tTwo  spaces,\r\n\n é漢😀\0 \u2581 ﬁ① ' + END_OF_TEXT + ' '

  def __init__(self, model: bytes):
    try:
      self.model, self._sp = model, sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as e:
      raise mistake(
        'tokenizer model', f'bytes SentencePiece cannot read ({e})', 'a .model file', 'another file'
      ) from e
    self.vocab_size = self._sp.vocab_size()
    self.end_of_text = self._sp.piece_to_id(END_OF_TEXT)
    self.identity = hashlib.sha256(b'sentencepiece\0' + model).hexdigest()
    pieces = self._sp.id_to_piece([*range(self.vocab_size)])
    cuts = {r'(?<=\n)': r'\n[\s\S]', r'(?<=[^ ])(?= )': '[^\u2581]\u2581'}
    free = [cut for cut, across in cuts.items() if not any(re.search(across, p) for p in pieces)]
    self._cut = re.compile('|'.join(free) or '(?!)')
    # SentencePiece writes spaces as U+2581, so that character itself must go in as its bytes.
    self._lower_block = self._sp.piece_to_id([f'<0x{b:02X}>' for b in '\u2581'.encode()])
    if not self._sp.is_control(self.end_of_text):
      raise mistake(
        'tokenizer model',
        f'one without the control symbol {END_OF_TEXT}',
        'one with it',
        'training one with --config.tokenizer=train',
      )
    if (back := self.decode(self.encode(self._probe))) != self._probe:
      raise mistake(
        'tokenizer model',
        f'{back!r} back from {self._probe!r}',
        'every text back as it was',
        'a model trained with byte fallback, identity normalisation and no dummy prefix',
      )

  def pieces(self) -> list[tuple[str, float | None]]:
    """All pieces and their scores; None for those that no text is merged to."""
    plain = lambda i: not (self._sp.is_byte(i) or self._sp.is_control(i) or self._sp.is_unknown(i))
    scores = [self._sp.get_score(i) if plain(i) else None for i in range(self.vocab_size)]
    return [*zip(self._sp.id_to_piece([*range(self.vocab_size)]), scores, strict=True)]

  def encode(self, text: str) -> np.ndarray:
    tokens = [np.zeros(0, np.int32)]
    for i, between in enumerate(text.split('\u2581')):
      if i:
        tokens.append(np.array(self._lower_block, np.int32))
      for stretch in self._stretches(between):
        tokens.append(np.array(self._sp.encode(stretch), np.int32))
    return np.concatenate(tokens)

  def _stretches(self, text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
      cut = self._cut.search(text, start + self._stretch)
      end = cut.start() if cut else len(text)
      yield text[start:end]
      start = end

  def decode(self, tokens: Iterable[int]) -> str:
    return self._sp.decode([int(t) for t in tokens])

  def save(self, folder: str) -> None:
    files.write_whole(os.path.join(folder, MODEL), self.model)
    _save_card(folder, 'sentencepiece', self.identity)


class Gpt2:
  """GPT-2's byte-level BPE (Radford et al. 2019), which GPT-3 uses too.

  Raises Mistake if `ranks` (the bytes of each token, and its id) are not as many as GPT-2's.
  """

  # Where a text is cut before anything is merged: OpenAI's pattern, without backtracking.
  _pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

  # That pattern still goes back over a run of white space, one step, and has a stack for that which
  # a long run overflows. Here a text can be cut as the pattern would cut it.
  _long_run = re.compile(r'(?<![^\S\x1c-\x1f])[^\S\x1c-\x1f]{9999,}(?=[^\S\x1c-\x1f][\S\x1c-\x1f])')

  end_of_text = 50256
  vocab_size = 50257

  def __init__(self, ranks: Mapping[bytes, int]):
    self.ranks = dict(sorted(ranks.items(), key=operator.itemgetter(1)))
    single = {bytes([b]) for b in range(256)}
    if [*self.ranks.values()] != [*range(self.end_of_text)] or not single <= self.ranks.keys():
      raise mistake(
        'tokenizer',
        f'{len(self.ranks)} tokens',
        f"GPT-2's {self.end_of_text}, numbered from 0",
        'encoder.json and vocab.bpe of GPT-2, or r50k_base.tiktoken',
      )
    self._bpe = tiktoken.Encoding(
      'gpt2',
      pat_str=self._pattern,
      mergeable_ranks=self.ranks,
      special_tokens={END_OF_TEXT: self.end_of_text},
    )
    self.identity = hashlib.sha256(b'gpt2\0' + self._file()).hexdigest()

  def encode(self, text: str) -> np.ndarray:
    cuts = [0, *(run.end() for run in self._long_run.finditer(text)), len(text)]
    parts = (text[start:end] for start, end in itertools.pairwise(cuts))
    encode = functools.partial(self._bpe.encode_to_numpy, disallowed_special=())
    return np.concatenate([encode(part).astype(np.int32) for part in parts])

  def decode(self, tokens: Iterable[int]) -> str:
    tokens = [int(t) for t in tokens]
    if any(not 0 <= t < self.vocab_size for t in tokens):
      raise IndexError(f'token out of range [0, {self.vocab_size})')
    known = [t for t in tokens if t != self.end_of_text]
    return self._bpe.decode_bytes(known).decode(errors='replace')

  def save(self, folder: str) -> None:
    files.write_whole(os.path.join(folder, RANKS), self._file())
    _save_card(folder, 'gpt2', self.identity)

  def _file(self) -> bytes:
    lines = (b'%s %d\n' % (base64.b64encode(token), rank) for token, rank in self.ranks.items())
    return b''.join(lines)


def _ranks_of_tiktoken(path: epath.Path) -> dict[bytes, int]:
  """The tokens of a .tiktoken file: base64 and rank, a line each."""
  with told_as(path, 'a .tiktoken file', 'fetching it again', Exception):
    lines = path.read_bytes().splitlines()
    return {base64.b64decode(t, validate=True): int(rank) for t, rank in map(bytes.split, lines)}


def _ranks_of_gpt2(folder: epath.Path, names: tuple[str, str]) -> dict[bytes, int]:
  """The tokens of GPT-2's own encoder.json, which vocab.bpe must agree with."""
  wanted = f"GPT-2's {' and '.join(names)}"
  with told_as(folder, wanted, 'fetching them again', Exception):
    ids = json.loads((folder / names[0]).read_bytes())
    merges = (folder / names[1]).read_bytes().decode().splitlines()[1:]
    return _ranks(folder, ids, [line.split(' ') for line in merges])


def _ranks(where, ids, merges) -> dict[bytes, int]:
  """The bytes of GPT-2's tokens, of which each but the first 256 is a merge, in order."""
  byte_of = {there: b for b, there in BYTES_THERE.items()}
  ranks = {bytes(map(byte_of.get, token)): i for token, i in ids.items() if token != END_OF_TEXT}
  if [ids[a + b] for a, b in merges] != [*range(256, 256 + len(merges))]:
    got = 'a vocabulary and merges that differ'
    raise mistake(where, got, "GPT-2's tokens, numbered as merged", 'both of one model')
  return ranks


def _theirs(card: epath.Path, about: dict) -> Tokenizer:
  """The tokenizer of a folder of Hugging Face."""
  if (card.parent / MODEL).exists():  # our own export has it
    return SentencePiece(_bytes_of(card.parent / MODEL))
  wanted = "GPT-2's byte-level BPE, bytes, or a SentencePiece tokenizer.model beside it"
  with told_as(card, wanted, 'the tokenizer of GPT-2', Exception):
    ids, merges = about['model']['vocab'], about['model']['merges']
    cut = about['pre_tokenizer']
    plain = cut['type'] == 'ByteLevel' and not cut['add_prefix_space']
    if about.get('normalizer') or not plain:
      got = 'one that changes a text, or cuts it otherwise'
      raise mistake(card, got, wanted, 'the tokenizer of GPT-2')
    for token in about['added_tokens']:
      ids[token['content']] = token['id']
    merges = [merge.split(' ') if isinstance(merge, str) else merge for merge in merges]
    if not merges and [ids.get(BYTES_THERE[b]) for b in range(256)] == [*range(256)]:
      if len(ids) == Bytes.vocab_size and ids[END_OF_TEXT] == Bytes.end_of_text:
        return Bytes()
    return Gpt2(_ranks(card, ids, merges))


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> SentencePiece:
  """A BPE model of exactly `vocab_size` pieces; the same texts give the same model, bit for bit.

  Texts with next to no spaces are read twice: of a model without a piece for it, each space that
  it meets would come back as another character.

  Raises Mistake when the texts are too few for the vocabulary, or the vocabulary for the texts.
  """
  model = _trained(texts, vocab_size)
  pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
  if pieces.piece_to_id(SPACE) == pieces.unk_id():
    model = _trained(texts, vocab_size, SPACE)
  return SentencePiece(model)


def _trained(texts, vocab_size, required=''):
  """A model of SentencePiece as its bytes, with pieces for the characters that are required."""
  model, raised = io.BytesIO(), []

  def lines():
    try:
      yield from _training_lines(texts)
    except BaseException as e:  # of which SentencePiece makes a complaint of its own
      raised.append(e)
      raise

  train = sentencepiece.SentencePieceTrainer.train
  if required:  # a model says all that it was asked for, and is another with ''
    train = functools.partial(train, required_chars=required)
  try:
    train(
      sentence_iterator=lines(),
      model_writer=model,
      model_type='bpe',
      vocab_size=vocab_size,
      byte_fallback=True,
      normalization_rule_name='identity',
      add_dummy_prefix=False,
      remove_extra_whitespaces=False,
      allow_whitespace_only_pieces=True,  # indentation: a third fewer tokens on source code
      control_symbols=[END_OF_TEXT],
      bos_id=-1,
      eos_id=-1,
      pad_id=-1,
      unk_id=0,
      max_sentence_length=1 << 16,  # bytes; see _training_lines
      num_threads=1,  # fixed, so that the model does not depend on the machine
      minloglevel=2,
    )
  except (RuntimeError, ValueError) as e:
    raise raised[0] if raised else _untrainable(str(e), vocab_size) from e
  return model.getvalue()


def load(path: str) -> Tokenizer:
  """The tokenizer of a folder (one we saved, GPT-2's own files, or one of Hugging Face with GPT-2's
  or ours), a .model or a .tiktoken file.

  Raises Mistake if there is none or its files do not belong together.
  """
  with told_as(path, 'a place that can be read', 'another place', ImportError, OSError, KeyError):
    path = epath.Path(path)
    path.exists()  # by whatever its scheme asks for
  if path.suffix == '.tiktoken' and path.is_file():
    return Gpt2(_ranks_of_tiktoken(path))
  if path.is_file():
    return SentencePiece(_bytes_of(path))
  for names in (('encoder.json', 'vocab.bpe'), ('vocab.json', 'merges.txt')):
    if (path / names[0]).exists():
      return Gpt2(_ranks_of_gpt2(path, names))
  card = path / CARD
  if not card.exists():
    raise mistake(
      'tokenizer',
      f'{path}, which {"has no " + CARD if path.exists() else "does not exist"}',
      "a folder with a saved tokenizer or GPT-2's encoder.json and vocab.bpe, a .model or a "
      '.tiktoken file',
      'the folder of a prepared corpus',
    )
  with told_as(card, 'the kind and identity of a tokenizer', 'copying it again', Exception):
    about = json.loads(_bytes_of(card))
    if 'model' in about:
      return _theirs(card, about)
    kind, identity = about['kind'], str(about['identity'])
  if kind == 'bytes':
    tokenizer = Bytes()
  elif kind == 'sentencepiece':
    tokenizer = SentencePiece(_bytes_of(path / MODEL))
  elif kind == 'gpt2':
    tokenizer = Gpt2(_ranks_of_tiktoken(path / RANKS))
  else:
    raise mistake('tokenizer kind', kind, 'bytes, gpt2 or sentencepiece', 'a newer gptjax')
  if tokenizer.identity != identity:
    raise mistake(
      f'tokenizer in {path}',
      f'a model with identity {tokenizer.identity[:12]}',
      f'{identity[:12]}, as its {CARD} says',
      'copying the folder again: the two files do not belong together',
    )
  return tokenizer


def _bytes_of(path: epath.Path) -> bytes:
  with told_as(path, 'a readable file', 'copying it again', OSError):
    return path.read_bytes()


def _save_card(folder: str, kind: str, identity: str) -> None:
  card = json.dumps({'kind': kind, 'identity': identity}, indent=2)
  files.write_whole(os.path.join(folder, CARD), card + '\n')


def _training_lines(texts: Iterable[str]) -> Iterator[str]:
  # SentencePiece leaves out, without a word, lines longer than max_sentence_length; so cut them.
  for text in texts:
    for line in text.split('\n'):
      for i in range(0, len(line), 4000):
        yield line[i : i + 4000]


def _untrainable(message: str, vocab_size: int) -> ValueError:
  """SentencePiece's complaint as a Mistake."""
  what = 'vocab_size for training a tokenizer'
  if m := re.search(r'too high.*<= (\d+)', message):
    return mistake(what, vocab_size, f'at most {m[1]} for this text', 'that, or more text')
  if m := re.search(r'smaller than required_chars\. \d+ vs (\d+)', message):
    return mistake(what, vocab_size, f'at least {m[1]} for this text', 'that or more')
  if 'sentences_.empty()' in message:
    return mistake('text for training a tokenizer', 'none', 'some', 'tokenizer=bytes or more text')
  return mistake(what, vocab_size, 'a size SentencePiece accepts', f'another size ({message})')
