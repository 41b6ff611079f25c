"""Plans of small runs for the CPU devices of the tests, as if it had a data sheet."""

import functools

import jax

from gptjax import cost
from gptjax.config import Run, resolve
from gptjax.machines import Chip, Machine
from tests import runs

GB = 10**9
CHIP = Chip('TPU v4', memory=GB, usable=GB, bandwidth=1e12, fast=1e11, slow=1e9, source='none')


def config(**settings):
  return runs.config('runs/x', 'data/x', **{'batch__ramp_tokens': 0.0} | settings)


def run_of(**settings) -> Run:
  return resolve(config(**settings), jax.devices())


def machine(chip: Chip = CHIP) -> Machine:
  return Machine('here', chip, jax.devices())


@functools.cache
def planned(**settings) -> cost.Plan:
  return cost.plan_for(run_of(**settings), machine())
