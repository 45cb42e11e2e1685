"""A small study to make libraries of: adapters of two tasks trained apart, and a third task that none knows."""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sweeper.placement.placement import PLACEMENTS
from sweeper.run import Run
from sweeper.spec import Settings, run_spec
from sweeper.training import train_runs
from sweeper.training.events import RunFinished
from sweeper.training.source import Fixed

MODEL = {
    "name": "tiny", "source": "random", "location": "llama",
    "config": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "vocab_size": 300,
    },
}  # fmt: skip
ANSWERS = {"fruit": ("apple", "grape"), "metal": ("iron", "zinc"), "mixed": ("apple", "zinc")}


def dataset(root: Path, name: str) -> dict[str, Any]:
    """A task in a file: prompts that begin with its name, answers that follow from their last letter."""
    path = root / f"{name}.jsonl"
    if not path.exists():
        rng, lines = random.Random(name), []
        for i in range(60):
            letter = rng.choice("ab")
            answer = ANSWERS[name]["ab".index(letter)]
            prompt = f"{name} {rng.randrange(1000)} {i} {letter}: "
            split = "train" if i < 36 else "validation" if i < 44 else "test"
            lines.append({"prompt": prompt, "response": answer, "split": split, "choices": list(ANSWERS[name])})
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {
        "name": name, "family": "jsonl", "path": str(path), "template": "plain", "max_length": 64,
        "metrics": ["exact_match", "choice_accuracy"],
    }  # fmt: skip


def train(root: Path, members: Mapping[str, Mapping[str, Any]], *, steps: int = 30) -> Path:
    """The study folder of runs, a task -> further fields of its run; named `TASK` or `TASK-...`."""
    settings = Settings(study="study", output_root=str(root), calibrate=False, device="cpu")
    requests = []
    for name, fields in members.items():
        placement = fields.get("placement", "full")
        spec = run_spec(
            {
                "model": MODEL, "dataset": dataset(root, name.partition("-")[0]), "method": {"name": "lora"},
                "placement": {"name": placement, "roles": list(PLACEMENTS[placement])},
                "allocation": {"name": "uniform"}, "rank": fields.get("rank", 4), "seed": fields.get("seed", 0),
                "optim": {"lr": 0.02}, "trainer": {"max_steps": steps, "batch_size": 8, "precision": "float32"},
                "evaluation": {"name": "default", "splits": ["test"]},
            }
        )  # fmt: skip
        requests.append(Run.of(spec, settings.folder))
    source = Fixed(requests)
    train_runs(source, settings)
    assert [e.record.status for e in source.events if isinstance(e, RunFinished)] == ["completed"] * len(members)
    return settings.folder
