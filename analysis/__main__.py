"""Command line: python -m analysis outputs/<study> --out paper/"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from sweeper import installation

from .load import load
from .venues import DEFAULT, VENUES, venue


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every command of the project does."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the analysis; returns the exit status: 0, or 2 where there was nothing to analyse or a request was wrong."""
    installation.forgive_output()
    parser = _Parser(prog=installation.program("analyse"), description="Records of a study -> tables, figures, report.")
    parser.add_argument("study", nargs="*", type=Path, help="folders of studies, such as outputs/default")
    parser.add_argument("--out", type=Path, default=Path("paper"), help="where to write (default: paper/)")
    parser.add_argument(
        "--metric", help="what trials are chosen by and the main figures show (default: nll, or what there is)"
    )
    parser.add_argument(
        "--tuned", action="append", default=[], metavar="FIELD", help="a field, besides optim.*, tuned inside arms"
    )
    parser.add_argument("--draws", type=int, default=2000, help="bootstrap draws (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap")
    parser.add_argument("--no-figures", action="store_true", help="tables and report only")
    parser.add_argument(
        "--venue",
        default=DEFAULT.name,
        metavar="|".join(VENUES),
        help="whose page figures are made for (default: icml)",
    )
    parser.add_argument("--mixed", action="store_true", help="fit a linear mixed model as well (needs statsmodels)")
    parser.add_argument(
        "--export", action="append", default=[], choices=["peft", "csv", "parquet"], help="write the runs so"
    )
    parser.add_argument(
        "--import", dest="imports", action="append", default=[], metavar="SOURCE",
        help="runs from elsewhere beside ours: a folder of PEFT's method_comparison results, a published table "
        "(.json), or wandb:entity/project",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if not options.study and not options.imports:
        parser.error("give a study's folder, such as outputs/default, or --import")
    for name, least in (("draws", 1), ("seed", 0)):
        if getattr(options, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(options, name)}")
    try:
        return _run(options)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 2


def printable(text: str) -> str:
    """One line, without what a terminal would obey: a record may come from somebody else."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _run(options: argparse.Namespace) -> int:
    from . import exchange

    page = venue(options.venue)
    for kind in options.export:
        exchange.check(kind)
    imported = [row for source in options.imports for row in exchange.read(source)]
    study = load(*options.study, rows=imported)
    counts = ", ".join(f"{count} {name}" for name, count in study.counts().items())
    print(f"{study.name or 'imported'}: {counts or 'no runs'}")
    for problem in study.problems[:10]:
        print(printable(f"  {problem.kind}: {problem.folder}: {problem.message}"))
    if len(study.problems) > 10:
        print(f"  and {len(study.problems) - 10} more, in tables/failures.csv")
    if study.runs.empty:
        print("error: no record to analyse", file=sys.stderr)
        return 2
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {options.out}: this folder cannot be made ({error.strerror})") from None
    # Slow imports wait until there is something to do.
    from . import claims, manifest, report, tables
    from .analyse import analyse

    found = analyse(
        study, metric=options.metric, tuned=options.tuned, draws=options.draws, seed=options.seed,
        mixed_model=options.mixed,
    )  # fmt: skip
    made = tables.sheets(found)
    written = [*tables.write(found, options.out / "tables", made), claims.write(found, options.out)]
    absent: dict[str, str] = {}
    drawn: list[Path] = []
    if not options.no_figures:
        from . import figures

        drawn, absent = figures.write(found, options.out / "figures", venue=page)
        written += drawn
    written.append(report.write(found, options.out, absent=absent, drawn=drawn, venue=page, made=made))
    for kind in options.export:
        written += exchange.write(found, options.out / kind, kind)
    for name, reason in absent.items():
        print(printable(f"no figure {name}: {reason}"))
    for row in found.tables["checks"].to_dict("records"):
        print(printable(f"check: {row['check']}: {row['subject']}: {row['message']}"))
    for folder in dict.fromkeys([options.out / "figures", *(path.parent for path in written)]):
        strange = manifest.unlisted(folder, written) if folder != options.out else []
        if strange:
            more = f" and {len(strange) - 5} more" if len(strange) > 5 else ""
            print(f"not of this analysis, left in {folder}/: {', '.join(strange[:5])}{more}")
    print(f"{len(written)} files in {options.out}/; start with {options.out}/report.html")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
