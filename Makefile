# Everything a newcomer needs: make sample, make test. Only make and Python 3.11+ are assumed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
INSTALLED := $(VENV)/.installed

.PHONY: sample recipes test soak lint docs keys clean

sample: $(INSTALLED)
	@$(BIN)/pairmill run sample/config.yaml

# Every recipe on its sample, against a scripted server that is started for it.
recipes: $(INSTALLED)
	@$(BIN)/python sample/recipes/run_all.py

test: $(INSTALLED)
	@$(BIN)/pytest --numprocesses $(WORKERS) --dist worksteal

# The long form of the property and fault tests; PAIRMILL_SOAK_SEED=N repeats a run.
soak: $(INSTALLED)
	@$(BIN)/pytest -m soak -s

lint: $(INSTALLED)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

# After a change that is meant: acknowledge the ledger keys and the code of stages.
keys: $(INSTALLED)
	@PAIRMILL_ACKNOWLEDGE=1 $(BIN)/pytest tests/flows/test_ledger_keys.py

docs: $(INSTALLED)
	@$(BIN)/python docs/generate.py

$(INSTALLED): pyproject.toml constraints.txt
	@echo "installing into $(VENV): about 5.5 GB, a minute or two on a fast line"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Pairmill needs Python 3.11 or newer; set PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) sample/out sample/recipes/buckets
