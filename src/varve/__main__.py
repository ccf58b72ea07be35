"""Run the command line: `python -m varve`."""

from varve.pipeline.cli import run_and_exit

if __name__ == "__main__":
    run_and_exit()
