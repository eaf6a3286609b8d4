# `make train` and `make test` do all the set-up on a fresh machine, then the job; a second call starts at once.
# `make test-all` adds the full compile matrix and long fuzzing, `make drills` kills, corrupts and attacks for half an hour.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
RUN := $(VENV)/bin/python
BUILD_INPUTS := pyproject.toml setup.py CMakeLists.txt $(wildcard cpp/*)

# Freed tensors stay with the process: giving their pages back costs an update 10 to 20 ms of page faults.
export MALLOC_TRIM_THRESHOLD_ ?= 1073741824
export MALLOC_MMAP_THRESHOLD_ ?= 1073741824

.PHONY: train smoke test test-all drills lint bench clean

train: $(VENV)/.ready
	$(RUN) -m swirl.train --packed $(ARGS)

smoke: $(VENV)/.ready
	$(RUN) -m swirl.train --packed --smoke --out run-smoke $(ARGS)

# One worker a core, one thread a worker.
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest tests -n $(shell nproc) --dist worksteal

test: lint
	$(PYTEST) -m "not slow" $(ARGS)

test-all: lint
	$(PYTEST) $(ARGS)

drills: $(VENV)/.ready-tests
	$(RUN) -m tests.drills $(ARGS)

lint: $(VENV)/.ready-tests
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

bench: $(VENV)/.ready-tests
	$(RUN) -m benchmarks.train_step $(ARGS)

# torch is pinned for this CPU set-up alone; a machine with its own torch (CUDA) uses `pip install .` instead.
define install
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(RUN) -m pip install --quiet --disable-pip-version-check -e '$(1)'
endef

$(VENV)/.ready: $(BUILD_INPUTS)
	$(call install,.)
	touch $@

# All of the above and the tests' packages at once, so that the C++ is built once.
$(VENV)/.ready-tests: $(BUILD_INPUTS)
	$(call install,.[test])
	touch $(VENV)/.ready $@

clean:
	rm -rf $(VENV) build dist *.egg-info kernels/_cpu*
