# make demo     everything from nothing: installs, starts the CPU topology, sends requests, shows what came of them, stops
# make test     everything from nothing: installs, lint, types, all tests
# ENGINE=cuda   installs CUDA vLLM instead of the CPU build (then use the gpu-* topologies; the demo needs the CPU build)
PYTHON ?= python3
ENGINE ?= cpu
RERUNS ?= 1
BIN := .venv/bin

# What pytest itself does not tell: that it ended before its closing line.
CRASHED = { code=$$?; [ $$code -eq 1 ] || echo "pytest did not come to its end: exit code $$code"; exit $$code; }

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format typecheck unit e2e bench-quick soak clean docs docs-generate newcomer

help:
	@echo "make demo [KEEP=1]   install what is missing, start, show, stop (KEEP=1 leaves it running)"
	@echo "make test            install what is missing, then lint, types and all tests"
	@echo "make setup           only install; quick when nothing changed"
	@echo "make docs            the documentation as a site, in site/"
	@echo "make lint | typecheck | unit | e2e | bench-quick | soak | format | clean"

setup:
	@$(PYTHON) scripts/setup.py --engine $(ENGINE)

demo: setup
	@$(BIN)/pdserve demo $(if $(KEEP),--keep)

# pytest last, so that its closing line is the last one. A test that fails is run once more, and told of (CONTRIBUTING.md);
# more than five of them in a run are no chance.
test:
	@$(PYTHON) scripts/setup.py --engine $(ENGINE) --test-servers
	@$(MAKE) --no-print-directory lint typecheck
	@$(BIN)/pytest --durations=40 --reruns $(RERUNS) --max-suite-reruns 5 || $(CRASHED)

lint:
	@$(BIN)/ruff check .

format:
	@$(BIN)/ruff check --fix --quiet .
	@$(BIN)/ruff format --quiet .

# The folders at the top are installed as pdserve.X, which mypy cannot follow: it gets a view in which they lie there.
typecheck:
	@rm -rf .typecheck && mkdir .typecheck && cp -rs $(CURDIR)/pdserve .typecheck/pdserve
	@for part in transfer kernels proxy deploy; do cp -rs $(CURDIR)/$$part .typecheck/pdserve/$$part; done
	@MYPYPATH=.typecheck $(BIN)/mypy -p pdserve

# The pages that are made from the code, then the site into site/; --strict: a dead link is an error.
docs-generate:
	@$(BIN)/python -P scripts/generate_docs.py

docs: docs-generate
	@$(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html is ready; $(BIN)/mkdocs serve shows it while you write"

# From a fresh clone to the second prompt's hit, each step with its seconds; three to six minutes.
newcomer:
	@$(PYTHON) scripts/newcomer.py

unit: setup
	@$(BIN)/pytest -m "not e2e and not gpu"

e2e: setup
	@$(BIN)/pytest -m e2e

bench-quick: setup
	@$(BIN)/python -P tests/bench/bench_quick.py --check

# Thousands of kills and recoveries of the cache daemon, then a million operations: about half an hour.
soak: setup
	@$(BIN)/python tests/transfer/crashes.py --schedules 5000 --minutes 25
	@$(BIN)/python tests/transfer/soak.py

# Ends what runs from this checkout before its environment goes; the demo model in ~/.cache/pdserve stays.
clean:
	@if [ -x $(BIN)/pdserve ]; then $(BIN)/pdserve stop --all; fi
	@rm -rf .venv .typecheck .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist site *.egg-info
