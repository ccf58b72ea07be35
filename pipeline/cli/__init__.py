"""The command line: one module for the store's commands, one for runs, and their output."""
