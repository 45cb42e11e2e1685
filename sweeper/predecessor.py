"""The run whose adapter another one begins with: what `trainer.init_from` names, in the study or elsewhere.

A run of the study is named by its id, which stands for all that was trained; it may be one that is still to train.
Elsewhere it is a folder, whose run id and digest are part of the identity of what begins from it.
"""

import hashlib
import re
from dataclasses import replace
from pathlib import Path

from sweeper import content, record
from sweeper.cache import cache_folder
from sweeper.errors import SpecError, gist
from sweeper.record import ADAPTER, Record
from sweeper.spec import OF_FILES, TrainerSpec

RUN_ID = re.compile(r"[0-9a-f]{12}")
CONTENT = "init_from"  # its name among the contents that a run's record and checkpoint note
FILES = ("adapter_config.json", "adapter_model.safetensors")


def in_study(given: str, study: Path) -> str | None:
    """The run of a study that is meant, by id or folder; None for a folder that lies elsewhere."""
    path = Path(given)
    if RUN_ID.fullmatch(given) and ((study / given).is_dir() or not path.is_dir()):
        return given
    try:
        found = path.resolve()
        return found.name if found.parent == study.resolve() else None
    except (OSError, RuntimeError):  # a loop of links
        return None


def folder(given: str, study: Path) -> Path:
    """The folder of the run that is meant."""
    own = in_study(given, study)
    return Path(given) if own is None else study / own


def identified(trainer: TrainerSpec, study: Path) -> TrainerSpec:
    """A run's training with its predecessor by id, or by the content of one elsewhere; as it is where that is gone."""
    given = trainer.init_from
    assert given is not None
    if (own := in_study(given, study)) is not None:
        return replace(trainer, init_from=own, content=None)
    try:
        told = f"{completed(given, study).run_id} {digest(Path(given))}"
    except SpecError:  # the plan's check says so
        return trainer
    return replace(trainer, content=f"{OF_FILES}{hashlib.sha256(told.encode()).hexdigest()}")


def completed(given: str, study: Path) -> Record:
    """The record of the run that is meant.

    Raises:
        SpecError: there is none, it did not complete, or left no adapter.
    """
    start, place = f"trainer.init_from={given}", folder(given, study)
    try:
        found = record.read_record(place)
    except FileNotFoundError:
        where = (
            f"no such run in {study}, nor in this command" if RUN_ID.fullmatch(given) else "no record in that folder"
        )
        raise SpecError(f"{start}: {where}; give the id of a run of the study, or a run's folder") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SpecError(f"{start}: its record cannot be read ({gist(error)})") from None
    if found.status != "completed":
        raise SpecError(f"{start}: that run {ended(found.status)}; only one that completed can be gone on from")
    if not all((place / ADAPTER / name).is_file() for name in FILES):
        what = "an adapter for each of its tasks" if (place / record.TASKS).is_dir() else "no adapter"
        raise SpecError(f"{start}: that run left {what}, and a run begins with one")
    return found


def digest(place: Path) -> str:
    """The digest of the adapter in a run's folder.

    Raises:
        SpecError: it cannot be read.
    """
    try:
        found = content.of_folder(place / ADAPTER, [place / ADAPTER / name for name in FILES], cache_folder()).text
    except OSError as error:
        raise SpecError(f"trainer.init_from: the adapter in {place} cannot be read ({gist(error)})") from None
    assert found is not None
    return found


def ended(status: str) -> str:
    """How a run ended, as the end of a sentence."""
    return f"was {status}" if status == "pruned" else status
