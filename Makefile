PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
FIELD := .field
# A process per core, at most four: each imports torch, 300 MB.
PARALLEL := -n auto --maxprocesses 4 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo digits test test-fast test-matrix wheel-check docs docs-output docs-pictures lint format bench \
	bench-gpu bench-batch-warmup bench-batch-warmup-quick soak fidelity fidelity-quick field clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/'

$(STAMP): pyproject.toml constraints.txt
	@echo "building $(VENV): a few minutes the first time"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --progress-bar on -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)  ## the main job: a byte-level transformer with a batch-size ramp, about three minutes
	$(BIN)/python -m examples.stdlib_transformer

digits: $(STAMP)  ## the same for an image model on scikit-learn's digits
	$(BIN)/python -m examples.digits

test: $(STAMP)  ## run the tests, doctests included
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL)

test-fast: $(STAMP)  ## the same without processes, kills, statistics, sweeps and benchmarks
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) -m "not slow" --ignore=tests/benchmarks

test-matrix: $(STAMP)  ## tests that lean on Lightning: oldest and newest versions, every Python: half an hour
	$(BIN)/python -m benchmarks.matrix

docs-pictures: demo  ## draw the pictures of the README and of the pages on `plot` and `fit` again: the demo's run, a published table
	cp $$(ls -t runs/demo/tensorboard/version_*/surge.png | head -1) benchmarks/demo/results/surge.png
	$(BIN)/lightning-surge plot runs/demo/csv --output benchmarks/demo/results/run.png --title "Byte-level transformer on the standard library"
	$(BIN)/lightning-surge fit examples/tables/mlperf_retinanet.csv --tuned --bootstrap 50 --figure examples/tables/mlperf_retinanet.png

wheel-check:  ## build the wheel, install it into an empty environment, and run the README's first block there
	rm -rf .wheel
	$(PYTHON) -m venv .wheel/tools
	.wheel/tools/bin/pip install --disable-pip-version-check -q build
	.wheel/tools/bin/python -m build --outdir .wheel/dist .
	$(PYTHON) -m venv .wheel/env
	.wheel/env/bin/pip install --disable-pip-version-check -q -c constraints.txt .wheel/dist/*.whl
	cd .wheel && env/bin/python ../.ci/smoke.py

docs: $(STAMP)  ## build the documentation in site/, warnings as errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --clean

docs-output: $(STAMP)  ## run the code of the tutorial and write its output into the page
	$(BIN)/python -m tests.code_blocks docs/tutorial.md

lint: $(STAMP)  ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## let ruff rewrite the files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## measure overhead and memory; writes benchmarks/overhead/results
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.publish

bench-gpu: $(STAMP)  ## the same at 124 million parameters on one CUDA GPU, at most eight minutes; writes benchmarks/gpu/results
	$(BIN)/python -m benchmarks.gpu

bench-batch-warmup: $(STAMP)  ## ramps against tuned constant batch sizes: goes on for BUDGET minutes (60)
	$(BIN)/python -m benchmarks.batch_warmup --budget $(or $(BUDGET),60)
	$(BIN)/python -m benchmarks.publish

bench-batch-warmup-quick: $(STAMP)  ## some cells of each kind, under a minute; writes nothing
	$(BIN)/python -m benchmarks.batch_warmup --quick

soak: $(STAMP)  ## 20,000 steps through bad times, and 150 random dry runs; 15 minutes, writes benchmarks/soak/results
	$(BIN)/python -m benchmarks.soak
	$(BIN)/python -m benchmarks.soak.dry_runs

fidelity: $(STAMP)  ## one step against line searches, rules after a change of the batch size: goes on for BUDGET minutes (60)
	$(BIN)/python -m benchmarks.fidelity --budget $(or $(BUDGET),60)
	$(BIN)/python -m benchmarks.publish

fidelity-quick: $(STAMP)  ## one cell of each kind, under a minute; writes nothing
	$(BIN)/python -m benchmarks.fidelity --quick

$(FIELD)/.installed: benchmarks/field/requirements.txt constraints.txt pyproject.toml
	@echo "building $(FIELD): 3 GB, ten minutes the first time"
	$(PYTHON) -m venv $(FIELD)
	grep -v '^pandas' constraints.txt > $(FIELD)/constraints.txt
	$(FIELD)/bin/pip install --disable-pip-version-check --progress-bar on -c $(FIELD)/constraints.txt -e . \
		-r benchmarks/field/requirements.txt
	@touch $@

field: $(FIELD)/.installed  ## inside libraries that others wrote, in an environment of their own: writes benchmarks/field/results
	$(FIELD)/bin/python -m benchmarks.field
	$(FIELD)/bin/python -m benchmarks.publish

clean:  ## remove the environments and what the examples wrote
	rm -rf $(VENV) $(FIELD) .matrix .wheel runs site
