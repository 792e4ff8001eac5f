# Two commands do everything on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := outputs/demo
# Processes that run tests side by side, a file each; each keeps to one core. In the order of names
# both have an equal share; by number of tests the few long ones would come last.
JOBS ?= 2
TOGETHER := -n $(JOBS) --dist loadfile --no-loadscope-reorder
# Of `make gpu` and `make gpu-bundle`; := because variables of these names in the environment are
# others'. HERE is the machine's own Python where there is no environment, or PYTHON is named.
MINUTES := 25
DEVICE := cuda
DATA :=
REFERENCE :=
OUT :=
ARCHIVE :=
WHEELS :=
PY :=
HERE = $(if $(filter command,$(firstword $(origin PYTHON))),$(PYTHON),$(or $(wildcard $(BIN)/python),$(PYTHON)))
CARRIED := $(if $(DATA),--data $(DATA)) $(if $(REFERENCE),--reference $(REFERENCE))

.PHONY: help env dev demo lint test test-all test-lowest gpu gpu-bundle format clean

help:
	@echo "make demo        render the synthetic set, pretrain CMD on the CPU, evaluate, report"
	@echo "make test        lint and all tests but the slow ones"
	@echo "make test-all    lint and all tests"
	@echo "make test-lowest the tests at the lowest allowed versions, in an environment of its own"
	@echo "make gpu         on a GPU: its tests, speed, then a study, within MINUTES=$(MINUTES); again to go on"
	@echo "make gpu-bundle  what that takes to a machine without a network, into bundle/"
	@echo "make env         only build the environment in $(VENV)"
	@echo "make format      apply the formatter"
	@echo "make clean       remove the environments and the demo's output"

env: $(VENV)/.env-done
dev: $(VENV)/.dev-done

$(VENV)/.env-done: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: Python 3.10 or newer is needed; name one with make PYTHON=python3.x"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.dev-done: $(VENV)/.env-done requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

demo: env
	$(BIN)/python -m datasets.synthetic --output $(DEMO)/data --train 1500 --val 500 \
		--size 64 --difficulty easy --class-cue 0.15 --seed 0
	$(BIN)/python main_cmd.py --cfg experiments/demo.yaml \
		--data_path $(DEMO)/data/train --output_dir $(DEMO)
	$(BIN)/python report.py --output_dir $(DEMO) \
		--gallery $(DEMO)/data/train --queries $(DEMO)/data/val
	@echo "look at $(DEMO)/report.html"

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TOGETHER) -m "not slow"

test-all: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TOGETHER)

test-lowest:
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check \
		-r requirements-dev.txt -c requirements-lowest.txt
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest $(TOGETHER) -m "not slow"

gpu:
	$(HERE) -m benchmarks.gpu --minutes $(MINUTES) --device $(DEVICE) $(CARRIED) \
		$(if $(OUT),--out $(OUT)) $(if $(ARCHIVE),--archive $(ARCHIVE))

gpu-bundle: env
	$(BIN)/python -m benchmarks.bundle $(CARRIED) $(if $(WHEELS),--wheels $(WHEELS)) \
		$(if $(PY),--python $(PY))

format: dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-lowest $(DEMO)
