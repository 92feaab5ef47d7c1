# Every target works in the active virtual environment, or in .venv, which it makes if there is none.
VENV := $(or $(VIRTUAL_ENV),.venv)
ifneq ($(words $(VENV)),1)
$(error the path of the active virtual environment holds a space: deactivate it)
endif
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3,$(shell command -v $(name))))
BIN := $(VENV)/bin
# An environment can be active for several clones: each installs itself.
PYTEST := $(BIN)/python -m pytest --numprocesses=2 --durations=10
STAMPS := $(VENV)/.entmaxkv-$(firstword $(shell pwd | cksum))

.PHONY: demo test lint pictures setup clean
.DEFAULT_GOAL := demo

demo: $(STAMPS)/run
	$(BIN)/entmaxkv demo

test: $(STAMPS)/develop lint
	$(BIN)/coverage erase
	$(PYTEST) --dist=loadfile --cov --cov-report=term
	$(PYTEST) --dist=load tests/compiled

lint: $(STAMPS)/develop
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/hadolint docker/Dockerfile docker/Dockerfile.cpu
	mkdir -p build/mypy && ln -sfn ../../kernels build/mypy/entmaxkv_kernels
	MYPYPATH=build/mypy $(BIN)/mypy -p entmaxkv_kernels
	MYPYPATH=build/mypy $(BIN)/mypy

pictures: $(STAMPS)/develop
	rm -rf build/pictures docs/pictures/*.svg
	$(BIN)/entmaxkv plot docs/results/*.json --out build/pictures
	cd build/pictures && cp $$(grep -oh '[^/]*\.svg' ../../README.md ../../docs/*.md | sort -u) ../../docs/pictures

setup: $(STAMPS)/run

$(BIN)/python:
	$(or $(PYTHON),$(error no python3 found: install Python 3.11 or 3.12)) -m venv $(VENV) \
		|| { rm -rf $(VENV); exit 1; }

$(STAMPS)/run: pyproject.toml scripts/setup_cpu.py | $(BIN)/python
	$(BIN)/python scripts/setup_cpu.py
	mkdir -p $(STAMPS) && touch $@

$(STAMPS)/develop: pyproject.toml scripts/setup_cpu.py | $(BIN)/python
	$(BIN)/python scripts/setup_cpu.py dev
	mkdir -p $(STAMPS) && touch $@ $(STAMPS)/run

clean:
	rm -rf .venv build *.egg-info .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis
