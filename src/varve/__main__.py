"""Run the command line: `python -m varve`."""

from varve.pipeline.cli import main

if __name__ == "__main__":
    main()
