"""A tokenizer as files of Hugging Face, so that `AutoTokenizer.from_pretrained(folder)` has it.

It gives the same tokens for every text that does not say `<|endoftext|>`, which there is the token.
"""

import itertools
import json
from collections.abc import Mapping

import numpy as np

from gptjax import files
from gptjax.data.tokenizer import (
  BYTES_THERE,
  END_OF_TEXT,
  MODEL,
  SPACE,
  Bytes,
  Gpt2,
  SentencePiece,
  Tokenizer,
)
from gptjax.errors import needs


def check() -> None:
  """Raises a Mistake where what writes them is not installed."""
  with needs('tokenizers', 'hf'):
    import tokenizers  # noqa: F401


def save(path: str, tokenizer: Tokenizer, context: int) -> None:
  """Writes the files into a folder that is there; `data.tokenizer.load` reads them too.

  Args:
    path: of the folder.
    tokenizer: what to write.
    context: for how many tokens the model is made.
  """
  import tokenizers

  folder = files.folder(path)
  made = {Bytes: _of_bytes, Gpt2: _of_gpt2, SentencePiece: _of_sentencepiece}[type(tokenizer)]
  theirs = made(tokenizer)
  end = tokenizers.AddedToken(END_OF_TEXT, special=True, normalized=False)
  theirs.add_special_tokens([end])
  if theirs.token_to_id(END_OF_TEXT) != tokenizer.end_of_text:
    raise AssertionError('end-of-text must be the token that it is here')
  files.write_whole(folder / 'tokenizer.json', theirs.to_str(pretty=True))
  if isinstance(tokenizer, SentencePiece):
    files.write_whole(folder / MODEL, tokenizer.model)
  about = {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'bos_token': END_OF_TEXT,
    'eos_token': END_OF_TEXT,
    'model_max_length': context,
    'clean_up_tokenization_spaces': False,
  }
  files.write_whole(folder / 'tokenizer_config.json', json.dumps(about, indent=2) + '\n')


def _byte_level(vocab, merges, cut):
  """A BPE of bytes; with `cut` after GPT-2's pattern cut the text into words."""
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers

  theirs = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
  theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut)
  theirs.decoder = decoders.ByteLevel()
  return theirs


def _of_bytes(tokenizer):
  vocab = {BYTES_THERE[b]: b for b in range(256)}
  return _byte_level(vocab | {END_OF_TEXT: tokenizer.end_of_text}, [], cut=False)


def _of_gpt2(tokenizer):
  there = lambda token: ''.join(BYTES_THERE[b] for b in token)
  vocab = {there(token): rank for token, rank in tokenizer.ranks.items()}
  merges = [
    tuple(map(there, _halves(token, tokenizer.ranks)))
    for token in tokenizer.ranks
    if len(token) > 1
  ]
  return _byte_level(vocab | {END_OF_TEXT: tokenizer.end_of_text}, merges, cut=True)


def _halves(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes]:
  """Of what two tokens a token is made: the merges that come before it, done on its bytes."""
  parts, own = [bytes([b]) for b in token], ranks[token]
  while len(parts) > 2:
    pairs = [ranks.get(a + b, own) for a, b in itertools.pairwise(parts)]
    i = int(np.argmin(pairs))
    parts[i : i + 2] = [parts[i] + parts[i + 1]]
  return parts[0], parts[1]


def _of_sentencepiece(tokenizer):
  import tokenizers
  from tokenizers import decoders, models, normalizers

  pieces = tokenizer.pieces()
  vocab = {piece: i for i, (piece, _) in enumerate(pieces)}
  # SentencePiece joins the two pieces whose union scores best, and of equals the leftmost; a list
  # of merges says the same if all ways to make a piece stand where its score is.
  merges = []
  for _, piece in sorted((-score, piece) for piece, score in pieces if score is not None):
    cuts = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
    merges += [(a, b) for a, b in cuts if a in vocab and b in vocab]
  theirs = tokenizers.Tokenizer(
    models.BPE(vocab=vocab, merges=merges, unk_token=pieces[0][0], byte_fallback=True)
  )
  theirs.normalizer = normalizers.Replace(' ', SPACE)
  theirs.decoder = decoders.Sequence(
    [decoders.Replace(SPACE, ' '), decoders.ByteFallback(), decoders.Fuse()]
  )
  return theirs
