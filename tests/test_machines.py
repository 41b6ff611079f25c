"""The table of chips, and devices of machines that are not there."""

import itertools

import pytest

from gptjax import machines, metrics, sharding
from gptjax.errors import Mistake
from tests import small


@pytest.mark.parametrize('name', machines.CHIPS)
def test_a_chip_is_one_that_metrics_know(name):
  chip = machines.CHIPS[name]
  assert metrics.peak_flops(chip.kind) and chip.source
  assert chip.slow is None or chip.slow < chip.fast < chip.bandwidth < 1e13
  assert 2**33 < chip.memory < 2**38


@pytest.mark.parametrize(
  'wrong',
  [
    '',
    'v5p',
    'v5p:',
    'v5q:2x2',
    'h100:8',
    'h100:2x8x8',
    'h100:0x8',
    'h100:1x16',
    'h100:100000x8',
    'v5p:2x2x2*',
    'v5p:2x2',
    'v5e:2x-2',
    'v5e:4x4x4',
    ':2x2',
  ],
)
def test_a_topology_that_is_none_is_told_with_those_that_are(wrong):
  with pytest.raises(Mistake, match='--topology: got .*wanted a TPU .v4, v5e, v5p, v6e.*h100'):
    machines.check(wrong)


@pytest.mark.parametrize(
  'topology, told',
  [
    ('v5p:2x2x2', "no compiler for it, wanted a compiler for v5p: libtpu.*'.[plan-tpu]' -c"),
    ('h100:1x8', "no compiler for it.*jax-cuda12-plugin, jax-cuda12-pjrt.*'.[plan-gpu]' -c"),
  ],
)
def test_a_compiler_that_is_not_installed_is_told(monkeypatch, topology, told):
  monkeypatch.setattr(machines, '_installed', lambda module: False)
  with pytest.raises(Mistake) as e:
    machines.check(topology)
  for part in told.split('.*'):
    assert part in str(e.value)


@pytest.mark.slow
@pytest.mark.parametrize(
  'topology, nodes',
  [
    ('v4:2x2x2', [8]),
    ('v5e:4x4', [16]),
    ('v5e:2x4*2', [8, 8]),
    ('v5p:2x2x2', [8]),
    ('v6e:2x4', [8]),
    ('tpu7x:2x2x1', [8]),
    ('a100:1x8', [8]),
    ('h100:4x8', [8, 8, 8, 8]),
    ('h200:2x8', [8, 8]),
  ],
)
def test_devices_are_what_the_table_says_and_lie_on_nodes(topology, nodes):
  machine = small.machine_or_skip(topology)
  devices = machine.devices
  assert {d.device_kind for d in devices} == {machine.chip.kind}
  assert [len(ids) for ids in sharding.nodes(devices)] == nodes
  mesh = {'stage': 1, 'data': len(nodes), 'fsdp': nodes[0], 'tensor': 1}
  across = sharding.cross(mesh, devices, 'auto')
  assert across == (dict.fromkeys(mesh, 1) | {'data': len(nodes)} if nodes[1:] else {})
  ordered = sharding.make_mesh(**mesh, devices=devices, across=across).devices
  assert ordered.shape == tuple(mesh.values())
  rows = [sorted(d.id for d in row.flat) for row in ordered[0]]
  assert rows == [sorted(ids) for ids in sharding.nodes(devices)]


@pytest.mark.slow
def test_a_size_that_its_compiler_does_not_know_is_told():
  small.machine_or_skip('v5e:2x4')
  with pytest.raises(Mistake, match='--topology=v5e:3x5: got '):
    machines.find('v5e:3x5')


@pytest.mark.slow
@pytest.mark.parametrize(
  'topology', ['v4:2x2x2', 'v6e:4x8', 'v5p:2x2x2*2', 'v5p:4x4x8', 'h100:2x8']
)
def test_every_mesh_lies_on_a_machine(topology):
  """Also one that no torus of its own has: 16 × 2 on 4 × 8."""
  devices = small.machine_or_skip(topology).devices
  n, ids = len(devices), sorted(d.id for d in devices)
  parts = [d for d in range(1, n + 1) if n % d == 0]
  found = 0
  for tensor, stage, fsdp in itertools.product(parts, parts, parts):
    if n % (tensor * stage * fsdp) == 0:
      mesh = {'stage': stage, 'data': n // (tensor * stage * fsdp), 'fsdp': fsdp, 'tensor': tensor}
      across = sharding.cross(mesh, devices, 'auto')
      ordered = sharding.make_mesh(**mesh, devices=devices, across=across).devices
      assert sorted(d.id for d in ordered.flat) == ids
      found += 1
  assert found >= 20
