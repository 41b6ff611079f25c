"""`python -m benchmarks.generate`: tokens a second beside `transformers`, on the same weights.

GPT-2 small with random weights, saved as `transformers` saves them and loaded by both, goes on
greedily from the same random prompts: in turns, prompts included, medians of several. That both say
the same tokens in f32 is seen to as well.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np

from gptjax import decode, trained
from gptjax.errors import needs, told_plainly
from gptjax.sampling import Sampling

GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0, no_repeat=0)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--batches', type=int, nargs='+', default=[1, 8])
  parser.add_argument('--prompt', type=int, default=64, help='tokens of each prompt')
  parser.add_argument('--tokens', type=int, default=128, help='that follow')
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument('--layers', type=int, default=12)
  a = parser.parse_args()
  with needs('torch or transformers', 'test'):
    import torch
    import transformers
  torch.manual_seed(0)
  theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=a.layers)).eval()
  # Random weights of that size are of one mind; louder ones say different tokens.
  for weight in theirs.parameters():
    weight.data *= 2
  with tempfile.TemporaryDirectory() as folder:
    theirs.save_pretrained(folder)
    ours = trained.look(folder)
    with trained.over(1, ours.shape):
      params = ours.params()
  in_bf16 = transformers.GPT2LMHeadModel(theirs.config).eval().to(torch.bfloat16)
  in_bf16.load_state_dict(theirs.state_dict())
  threads = f'{torch.get_num_threads()} threads'
  print(f'{theirs.num_parameters():,} parameters, {a.prompt} + {a.tokens} tokens, {threads}')
  print(
    f'transformers {transformers.__version__} on torch {torch.__version__}, jax {jax.__version__}'
  )
  print('| prompts | transformers f32 | transformers bf16 | gptjax f32 | ratio in f32 | in bf16 |')
  print('|---|---|---|---|---|---|')
  for batch in a.batches:
    prompts = np.random.default_rng(0).integers(0, 50257, (batch, a.prompt))
    with trained.over(1, ours.shape):
      decoder = decode.Decoder(ours.program, dict(params), batch, a.prompt + a.tokens)
      runs = {
        'f32': lambda: _theirs(torch, theirs, prompts, a.tokens),  # noqa: B023
        'bf16': lambda: _theirs(torch, in_bf16, prompts, a.tokens),  # noqa: B023
        'ours': lambda: _ours(decoder, prompts, a.tokens),  # noqa: B023
      }
      if (same := (runs['f32']() == runs['ours']()).mean()) < 1:
        print(f'of {batch} prompts {same:.1%} of the tokens are the same')
      seconds = in_turns(runs, a.repeats)
    rates = {name: batch * a.tokens / took for name, took in seconds.items()}
    print(
      f'| {batch} | {rates["f32"]:.1f} | {rates["bf16"]:.1f} | {rates["ours"]:.1f} '
      f'| {rates["ours"] / rates["f32"]:.2f} | {rates["ours"] / rates["bf16"]:.2f} |',
      flush=True,
    )


def in_turns(runs: dict[str, Callable], repeats: int) -> dict[str, float]:
  """The median seconds of each, called one after the other, after a call that is not counted."""
  took = {name: [] for name in runs}
  for i in range(repeats + 1):
    for name, run in runs.items():
      start = time.perf_counter()
      run()
      if i:
        took[name].append(time.perf_counter() - start)
  return {name: statistics.median(times) for name, times in took.items()}


def _theirs(torch, model, prompts, count) -> np.ndarray:
  with torch.no_grad():
    made = model.generate(
      torch.tensor(prompts),
      attention_mask=torch.ones(prompts.shape, dtype=torch.long),
      max_new_tokens=count,
      do_sample=False,
      eos_token_id=None,
      pad_token_id=0,
    )
  return made[:, prompts.shape[1] :].numpy()


def _ours(decoder, prompts, count) -> np.ndarray:
  made = decode.sample(decoder, prompts.tolist(), count, GREEDY, 0, [*range(len(prompts))])
  return np.stack([*made], 1)


if __name__ == '__main__':
  with told_plainly():
    main()
