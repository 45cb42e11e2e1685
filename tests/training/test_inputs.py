"""What would be an index out of range on a GPU is one line on the host."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from sweeper import models, record
from sweeper.errors import DataError
from sweeper.models import BaseModel
from sweeper.spec import DatasetSpec, ModelSpec
from sweeper.tasks import Choice, Encoded, EncodedSplit
from sweeper.tasks.package import is_installed
from sweeper.training import inputs
from sweeper.training.events import RunFinished

SPEC = DatasetSpec(name="mine", family="icd10_chapter")


def splits(**changes: Any) -> dict[str, EncodedSplit]:
    plain: dict[str, Any] = {"id": "seven", "input_ids": (5, 6, 7), "prompt_length": 1}
    fine = Encoded("fine", (1, 2, 287), 1)
    return {"train": EncodedSplit((fine,)), "test": EncodedSplit((fine, Encoded(**plain | changes)))}


def test_ids_and_lengths_that_a_model_has_room_for_pass(load: Any) -> None:
    for kind in ("llama", "gpt2", "opt"):
        inputs.check(load(kind), SPEC, splits(input_ids=tuple(range(128))))
    inputs.check(load("llama"), SPEC, splits(input_ids=tuple(range(200))))  # rotary positions are computed


@pytest.mark.parametrize("ids", [(5, 288, 6), (5, -1), (4_000_000, 5)])
def test_a_token_beyond_the_embedding_is_named(ids: tuple[int, ...], load: Any) -> None:
    bad = next(one for one in ids if not 0 <= one < 288)
    message = rf"^dataset=mine: example seven: token {bad} \(.*\) lies beyond the 288 rows .* of model=tiny_llama: its"
    for changes in ({"input_ids": ids}, {"choices": (Choice("x", ids),)}):
        with pytest.raises(DataError, match=message):
            inputs.check(load("llama"), SPEC, splits(**changes))


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_more_tokens_than_learned_positions_are_named(kind: str, load: Any) -> None:
    message = r"^dataset=mine: example seven: 129 tokens, and model=tiny_\w+ has learned 128 positions: choose"
    with pytest.raises(DataError, match=message):
        inputs.check(load(kind), SPEC, splits(input_ids=(5,) * 129))
    with pytest.raises(DataError, match=message):
        inputs.check(load(kind), SPEC, splits(choices=(Choice("x", (5,) * 128),)))


@pytest.fixture
def narrow(load: Any, tmp_path: Path) -> ModelSpec:
    """A model folder whose tokenizer has more tokens than its embedding has rows."""
    base: BaseModel = load("llama")
    small = type(base.model)(type(base.model.config).from_dict(base.model.config.to_dict() | {"vocab_size": 200}))
    small.save_pretrained(tmp_path / "narrow")
    base.tokenizer.save_pretrained(tmp_path / "narrow")
    return ModelSpec(name="path", source="path", location=str(tmp_path / "narrow"), config={})


def test_a_tokenizer_of_another_model_fails_its_runs_with_file_and_line(
    narrow: ModelSpec, make_run: Any, run_all: Any, tmp_path: Path
) -> None:
    bad, good = make_run("attn", model=dataclasses.asdict(narrow)), make_run("attn")
    events = run_all([bad, good])
    ends = {event.record.run_id: event.record.status for event in events if isinstance(event, RunFinished)}
    assert ends == {bad.run_id: "failed", good.run_id: "completed"}
    error = record.read_record(tmp_path / "study" / bad.run_id).error
    assert error is not None
    assert error["class"] == "DataError"
    assert re.search(r"parity.jsonl:\d+: token 2\d\d .* its tokenizer has 259 tokens", error["message"])


@pytest.mark.skipif(not is_installed("reasoning_gym"), reason="needs reasoning-gym")
def test_the_general_text_is_looked_at_too(narrow: ModelSpec) -> None:
    base = models.load(narrow, dtype=torch.float32, device=torch.device("cpu"))
    with pytest.raises(DataError, match=r"^evaluation.splits=general_text: passage .* lies beyond the 200 rows"):
        inputs.check_general(base)
