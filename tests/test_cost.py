"""What a plan says of a step and a run is what their parts come to."""

import dataclasses

import pytest

from gptjax import cost, plan_table
from gptjax.errors import Mistake
from tests import plans


def test_a_step_is_its_slices_and_the_model_is_in_it():
  made = plans.planned(mesh__data=2, mesh__fsdp=2, mesh__tensor=2)
  assert made.step.flops == made.besides.flops + made.run.slices * made.each.flops
  # Attention in chunks computes scores of keys that are not seen, and remat some things twice.
  assert 1.0 < made.step.flops / made.model_flops < 1.6
  assert ('all-reduce', ('data',)) in made.besides.sent
  assert not [axes for _, axes in made.each.sent if axes == ('data',)]
  assert made.turns == made.idle == 0
  least, most = made.run_seconds
  step, steps = made.seconds(made.step), made.run.ramp.total / 24
  assert least == pytest.approx(steps * step.least) and most == pytest.approx(steps * step.most)
  assert made.settings.knobs()['compute.microbatch'] == 1 and made.settings.shape == '1·2·2·2'


@pytest.mark.slow
def test_a_pipeline_idles_in_some_of_its_turns():
  made = plans.planned(mesh__stage=2, mesh__data=4, model__n_layers=4, compute__microbatch=2)
  assert made.turns == 2 and made.idle == 2 / (made.run.slices + 2)
  turns = made.run.slices + 2
  assert made.step.flops == pytest.approx(made.besides.flops + turns * made.each.flops)
  assert f'pipeline       {2 / turns:12.1%}' in plan_table.table(made)


@pytest.mark.slow
def test_the_ramp_fills_up_slices():
  made = plans.planned(batch__ramp_tokens=2048.0, compute__microbatch=3, mesh__data=8)
  # Rungs of 8 and 16 in slices of 24.
  counted = [(rows, steps) for rows, steps in made.run.ramp.stretches()]
  computed = sum(24 * steps for rows, steps in counted)
  assert made.filler == pytest.approx(1 - sum(r * steps for r, steps in counted) / computed)
  assert made.filler > 0.1


def test_slices_over_an_unknown_network_are_refused():
  run = dataclasses.replace(plans.run_of(), across={'data': 2})
  with pytest.raises(Mistake, match='unknown network'):
    cost.plan_for(run, plans.machine(dataclasses.replace(plans.CHIP, slow=None)))
