# Everything a newcomer or a developer runs. `make demo` and `make test` need no other set-up.
#
#   make demo      real text through a MoE layer on four ranks, checked, with its timeline
#   make test      the tests that CI runs (no GPU needed)
#   make test-all  also the full product of parameters (minutes more)
#   make gpu-test  the tests that need an NVIDIA GPU, on all GPUs of this host at once
#   make docs      the site of docs/, in out/site
#   make dist-test the wheel and the sdist, each in a clean environment
#   make lint      formatter, linter, types
#   make machine-code BASE=<commit>  whether kernels compile to the same as in that commit
#   make format    let the formatters write
#   make venv      .venv with all that the others need

# The first Python that runs and is new enough.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
RUN := $(VENV)/bin/python
# The CUDA extra only where the driver can use it.
HAVE_GPU := $(shell (test -e /proc/driver/nvidia/version || command -v nvidia-smi) >/dev/null 2>&1 && echo yes)
EXTRAS := mpi,jax,train,plot,cli,test,lint,docs,compile$(if $(HAVE_GPU),$(shell echo ,cuda13))
STAMP := $(VENV)/.cometrt-$(subst $(shell echo ,),-,$(EXTRAS))
CUDA_SOURCES = $(shell find kernels_cu -name '*.cu' -o -name '*.cuh')

.PHONY: venv demo docs test test-all gpu-test dist-test machine-code lint format clean

venv: $(STAMP)

$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || \
	  { echo "cometrt needs Python 3.11 or newer: make PYTHON=/path/to/python3 ..."; exit 1; }
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); $(PYTHON) -m virtualenv -q $(VENV); } || \
	  { echo "needs the venv module: on Debian and Ubuntu, apt install python3-venv"; exit 1; }
	@echo "setting up $(VENV): about a minute, from the Python package index"
	@$(RUN) -m pip install -q --disable-pip-version-check -e '.[$(EXTRAS)]'
	@rm -f $(VENV)/.cometrt-*
	@touch $@

demo: venv
	$(VENV)/bin/mpirun -n 4 $(RUN) -m mpi4py examples/demo.py

test: venv
	$(RUN) -m pytest -q -n 2

test-all: venv
	$(RUN) -m pytest -q -n auto --full

# A broken link, and a docstring that cannot be read, is an error. (With --quiet it is none.)
docs: venv
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

# DIST_PYTHON may be another Python: make dist-test DIST_PYTHON=python3.13
DIST_PYTHON ?= $(PYTHON)
dist-test: venv
	$(RUN) -m tests.dist --python $(DIST_PYTHON)

# Where CuPy is installed already, it is used as it is: make gpu-test RUN=python3
# KEEP=FILE: what has passed on this tree, as that file says, is passed over.
gpu-test: $(if $(filter $(VENV)/%,$(RUN)),venv)
	$(RUN) -m tests.gpu $(if $(KEEP),--keep $(KEEP)) $(GPU_TEST_OPTIONS)

# Pure refactoring: every kernel has the machine code that it has in that commit.
machine-code: venv
	$(RUN) -m tests.machine_code $(BASE)

lint: venv
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(if $(CUDA_SOURCES),$(VENV)/bin/clang-format --dry-run --Werror $(CUDA_SOURCES))

format: venv
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .
	$(if $(CUDA_SOURCES),$(VENV)/bin/clang-format -i $(CUDA_SOURCES))

clean:
	rm -rf $(VENV) out dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
