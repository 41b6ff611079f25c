"""Times follow from work, rates and the mesh by arithmetic that can be done by hand."""

import collections
import dataclasses

import pytest

from gptjax import estimate, hlo, metrics
from gptjax.estimate import Seconds, Work
from gptjax.hlo import Collective
from gptjax.machines import Chip
from gptjax.schedule import Ramp
from gptjax.sizes import Shape

CHIP = Chip('TPU v4', memory=100, usable=100, bandwidth=1e12, fast=1e11, slow=1e9, source='')
PEAK = metrics.peak_flops(CHIP.kind)
SHAPE = Shape(4, 64, 4, 16, 256, 128, 512, (None, 32))
MESH = {'stage': 1, 'data': 4, 'fsdp': 8, 'tensor': 1}


def costs(flops=0.0, moved=0.0, collectives=None, kernels=None):
  count = collections.Counter
  return hlo.Costs(flops, moved, count(collectives or {}), count(kernels or {}))


def test_work_has_what_is_sent_by_each_device():
  found = {
    Collective('all-gather', ('fsdp',), 8, 800): 2,
    Collective('reduce-scatter', ('fsdp',), 8, 80): 1,
    Collective('all-reduce', ('data',), 4, 400): 1,
    Collective('collective-permute', ('stage',), 2, 30): 3,
  }
  work = estimate.work(costs(5.0, 7.0, found), SHAPE, rows=2, tensor=1)
  assert work.flops == 5 and work.bytes == 7
  assert work.sent == {
    ('all-gather', ('fsdp',)): 2 * 700,
    ('reduce-scatter', ('fsdp',)): 70,
    ('all-reduce', ('data',)): 600,
    ('collective-permute', ('stage',)): 90,
  }


@pytest.mark.parametrize(
  'kernels, forwards',
  [
    ({'__cudnn$fmhaSoftmax a.1': 4}, 1),
    ({'__cudnn$fmhaSoftmax a.1': 4, '__cudnn$fmhaSoftmaxBackward b.2': 4}, 3.5),
    ({'tpu_custom_call splash_mha_fwd_residuals.4': 8}, 2),
    ({'tpu_custom_call splash_mha_dkv.1': 4, 'tpu_custom_call splash_mha_dq.2': 4}, 3.5),
    ({'AllocateBuffer custom-call.1': 9}, 0),
  ],
)
def test_kernels_of_attention_count_the_keys_that_are_seen(kernels, forwards):
  """One forward in each of the layers is what the formula has."""
  bare = dataclasses.replace(SHAPE, n_heads=0)
  rows, tensor = 3, 2
  tokens = rows * SHAPE.context / tensor
  matrices = 2 * SHAPE.n_layers * 4 * SHAPE.d_model * SHAPE.n_heads * SHAPE.d_head
  attention = SHAPE.forward_flops - bare.forward_flops - matrices
  work = estimate.work(costs(kernels=kernels), SHAPE, rows, tensor)
  assert work.flops == pytest.approx(forwards * attention * tokens)


def test_time_is_work_at_the_rates_of_the_chip():
  done = Work(PEAK * 3, 2e12, {('all-gather', ('fsdp',)): 1e11})
  got = estimate.seconds(done, CHIP, MESH, {})
  assert got == Seconds(3.0, 2.0, 1.0)
  assert (got.least, got.most, got.bound) == (3.0, 6.0, 'compute')


def test_what_goes_between_nodes_goes_at_their_pace():
  across = {'stage': 1, 'data': 4, 'fsdp': 2, 'tensor': 1}
  network = lambda axes: (
    estimate.seconds(Work(0, 0, {('x', axes): 1e9}), CHIP, MESH, across).network
  )
  assert network(('tensor',)) == 1e9 / 1e11
  assert network(('data',)) == 1.0
  assert network(('fsdp',)) == 1 / 4  # of each group four are on a node, each with its share
  unknown = dataclasses.replace(CHIP, slow=None)
  assert estimate.seconds(Work(0, 0, {('x', ('data',)): 1}), unknown, MESH, across).network != 0


def test_a_run_is_its_steps():
  ramp = Ramp.linear(4, 8, 4, 8, 30)
  assert [*ramp.stretches()] == [(4, 2), (8, 2), (6, 1)]
  besides, each = Seconds(1.0, 0.0, 0.0), Seconds(0.0, 2.0, 0.5)
  got = estimate.run_seconds(ramp, microbatch=4, extra=2, besides=besides, each=each)
  turns = [3, 3, 4, 4, 4]
  assert got == (sum(2.0 * n for n in turns), sum(1 + 2.5 * n for n in turns))
