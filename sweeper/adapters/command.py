"""The command line of `adapters.py`: merge, combine, spectra, route, push."""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from sweeper import installation
from sweeper.adapters import block_spectra, combine, merge, push, spectra
from sweeper.adapters.library import command as library
from sweeper.errors import DataError, SpecError
from sweeper.reporting.console import make_console
from sweeper.reporting.table import print_table
from sweeper.rescoring import rescore

if TYPE_CHECKING:
    from sweeper.adapters.block_spectra import BlockSpectrum
    from sweeper.adapters.spectra import ModuleSpectrum
    from sweeper.rescoring.rescore import Saved


def main(arguments: Sequence[str]) -> None:
    """Does what the command says.

    Raises:
        SweeperError: a device that is not here, a folder without runs or one that cannot be written, a request that
            cannot be met, or a merged model that is not equal.
    """
    from sweeper.device import device_for

    parser = _parser()
    options, more = parser.parse_known_args(arguments)
    if options.command == "route" and not any(word.startswith("-") for word in more):
        options.run += more  # argparse takes no further folders and key=value once it has seen an option
    elif more:
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if options.command != "push":
        device_for(options.device, asked="--device ")
    for flag in ("out", "save"):
        if getattr(options, flag, None) is not None:
            _check_writable(flag, getattr(options, flag))
    commands = {"merge": _merge, "combine": _combine, "spectra": _spectra, "route": library.route, "push": _push}
    commands[options.command](options)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every command of the project does."""

    def error(self, message: str) -> NoReturn:
        raise SpecError(f"{self.prog.removeprefix('python ')}: {message}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=installation.program("adapters"), description="Saved adapters: merge, combine, spectra, route, push."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("merge", help="adapter into base model: a plain transformers model, checked for equality")
    one.add_argument("run", type=Path, help="outputs/STUDY/RUN_ID, or what combine wrote")
    one.add_argument("--out", type=Path, required=True, help="a new folder")
    one.add_argument("--precision", default="float32", choices=["float32", "bfloat16"], help="of the weights")
    one = commands.add_parser("combine", help="several adapters of one base model into one")
    one.add_argument("run", nargs="+", type=Path, help="outputs/STUDY/RUN_ID")
    one.add_argument("--out", type=Path, required=True, help="a new folder")
    one.add_argument("--method", default="add", metavar="METHOD", help=", ".join(combine.METHODS))
    one.add_argument("--weights", type=float, nargs="+", default=[], metavar="W", help="one for each run (default: 1)")
    one.add_argument("--t", type=float, help="interpolate: share of the second run, 0 to 1 or beyond")
    one.add_argument("--rank", type=int, help="of methods with svd (default: the highest of the runs')")
    one.add_argument("--density", type=float, help="ties, dare, magnitude_prune: share of values kept (default: 0.5)")
    one.add_argument("--majority-sign", default="total", choices=["total", "frequency"], help="ties: elects signs")
    one.add_argument("--seed", type=int, default=0, help="dare: of what it drops")
    one = commands.add_parser("spectra", help="effective rank, norms and intruder dimensions of every update")
    one.add_argument("run", nargs="+", type=Path, help="outputs/STUDY for all its runs, or outputs/STUDY/RUN_ID")
    one.add_argument("--top", type=int, default=10, help="tuned singular vectors to examine (default: 10)")
    one.add_argument("--epsilon", type=float, default=0.5, help="cosine below which one is an intruder (default: 0.5)")
    one.add_argument("--update-only", action="store_true", help="leave out what needs the base's own spectrum (faster)")
    library.arguments(commands.add_parser("route", help=library.ABOUT))
    for name in ("merge", "combine", "spectra", "route"):
        commands.choices[name].add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    one = commands.add_parser("push", help="adapters with model cards to the Hugging Face hub, in one commit")
    one.add_argument("run", nargs="+", type=Path, help="outputs/STUDY/RUN_ID, what combine wrote, or outputs/STUDY")
    one.add_argument("--repo", required=True, metavar="USER/NAME", help="the repository; made where there is none")
    one.add_argument("--base", metavar="USER/NAME", help="the base model on the hub, where the runs do not say it")
    one.add_argument("--private", action="store_true", help="where the repository is made: make it private")
    one.add_argument("--dry-run", action="store_true", help="print what would be uploaded; needs no network")
    return parser


def _merge(options: argparse.Namespace) -> None:
    (run,) = _each([options.run])
    note = merge.merge(run, options.out, device=options.device, precision=options.precision)
    make_console().print(
        f"{options.out}: {note['model']} with {run.folder.name} merged, {note['precision']}; logits differ by up to "
        f"{note['max_logit_difference']:.2g} (allowed {note['tolerance']:.2g}). Use it with model=path "
        f"model.location={options.out}",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip


def _combine(options: argparse.Namespace) -> None:
    asked = combine.Combination(
        method=options.method, weights=tuple(options.weights), t=options.t, rank=options.rank, density=options.density,
        majority_sign=options.majority_sign, seed=options.seed,
    )  # fmt: skip
    note = combine.combine(_each(options.run), asked, options.out, device=options.device)
    parts = " + ".join(f"{w:g} {run['run_id']}" for w, run in zip(note["weights"], note["from"], strict=True))
    make_console().print(
        f"{options.out}: {asked.method}, {parts}; rank up to {max(note['ranks'].values())}. PEFT loads "
        f"{options.out / 'adapter'}; score it with {installation.program('evaluate')} {options.out}",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip


def _spectra(options: argparse.Namespace) -> None:
    look = spectra.Look(top=options.top, epsilon=options.epsilon, base=not options.update_only)
    console = make_console()
    runs = rescore.find(options.run)
    _check_models(runs)
    labels = rescore.labels(runs)
    cells = []
    for run, modules in spectra.spectra(runs, look, device=options.device):
        if not modules:
            console.print(f"{run.folder}: changed no matrix of the model", markup=False, soft_wrap=True)
            continue
        console.print(f"{run.folder / spectra.FILE}", markup=False, highlight=False, soft_wrap=True)
        cells.append([labels[run.folder], *_row(modules)])
    if not cells:
        raise DataError("spectra: no run changed a matrix of its model, so there is no spectrum to look at")
    header = ["run", "|dW|", "effective rank", "stable rank", "intruders", "energy by role"]
    print_table(header, cells, console)
    cells = []
    for folder, blocks in block_spectra.spectra(runs, look):
        console.print(f"{folder / spectra.FILE}", markup=False, highlight=False, soft_wrap=True)
        names = dict.fromkeys(one.block for one in blocks)
        cells += [_block_row(folder.name, [one for one in blocks if one.block == name]) for name in names]
    if cells:
        header = ["run", "block", "rank", "|s B A|", "effective rank", "energy", "energy by role"]
        print_table(header, cells, console)


def _push(options: argparse.Namespace) -> None:
    wanted = push.parcels(push.find(options.run), options.repo, base=options.base)
    console = make_console()
    with push.staged(wanted, options.repo) as root:
        if not options.dry_run:
            where = push.upload(root, options.repo, private=options.private)
            console.print(f"{where}: {_adapters(wanted)}", markup=False, highlight=False, soft_wrap=True)
            return
        files = push.listing(root)
        console.print(
            f"{options.repo}{' (private)' if options.private else ''}: {_adapters(wanted)}, {len(files)} files; "
            "nothing was sent", markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
        console.out("\n".join(f"{size:>15,} bytes  {name}" for name, size in files), highlight=False)
        console.out(f"\n{push.CARD}:\n\n{(root / push.CARD).read_text()}", highlight=False)


def _adapters(wanted: "Sequence[push.Parcel]") -> str:
    return f"{len(wanted)} adapter{'' if len(wanted) == 1 else 's'}"


def _row(modules: "Sequence[ModuleSpectrum]") -> list[str]:
    intruders = [one.intruder_dimensions for one in modules if one.intruder_dimensions is not None]
    examined = sum(one.examined or 0 for one in modules)
    roles: dict[str, float] = {}
    for one in modules:
        roles[one.role] = roles.get(one.role, 0.0) + one.energy_share
    return [
        f"{sum(one.update_norm**2 for one in modules) ** 0.5:.3g}",
        f"{sum(one.effective_rank for one in modules) / len(modules):.2f}",
        f"{sum(one.stable_rank for one in modules) / len(modules):.2f}",
        f"{sum(intruders)} of {examined}" if intruders else "-",
        _shares(roles),
    ]


def _block_row(run: str, modules: "Sequence[BlockSpectrum]") -> list[str]:
    roles: dict[str, float] = {}
    for one in modules:
        roles[one.role] = roles.get(one.role, 0.0) + one.energy_share
    total = sum(roles.values())
    return [
        run, modules[0].block, f"{sum(one.rank for one in modules) / len(modules):.3g}",
        f"{sum(one.update_norm**2 for one in modules) ** 0.5:.3g}",
        f"{sum(one.effective_rank for one in modules) / len(modules):.2f}", f"{total:.0%}",
        _shares({role: share / total for role, share in roles.items()} if total else {}),
    ]  # fmt: skip


def _shares(roles: Mapping[str, float]) -> str:
    return " ".join(f"{role} {share:.0%}" for role, share in sorted(roles.items(), key=lambda pair: -pair[1]))


def _check_writable(flag: str, out: Path) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise DataError(f"--{flag} {out}: cannot be written ({error.strerror}); give another folder") from None


def _each(paths: Sequence[Path]) -> "list[Saved]":
    """One run a path.

    Raises:
        DataError: a path is that of a study, or has no completed run.
        Problems: a base model is not the one that a run was trained on.
    """
    found = []
    for path in paths:
        runs = rescore.find([path])
        if runs[0].folder != path:
            names = ", ".join(str(run.folder.relative_to(path)) for run in runs[:4])
            raise DataError(f"{path}: give the folder of one adapter, such as {runs[0].folder} (here: {names})")
        found.append(runs[0])
    _check_models(found)
    return found


def _check_models(runs: "Sequence[Saved]") -> None:
    rescore.check_models(runs)
    for line in rescore.changed(runs, certain=False):
        make_console().print(line, markup=False, soft_wrap=True)
