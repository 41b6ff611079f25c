"""What a run costs on a machine that need not be there: its step compiled, read and timed."""

import dataclasses
import time

import jax

from gptjax import ahead, estimate, hlo, memory, metrics, search
from gptjax.config import Run
from gptjax.errors import mistake
from gptjax.estimate import Seconds, Work
from gptjax.machines import Machine
from gptjax.memory import Memory


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is known of a run before its machine is there; of one device, if not said otherwise."""

  machine: Machine
  run: Run
  mesh: jax.sharding.Mesh
  compiled: jax.stages.Compiled
  compile_seconds: float
  memory: Memory
  besides: Work  # of a step besides its slices; with a step of one slice at most, of all of it
  each: Work  # of each slice, or turn of a pipeline

  @property
  def fits(self) -> bool:
    return self.memory.held <= self.memory.there

  @property
  def turns(self) -> int:
    """Turns of a pipeline in a step besides its slices."""
    return 2 * (self.run.mesh['stage'] - 1)

  @property
  def idle(self) -> float:
    """Of a pipeline's turns in a step of the full batch."""
    return self.turns / (self.run.slices + self.turns)

  @property
  def filler(self) -> float:
    """Of the rows that the run computes, those that only fill up slices."""
    computed, surplus = self.run.ramp.slots(self.run.microbatch)
    return surplus / computed

  @property
  def settings(self) -> search.Settings:
    mesh = self.run.mesh
    rows = self.run.microbatch // (mesh['data'] * mesh['fsdp'])
    return search.Settings(mesh, rows, self.run.program.numerics.remat)

  @property
  def step(self) -> Work:
    """Of a full batch."""
    return self.besides.plus(self.each, self.run.slices + self.turns)

  def seconds(self, done: Work) -> Seconds:
    return estimate.seconds(done, self.machine.chip, self.run.mesh, self.run.across)

  @property
  def model_flops(self) -> float:
    """What the formula says a device computes in a step of the full batch, nothing twice."""
    shape = self.run.program.shape
    tokens = self.run.slices * self.run.microbatch * shape.context
    return shape.train_flops * tokens / len(self.machine.devices)

  @property
  def peak(self) -> float:
    return metrics.peak_flops(self.machine.chip.kind)

  def mfu(self, seconds: float) -> float:
    """Of a step of the full batch that takes so long."""
    return self.model_flops / seconds / self.peak

  @property
  def run_seconds(self) -> tuple[float, float]:
    """Of the whole run, at best and if nothing overlaps."""
    run, besides, each = self.run, self.seconds(self.besides), self.seconds(self.each)
    return estimate.run_seconds(run.ramp, run.microbatch, self.turns, besides, each)


def plan_for(run: Run, machine: Machine) -> Plan:
  """Compiles the training step of a run for a machine, and reads what came of it.

  Raises:
    DoesNotFit: where the compiler finds too little memory.
    Mistake: where it refuses for another reason, or rates of the machine are not known.
  """
  if run.across and machine.chip.slow is None:
    got = f'{machine.topology}, slices over an unknown network'
    raise mistake('--topology', got, 'a chip for which that is published', 'one slice')
  mesh = run.make_mesh(machine.devices)
  start = time.perf_counter()
  compiled = ahead.compile_step(run, mesh)
  took = time.perf_counter() - start
  text, shape = compiled.as_text(), run.program.shape
  rows = run.microbatch / (run.mesh['data'] * run.mesh['fsdp'])
  # In a pipeline each stage runs its own layers only; the others' are not in its program.
  done = lambda trips: estimate.work(
    hlo.read(text, run.mesh, trips), shape, rows, run.mesh['tensor']
  )
  besides, once = done(0), done(1)
  return Plan(
    machine=machine,
    run=run,
    mesh=mesh,
    compiled=compiled,
    compile_seconds=took,
    memory=memory.of(run, mesh, compiled, machine.chip.usable),
    besides=besides,
    each=once.plus(besides, -1),
  )
