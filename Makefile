# All targets share one environment in .venv; a second call installs nothing. It is made with uv if uv
# is on the PATH, and with venv and pip of Python 3.12 otherwise.
PYTHON ?= $(shell command -v python3.12 || command -v python3)
UV := $(shell command -v uv)
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test slow check clean

demo: $(STAMP)
	$(BIN)/varve demo --out demo

# Two test processes share the cores. Each has one thread, since threads that wait for a core double
# the time on small tensors.
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
