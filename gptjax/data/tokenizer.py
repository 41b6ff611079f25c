"""Text to tokens and back, exactly: SentencePiece or plain bytes, behind one protocol."""

import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np
import sentencepiece
from etils import epath

from gptjax.errors import mistake, told_as

END_OF_TEXT = '<|endoftext|>'
CARD = 'tokenizer.json'  # kind and identity, beside whatever files the kind needs
MODEL = 'tokenizer.model'


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

  # Long texts are encoded in pieces of about this many characters, cut after a newline: no
  # trained piece holds a newline, so the tokens are the same, and memory stays small.
  _stretch = 4000
  _probe = '  \tTwo  spaces,\r\n\n é漢😀\0 \u2581 ' + END_OF_TEXT + ' '

  def __init__(self, model: bytes):
    try:
      self._model, self._sp = model, sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as e:
      raise mistake(
        'tokenizer model', f'bytes SentencePiece cannot read ({e})', 'a .model file', 'another file'
      ) from e
    self.vocab_size = self._sp.vocab_size()
    self.end_of_text = self._sp.piece_to_id(END_OF_TEXT)
    self.identity = hashlib.sha256(b'sentencepiece\0' + model).hexdigest()
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

  def encode(self, text: str) -> np.ndarray:
    tokens = []
    for i, between in enumerate(text.split('\u2581')):
      if i:
        tokens.extend(self._lower_block)
      for stretch in _stretches(between, self._stretch):
        tokens.extend(self._sp.encode(stretch))
    return np.array(tokens, np.int32)

  def decode(self, tokens: Iterable[int]) -> str:
    return self._sp.decode([int(t) for t in tokens])

  def save(self, folder: str) -> None:
    (epath.Path(folder) / MODEL).write_bytes(self._model)
    _save_card(folder, 'sentencepiece', self.identity)


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> SentencePiece:
  """A BPE model of exactly `vocab_size` pieces; the same texts give the same model, bit for bit.

  Raises Mistake when the texts are too few for the vocabulary, or the vocabulary for the texts.
  """
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=_training_lines(texts),
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
  except RuntimeError as e:
    raise _untrainable(str(e), vocab_size) from e
  return SentencePiece(model.getvalue())


def load(path: str) -> Tokenizer:
  """The tokenizer saved in a folder (ours or a prepared corpus), or a SentencePiece .model file.

  Raises Mistake if there is none or its files do not belong together.
  """
  path = epath.Path(path)
  if path.is_file():
    return SentencePiece(_bytes_of(path))
  card = path / CARD
  if not card.exists():
    raise mistake(
      'tokenizer',
      f'{path}, which {"has no " + CARD if path.exists() else "does not exist"}',
      'a folder with a saved tokenizer, or a .model file',
      'the folder of a prepared corpus',
    )
  with told_as(card, 'the kind and identity of a tokenizer', 'copying it again', Exception):
    about = json.loads(_bytes_of(card))
    kind, identity = about['kind'], about['identity']
  # GPT-2's byte-level BPE will be a third kind here.
  if kind == 'bytes':
    tokenizer = Bytes()
  elif kind == 'sentencepiece':
    tokenizer = SentencePiece(_bytes_of(path / MODEL))
  else:
    raise mistake('tokenizer kind', kind, 'bytes or sentencepiece', 'a newer gptjax')
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
  (epath.Path(folder) / CARD).write_text(card + '\n')


def _stretches(text: str, size: int) -> Iterator[str]:
  """Cuts text after the first newline at or past each `size` characters."""
  start = 0
  while start < len(text):
    end = text.find('\n', start + size) + 1 or len(text)
    yield text[start:end]
    start = end


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
