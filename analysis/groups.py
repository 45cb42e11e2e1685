"""Units of independence of predictions that do not name them: those of earlier versions.

The ids of some tasks say for certain which group an example is of. The rules are written here and not asked of the
tasks: records are read without the code that made them.
"""

import re
from collections.abc import Sequence

# family -> what matches a whole id; its group 1 names the unit, as `template` where there is one
FROM_IDS = {
    "gsm_symbolic": (re.compile(r"(\d+)-\d+"), "template-{}"),
    "human_eval": (re.compile(r"(HumanEval/\d+)"), "{}"),
    "icd10_chapter": (re.compile(r"([A-Z][0-9A-Z]{2})(?:\..+)?"), "{}"),
}


def recovered(family: str | None, ids: Sequence[str]) -> list[str] | None:
    """The unit of each example; None where the family's ids do not tell, or one of them is not of its kind."""
    if family not in FROM_IDS or not ids:
        return None
    pattern, template = FROM_IDS[family]
    found = [pattern.fullmatch(str(example_id)) for example_id in ids]
    if not all(found):
        return None
    return [template.format(match[1]) for match in found if match is not None]
