# Two commands for a fresh machine with Python 3.10 or later and g++:
#   make demo   train on real images, draw new ones, move them, stream them as video; report in out/demo
#   make test   build and run every test; make test-cpp only those of the C and C++ library; make fuzz
#               40,000 random calls against the definition, the second half of them drawn by SEED
# and one for a machine with a GPU, whose python3 has torch, pytest and what builds (README.md); it installs nothing:
#   make gpu-report OUT=folder   build for that GPU, measure, test and sanitize, within nine minutes
# and for those who pass it on:
#   make wheel, make sdist       into dist/
#   make check-wheel             test that wheel beside the releases of torch in TORCHES; several GB, half an hour
#
# The first two make their environment in .venv first. Where torch can be imported already, that torch is used; on a
# machine without an NVIDIA GPU the CPU build is pinned, for a plain `torch` would bring several GB of CUDA libraries.
# If there is an nvcc, CUDA kernels are compiled for the visible GPUs. If there are none, kernels would take minutes and
# serve nobody here, so they are left out unless asked for:
#   POM_EXT_CUDA=1 make test                  compile them for all GPUs
#   TORCH_CUDA_ARCH_LIST=9.0 make test        for one kind; make wheel compiles for all unless this is set
# The page that games are played on is tested in a headless Chromium: the one that is there, or Debian's, or Playwright's.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= out/gpu-report
TORCH := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo 'torch>=2.10' || echo 'torch==2.13.0')
TORCHES ?= 2.12.0 2.14.1
POM_EXT_CUDA ?= gpu
SEED ?= $(shell od -An -N4 -tu4 /dev/urandom | tr -d ' ')
ASKED = POM_EXT_CUDA=$(POM_EXT_CUDA) TORCH_CUDA_ARCH_LIST=$(TORCH_CUDA_ARCH_LIST) CUDA_HOME=$(CUDA_HOME)
SOURCES := setup.py pyproject.toml $(wildcard tools/build/*.py) $(shell find csrc -type f)

export POM_EXT_CUDA
.PHONY: demo test test-cpp fuzz bench gpu-report wheel sdist check-wheel clean always

demo: $(VENV)/built
	$(BIN)/pom-ext demo --out out/demo

test: $(VENV)/built $(VENV)/browser
	$(BIN)/python -m pytest -q $(PYTEST_ARGS)

test-cpp: $(VENV)/built
	$(BIN)/python -m pytest -q $(PYTEST_ARGS) tests/engine tests/export/test_export.py \
	  $(addprefix tests/build/test_,$(addsuffix .py,cpp cuda_on_cpu cmake))

fuzz: $(VENV)/built
	for seed in 0 $(SEED); do \
	  echo "seed $$seed"; \
	  POM_EXT_FUZZ_CASES=20000 POM_EXT_FUZZ_SEED=$$seed $(BIN)/python -m pytest -q $(PYTEST_ARGS) tests/ops/test_fuzz.py || exit 1; \
	done

bench: $(VENV)/built
	$(BIN)/python -m benchmarks.run

wheel: export TORCH_CUDA_ARCH_LIST := $(or $(TORCH_CUDA_ARCH_LIST),all)
wheel: $(VENV)/environment
	rm -f dist/*.whl
	$(BIN)/python -m tools.build.cuda
	$(BIN)/pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

sdist: $(VENV)/environment
	rm -f dist/*.tar.gz
	$(BIN)/python -c "from setuptools.build_meta import build_sdist; build_sdist('dist')"

check-wheel: wheel
	$(BIN)/python tools/check_wheel.py dist/*.whl --torch $(TORCHES)

gpu-report:
	$(PYTHON) -m benchmarks.gpu_report "$(OUT)"

$(VENV)/environment: pyproject.toml
	$(PYTHON) -c "import torch" 2>/dev/null && $(PYTHON) -m venv --system-site-packages $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet '$(TORCH)'
	$(BIN)/pip install --quiet cmake ninja pybind11 setuptools wheel
	touch $@

# Changes when other GPUs are asked for.
$(VENV)/asked: always | $(VENV)/environment
	@echo '$(ASKED)' | cmp --quiet - $@ 2>/dev/null || echo '$(ASKED)' >$@

$(VENV)/built: $(VENV)/environment $(VENV)/asked $(SOURCES)
	$(BIN)/python -m tools.build.cuda
	$(BIN)/pip install --quiet --no-build-isolation --editable '.[train,play,test]'
	touch $@

$(VENV)/browser: $(VENV)/built
	for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && touch $@; done; \
	test -e $@ || { [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -qq -y chromium; } || \
	$(BIN)/playwright install chromium
	touch $@

clean:
	rm -rf $(VENV) build dist out *.egg-info pom_ext/*.so pom_ext/_build.json
