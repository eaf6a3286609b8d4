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

.PHONY: train smoke test test-all test-lowest drills lint bench docs audit dist clean

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

# Dependencies at the lowest versions that pyproject.toml allows, all but torch: those of LOWEST come first, and what
# tests need besides is that of VENV.
LOWEST := build/lowest
test-lowest: $(VENV)/.ready-release
	$(RUN) -m uv venv --quiet --clear --python $(RUN) $(LOWEST)
	$(RUN) tests/requirements.py --without torch >$(LOWEST)/requirements.txt
	$(RUN) -m uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct -r $(LOWEST)/requirements.txt
	$(RUN) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >$$(echo $(LOWEST)/lib/python3*/site-packages)/rest.pth
	PYTHONPATH=. $(LOWEST)/bin/python -m pytest tests -m "not slow" $(ARGS)

docs: $(VENV)/.ready-docs
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet
	@echo build/site/index.html

# What swirl needs at run time, against known vulnerabilities. It asks PyPI's JSON API, so it needs the network; an index
# without that API ends it with "Dependency not found on PyPI".
audit: $(VENV)/.ready-release
	$(RUN) tests/requirements.py --installed >build/requirements.txt
	$(RUN) -m pip_audit --strict --no-deps --disable-pip -r build/requirements.txt

dist: $(VENV)/.ready-release
	$(RUN) -m build

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

# Extras that no test needs.
$(VENV)/.ready-%: $(VENV)/.ready-tests
	$(RUN) -m pip install --quiet --disable-pip-version-check $$($(RUN) tests/requirements.py --extra $*)
	mkdir -p build
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info kernels/_cpu*
