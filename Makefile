# `make demo` and `make test` share one environment in .venv; a second call installs nothing.
# With uv on the PATH it is used, otherwise Python 3.12's own venv and pip.
PYTHON ?= $(shell command -v python3.12 || command -v python3)
UV := $(shell command -v uv)
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test slow check clean

demo: $(STAMP)
	$(BIN)/varve demo --out demo

# Two test processes share the cores, so each is given one thread: on small tensors two that wait for
# each other take twice the time.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" -n 2 --dist worksteal --durations=8

slow: $(STAMP)
	$(BIN)/pytest -m slow

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(STAMP): pyproject.toml constraints.txt
ifdef UV
	test -x $(BIN)/python || uv venv --quiet --python 3.12 .venv
	uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
else
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' || \
		{ echo "Python 3.12 or newer is needed; $(PYTHON) is older. Set PYTHON=/path/to/python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
endif
	touch $(STAMP)

clean:
	rm -rf .venv demo
