"""What tells runs apart, in the words people type: for the live view, the tables and the trackers."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sweeper.record import LEFT_OUT, LEFT_OUT_OF_TASKS

# a group's name stands for the group; what its options also say is shown only where it varies by itself
GROUPS = ("model", "dataset", "method", "placement", "allocation", "sharing", "objective", "evaluation")


CONTENTS = ("model.content", "dataset.content", "trainer.content")
SHOWN = 19  # characters of a digest


def flat(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted field -> value of a spec's plain mapping; the name of a group is under the group itself."""
    found: dict[str, Any] = {}

    def walk(node: Mapping[str, Any], prefix: str) -> None:
        for key, value in node.items():
            if key == "name" and prefix.rstrip(".") in GROUPS:
                found[prefix.rstrip(".")] = value
            elif isinstance(value, Mapping) and value:
                walk(value, f"{prefix}{key}.")
            elif key == "parts":  # a dataset's tasks
                found[f"{prefix}{key}"] = "+".join(part["name"] for part in value)
                for part in value:
                    walk({name: one for name, one in part.items() if name != "name"}, f"{prefix}{part['name']}.")
            elif key == "content" and value is not None:
                found[f"{prefix}{key}"] = str(value)[:SHOWN]
            else:
                found[f"{prefix}{key}"] = value

    walk(spec, "")
    if found.get("dataset.options.order") == "seed":  # which the seed tells already
        found["dataset.parts"] = "+".join(sorted(found["dataset.parts"].split("+")))
    return LEFT_OUT | (LEFT_OUT_OF_TASKS if "dataset.parts" in found else {}) | found


def varying(specs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Fields that differ between specs and do not follow from the others, besides placement and rank."""
    return varying_rows([flat(spec) for spec in specs])


def varying_rows(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """As `varying`, of what `flat` gave."""
    fields = list(dict.fromkeys(key for row in rows for key in row))
    differing = [key for key in fields if any(_unlike(row.get(key), rows[0].get(key)) for row in rows)]
    return [key for key in differing if key not in ("placement", "rank") and not _follows(key, rows, differing)]


def label(spec: Mapping[str, Any], fields: Sequence[str], but: Collection[str] = ()) -> str:
    """A short name such as "attn r8 seed=1"; `fields` as from `varying`. What is in `but` is no part of it."""
    row = flat(spec)
    words = {"placement": row["placement"], "rank": f"r{row['rank']}"}
    words |= {key: f"{key.split('.')[-1]}={row.get(key)}" for key in fields}
    return " ".join(str(word) for key, word in words.items() if key not in but) or "all"


def _unlike(one: Any, two: Any) -> bool:
    """Whether two values are written otherwise; of thousands of runs most fields are equal, which is told faster."""
    return not (type(one) is type(two) and one == two) and repr(one) != repr(two)


def _follows(key: str, rows: Sequence[Mapping[str, Any]], differing: Sequence[str]) -> bool:
    if key in CONTENTS and any(other != key and other.split(".")[0] == key.split(".")[0] for other in differing):
        return True
    leader = "rank" if key == "alpha" else key.split(".")[0]
    if leader == key or leader not in differing or leader not in (*GROUPS, "rank"):
        return False
    pairs = {(repr(row.get(leader)), repr(row.get(key))) for row in rows}
    return len(pairs) == len({first for first, _ in pairs})
