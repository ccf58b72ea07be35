"""Contract suites: the tests that every variant of a kind passes, Varve's own and the user's.

    python -m varve.contracts                      every variant that is installed
    python -m varve.contracts --backbone mine.py   those that a file registers

One module for each kind. With options, only the kinds that they name are tested. Other arguments
are pytest's own.
"""
