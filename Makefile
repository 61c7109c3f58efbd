# Two commands do everything on a fresh machine with Python 3.11: `make quickstart` and `make test`.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: quickstart test test-fast test-integration fuzz check ui clean

quickstart: $(VENV)/.installed
	$(BIN)/overfill run sweeps/quickstart.yaml

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m "not integration" --numprocesses 2 --dist loadfile
	$(BIN)/python -m pytest -m integration

test-fast: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m "not integration" --numprocesses 2 --dist loadfile

test-integration: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m integration

# Damaged experiment files, corpora and stores, thousands of them; a small part of these tests is in `make test`.
fuzz: $(VENV)/.installed-test
	OVERFILL_FUZZ=full $(BIN)/python -m pytest tests/fuzz --timeout 3600 --numprocesses 2 --dist load

# Random faults in real runs: make faults N=20 SEED=1 JOBS=2
N ?= 200
SEED ?= 0
JOBS ?= 1
faults: $(VENV)/.installed-test
	$(BIN)/python -m tests.faults -n $(N) --seed $(SEED) --jobs $(JOBS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

ui: $(VENV)/.installed
	$(BIN)/overfill ui

$(VENV)/.installed: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11, or name another with PYTHON=..."; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (a few minutes at first)"
	@$(PIP) --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@$(PIP) --editable '.[test]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-test
	@$(PIP) --editable '.[test,dev]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
