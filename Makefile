# make quickstart   install, then the whole story on real digits, without a download (about 6 minutes)
# make test         install, then every test but the slow ones, in two processes side by side
# make test-fast    only the tests that take less than a second each
# make test-slow    the slow ones: long trainings, the wheel, stories of several processes
# make lint         ruff and mypy, as CI runs them
# make faults       kill, stop and damage training at random, and count what was lost (docs/reliability.md)
# make bench-step   the benchmarks of the training step (docs/benchmarks.md)
# make bench-data   the benchmarks of the data plane (docs/benchmarks.md)
# make setup        only .venv with everything the tests, benchmarks and linters need
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: setup test test-fast test-slow test-half-1 test-half-2 lint faults bench-step bench-data quickstart clean-quickstart
.DELETE_ON_ERROR:

setup: .venv/.ready

.venv/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11 ...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[demo,dev]"
	@touch $@

# The tests use one thread, so two processes take about half the time on two cores. Each prints when it ends.
FIRST_HALF := tests/train tests/system
BOTH_HALVES := $(MAKE) --no-print-directory --jobs 2 --output-sync=target test-half-1 test-half-2

test: setup
	@$(BOTH_HALVES) MARKS="not slow"

test-fast: setup
	@$(BOTH_HALVES) MARKS="not slow and not medium"

test-slow: setup
	@$(BOTH_HALVES) MARKS="slow"

test-half-1:
	$(BIN)/python -m pytest -m "$(MARKS)" -o cache_dir=.pytest_cache/1 $(FIRST_HALF)

test-half-2:
	$(BIN)/python -m pytest -m "$(MARKS)" -o cache_dir=.pytest_cache/2 $(FIRST_HALF:%=--ignore=%)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

faults: setup
	python tools/faults

bench-step: setup
	python tools/bench step
	python tools/bench precision
	python tools/bench processes

bench-data: setup
	python tools/bench data
	python tools/bench plan
	python tools/bench convert

# ---- quickstart: the commands of the README; data that exist are not made again --------------------------------------

DIGITS := data/digits
GENERATED := data/digits_generated
RUN := runs/quickstart
PLAIN := runs/quickstart-plain
RELEASE := releases/quickstart
PREPARE := python -m nrat_scale.prepare
EVALUATE := python -m nrat_scale.evaluate
BEST := --data $(DIGITS)/test --checkpoint best --attacks natural,pgd20,cw20,aa
LAST := --data $(DIGITS)/test --checkpoint last --attacks natural,pgd20,cw20

quickstart: setup $(DIGITS)/test/index.json $(GENERATED)/index.json
	accelerate launch -m nrat_scale.train recipes/quickstart.yaml
	accelerate launch -m nrat_scale.train recipes/quickstart.yaml objective.name=natural run_dir=$(PLAIN)
	$(EVALUATE) $(RUN) $(BEST)
	$(EVALUATE) $(RUN) $(LAST)
	$(EVALUATE) $(PLAIN) $(BEST)
	$(EVALUATE) $(PLAIN) $(LAST)
	python -m nrat_scale.report $(RUN) $(PLAIN)
	python -m nrat_scale.release $(RUN) --to $(RELEASE)

$(DIGITS)/test/index.json: | setup
	$(PREPARE) digits --out $(DIGITS)

$(GENERATED)/index.json: $(DIGITS)/test/index.json
	test -f $(GENERATED).npz || python tools/generate_digits.py recipes/quickstart.yaml --out $(GENERATED).npz
	$(PREPARE) npz $(GENERATED).npz --dataset digits --out $(GENERATED)

# Removes the quickstart's shards, runs and release, so that it starts from nothing again.
clean-quickstart:
	rm -rf $(DIGITS) $(GENERATED) $(GENERATED).npz $(RUN) $(PLAIN) $(RELEASE)
