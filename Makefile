# Two commands matter: `make demo` shows what isthmus does, `make test` proves it. Both create .venv when it is absent.
PYTHON ?= python3
BIN := .venv/bin
SYSTEM ?= spark

.PHONY: demo test lint claims bench faults install clean

demo: install  ## pre-train a convnet without labels on built-in data and show what it learnt
	$(BIN)/isthmus run spark --out runs/demo
	$(BIN)/isthmus report runs/demo

test: install  ## every test, two at a time
	$(BIN)/python -m pytest -n 2 --dist worksteal --cov --cov-report=term:skip-covered $(ARGS)

lint: install  ## style, types on the public surface, import contracts
	$(BIN)/ruff check src tests benchmarks faults
	$(BIN)/ruff format --check src tests benchmarks faults
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python -m isthmus.catalog --check

claims: install  ## the verdict over seeds of every ready system, recorded in results/claims
	$(BIN)/isthmus claim --all --seeds 0 1 2

bench: install  ## speed and memory beside named peers, recorded in results/benchmarks
	for script in $(filter-out common,$(basename $(notdir $(wildcard benchmarks/[a-z]*.py)))); do $(BIN)/python -m benchmarks.$$script || exit 1; done

faults: install  ## kills, full disks, damaged files and odd arguments, counted in results/faults; SECONDS for each kind
	$(BIN)/python -m faults --seconds $(or $(SECONDS),60) --add

install: .venv/.installed

# `torch` on Linux carries CUDA; pip's own variables (PIP_INDEX_URL…) choose another build.
.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache .import_linter_cache .coverage* build dist
