# Development commands. Each works by itself on a fresh machine: it creates .venv, installs what
# it needs and runs. A second run reinstalls only what changed.
#
#   make demo       writes a small checkpoint, loads it, runs its MoE layers, prints a table
#   make test       the tests that need no GPU (GPU tests run too where there is one)
#   make test-all   the same with every case on every mesh, optimised as users run it, and the
#                   comparisons with PyTorch implementations
#   make gpu-test   only the GPU tests, on the compiled extension
#   make sanitize   the kernels under compute-sanitizer (of the CUDA toolkit), on small layers
#   make lint       ruff, mypy, clang-format
#   make bench      quantize_fp8, the ceilings, and the layers; needs a GPU
#   make graphs     build/graphs/graphs, by which builds are compared (python -m benchmarks.graphs)
#   make wheel      dist/*.whl with the CUDA extension
#   make clean      removes everything that the above made
#
# Variables: PYTHON (at least 3.11), JAX_W4MOE_CUDA=AUTO|ON|OFF (default: AUTO where there is an
# NVIDIA GPU, else OFF, which is faster and enough for the CPU tests), CUDACXX, BENCH (options of
# `jax_w4moe bench`).

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMPS := $(VENV)/stamps
# loadgroup: tests that share compilations stay in one process.
PYTEST := $(PY) -m pytest -q -n 2 --dist loadgroup
# Modules are compiled when they are first imported; most never are.
export PIP_COMPILE := 0
# -qq: errors only.
PIP := $(PY) -m pip --disable-pip-version-check -qq

GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
JAX_W4MOE_CUDA ?= $(if $(GPU),AUTO,OFF)
export JAX_W4MOE_CUDA

# Test processes share the GPU, so none of them may reserve it all.
export XLA_PYTHON_CLIENT_PREALLOCATE ?= false

# The install is editable, so a changed Python file needs no reinstall, but one that is added or
# removed does: the names of the files are part of the stamp's name.
NAMES := $(shell find jax_w4moe -name '*.py' | LC_ALL=C sort | cksum | cut -d ' ' -f 1)
CSRC := $(shell find csrc -type f)
PACKAGE := $(STAMPS)/package-$(JAX_W4MOE_CUDA)-$(NAMES)
INSTALLED := $(PACKAGE) $(if $(GPU),$(STAMPS)/extra-cuda13)

.PHONY: demo test test-all test-judge gpu-test gpu-test-on sanitize lint bench bench-on graphs wheel \
  clean

demo: $(INSTALLED) $(STAMPS)/extra-flax $(STAMPS)/extra-checkpoint
	$(PY) -m jax_w4moe demo

# Most of the time on CPUs goes into compiling, and optimising is a third of that.
test test-judge: export JAX_DISABLE_MOST_OPTIMIZATIONS ?= $(if $(GPU),0,1)
# Test processes, and the programs that tests start, share what they compile.
test test-judge: export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/build/jax_cache
test test-judge: export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0
test test-judge: export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES ?= -1
test: $(INSTALLED) $(STAMPS)/extra-test
	$(PYTEST) tests

test-all: $(INSTALLED) $(STAMPS)/extra-test $(STAMPS)/extra-judge
	$(PYTEST) -m '' tests

test-judge: $(INSTALLED) $(STAMPS)/extra-test $(STAMPS)/extra-judge
	$(PY) -m pytest -q -m judge tests/judge

# These must not pass because nothing was compiled and every test was skipped.
REQUIRE_GPU = $(PY) -c 'import sys, jax_w4moe; sys.exit(jax_w4moe.why_unavailable())'

gpu-test:
	$(MAKE) JAX_W4MOE_CUDA=ON gpu-test-on
gpu-test-on: $(INSTALLED) $(STAMPS)/extra-test $(STAMPS)/extra-gpu-test
	@$(REQUIRE_GPU)
	$(PY) -m pytest -q -m gpu tests

# Racecheck takes all of the host's memory where launches do not wait for one another.
SANITIZE = compute-sanitizer --kernel-name kernel_substring=jax_w4moe --error-exitcode 1
sanitize: $(INSTALLED) $(STAMPS)/extra-test
	@$(REQUIRE_GPU)
	for tool in memcheck initcheck; do \
	  PYTHONPATH=. $(SANITIZE) --tool $$tool $(PY) -m tests.helpers.small_layers || exit 1; \
	done
	NVCC_APPEND_FLAGS=-DJAX_W4MOE_RACECHECK $(PIP) install --no-deps --upgrade --target build/racecheck .
	PYTHONPATH=build/racecheck:. $(SANITIZE) --tool racecheck --force-blocking-launches \
	  $(PY) -m tests.helpers.small_layers

bench:
	$(MAKE) JAX_W4MOE_CUDA=ON bench-on
bench-on: $(INSTALLED) $(STAMPS)/extra-bench
	@$(REQUIRE_GPU)
	$(PY) -m benchmarks.run
	$(PY) -m jax_w4moe bench $(BENCH)

lint: $(INSTALLED) $(STAMPS)/extra-test $(STAMPS)/extra-lint
	$(PY) -m ruff check . .ci
	$(PY) -m ruff format --check . .ci
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CSRC) $(wildcard benchmarks/*.cu tests/csrc/*.cu)

graphs: $(STAMPS)/venv
	JAX_W4MOE_CUDA=ON $(PIP) wheel --no-deps -w build/graphs -C build-dir=build/graphs \
	  -C cmake.define.JAX_W4MOE_GRAPHS=ON .
	ls -l build/graphs/graphs

wheel: $(STAMPS)/venv
	JAX_W4MOE_CUDA=ON $(PIP) wheel --no-deps -w dist .
	ls -l dist

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 11) \
	  and f"Python {v} is older than 3.11; run make with PYTHON=<a newer one>.")'
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

$(PACKAGE): $(STAMPS)/venv pyproject.toml CMakeLists.txt $(if $(filter OFF,$(JAX_W4MOE_CUDA)),,$(CSRC))
	@rm -f $(STAMPS)/package-*
	$(PIP) install -e .
	@touch $@

# An extra's requirements by themselves, so that the package is not built again for each.
$(STAMPS)/extra-%: pyproject.toml | $(PACKAGE)
	$(PY) -c 'import sys, tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"] \
	  ["optional-dependencies"][sys.argv[1]], sep="\n")' $* > $@.txt
	$(PIP) install -r $@.txt
	@touch $@
