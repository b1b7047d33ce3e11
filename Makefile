# `make demo` and `make test` set up what they need in .venv by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test check laws clean

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	touch $@

demo: $(READY)
	PATH="$(abspath $(BIN)):$$PATH" sh benchmarks/demo.sh demo

# Two processes, each file's tests in one of them: what a module's fixtures train is trained once.
test: $(READY)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MAKE) test

# Refits the step-time law to a table of measured runs: make laws TABLE=measured_runs.csv
laws: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/fit_step_law.py "$(TABLE)"  # small matrices: threads only wait

clean:
	rm -rf $(VENV) demo build *.egg-info
