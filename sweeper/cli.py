"""How a command ends: one line an error, an exit code, no traceback for what is the user's to mend."""

import atexit
import contextlib
import errno
import gc
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

from rich.console import Console

from sweeper import installation, lost, shell
from sweeper.completion import SCRIPTS
from sweeper.errors import Interrupted, Problems, SweeperError, unknown
from sweeper.lost import ContextLost
from sweeper.redaction import without_credentials

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from sweeper.config import Composer

FULL = "HYDRA_FULL_ERROR"
SEVERAL = "-m"
FROM = "--from"  # as `sweeper.repeat.FLAG`, which imports more than a start should


_UNWRITABLE = {
    errno.ENOSPC: "make room", errno.EDQUOT: "make room", errno.EROFS: "make it writable again",
}  # fmt: skip


class NoRoom(SweeperError):
    """What was trained cannot be written: there is no room, or the file system has become read-only."""

    exit_code = 1


class Quit(SystemExit):
    """Carries an error of a single run past Hydra, which would print about it, to `run`."""

    def __init__(self, error: SweeperError) -> None:
        super().__init__(error.exit_code)
        self.error = error


def put_flags_last() -> None:
    """Makes `study=mine -m rank=4,8` what it looks like: Hydra takes no overrides behind a flag that follows others.

    Nor does it read quoted keys of a mapping, which `'allocation.pattern={"attn_q": 16}'` may have.
    Ends the command with a line for a flag that there is not or flags that do not go together, and with our script
    where bash asks for completion.
    """
    from hydra._internal.utils import get_args_parser

    from sweeper import config

    installation.forgive_output()
    sys.argv[1:] = config.unquoted(sys.argv[1:])
    if FROM in sys.argv[1:]:
        sys.exit(run(_repeat))

    def refuse(message: str) -> NoReturn:
        print(f"error: {message}. Flags: {shell.command('train', '--hydra-help')}", file=sys.stderr)
        sys.exit(2)

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    known, rest = parser.parse_known_args()
    if known.shell_completion and (script := SCRIPTS.get(" ".join(known.overrides))):
        print(script)
        sys.exit(0)
    for word in rest:
        if word.startswith("-"):
            refuse(f"{word}: no such flag; fields have no dashes: '{_as_field(word, sys.argv)}'")
    if known.multirun and (known.cfg or known.info):
        shows = f"--cfg {known.cfg}" if known.cfg else f"--info {known.info}"
        print(f"error: {shows} is of one run, without -m: {_of_one_run(known.overrides, shows)}", file=sys.stderr)
        sys.exit(2)
    if rest and not any(word.startswith("-") for word in rest):
        overrides = [*known.overrides, *rest]
        sys.argv[1:] = [*overrides, *(word for word in sys.argv[1:] if word not in overrides)]


def _as_field(flag: str, words: Sequence[str]) -> str:
    """The override that someone meant who typed a flag."""
    name, equals, value = flag.lstrip("-").partition("=")
    name = name.replace("-", "_")
    if name == "dry_run":
        return f"sweep.dry_run={value or 'true'}"
    following = words[words.index(flag) + 1 :] if flag in words else []
    if not equals and following and not following[0].startswith("-") and "=" not in following[0]:
        value = following[0]
    return f"{name}={value or '...'}"


def _of_one_run(overrides: Sequence[str], shows: str) -> str:
    """What to type to see the configuration of a grid's first run."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    first = []
    for line in overrides:
        with contextlib.suppress(Exception):  # what cannot be read has a line of its own, once it is tried
            override = OverridesParser.create().parse_overrides([line])[0]
            if override.is_interval_sweep():
                continue
            if override.is_sweep_override():
                line = f"{line.partition('=')[0]}={next(iter(override.sweep_string_iterator()))}"
        first.append(line)
    return shell.command("train", *first, *shows.split())


def run(main: Callable[[], object]) -> int:
    """Calls Hydra's main and returns the exit code: 0, 1 runs failed, 2 bad input, 130 interrupted.

    A process that can use its GPU no more is replaced by a fresh one of the same command.

    Set HYDRA_FULL_ERROR=1 for tracebacks.
    """
    installation.forgive_output()
    atexit.register(gc.freeze)  # or the interpreter looks through all that the imports made once more before it goes
    # threads that spin while they wait make a step many times slower on cores that are shared with other work
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

    def command() -> object:
        from sweeper import config

        config.load_plugins(sys.argv[1:])
        return main()

    if os.environ.get(FULL) == "1":
        try:
            command()
        except (ContextLost, Quit) as error:
            cause = error.error if isinstance(error, Quit) else error
            if isinstance(cause, ContextLost):
                lost.go_on(cause)
            raise
        return 0
    os.environ[FULL] = "1"  # makes Hydra raise instead of printing its own account
    try:
        command()
    except Quit as quit_:
        return _report(quit_.error)
    except SweeperError as error:
        return _report(error)
    except KeyboardInterrupt:
        return _report(Interrupted("stopped at once; the same command trains what is missing", shell.this_command()))
    except Exception as error:
        told = no_room(error) or (_explain(error, sys.argv[1:]) if from_hydra(error) else None)
        if told is None:
            raise
        return _report(told)
    finally:
        del os.environ[FULL]
    return 0


def _repeat() -> None:
    from sweeper import repeat

    repeat.main(sys.argv[1:])


def train(cfg: "DictConfig") -> float | None:
    """The job of one configuration; returns its objective, the validation NLL after training."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from sweeper import config
    from sweeper.study import launch

    hydra = HydraConfig.get()
    try:
        running = GlobalHydra.instance()
        loader = running.config_loader() if running.is_initialized() else None
        return launch.train_one(*config.from_config(cfg, loader, chosen=hydra.runtime.choices))
    except SweeperError as error:
        if hydra.mode == RunMode.RUN or isinstance(error, ContextLost):  # no job of this process can go on
            raise Quit(error) from None
        if isinstance(error, Interrupted):  # Hydra's launchers would keep it as the job's error and begin the next
            raise KeyboardInterrupt from None
        raise


def no_room(error: BaseException) -> NoRoom | None:
    """The line for a full or read-only disk, if that is what an error is; not every library says so by an OSError."""
    mend = next((mend for code, mend in _UNWRITABLE.items() if os.strerror(code) in str(error)), None)
    if mend is None:
        return None
    reason = str(error).strip().splitlines()[-1]  # a worker's error has its traceback before it
    return NoRoom(f"{reason}: {mend}; the same command goes on from what is saved")


def from_hydra(error: BaseException) -> bool:
    """Whether Hydra or OmegaConf raised this about the command, rather than a part of ours about itself."""
    if type(error).__module__.split(".")[0] == "hydra":  # whose traceback may end in what it called
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", ""))
    return module.split(".")[0] in ("hydra", "omegaconf", "antlr4")


def _report(error: SweeperError) -> int:
    if isinstance(error, ContextLost):
        lost.go_on(error, without=(FULL,))
    if isinstance(error, Interrupted):
        told = Console(stderr=True, highlight=False)
        told.print(f"{error.message}:", markup=False)
        told.print(without_credentials(error.again, typed=True), markup=False, soft_wrap=True)  # to be copied as it is
        return error.exit_code
    for line in error.lines:
        print(f"error: {without_credentials(line, typed=True)}", file=sys.stderr)
    return error.exit_code


def _explain(error: Exception, arguments: Sequence[str]) -> SweeperError:
    from hydra._internal.utils import get_args

    parsed = get_args(arguments)
    return explain(error, parsed.overrides, parsed.config_dir, multirun=parsed.multirun)


def explain(error: Exception, overrides: Sequence[str], config_dir: str | None, *, multirun: bool) -> SweeperError:
    """Everything wrong with the command, in place of Hydra's account of the first thing."""
    from sweeper import config

    lines: list[str] = _no_such_hydra_field(str(error), overrides)
    try:
        composer = config.composer_of(config_dir)
        if not (multirun or is_multirun(composer, overrides)):
            lines += grid_without_multirun(overrides, composer)
        elif str(error).startswith("Ambiguous"):  # Hydra did not see that it is one, for what is wrong with hydra.*
            error = _refused(composer, overrides) or error
            lines += _no_such_hydra_field(str(error), overrides)
        config.expand(overrides, composer)
    except Problems as problems:
        lines += problems.lines
    except Exception:  # the first error is what counts, not what happened while explaining it
        lines = []
    return Problems(lines or [config.one_line(error)])


def _no_such_hydra_field(message: str, overrides: Sequence[str]) -> list[str]:
    """A line with the fields of `hydra`, its sweeper or its launcher, if the message is about one that is not there."""
    from dataclasses import fields

    from hydra.conf import HydraConf
    from hydra_plugins.lora_sweeper.ray_launcher import RayLauncherConf

    from sweeper.config.build import OF_SWEEP

    match = re.match(r"Could not override 'hydra\.(\w+)\.?(\w*)\.?(\w*)", message)
    if match is None:
        return []
    part, field, key = match.groups()
    if part not in ("sweeper", "launcher"):
        known = [one.name for one in fields(HydraConf)]
        return [] if part in known else [unknown("hydra field", part, known, given=f"hydra.{part}")]
    chosen, known = _chosen_plugin(part, overrides)
    name = f"hydra.{part}.{field}"
    if field == "params":
        return [f"{name}: give axes by themselves, or add them with a plus: '+{name}.{key or 'rank'}=...'"]
    if field in known and key:  # a mapping, empty until it is given
        return [f"{name} is given whole: '{name}={{{key}: ...}}'"]
    if field in known:
        return []
    if part == "launcher" and field in {one.name for one in fields(RayLauncherConf)}:
        return [f"{name} is a field of hydra/launcher=ray: give that as well"]
    if not known:
        return [f"{name}: hydra/{part}={chosen} has no fields"]
    if field in OF_SWEEP:
        value = next((line.partition("=")[2] for line in overrides if line.lstrip("+").startswith(f"{name}=")), "...")
        return [unknown(f"hydra.{part} field", field, known, given=name, meant=[f"sweep.{field}={value}"])]
    return [unknown(f"hydra.{part} field", field, known, given=name)]


def _chosen_plugin(part: str, overrides: Sequence[str]) -> tuple[str, list[str]]:
    """The sweeper or launcher that a command chooses, and its fields."""
    from hydra.core.config_store import ConfigStore

    given = [line.partition("=")[2] for line in overrides if line.lstrip("+").startswith(f"hydra/{part}=")]
    chosen = given[-1] if given else {"sweeper": "ablation", "launcher": "packed"}[part]
    try:
        node = ConfigStore.instance().load(f"hydra/{part}/{chosen}.yaml").node
    except OSError:  # there is none of this name, which has a line of its own
        return chosen, []
    return chosen, [name for name in map(str, node) if not name.startswith("_")]


def is_multirun(composer: "Composer", overrides: Sequence[str]) -> bool:
    """Whether an overlay such as search=lr makes a sweep of a command without -m."""
    from hydra.types import RunMode

    telling = [
        line for line in overrides if line.startswith("hydra.mode=") or not line.lstrip("+~").startswith("hydra")
    ]
    try:
        cfg = composer.loader.load_configuration(
            composer.config_name, telling, RunMode.MULTIRUN, validate_sweep_overrides=False
        )
    except Exception:  # the command has other faults
        return False
    return bool(cfg.hydra.mode == RunMode.MULTIRUN)


def _refused(composer: "Composer", overrides: Sequence[str]) -> Exception | None:
    """Why Hydra does not compose a sweep."""
    from hydra.types import RunMode

    try:
        composer.loader.load_configuration(
            composer.config_name, list(overrides), RunMode.MULTIRUN, validate_sweep_overrides=False
        )
    except Exception as error:
        return error
    return None


def grid_without_multirun(overrides: Sequence[str], composer: "Composer", needs: str = SEVERAL) -> list[str]:
    """A line for each override that asks for several runs where there is one; `needs` is what trains several.

    The first line has the command that does, where that is a flag away.
    """
    lines: list[str] = []
    for line in overrides:
        try:
            override = composer.parse(line)
        except Exception:  # named by expand
            continue
        told = needs if lines or needs != SEVERAL else f"{needs}: {shell.command('train', needs, *overrides)}"
        if override.is_interval_sweep():
            lines.append(f"{line}: a range is tuned by a sweep, which needs {told}")
        elif override.is_sweep_override():
            key, values = line.split("=", 1)
            as_one = f"; a list as one value is '{key}=[{values}]'" if _is_list(key.lstrip("+"), composer) else ""
            lines.append(f"{line}: several values need {told}{as_one}")
    return lines


def _is_list(key: str, composer: "Composer") -> bool:
    """Whether a field holds a list by default."""
    from omegaconf import ListConfig, OmegaConf

    try:
        return isinstance(OmegaConf.select(composer.compose([]), key), ListConfig)
    except Exception:  # a configuration of one's own that needs values
        return False
