"""Machines that need not be there: what their chips can do, and their devices, to compile for.

Compiling for a TPU wants `libtpu` (the extra plan-tpu), for an NVIDIA GPU the CUDA plugin (the
extra plan-gpu). Neither wants the hardware, and JAX itself may run on the CPU.
"""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from gptjax.errors import mistake, told_as

GB, GIB = 10**9, 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """What JAX calls a device, by its public data sheet; bytes, and bytes a second in one direction.

  `fast` is what it sends to the others of its slice or node: on TPU by all links of the torus at
  once, which a collective along one axis of the mesh seldom does, on GPU by NVLink. `slow` is its
  share of the network between slices or nodes.
  """

  kind: str  # as JAX names it
  memory: int
  usable: int  # of it by a run: what a TPU's compiler refuses beyond; of a GPU 90 % (launch/gpu.sh)
  bandwidth: float
  fast: float
  slow: float | None  # None: not published
  source: str


@dataclasses.dataclass(frozen=True)
class Machine:
  """Devices of one kind, there or not, under the name of their topology."""

  topology: str
  chip: Chip
  devices: Sequence[jax.Device]


DOCS = 'cloud.google.com/tpu/docs'
TPU = {
  'v4': Chip(
    kind='TPU v4',
    memory=32 * GIB,
    usable=int(30.75 * GIB),
    bandwidth=1228 * GB,
    fast=300 * GB,
    slow=None,
    source=f'{DOCS}/v4: 32 GiB, 1228 GB/s, 3D torus, 2400 Gbit/s a chip',
  ),
  'v5e': Chip(
    kind='TPU v5 lite',
    memory=16 * GIB,
    usable=int(15.75 * GIB),
    bandwidth=819 * GB,
    fast=400 / 2 * GB,
    slow=200 / 8 / 8 * GB,
    source=f'{DOCS}/v5e: 16 GB, 819 GB/s, 2D torus, 400 GB/s both ways; 200 Gbit/s for 8 chips',
  ),
  'v5p': Chip(
    kind='TPU v5',
    memory=95 * GIB,
    usable=int(95.74 * GIB),
    bandwidth=2765 * GB,
    fast=1200 / 2 * GB,
    slow=50 / 8 * GB,
    source=f'{DOCS}/v5p: 95 GiB, 2765 GB/s, 3D torus, 1200 GB/s both ways; 50 Gbit/s a chip',
  ),
  'v6e': Chip(
    kind='TPU v6 lite',
    memory=32 * GIB,
    usable=int(31.25 * GIB),
    bandwidth=1640 * GB,
    fast=800 / 2 * GB,
    slow=800 / 8 / 8 * GB,
    source=f'{DOCS}/v6e: 32 GB, 1640 GB/s, 2D torus, 800 GB/s both ways; 800 Gbit/s for 8 chips',
  ),
  'tpu7x': Chip(  # a chip is two devices
    kind='TPU7x',
    memory=96 * GIB,
    usable=int(94.75 * GIB),
    bandwidth=7380 / 2 * GB,
    fast=1200 / 2 / 2 * GB,
    slow=None,
    source=f'{DOCS}/tpu7x: 192 GiB, 7380 GB/s, 3D torus, 1200 GB/s both ways, for two devices',
  ),
}
GPU = {
  'a100': Chip(
    kind='NVIDIA A100-SXM4-80GB',
    memory=80 * GIB,
    usable=72 * GIB,
    bandwidth=2039 * GB,
    fast=300 * GB,
    slow=200 / 8 * GB,
    source='A100 80GB data sheet: 2039 GB/s, NVLink 600 GB/s both ways; DGX: 200 Gbit/s a GPU',
  ),
  'h100': Chip(
    kind='NVIDIA H100 80GB HBM3',
    memory=80 * GIB,
    usable=72 * GIB,
    bandwidth=3352 * GB,
    fast=450 * GB,
    slow=400 / 8 * GB,
    source='H100 SXM data sheet: 3.35 TB/s, NVLink 900 GB/s both ways; DGX: 400 Gbit/s a GPU',
  ),
  'h200': Chip(
    kind='NVIDIA H200',
    memory=141 * GB,
    usable=int(0.9 * 141 * GB),
    bandwidth=4800 * GB,
    fast=450 * GB,
    slow=400 / 8 * GB,
    source='H200 SXM data sheet: 141 GB, 4.8 TB/s, NVLink 900 GB/s both ways; 400 Gbit/s a GPU',
  ),
}
CHIPS = TPU | GPU
FLAT = ('v5e', 'v6e')  # whose torus has two dims
N = r'[1-9]\d*'
MOST = 2**15  # devices: what is more is a slip of the keyboard, and takes hours to compile for
# What XLA's compiler wants to know of a GPU besides: units, clock in GHz, compute capability, and
# bytes of L2 and of shared memory of a unit. OpenXLA lists them for each (xla/backends/gpu/
# target_config/specs, Apache 2.0); the whitepapers of Ampere and Hopper print them.
COMPILED_AS = {
  'a100': (108, 1.41, 'major: 8 minor: 0', 40 * 2**20, 167936, 166912),
  'h100': (
    132,
    1.98,
    'major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES',
    50 * 2**20,
    233472,
    232448,
  ),
}
COMPILED_AS['h200'] = COMPILED_AS['h100']


def check(topology: str) -> None:
  """Raises a Mistake for what names no machine, or one whose compiler is not installed."""
  name, _, size = topology.partition(':')
  # A torus of two dims or of three; a GPU's node has eight at most.
  dims = 1 if name in FLAT else 2
  form = rf'{N}(x{N}){{{dims}}}(\*{N})?' if name in TPU else rf'{N}x[1-8]'
  known = name in CHIPS and re.fullmatch(form, size)
  if not known or math.prod(map(int, re.findall(r'\d+', size))) > MOST:
    wanted = f'a TPU ({", ".join(TPU)}) or GPU ({", ".join(GPU)}) and how many'
    fix = 'v5p:4x4x8, v5p:4x4x8*2 for two slices, or h100:16x8 for 16 nodes of 8'
    raise mistake('--topology', repr(topology), wanted, fix)
  if missing := lacking(name):
    extra = 'plan-tpu' if name in TPU else 'plan-gpu'
    wanted = f'a compiler for {name}: {missing}'
    fix = f"pip install -e '.[{extra}]' -c constraints.txt"
    raise mistake('--topology', f'{topology}, and no compiler for it', wanted, fix)


def find(topology: str) -> Machine:
  """A machine by name: 'v5p:4x4x8', 'v5p:4x4x8*2' (two slices) or 'h100:16x8' (16 nodes).

  Wants JAX on the CPU (`JAX_PLATFORMS=cpu`): a machine's own plugin here only compiles.

  Raises:
    Mistake: for one that is unknown, that its plugin does not know, or that has no plugin here.
  """
  check(topology)
  name, _, size = topology.partition(':')
  with told_as(f'--topology={topology}', 'one that its compiler knows', 'another size', Exception):
    if name in TPU:
      # It only compiles: it need not be the one process that has the TPU, nor look for one.
      os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
      os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
      # It warns if it does not know where it is. What is compiled for is told to it below.
      os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-8')
      os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
      shape, _, slices = size.partition('*')
      # A v4 chip's two cores are one device only if asked to be.
      settings = {'chip_config_name': 'megacore'} if name == 'v4' else {}
      settings |= {'num_slices': int(slices)} if slices else {}
      described = topologies.get_topology_desc(f'{name}:{shape}', 'tpu', **settings)
    else:
      nodes, each = size.split('x')
      described = topologies.get_topology_desc(
        name, 'cuda', topology=f'{nodes}x1x{each}', target_config=_target(name)
      )
    return Machine(topology, CHIPS[name], described.devices)


def lacking(name: str) -> str:
  """What to install before a chip's machines can be compiled for."""
  if name in TPU:
    return '' if _installed('libtpu') else 'libtpu'
  wanted = {
    'jax-cuda12-plugin': _installed('jax_cuda12_plugin') or _installed('jax_cuda13_plugin'),
    'jax-cuda12-pjrt': _installed('jax_plugins.xla_cuda12') or _installed('jax_plugins.xla_cuda13'),
    'nvidia-cuda-nvcc-cu12': _installed('nvidia.cuda_nvcc') or _installed('nvidia.cu13'),
    'nvidia-cudnn-cu12': _installed('nvidia.cudnn'),
  }
  return ', '.join(package for package, there in wanted.items() if not there)


def _installed(module: str) -> bool:
  try:
    return importlib.util.find_spec(module) is not None
  except ModuleNotFoundError:  # its parent is not there
    return False


def _target(name: str) -> str:
  """A GPU as XLA's compiler reads it (GpuTargetConfigProto)."""
  units, clock, capability, l2, shared, shared_optin = COMPILED_AS[name]
  gpu = GPU[name]
  return f"""
    platform_name: "CUDA"
    device_description_str: "{gpu.kind}"
    gpu_device_info {{
      name: "{gpu.kind}"
      device_vendor: "NVIDIA Corporation"
      cuda_compute_capability {{ {capability} }}
      core_count: {units}
      fpus_per_core: {64 if name == 'a100' else 128}
      clock_rate_ghz: {clock}
      device_memory_size: {gpu.memory}
      memory_bandwidth: {int(gpu.bandwidth)}
      l2_cache_size: {l2}
      shared_memory_per_core: {shared}
      shared_memory_per_block: 49152
      shared_memory_per_block_optin: {shared_optin}
      registers_per_core_limit: 65536
      registers_per_block_limit: 65536
      threads_per_warp: 32
      threads_per_core_limit: 2048
      threads_per_block_limit: 1024
      thread_dim_limit_x: 1024
      thread_dim_limit_y: 1024
      thread_dim_limit_z: 64
      block_dim_limit_x: 2147483647
      block_dim_limit_y: 65535
      block_dim_limit_z: 65535
    }}
    dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
  """
