# The first commands a newcomer runs. All of them need only Python 3.11 or later with pip.

PYTHON ?= python3
BIN := .venv/bin
# Compiling for one device after another leaves a core idle: as many processes as cores, up to 4.
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal
INSTALLED := .venv/installed

.PHONY: .venv train test test-slow test-all plan lint clean

.venv: $(INSTALLED)

# An environment that lost its interpreter or its pip is made again.
$(INSTALLED): setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'error: $(PYTHON) is missing or older than 3.11; try make PYTHON=python3.11' >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo 'error: $(PYTHON) cannot make a virtual environment: it lacks venv or ensurepip;' \
	    'try installing them (Debian and Ubuntu: apt install python3-venv)' \
	    'or another interpreter: make PYTHON=…' >&2; \
	  exit 1; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[test]' -c constraints.txt
	@touch $@

# Trains the model of configs/tiny.py on the running Python's own standard library. Started again,
# it goes on where it stopped.
train: $(INSTALLED)
	$(BIN)/python -m gptjax.prepare --config=configs/corpus.py --config.source=stdlib \
	  --config.out=data/stdlib --config.context=256
	$(BIN)/python -m gptjax.train --config=configs/tiny.py --config.workdir=runs/tiny
	$(BIN)/python -m gptjax.generate --workdir=runs/tiny --prompt='def main('
	$(BIN)/python -m gptjax.report runs/tiny

test: $(INSTALLED)
	$(PYTEST) -m 'not slow and not gpu'

test-slow: $(INSTALLED)
	$(PYTEST) -m 'slow and not gpu'

test-all: $(INSTALLED)
	$(PYTEST) -m 'not gpu'

# Plans the eight GPT-3 runs on TPUs and H100s that need not be there. Wants the extras plan-tpu and
# plan-gpu, in an environment of their own: BIN names its folder of programs.
plan:
	JAX_PLATFORMS=cpu $(BIN)/python -m benchmarks.plans

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Leaves data/ and runs/ alone: they are work, not waste.
clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find gptjax configs tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
