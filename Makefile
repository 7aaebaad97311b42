# make demo | test | test-full | lint | evidence | cpu-check | gpu-check | clean
#
# From a fresh clone every target first makes .venv (python3 >= 3.10), installs requirements.txt into it and builds
# the package in place. Stamp files make a second call quick; an edit of csrc/ or setup.py builds again.
#
# PYTHON=/path/to/python uses an interpreter that already has torch, as it is: nothing is installed, and compiled
# parts are taken as they lie in fused_resnet/ (`PYTHON=python3 make gpu-check` on a prepared GPU machine).
# Both checks take BUDGET=540 seconds in all, and go on in later calls: STEPS=rest, or STEPS=tune,ops. OUT=folder is where
# their records go.
# FUSED_RESNET_CUDA=1 also compiles _C_cuda beside a CPU-only torch.

VENV := .venv
BOOTSTRAP ?= python3
FUSED_RESNET_CUDA ?=
export FUSED_RESNET_CUDA
CSRC := $(shell find csrc -type f)
WORKERS ?= 2
OUT ?=
STEPS ?=
BUDGET ?=
CHECK_OPTIONS = $(if $(OUT),--out $(OUT)) $(if $(STEPS),--only $(STEPS)) $(if $(BUDGET),--budget $(BUDGET))

ifeq ($(origin PYTHON), undefined)
PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
BUILT := $(VENV)/.built$(if $(FUSED_RESNET_CUDA),-cuda$(FUSED_RESNET_CUDA))
else
BUILT :=
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
endif

# Tests run in $(WORKERS) processes of one thread each, so that they do not fight over the cores. tests/conftest.py
# says which files they begin with.
PYTEST := OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-full lint evidence cpu-check gpu-check clean

demo: $(BUILT)
	$(PYTHON) -m benchmarks.demo $(if $(OUT),--out $(OUT))

test: $(BUILT)
	$(PYTEST) -m "not full" tests

test-full: $(BUILT)
	$(PYTEST) -m full tests

lint: $(BUILT)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy fused_resnet
	$(PYTHON) -c 'from importlinter.cli import lint_imports_command; lint_imports_command()'
	$(PYTHON) -c 'from clang_format import clang_format; clang_format()' --dry-run --Werror $(CSRC)

# What CI cannot: random problems on the emulated kernels and on all kernels of bytes, a record each; then all of
# cpu-check, at its full size, which takes hours. Finished parts are kept in out/ and not run again. The records are to be committed.
evidence: $(BUILT)
	$(PYTHON) -m benchmarks.random_problems --device sm_80 --kind mixed --problems 2000 --per-part 250
	$(PYTHON) -m benchmarks.random_problems --device sm_90 --kind mixed --problems 2000 --per-part 250
	$(PYTHON) -m benchmarks.random_problems --device sm_80 --kind int8 --problems 500 --per-part 250
	$(PYTHON) -m benchmarks.random_problems --device sm_90 --kind int8 --problems 500 --per-part 250
	$(PYTHON) -m benchmarks.random_problems --device cpu --kind int8 --problems 5000
	$(PYTHON) -m benchmarks.cpu_check --evidence $(CHECK_OPTIONS)

# The CPU engine: correctness, then accuracy, memory and tables, on whatever machine this is.
cpu-check: $(BUILT)
	$(PYTHON) -m benchmarks.cpu_check $(CHECK_OPTIONS)

gpu-check: $(BUILT)
	$(PYTHON) -m benchmarks.gpu_check $(CHECK_OPTIONS)

ifdef BUILT
$(VENV)/.installed: requirements.txt
	@$(BOOTSTRAP) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fused_resnet needs Python 3.10 or later")'
	test -x $(VENV)/bin/python || $(BOOTSTRAP) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -r requirements.txt
	@touch $@

# One stamp per choice of parts; the other choice's stamp is removed, since both build into fused_resnet/.
$(BUILT): $(INSTALLED) setup.py pyproject.toml fused_resnet/operators/schemas.py \
		fused_resnet/emulation/interface.py $(CSRC)
	$(VENV)/bin/python -m pip install -q --no-build-isolation --no-deps -e .
	@rm -f $(VENV)/.built*
	@touch $@
endif

clean:
	rm -rf build out *.egg-info .benchmarks .hypothesis .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	rm -f fused_resnet/*.so fused_resnet/_build.json $(VENV)/.built*
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
