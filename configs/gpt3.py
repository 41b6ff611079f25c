"""The GPT-3 models of Table 2.1 (Brown et al. 2020): `--config=configs/gpt3.py:13b`.

Every knob there is stands here; `configs/tiny.py` has the same ones. Durations are in tokens.
"""

from ml_collections import ConfigDict

from gptjax import sizes
from gptjax.errors import mistake


def get_config(size: str = '125m') -> ConfigDict:
  """The recipe of a size: 125m 350m 760m xl xl-16h 2.7b 6.7b 13b 13b-5120 175b."""
  if size not in sizes.GPT3:
    raise mistake('size of GPT-3', size, f'one of {" ".join(sizes.GPT3)}', 'configs/gpt3.py:125m')
  row = sizes.GPT3[size]
  c = ConfigDict()
  c.workdir = f'runs/gpt3-{size}'  # metrics, checkpoints, what it was made of
  # The processes that train together: the cluster that JAX finds (TPU pod, SLURM, Open MPI, GKE) or
  # one; 'one'; or 'address:port,processes,index'.
  c.hosts = 'auto'
  c.seed = 0  # of the weights, the order of the data and dropout
  c.init_from = ''  # a run's workdir or a folder of Hugging Face, for its weights; '': new ones
  c.deterministic = False  # on GPU too the same bits each time, but slower
  c.train_tokens = 300e9  # the length of the run
  c.skip_sequences = ''  # of the stream, to leave out: '1000-1999,5000-5009'; '': none

  c.model = ConfigDict()
  # Table 2.1; d_ff is 4 d_model for all of them.
  c.model.n_layers = row.n_layers
  c.model.d_model = row.d_model
  c.model.n_heads = row.n_heads
  c.model.d_head = row.d_head
  c.model.d_ff = 4 * row.d_model
  c.model.context = 2048  # tokens a sequence; as the corpus was prepared
  c.model.vocab_size = 50257  # of the corpus's tokenizer
  c.model.pattern = ('dense', 'banded')  # one period of layers; the paper prints no order
  c.model.window = 256  # keys that a banded layer sees; not printed either, as in GPT-Neo
  c.model.dropout = 0.0  # of embeddings, attention and both branches; the paper names none
  c.model.qkv_bias = True  # False: none of q, k and v, as in GPT-Neo

  c.data = ConfigDict()
  # What gptjax.prepare made: folders with the weights that they are mixed by, as in
  # 'data/web=60,data/books=40'.
  c.data.sources = 'data/corpus'
  c.data.prefetch = 2  # batches made ahead

  c.batch = ConfigDict()
  c.batch.sequences = row.batch  # of a step, when the ramp is over
  c.batch.ramp_from = 16  # sequences of the first steps: 32 k tokens
  c.batch.ramp_step = 16  # sequences from rung to rung
  c.batch.ramp_tokens = row.ramp_tokens  # 0: no ramp

  c.lr = ConfigDict()
  c.lr.peak = row.peak_lr
  c.lr.warmup_tokens = 375e6  # linear from 0 to the peak
  c.lr.decay_tokens = 260e9  # counted from the start
  c.lr.final_fraction = 0.1  # of the peak, after the cosine

  c.adamw = ConfigDict()
  c.adamw.b1 = 0.9  # appendix B, and so are the next three
  c.adamw.b2 = 0.95
  c.adamw.eps = 1e-8
  c.adamw.weight_decay = 0.1  # of matrices
  c.adamw.clip_norm = 1.0  # the largest norm of all gradients together

  c.eval = ConfigDict()
  c.eval.every_tokens = 1e9  # 0: only at the end
  c.eval.sequences = 512  # held-out windows of each source, at most

  c.save = ConfigDict()
  c.save.every_tokens = 1e9  # 0: only at the end
  c.save.keep = 3  # checkpoints, the newest
  c.save.keep_every_tokens = 10e9  # besides, the first after each multiple; 0: none
  c.save.failures = 3  # saves that fail in a row, after which the run ends

  c.resume = ConfigDict()
  c.resume.accept_changes = False  # of the recipe: rate, batch, data, length

  c.stability = ConfigDict()
  c.stability.spike = 10.0  # robust deviations above the median; 0: only NaN and infinity
  c.stability.window = 128  # good steps that a spike is told by
  c.stability.streak = 16  # bad steps in a row after which the run rolls back and skips them
  c.stability.rollbacks = 3  # how often it may

  c.watchdog = ConfigDict()
  c.watchdog.seconds = 1800.0  # without a step, when the run says where it is stuck; 0: never
  c.watchdog.ends = False  # and ends, to be started again

  c.check = ConfigDict()
  c.check.every_tokens = 0.0  # copies of the state compared, a step computed twice more; 0: never

  c.mesh = ConfigDict()
  c.mesh.data = -1  # -1: all devices that are left
  c.mesh.fsdp = 1  # splits weights and optimizer over d_model, and the batch
  c.mesh.tensor = 1  # splits heads, d_ff, the vocabulary and what lies between products
  c.mesh.stage = 1  # splits the layers into a pipeline; each stage has whole periods of the pattern
  # Which axes cross the slow links between nodes or TPU slices, as in 'stage,data', the first as
  # far as it goes; auto: data, then stage, fsdp, tensor.
  c.mesh.slow_axes = 'auto'

  c.compute = ConfigDict()
  c.compute.microbatch = 4  # sequences at a time for each data·fsdp part of the mesh
  c.compute.dtype = 'auto'  # float32 on CPU, bfloat16 elsewhere
  c.compute.attention = 'auto'  # chunked on CPU, cudnn on GPU, splash on TPU; or a name
  c.compute.remat = 'dots'  # none, weights, dots or full: from most memory to least
  # loop: layers share one program; apart: each has its own, which takes longer to compile and moves
  # less memory; auto: apart if there are no more than 24, on a GPU, and without remat on a TPU.
  c.compute.layers = 'auto'
  c.compute.loss_chunk = 512  # positions whose logits are held at a time
  c.compute.compiled = ''  # a step that `gptjax.plan --save` compiled; '': compiled at the start
  c.compute.cache = True  # keeps what was compiled, in the workdir

  c.log = ConfigDict()
  c.log.progress = True  # a bar, or lines where no terminal is
  c.log.tensorboard = True  # files for it in the workdir
  c.log.wandb = ''  # a W&B project; '': none
  c.profile = ''  # steps to trace, '20-22'; '': none
  return c
