#!/usr/bin/env python3
"""How large the source of some checkouts is, and how deep the stack at a training step.

    git worktree add ../before main
    python -m benchmarks.structure ../before .

Lines and files of `sweeper/`, `analysis/` and the entry points, `--without` some (of a feature that only one has). The
stack is that of a packed grid on the CPU, from the entry point to `Pack.step`: frames of the project's own code, and
all, Hydra's among them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

PARTS = ("sweeper", "analysis", "train.py", "evaluate.py", "adapters.py")
GRID = ["-m", "experiment=smoke", "placement=attn,ff", "rank=2,4", "sweep.calibrate=false", "evaluation.before=false"]
CHILD = """
import importlib.util, json, runpy, sys
root, out, *words = sys.argv[1:]
names = ("sweeper.training", "sweeper.engine")
name = next(f"{n}.pack" for n in names if importlib.util.find_spec(n))
Pack = __import__(name, fromlist=["Pack"]).Pack
step, seen = Pack.step, []
def counted(pack):
    frame, own, every = sys._getframe(1), [step.__qualname__], 1
    while frame is not None and frame.f_code.co_filename != "<string>":
        every += 1
        if frame.f_code.co_filename.startswith(root):
            own.append(frame.f_code.co_qualname)
        frame = frame.f_back
    seen.append((len(own), every, own))
    return step(pack)
Pack.step = counted
sys.argv = ["train.py", *words]
try:
    runpy.run_path("train.py", run_name="__main__")
finally:
    open(out, "w").write(json.dumps(max(seen)))
"""


def files(checkout: Path, without: list[str]) -> list[Path]:
    paths = [
        path
        for part in PARTS
        for path in ([checkout / part] if part.endswith(".py") else (checkout / part).rglob("*.py"))
    ]
    return [path for path in paths if not any(str(path.relative_to(checkout)).startswith(one) for one in without)]


def depth(checkout: Path) -> tuple[int, int, list[str]]:
    """Own frames and all frames at a step, and the names of the own ones, innermost first."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "depth.json")
        paths = os.pathsep.join([str(checkout), str(checkout / "sweeper" / "plugins")])
        command = [sys.executable, "-c", CHILD, str(checkout), str(out), *GRID, f"output_root={folder}"]
        environment = os.environ | {"PYTHONPATH": paths, "SWEEPER_CACHE": f"{folder}/cache"}
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
        if not out.exists():
            raise SystemExit((done.stdout + done.stderr)[-2000:])
        own, every, names = json.loads(out.read_text())
    return own, every, names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="+", type=Path)
    parser.add_argument(
        "--without", nargs="*", default=[], metavar="PATH", help="files or folders that are not counted"
    )
    args = parser.parse_args()
    print("| checkout | files | lines | own frames at a step | all frames |\n| --- | ---: | ---: | ---: | ---: |")
    for checkout in args.checkouts:
        found = files(checkout.resolve(), args.without)
        lines = sum(len(path.read_text().splitlines()) for path in found)
        own, every, names = depth(checkout.resolve())
        print(f"| {checkout} | {len(found)} | {lines:,} | {own} | {every} |", flush=True)
        print("  " + " < ".join(names), file=sys.stderr)


if __name__ == "__main__":
    main()
