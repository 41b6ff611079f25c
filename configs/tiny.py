"""GPT-3's recipe in small: minutes on two CPU cores, for `make train` and for tests."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """The same knobs as configs/gpt3.py, which says what each is."""
  c = ConfigDict()
  c.workdir = 'runs/tiny'
  c.hosts = 'auto'
  c.seed = 0
  c.init_from = ''
  c.deterministic = False
  c.train_tokens = 1.5e6
  c.skip_sequences = ''

  c.model = ConfigDict()
  c.model.n_layers = 4
  c.model.d_model = 128
  c.model.n_heads = 4
  c.model.d_head = 32
  c.model.d_ff = 512
  c.model.context = 256
  c.model.vocab_size = 4096
  c.model.pattern = ('dense', 'banded')
  c.model.window = 64
  c.model.dropout = 0.0
  c.model.qkv_bias = True  # False: none of q, k and v, as in GPT-Neo

  c.data = ConfigDict()
  c.data.sources = 'data/stdlib'
  c.data.prefetch = 2

  c.batch = ConfigDict()
  c.batch.sequences = 32
  c.batch.ramp_from = 8
  c.batch.ramp_step = 8
  c.batch.ramp_tokens = 3e5

  c.lr = ConfigDict()
  c.lr.peak = 3e-3
  c.lr.warmup_tokens = 1e5
  c.lr.decay_tokens = 1.3e6
  c.lr.final_fraction = 0.1

  c.adamw = ConfigDict()
  c.adamw.b1 = 0.9
  c.adamw.b2 = 0.95
  c.adamw.eps = 1e-8
  c.adamw.weight_decay = 0.1
  c.adamw.clip_norm = 1.0

  c.eval = ConfigDict()
  c.eval.every_tokens = 2.5e5
  c.eval.sequences = 512

  c.save = ConfigDict()
  c.save.every_tokens = 5e5
  c.save.keep = 2
  c.save.keep_every_tokens = 0.0
  c.save.failures = 3

  c.resume = ConfigDict()
  c.resume.accept_changes = False

  c.stability = ConfigDict()
  c.stability.spike = 10.0
  c.stability.window = 128
  c.stability.streak = 16
  c.stability.rollbacks = 3

  c.watchdog = ConfigDict()
  c.watchdog.seconds = 1800.0
  c.watchdog.ends = False

  c.check = ConfigDict()
  c.check.every_tokens = 0.0

  c.mesh = ConfigDict()
  c.mesh.data = -1
  c.mesh.fsdp = 1
  c.mesh.tensor = 1
  c.mesh.stage = 1
  c.mesh.slow_axes = 'auto'

  c.compute = ConfigDict()
  c.compute.microbatch = 4
  c.compute.dtype = 'auto'
  c.compute.attention = 'auto'
  c.compute.remat = 'none'
  c.compute.layers = 'auto'
  c.compute.loss_chunk = 128
  c.compute.compiled = ''
  c.compute.cache = True

  c.log = ConfigDict()
  c.log.progress = True
  c.log.tensorboard = True
  c.log.wandb = ''
  c.profile = ''
  return c
