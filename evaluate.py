"""Score saved adapters without training: `python evaluate.py outputs/STUDY dataset=human_eval,chain_sum`."""

import sys

from sweeper import cli, rescore_cli

if __name__ == "__main__":
    sys.exit(cli.run(lambda: rescore_cli.main(sys.argv[1:])))
