"""Score saved adapters without training: `python evaluate.py outputs/STUDY dataset=human_eval,chain_sum`."""

import sys

from sweeper import cli
from sweeper.rescoring import command

if __name__ == "__main__":
    sys.exit(cli.run(lambda: command.main(sys.argv[1:])))
