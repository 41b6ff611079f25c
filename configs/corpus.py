"""How a corpus is prepared: python -m gptjax.prepare --config=configs/corpus.py --config.out=…"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  c = ConfigDict()
  # What to read, one or several with commas between: a folder (.txt, .jsonl, .parquet; .gz and .zst
  # of the first two; Megatron's .bin with .idx; a TFDS dataset in array_record), a glob, a file
  # (nanoGPT's .bin too), or `stdlib`, the source of this Python's standard library.
  c.source = 'stdlib'
  # Of .jsonl, .parquet and TFDS datasets. Other fields are not read.
  c.text_column = 'text'
  # The folder to make.
  c.out = ''
  # Windows hold context + 1 tokens.
  c.context = 2048
  # `train` one on the corpus, `bytes`, the folder of a saved one, a SentencePiece .model,
  # the folder of GPT-2's encoder.json and vocab.bpe, or its .tiktoken file.
  c.tokenizer = 'train'
  # Of the tokenizer to train; a given one has its own.
  c.vocab_size = 4096
  # Orders the documents, deals them to shards and chooses the held-out ones.
  c.seed = 0
  # Of the documents, on average: chosen by a hash of their content. A large corpus needs less.
  c.validation_fraction = 0.05
  # Files of the training split. A worker makes one at a time; each drops less than one window.
  c.shards = 16
  # Processes; 0 is one per core. The result does not depend on it.
  c.workers = 0
  # Options of Apache Beam, to prepare on a cluster instead: '--runner=DataflowRunner …'. `out` must
  # be a folder that all its machines share. The result does not depend on this either.
  c.beam = ''
  # `raise` or `skip` (and count) what is not UTF-8, not JSON, or has no text.
  c.on_bad_text = 'raise'
  return c
