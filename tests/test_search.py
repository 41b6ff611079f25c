"""What is worth compiling divides the model, holds its state, and comes in a sensible order."""

import math

import pytest

from configs import gpt3
from gptjax import search, sharding
from gptjax.config import resolve
from tests import small

KIND = 'NVIDIA H100 80GB HBM3'


def machine(nodes, each=8):
  ids = range(each * nodes)
  return [small.Device('gpu', KIND, '9.0', id=i, slice_index=i // each) for i in ids]


def model_of(size, devices):
  c = gpt3.get_config(size)
  c.mesh.data = c.compute.microbatch = 1
  run = resolve(c, devices[:1])
  return run.program.shape, run.slices


@pytest.mark.parametrize('size, nodes', [('125m', 1), ('13b', 8), ('175b', 128)])
def test_meshes_divide_the_model_and_hold_its_state(size, nodes):
  devices = machine(nodes)
  shape, batch = model_of(size, devices)
  memory = 80 * 2**30
  found = [*search.meshes(shape, batch, devices, memory)]
  assert found and len({tuple(mesh.values()) for mesh in found}) == len(found)
  for mesh in found:
    assert math.prod(mesh.values()) == len(devices) and mesh['tensor'] <= 8
    sharding.check(shape, mesh, len(devices))
    share = shape.n_params / (mesh['stage'] * mesh['fsdp'] * mesh['tensor'])
    assert search.STATE_BYTES * share <= memory / 2
    assert not batch % (mesh['data'] * mesh['fsdp'])


def test_what_exchanges_least_comes_first():
  devices = machine(1)
  assert next(search.meshes(*model_of('125m', devices), devices, 80 * 2**30)) == {
    'stage': 1,
    'data': 8,
    'fsdp': 1,
    'tensor': 1,
  }


def test_tensor_stays_within_a_node_of_any_size():
  devices = machine(2, each=6)
  shape, _ = model_of('125m', devices)
  found = {mesh['tensor'] for mesh in search.meshes(shape, 480, devices, 80 * 2**30)}
  assert found == {1, 2}


def test_a_machine_that_holds_no_state_has_no_mesh():
  devices = machine(1)
  assert not [*search.meshes(*model_of('175b', devices), devices, 80 * 2**30)]


def test_policies_compute_least_again_first_and_divide_the_batch():
  batch = 256
  mesh = {'stage': 1, 'data': 8, 'fsdp': 1, 'tensor': 1}
  got = [(s.remat, s.microbatch) for s in search.policies(batch, mesh)]
  assert got == [(remat, rows) for remat in ('none', 'dots', 'full') for rows in (4, 2, 1)]
  knobs = next(search.policies(batch, mesh)).knobs()
  assert knobs['mesh.data'] == 8 and knobs['compute.remat'] == 'none'
  assert not [*search.policies(batch, mesh | {'data': 512})]
