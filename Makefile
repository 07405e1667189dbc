# Each target works from a fresh clone: it makes a virtual environment and installs what it needs, in the versions that
# were last tested: .ci/newest.txt holds the newest, .ci/oldest.txt the oldest that pyproject.toml allows.
PYTHON ?= python3
LOCK ?= newest
VENV := $(if $(filter oldest,$(LOCK)),.venv-oldest,.venv)
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet
OUT ?= demo-out
JOBS ?= 2
TESTS ?=
COUNT ?= 100000
# The lower bounds in pyproject.toml, as versions to install.
OLDEST := $(shell sed -n 's/^[^\#]*"\([a-z].*\)>=\(.*\)".*/\1==\2/p' pyproject.toml)
# What depends most on the packages around: torch's numbers, its exporter, onnxruntime, keys, servers, what is installed.
OLDEST_TESTS := tests/training tests/models/test_layout.py tests/saliency tests/export/test_exporting.py \
  tests/artifacts/test_onnx_file.py tests/inference \
  tests/serving/test_app.py tests/serving/test_server.py tests/serving/test_service.py tests/serving/test_protocol.py \
  tests/test_keys.py tests/array_triggers tests/test_distributions.py

.PHONY: demo test pytest test-oldest docs fuzz lock clean

demo: $(VENV)/installed
	$(BIN)/keyed-xai demo -o $(OUT)

test: $(VENV)/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MAKE) pytest

pytest: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) $(TESTS)

test-oldest:
	$(MAKE) pytest LOCK=oldest TESTS='$(OLDEST_TESTS)'

docs: $(VENV)/installed-dev
	$(BIN)/properdocs build --strict --config-file .site/properdocs.yml

fuzz: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m keyed_xai_benchmarks.fuzz --count $(COUNT)

lock:
	rm -rf $(VENV)
	$(MAKE) $(BIN)/python
	$(INSTALL) -e '.[dev,bench]' $(if $(filter oldest,$(LOCK)),$(OLDEST))
	$(BIN)/python -m pip freeze --exclude-editable > .ci/$(LOCK).txt
	@touch $(VENV)/installed $(VENV)/installed-dev

clean:
	rm -rf .venv .venv-oldest build *.egg-info .runtime/build .runtime/*.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "keyed-xai needs Python 3.11 or newer: make PYTHON=python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
	  || { rm -rf $(VENV); echo "No virtual environment could be made: install python3-venv." >&2; exit 1; }

$(VENV)/installed: pyproject.toml .ci/$(LOCK).txt | $(BIN)/python
	$(INSTALL) -c .ci/$(LOCK).txt -e .
	@touch $@

$(VENV)/installed-dev: pyproject.toml .ci/$(LOCK).txt | $(BIN)/python
	$(INSTALL) -c .ci/$(LOCK).txt -e '.[dev]'
	@touch $@ $(VENV)/installed
