#!/usr/bin/env python3
"""Lengths of the rows of real tasks, for speed figures on ragged rows: `benchmarks/token_lengths.json`.

    python -m benchmarks.token_lengths icd10_chapter gsm_symbolic medmcqa_subject    # writes it, from SmolLM2's tokens

Of each task the first 512 training examples, of the prompt and in all. The benchmarks fill them with random tokens:
speed depends on how many there are, not on which.
"""

import argparse
import json
from pathlib import Path

from omegaconf import OmegaConf

LENGTHS = Path(__file__).with_suffix(".json")
COUNT = 512


def lengths(task: str) -> list[tuple[int, int]]:
    """Tokens of the prompt and in all, of each example of a task."""
    found = json.loads(LENGTHS.read_text())
    if task not in found:
        raise SystemExit(f"no lengths of {task!r}: have {', '.join(found)}; benchmarks.token_lengths adds others")
    return [(prompt, total) for prompt, total in found[task]]


def measured(task: str) -> list[tuple[int, int]]:
    from sweeper import tasks
    from sweeper.models.base import load_tokenizer
    from sweeper.spec import DatasetSpec, ModelSpec, from_mapping

    conf = Path(__file__).parent.parent / "conf"
    read = {kind: OmegaConf.to_container(OmegaConf.load(conf / kind / f"{name}.yaml"))
            for kind, name in (("dataset", task), ("model", "smollm2_135m"))}  # fmt: skip
    tokenizer = load_tokenizer(from_mapping(ModelSpec, read["model"]))
    encoded = tasks.encode(from_mapping(DatasetSpec, read["dataset"]), tokenizer, model_key="smollm2", cache=None)
    return [(one.prompt_length, len(one.input_ids)) for one in encoded["train"].examples[:COUNT]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+")
    found = json.loads(LENGTHS.read_text()) if LENGTHS.exists() else {}
    for task in parser.parse_args().tasks:
        found[task] = measured(task)
        total = [one[1] for one in found[task]]
        print(f"{task}: {len(total)} examples, {sum(total) / len(total):.1f} tokens on average, up to {max(total)}")
    rows = ",\n".join(f' "{task}": {json.dumps(own)}' for task, own in sorted(found.items()))
    LENGTHS.write_text(f"{{\n{rows}\n}}\n")


if __name__ == "__main__":
    main()
