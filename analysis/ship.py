"""The former name of analysis.archive, so that python -m analysis.ship still works."""

from .archive import main

if __name__ == "__main__":
    raise SystemExit(main())
