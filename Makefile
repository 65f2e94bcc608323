# `make demo`, `make proof`, `make test`, `make lint`, `make docs`: each does the set-up it needs and reuses what is there.
# Needs nothing but make and Python 3.9 or later; `make VENV=path PYTHON=python3.12 test` chooses others.

VENV ?= .venv
# The first that runs: a launcher may exist without the version it stands for.
PYTHON ?= $(shell for name in python3.11 python3.12 python3.10 python3; do \
	$$name -c "" >/dev/null 2>&1 && { echo $$name; break; }; done)

VENV_PYTHON = $(VENV)/bin/python
PIP_INSTALL = "$(VENV_PYTHON)" -m pip --disable-pip-version-check install
# Written last: as long as it is missing or older than its sources, the set-up is not finished. It names
# the checkout whose package is installed; another checkout that shares the environment sets it up again.
READY = $(VENV)/.distill_d2_ready
ifneq ($(shell cat "$(READY)" 2>/dev/null),$(CURDIR))
.PHONY: $(READY)
endif
# One thread per process: results do not depend on the machine, and small tensors are faster so.
RUN = OMP_NUM_THREADS=1 "$(VENV_PYTHON)"
# Test files side by side; the end of a run prints the peak of memory (tests/memory.py).
PYTEST = $(RUN) -m pytest -q -n auto --maxprocesses 4 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help env demo proof lint docs test test-slow test-gpu clean

help:
	@echo "make demo       set up, then train a teacher, a student alone and a distilled student"
	@echo "make proof      set up, then repeat the proof that distillation helps, in hours: DATA=FOLDER (docs/proof.md)"
	@echo "make test       set up, then run the test suite"
	@echo "make test-slow  set up, then run the slow tests too (minutes of training)"
	@echo "make test-gpu   check every loss and detector on one GPU, and measure costs (8 minutes; sets nothing up)"
	@echo "make lint       set up, then check style (ruff) and types (mypy)"
	@echo "make docs       set up, then build the pages of docs/ strictly, and run their commands on small data (minutes)"
	@echo "make env        only set up: environment, detectron2, this package"
	@echo "make clean      remove caches and build products (not the environment, data or output)"
	@echo "VENV=path names the environment folder (now: $(VENV); about 6 GB), PYTHON=name its Python"

env: $(READY)

demo: env
	@$(RUN) -m distill_d2 demo

# DATA: the photos. ARGS: more options, such as ARGS="--list" or ARGS="--pairs retinanet --processes 4".
DATA ?= datasets/voc_animals
proof: env
	@$(RUN) -m distill_d2 proof --data "$(DATA)" $(ARGS)

lint: env
	"$(VENV_PYTHON)" -m ruff check .
	"$(VENV_PYTHON)" -m ruff format --check .
	"$(VENV_PYTHON)" -m mypy

# The site is in output/site. One file of tests, so its pages are what runs side by side.
docs: env
	"$(VENV_PYTHON)" -m mkdocs build --strict
	$(PYTEST) --dist load -m "slow or not slow" tests/docs

test: env
	$(PYTEST) -m "not slow"

test-slow: env
	$(PYTEST)

# Machines with a GPU often bring their own torch: without an environment here, the system's Python is used.
test-gpu:
	"$(or $(wildcard $(VENV_PYTHON)),python3)" tools/test_gpu.py

$(READY): requirements.txt setup.py pyproject.toml distill_d2/install_detectron2.py
	@rm -f "$(READY)"
	@$(MAKE) --no-print-directory create-venv
	$(PIP_INSTALL) -r requirements.txt
	$(PIP_INSTALL) --no-build-isolation -e ".[dev]"
	"$(VENV_PYTHON)" -m distill_d2 install-detectron2
	@echo "$(CURDIR)" > "$(READY)"
	@echo "the environment $(VENV) is ready"

# An environment with a working pip is kept, whichever Python it has.
.PHONY: create-venv
create-venv:
	@if "$(VENV_PYTHON)" -m pip --version >/dev/null 2>&1; then exit 0; fi; \
	if [ -z "$(PYTHON)" ]; then \
		echo "make: no Python 3 found; install Python 3.9 or later, or name one: make PYTHON=path" >&2; exit 1; fi; \
	if ! $(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 9))"; then \
		echo "make: Python 3.9 or later is needed, but $(PYTHON) is older; name one: make PYTHON=path" >&2; exit 1; fi; \
	if ! $(PYTHON) -c "import ensurepip, venv" >/dev/null 2>&1; then \
		echo "make: $(PYTHON) lacks the module venv or ensurepip; install it (Debian and Ubuntu: the package" \
			"python3-venv), or name another Python: make PYTHON=path" >&2; exit 1; fi; \
	echo "creating the environment $(VENV)"; \
	$(PYTHON) -m venv "$(VENV)"

clean:
	rm -rf build dist .pytest_cache *.egg-info
	find . \( -path "./$(VENV)" -o -path ./.git \) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
