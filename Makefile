# Everything a user or a developer types. `make` alone lists it.

.DEFAULT_GOAL := help
.PHONY: help setup build experiment gpu-experiment gpu-check bundle fetch test bench bench-methods scaling fixtures data doctor clean

EXPERIMENT ?= experiments/glue.yaml
PYTHON ?= python3
PROGRAM := target/release/child-tuning
# MODEL and DATA, where given, go before what the experiment says.
RUN_OPTIONS := $(if $(MODEL),--set 'model=[$(MODEL)]') $(if $(DATA),--data '$(DATA)') $(if $(JOBS),--jobs $(JOBS))

help:           ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /  make \1\t/' | expand -t 26

setup: .venv/installed  ## install libtorch and a small encoder into .venv (once, about 5 GB)

.venv/installed: requirements.txt scripts/setup.sh
	@PYTHON='$(PYTHON)' scripts/setup.sh

build: setup    ## compile the program: target/release/child-tuning
	@cargo build --release --locked

experiment: build  ## run experiments/quickstart.yaml on the CPU, in minutes
	@$(PROGRAM) run experiments/quickstart.yaml --jobs auto

gpu-experiment: build  ## run EXPERIMENT (experiments/glue.yaml) on CUDA; MODEL=folder DATA=folder JOBS=auto (all GPUs)
	@$(PROGRAM) run '$(EXPERIMENT)' --device cuda $(RUN_OPTIONS)

gpu-check: build  ## compare the GPU with the CPU, measure its speed, write docs/results/gpu_check.{json,md}; OPTIONS=
	@$(PROGRAM) gpu-check $(OPTIONS)

bundle: setup   ## pack the program for machines with PyTorch 2.11 and no compiler: target/bundle/*.tar.gz
	@scripts/bundle.sh

fetch: build    ## get data sets from where they are published: TASKS="cola rte"; without TASKS, list what is here
	@$(PROGRAM) data $(if $(TASKS),fetch $(TASKS),list)

doctor: build   ## show what is installed, and what to do about what is not
	@$(PROGRAM) doctor $(if $(DATA),--data '$(DATA)')

# What the tests compare with and the benchmark runs against, beside what the program needs.
.venv/developer: requirements-dev.txt .venv/installed
	@.venv/bin/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@.venv/bin/pip install --quiet --disable-pip-version-check --no-deps modelscope==1.40.2
	@touch $@

test: .venv/developer  ## everything that CI runs: format, lints, docs, tests
	@cargo fmt --check
	@cargo clippy --locked --all-targets --quiet -- -D warnings
	@RUSTDOCFLAGS='-D warnings' cargo doc --locked --no-deps --quiet
	@$(PYTHON) scripts/make_miniature_data.py --check
	@CHILD_TUNING_REQUIRE_PYTHON=1 cargo test --locked

bench: build .venv/developer  ## measure speed against the Python peer, interleaved, in one table
	@cargo build --release --locked --bench step --bench fisher --bench threshold
	@.venv/bin/python benches/compare.py $(BENCH_OPTIONS)

bench-methods: build  ## time a step of each method against one of plain fine-tuning; BENCH_OPTIONS="--precision bf16"
	@cargo bench --locked --bench methods -- $(BENCH_OPTIONS)

scaling: build  ## measure how time and memory grow, and draw docs/scaling.svg; BENCH_OPTIONS="--rounds 1"
	@cargo build --release --locked --bench step --bench fisher
	@$(PYTHON) benches/scaling.py $(BENCH_OPTIONS)

fixtures: .venv/developer  ## compute the reference numbers of the tests again
	@.venv/bin/python scripts/make_fixtures.py
	@.venv/bin/python scripts/make_metric_fixtures.py
	@.venv/bin/python scripts/make_tokenizer_fixtures.py

data:           ## generate the miniature data sets again
	@$(PYTHON) scripts/make_miniature_data.py

clean:          ## remove what was built and installed
	@rm -rf target .venv
