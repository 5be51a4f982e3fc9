# Everything runs in .venv, which one rule makes. Nothing has to be installed first but python 3.11 or newer.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STAMP := .venv/.stamp
PEERS := .venv/.peers
SOAK ?= --minutes 10
TESTS ?=

.PHONY: help demo test cover lint format bench soak fuzz clean
.DELETE_ON_ERROR:

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[torch,cli,test,examples]'
	@touch $@

demo: $(STAMP)  ## two ranks train on handwritten digits and grow seeds
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 2 examples/train_digits.py

test: $(STAMP)  ## the whole suite; TESTS="tests/unit -k topics" runs a part
	$(BIN)/python -m pytest $(TESTS)

cover: $(STAMP)  ## the suite with branch coverage; the core must reach 100 %, all else 90 %
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest $(TESTS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --fail-under=90
	$(BIN)/coverage report --fail-under=100 --include='fabric/core/*'

lint: $(STAMP)  ## ruff, mypy, and the floors of the house
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(STAMP)  ## mend what ruff can mend
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

$(PEERS): $(STAMP)
	@$(BIN)/pip install --quiet -c constraints.txt -e '.[bench]' && touch $@ || echo "bench: peers that are missing are skipped"

bench: $(STAMP) $(PEERS)  ## one table: the fabric beside other libraries; perf/results/ has it afterwards
	$(BIN)/python -m perf --out perf/results/latest.json

soak: $(STAMP)  ## the simulation with many new seeds, SOAK="--minutes 60", the model, and 200 rounds of killed processes
	$(BIN)/python -m tests.simulation.soak $(SOAK)
	TENSOR_FABRIC_SOAK=1 $(BIN)/python -m pytest -q tests/model tests/simulation/test_restarts.py tests/integration/test_restarting.py

fuzz: $(STAMP)  ## the property tests with many more examples
	$(BIN)/python -m pytest tests/property --hypothesis-profile=fuzz -o timeout=0

clean:  ## removes .venv and everything that was made
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis htmlcov .coverage .coverage.*
	rm -rf examples/out
	find fabric transports tests perf examples -name __pycache__ -type d -prune -exec rm -rf {} +
