# Two commands for a bare clone:  make pretrain   make test
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup pretrain test test-fast lint

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

pretrain: setup
	$(BIN)/python experiments/pretrain.py

# Tests that start Ray wait much: those without run beside them, at the lowest priority, and speak when they are done.
test: setup
	@mkdir -p build; \
	nice -n 19 $(BIN)/python -m pytest -m "not ray and not chaos" > build/tests-without-ray.txt 2>&1 & beside=$$!; \
	trap "kill $$beside 2> /dev/null" EXIT; trap "exit 130" INT TERM; \
	$(BIN)/python -m pytest -m "ray and not chaos"; with=$$?; \
	wait $$beside; without=$$?; cat build/tests-without-ray.txt; exit $$((with | without))

test-fast: setup
	$(BIN)/python -m pytest -m "not slow"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
