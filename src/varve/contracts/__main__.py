"""Run the contract suites: `python -m varve.contracts --backbone mine.py`."""

import sys

import pytest

if __name__ == "__main__":
    plugin = ["-p", "varve.contracts.options"]
    sys.exit(pytest.main([*plugin, "--pyargs", "varve.contracts", *sys.argv[1:]]))
