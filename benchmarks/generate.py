"""`python -m benchmarks.generate`: tokens a second beside `transformers`, on the same weights.

GPT-2 small with random weights, saved as `transformers` saves them and loaded by both, goes on
greedily from the same random prompts: in turns, prompts included, medians of several. That both say
the same tokens in f32 is seen to as well.
"""

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence

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
  print('| prompts | transformers f32 | bf16 | gptjax f32 | bf16 | ratio in f32 | in bf16 |')
  print('|---|---|---|---|---|---|---|')
  for batch in a.batches:
    prompts = np.random.default_rng(0).integers(0, 50257, (batch, a.prompt))
    with trained.over(1, ours.shape):
      decoders = [
        decode.Decoder(ours.program, dict(params), batch, a.prompt + a.tokens, dtype)
        for dtype in ('float32', 'bfloat16')
      ]
      runs = [
        functools.partial(run, model, prompts, a.tokens)
        for run, models in ((_theirs, (theirs, in_bf16)), (_ours, decoders))
        for model in models
      ]
      if (same := (runs[0]() == runs[2]()).mean()) < 1:
        print(f'of {batch} prompts {same:.1%} of the tokens are the same')
      seconds = in_turns(runs, a.repeats)
    rates = [batch * a.tokens / took for took in seconds]
    ratios = rates[2] / rates[0], rates[3] / rates[1]
    cells = [f'{rate:.1f}' for rate in rates] + [f'{ratio:.2f}' for ratio in ratios]
    print(f'| {batch} | {" | ".join(cells)} |', flush=True)


def in_turns(runs: Sequence[Callable], repeats: int) -> list[float]:
  """The median seconds of each, called one after the other, after a call that is not counted."""
  took = [[] for _ in runs]
  for i in range(repeats + 1):
    for times, run in zip(took, runs, strict=True):
      start = time.perf_counter()
      run()
      if i:
        times.append(time.perf_counter() - start)
  return [statistics.median(times) for times in took]


def _theirs(model, prompts, count) -> np.ndarray:
  import torch

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
