#!/usr/bin/env python3
"""Injects faults into real sweeps, repeats their command, and compares what is left with a sweep left alone.

    make faults                                                    # all of it, and docs/robustness.md
    python -m tests.faults.harness --fault "disk full" --times 3   # one fault, printed

A sweep is a search of two arms on a tiny random model, on the CPU: two trials each, confirmation on a fresh seed,
evaluations on the way, checkpoints every other step. Each start is a fork of a warm process, so that what is struck
is the sweep and not the import of its libraries. An injection counts if it struck while a run was unfinished.
Afterwards the same command is repeated until it ends well, doing what it says where it asks for something, and then
every run of the sweep left alone is there once, with its curve, its scores to 1e-5 and its adapter. Half of the
injections have `trainer.deterministic=true`.
"""

import argparse
import contextlib
import gc
import hashlib
import importlib
import json
import multiprocessing
import os
import random
import re
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.context import ForkProcess
from pathlib import Path

from filelock import FileLock

from sweeper.record import records
from tests.faults.outcomes import Result, ended, judge, outcome

COMMON = (
    "-m", "experiment=smoke", "placement=attn,ff", "rank=4", "seed=0", "trainer.max_steps=6",
    "evaluation.every_steps=3", "dataset.max_length=48", "dataset.train_examples=16", "sweep.checkpoint_seconds=0.05",
    "sweep.calibrate=false", "sweep.max_pack=3", "trainer.precision=float32",
)  # fmt: skip
TUNED = (
    "optim.lr=tag(log,interval(1e-4,1e-2))", "hydra.sweeper.n_trials=2", "hydra.sweeper.sampler=random",
    "hydra.sweeper.confirm_seeds=[1]",
)  # fmt: skip
DETERMINISTIC = ("trainer.deterministic=true", "trainer.precision=bfloat16")  # in which rounding shows soonest
TRIALS = 2
WARM = (
    "torch", "torch._dynamo", "optuna", "hydra", "safetensors.torch", "transformers.models.llama.modeling_llama",
    "peft", "sweeper.api", "sweeper.study.launch", "sweeper.study.search", "sweeper.training.trainer",
    "sweeper.tasks.icd10_chapter", "analysis.load", "torch.utils.tensorboard", "psycopg", "sqlalchemy",
)  # fmt: skip
"""What a sweep imports; each start finds it in memory."""
STARTS = 8
"""Times that a command is repeated until it counts as not ending."""
TRIES = 25
"""Sweeps that a fault may miss."""
STRUCK = "struck"
FOLDER = Path(".cache/faults")
Plant = Callable[[Callable[[str], bool]], None]
"""Patches the child; what it is given says, at each call of what is patched, whether to strike now."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One kind of fault.

    Attributes:
        plant: patches the child that is to be struck. calls: how often, at most, what is patched has been called when
            it strikes. again: patches the children of the repeated commands.
        signals: what the driver is sent, one after another. early: within the first second.
        damage: changes a file that a stopped sweep left. what: pattern of the files, in the study or the cache.
        act: strikes in a way of its own; returns how many runs were unfinished, None where it missed.
        overrides: what the command has besides; `tuned` whether it is a search. aside: overrides that change no result.
        kills: whether a real process dies by it. diverges: whether the run that is struck may.
        most: times that it is injected at most, for what takes long.
        says: what is to be found in what the struck command printed, or with `later` in what its repeat did; `silent`
            where there may be nothing to say. ready: pattern of what must be in the study when it is struck.
    """

    name: str
    plant: Plant | None = None
    calls: int = 1
    again: Plant | None = None
    signals: tuple[int, ...] = ()
    early: bool = False
    damage: Callable[[Path, random.Random], None] | None = None
    what: str = ""
    act: "Callable[[Attempt], int | None] | None" = None
    overrides: tuple[str, ...] = ()
    aside: tuple[str, ...] = ()
    tuned: bool = True
    kills: bool = False
    diverges: bool = False
    most: int | None = None
    says: str | None = None
    later: bool = False
    silent: bool = False
    ready: str = ""


@dataclass(kw_only=True)
class Injection:
    """What became of one injection, as a line of JSON."""

    fault: str
    deterministic: bool
    at_stake: int
    kills: bool
    lost: list[str]
    duplicated: list[str]
    corrupted: list[str]
    compared: int
    identical: int
    furthest: float
    starts: int
    ended: bool
    message: str | None
    traceback: bool
    seconds: float
    log: str = ""


class Attempt:
    """One sweep that is to be struck, in a folder of its own.

    Attributes:
        overrides: what the command has besides; an act may add to it, for the repeats as well.
        stack: what is undone at the end. prepare: called in each child. mend: before the command is repeated.
        expected: what the command is to leave, with its files as they are now. kept: what else is to be there.
    """

    def __init__(self, harness: "Harness", fault: Fault, *, deterministic: bool) -> None:
        harness.number += 1
        self.harness, self.fault, self.chance = harness, fault, harness.chance
        self.deterministic = deterministic
        self.root = harness.root / f"n{harness.number}"
        self.root.mkdir()
        self.output, self.study_name = self.root, "study"
        self.cache = self.root / "cache"
        shutil.copytree(harness.cache, self.cache)
        self.overrides = [*fault.overrides, *(DETERMINISTIC if deterministic else ())]
        self.stack = contextlib.ExitStack()
        self.mend: Callable[[], None] | None = None
        self.log, self.later = self.root / "struck.log", self.root / "repeated.log"
        self.marker = self.root / STRUCK
        self.environment: dict[str, str] = {}
        self.aside = list(fault.aside)
        self.files = ""  # which of its own the command reads
        self.prepare: Callable[[], None] | None = None
        self.kept: Mapping[str, Result] = {}
        self.kept_spare: Callable[[], Mapping[str, Result]] = dict

    @property
    def study(self) -> Path:
        return self.output / self.study_name

    @property
    def command(self) -> list[str]:
        tuned = TUNED if self.fault.tuned else ()
        return self.typed(*tuned, *self.overrides)

    def typed(self, *overrides: str) -> list[str]:
        """The command with some overrides, each in the place of what is usual."""
        found = {line.partition("=")[0]: line for line in (*COMMON, *overrides)}
        return [*found.values(), *self.aside, f"output_root={self.output}", f"study={self.study_name}"]

    @property
    def expected(self) -> Mapping[str, Result]:
        return self.harness.calm(self)

    def left(self) -> int:
        """Runs that are unfinished now."""
        return len(self.expected) - ended(self.study)

    def start(
        self, plant: Plant | None = None, *, call: int = 1, log: Path | None = None, command: Sequence[str] = ()
    ) -> ForkProcess:
        """A process that carries out the command."""
        process = multiprocessing.get_context("fork").Process(
            target=_sweep, args=(self, plant, call, log or self.log, command)
        )
        process.start()
        return process

    def wait(self, process: ForkProcess, seconds: float | None = None) -> int:
        """How a command ended; 124 where it had to be killed."""
        process.join(60 + 20 * self.harness.seconds if seconds is None else seconds)
        code = process.exitcode
        if code is None:
            code = 124
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid or 0, signal.SIGKILL)  # what it left behind, too
        process.join()
        return code

    def sleep(self, process: ForkProcess, share: float = 0.9) -> bool:
        """Waits for a random part of the time that a sweep takes; whether it goes on still."""
        process.join(self.chance.uniform(0, share * self.harness.seconds))
        return process.is_alive()

    def close(self) -> None:
        self.stack.close()
        shutil.rmtree(self.root, ignore_errors=True)


class Harness:
    """Sweeps in a folder of their own, each with a copy of one warm cache."""

    def __init__(self, root: Path, seed: object) -> None:
        self.root, self.chance, self.number = root, random.Random(str(seed)), 0
        self.seconds, self.cache = 60.0, root / "cache"
        self.cache.mkdir(parents=True)
        self.shared = root.parent / "alone"  # with other jobs
        self.shared.mkdir(exist_ok=True)
        plain = Fault(name="none")
        for _ in range(2):
            warm = Attempt(self, plain, deterministic=False)
            shutil.rmtree(warm.cache)
            warm.cache = self.cache
            began = time.monotonic()
            if warm.wait(warm.start()):
                raise SystemExit(warm.log.read_text()[-3000:])
            self.seconds = time.monotonic() - began  # of a sweep left alone, caches warm
            warm.close()

    def calm(self, attempt: Attempt) -> Mapping[str, Result]:
        """What the attempt's command leaves when nothing strikes it."""
        return self._once("calm", attempt, self._leave_alone)

    def spare(self, attempt: Attempt) -> Mapping[str, Result]:
        """Runs that the command would train if another trial were best: every trial on the seed that confirms."""
        return self._once("spare", attempt, self._confirm_all)

    def _once(
        self, name: str, attempt: Attempt, make: Callable[[Attempt], Mapping[str, Result]]
    ) -> Mapping[str, Result]:
        fault = attempt.fault
        key = repr((name, fault.overrides, fault.tuned, attempt.files, attempt.deterministic))
        path = self.shared / f"{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"
        with FileLock(f"{path}.lock"):
            if not path.exists():
                path.write_text(json.dumps({run_id: asdict(one) for run_id, one in make(attempt).items()}))
        return {run_id: Result.of(plain) for run_id, plain in json.loads(path.read_text()).items()}

    def _undisturbed(self, attempt: Attempt) -> Attempt:
        alone = Attempt(self, attempt.fault, deterministic=attempt.deterministic)
        alone.overrides, alone.prepare, alone.aside = attempt.overrides, attempt.prepare, []
        return alone

    def _leave_alone(self, attempt: Attempt) -> Mapping[str, Result]:
        alone = self._undisturbed(attempt)
        if alone.wait(alone.start()):
            raise SystemExit(alone.log.read_text()[-3000:])
        found = outcome(alone.study)
        alone.close()
        return found

    def _confirm_all(self, attempt: Attempt) -> Mapping[str, Result]:
        """As a plain grid, which gives the same runs."""
        alone = self._undisturbed(attempt)
        if alone.wait(alone.start()):
            raise SystemExit(alone.log.read_text()[-3000:])
        points = sorted({(one.spec["placement"]["name"], one.spec["optim"]["lr"]) for one in records(alone.study)})
        again = self._undisturbed(attempt)
        for place, lr in points:
            command = again.typed(*again.overrides, f"placement={place}", "seed=1", f"optim.lr={lr!r}")
            if again.wait(again.start(command=command)):
                raise SystemExit(again.log.read_text()[-3000:])
        found = {run_id: one.named("confirm") for run_id, one in outcome(again.study).items()}
        for one in (alone, again):
            one.close()
        return found

    def inject(self, fault: Fault, number: int) -> Injection:
        """One injection that counts, and what it left."""
        deterministic = bool(number % 2)
        for _ in range(TRIES):
            began = time.monotonic()
            attempt = Attempt(self, fault, deterministic=deterministic)
            try:
                at_stake = self._strike(attempt)
                if at_stake is not None and at_stake > 0:
                    return self._finish(attempt, at_stake, began)
            finally:
                attempt.close()
        raise RuntimeError(f"{fault.name}: did not strike in {TRIES} sweeps")

    def _strike(self, attempt: Attempt) -> int | None:
        """How many runs were unfinished when the fault struck; None where it did not."""
        fault = attempt.fault
        if fault.act is not None:
            return fault.act(attempt)
        if fault.plant is not None:
            attempt.wait(attempt.start(fault.plant, call=self.chance.randrange(1, fault.calls + 1)))
            if not attempt.marker.exists():
                return None
            return len(attempt.expected) - int(attempt.marker.read_text().split()[0])
        process = attempt.start()
        process.join(self.chance.uniform(0.05, min(1.0, self.seconds) if fault.early else 0.9 * self.seconds))
        if not process.is_alive() or (fault.ready and not list(attempt.study.glob(fault.ready))):
            attempt.wait(process, 0)
            return None
        left = attempt.left()
        for number in fault.signals:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid or 0, number)
            time.sleep(0.1)
        attempt.wait(process)
        if left > 0 and fault.damage is not None:
            place, _, pattern = fault.what.partition(":")
            folder = attempt.study if place == "study" else attempt.cache
            files = sorted(path for path in folder.glob(pattern) if path.is_file() and path.stat().st_size)
            if not files:
                return None
            fault.damage(self.chance.choice(files), self.chance)
        return left

    def _finish(self, attempt: Attempt, at_stake: int, began: float) -> Injection:
        fault, starts, code = attempt.fault, 0, 1
        if attempt.mend is not None:
            attempt.mend()
        while code and starts < STARTS:
            starts += 1
            code = attempt.wait(attempt.start(fault.again, log=attempt.later))
            if code:
                obey(attempt.later.read_text())
        struck = attempt.marker.read_text().split()[1:] if attempt.marker.exists() and fault.diverges else []
        counted = TRIALS if fault.tuned else None
        expected = {**attempt.kept, **attempt.expected}

        def spare() -> Mapping[str, Result]:
            return {**attempt.kept_spare(), **(self.spare(attempt) if fault.tuned else {})}

        verdict = judge(attempt.study, expected, spare, excused=struck, trials=counted, exact=attempt.deterministic)
        log = f"{_text(attempt.log)}\n-- repeated\n{_text(attempt.later)}"
        message = said(_text(attempt.later if fault.later else attempt.log), fault.says)
        return Injection(
            fault=fault.name, deterministic=attempt.deterministic, at_stake=at_stake, kills=fault.kills,
            **asdict(verdict), starts=starts, ended=not code, message=message,
            traceback="Traceback (most recent call last)" in log,
            seconds=round(time.monotonic() - began, 1), log=log[-8000:],
        )  # fmt: skip


def obey(log: str) -> None:
    """Does what the last message asks of a user."""
    asked = re.findall(r"^error: (/\S+) .*: move it away", log, re.MULTILINE)
    if asked:
        path = Path(asked[-1])
        path.rename(path.with_name(f"{path.name}.away.{time.monotonic_ns()}"))


def said(log: str, pattern: str | None) -> str | None:
    """The line of a log that a pattern is found in; of several, the last."""
    if pattern is None:
        return None
    lines = [line for line in log.splitlines() if re.search(pattern, line)]
    return lines[-1].strip() if lines else None


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _sweep(attempt: Attempt, plant: Plant | None, call: int, log: Path, command: Sequence[str] = ()) -> None:
    """The child: plants the fault and runs the command as a user's shell would."""
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ |= {"SWEEPER_CACHE": str(attempt.cache), **attempt.environment}
    random.seed(f"{attempt.root} {call}")
    with open(log, "a", buffering=1) as opened:
        os.dup2(opened.fileno(), 1)
        os.dup2(opened.fileno(), 2)
        sys.stdout = sys.stderr = opened
        if attempt.prepare is not None:
            attempt.prepare()
        if plant is not None:
            plant(_once(call, attempt.study, attempt.marker))
        sys.argv = ["train.py", *(command or attempt.command)]
        code = 1
        try:
            runpy.run_path("train.py", run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1 if end.code else 0
        except KeyboardInterrupt:
            code = 130
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            opened.flush()
            os._exit(code)


def _once(call: int, study: Path, marker: Path) -> Callable[[str], bool]:
    """Says whether to strike: at the `call`-th question, once; notes how many runs had ended, and who is struck."""
    asked: Counter[str] = Counter()

    def strike(whom: str = "") -> bool:
        asked["times"] += 1
        if asked["times"] != call:
            return False
        marker.write_text(f"{ended(study)} {whom}")
        return True

    return strike


def warm() -> None:
    """Imports what a sweep needs, and composes its command once: a fork finds parsers and caches filled."""
    os.environ |= {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "2000"}  # before torch is loaded
    for name in WARM:
        importlib.import_module(name)
    importlib.import_module("tests.faults.launcher").register()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        sys.argv = ["train.py", *COMMON, *TUNED, "sweep.dry_run=true", f"output_root={folder}"]
        with contextlib.suppress(SystemExit):
            runpy.run_path("train.py", run_name="__main__")
    gc.collect()
    gc.freeze()  # a fork would copy every page that a collection touches


def run(faults: Sequence[Fault], times: int, seed: int, jobs: int, out: Path, root: Path) -> None:
    """Injects each fault so many times, round after round; each injection is a line of a file of its job in `out`."""
    warm()
    work = [(fault, n) for n in range(times) for fault in faults if fault.most is None or n < fault.most]
    fork = multiprocessing.get_context("fork")
    following = fork.Value("i", 0)
    out.mkdir(parents=True, exist_ok=True)

    def job(number: int) -> None:
        harness = Harness(root / f"job{number}", f"{seed}/{number}")
        print(f"job {number}: a sweep left alone takes {harness.seconds:.1f} s", flush=True)
        with (out / f"{os.getpid()}.jsonl").open("a") as lines:
            while True:
                with following.get_lock():
                    mine = following.value
                    following.value += 1
                if mine >= len(work):
                    return
                fault, n = work[mine]
                harness.chance = random.Random(f"{seed} {fault.name} {n}")
                try:
                    found = harness.inject(fault, n)
                except Exception as error:  # one that cannot be injected is missed in the figures
                    print(f"{mine + 1}/{len(work)} {fault.name}: {type(error).__name__}: {error}", flush=True)
                    continue
                lines.write(json.dumps(asdict(found)) + "\n")
                lines.flush()
                told = "; ".join(_faulty(found)) or "well"
                print(f"{mine + 1}/{len(work)} {fault.name}: {told} ({found.seconds} s)", flush=True)

    processes = [fork.Process(target=job, args=(number,)) for number in range(jobs)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def _faulty(found: Injection) -> list[str]:
    told = ["traceback"] if found.traceback else []
    told += [f"{name} {getattr(found, name)}" for name in ("lost", "duplicated", "corrupted") if getattr(found, name)]
    return [*told, *([] if found.ended else ["did not end"])]


def main() -> None:
    from tests.faults import report
    from tests.faults.faults import FAULTS, by_name

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fault", action="append", choices=[fault.name for fault in FAULTS], help="only this one")
    parser.add_argument("--times", type=int, default=12, help="of each fault; what takes long has a limit of its own")
    parser.add_argument("--jobs", type=int, default=1, help="at once, each with a sweep of its own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a folder for a line each injection; those there are kept")
    parser.add_argument("--root", type=Path, help="where sweeps lie, instead of a temporary folder")
    args = parser.parse_args()
    chosen = [by_name(name) for name in args.fault] if args.fault else FAULTS
    with contextlib.ExitStack() as stack:
        out = args.out or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=args.root)))
        run(chosen, args.times, args.seed, args.jobs, out, root)
        found = report.read(out)
    print(report.table(report.summed(found)))
    if problems := report.problems(found):
        print("\n".join(problems))
        sys.exit(1)


if __name__ == "__main__":
    main()
