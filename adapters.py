"""Saved adapters: merge, combine, look at their spectra, push. `python adapters.py spectra outputs/STUDY`."""

import sys

from sweeper import cli
from sweeper.adapters import command

if __name__ == "__main__":
    sys.exit(cli.run(lambda: command.main(sys.argv[1:])))
