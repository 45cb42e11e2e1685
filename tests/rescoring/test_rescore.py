"""Saved adapters are scored as they were when they were trained; what is wrong is said before a model is loaded."""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sweeper import tasks
from sweeper.errors import DataError, Problems, SpecError
from sweeper.record import PREDICTIONS, RECORD, read_record
from sweeper.reporting.console import make_console
from sweeper.rescoring import command, rescore
from sweeper.run import Run
from sweeper.spec import DatasetSpec, EvaluationSpec, Settings
from sweeper.tasks.baseline import majority
from sweeper.tasks.example import Example
from sweeper.training import train_runs
from sweeper.training.events import RunFinished
from sweeper.training.source import Fixed

CHAIN = DatasetSpec(
    name="chain_sum", family="chain_sum", train_examples=40, validation_examples=6, test_examples=8, max_length=64,
    template="plain",
)  # fmt: skip
WORDS = ("red", "blue", "yellow", "brownish")
TEST = EvaluationSpec(name="default", splits=("test", "general_text"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A study of two runs of different placement and rank, and its settings."""
    return study(tmp_path_factory.mktemp("rescore"), "float32")


def study(root: Path, precision: str) -> Settings:
    from sweeper.placement.placement import PLACEMENTS
    from sweeper.spec import run_spec, to_mapping

    settings = Settings(study="tiny", output_root=str(root), calibrate=False, device="cpu")
    sizes = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "vocab_size": 300,
    }  # fmt: skip
    requests = []
    for placement, rank in (("attn", 4), ("full", 2)):
        spec = run_spec(
            {
                "model": {"name": "tiny", "source": "random", "location": "llama", "config": sizes},
                "dataset": to_mapping(CHAIN),
                "method": {"name": "lora"},
                "placement": {"name": placement, "roles": list(PLACEMENTS[placement])},
                "allocation": {"name": "uniform"},
                "rank": rank,
                "optim": {"lr": 0.05},
                "trainer": {"max_steps": 3, "batch_size": 2, "precision": precision},
                "evaluation": to_mapping(TEST),
            }
        )
        requests.append(Run.of(spec, settings.folder))
    source = Fixed(requests)
    train_runs(source, settings)
    assert [e.record.status for e in source.events if isinstance(e, RunFinished)] == ["completed"] * 2
    return settings


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-3)])
def test_scores_are_those_of_the_record(precision: str, tolerance: float, tmp_path: Path) -> None:
    settings = study(tmp_path, precision)
    runs = rescore.find([settings.folder])
    found = list(rescore.rescore(runs, [], TEST, settings))
    assert len(found) == 4
    for one in found:
        scores = read_record(one.run.folder).scores[one.split]
        assert one.score.nll == pytest.approx(scores["after"].nll, rel=tolerance)
        assert one.base.nll == pytest.approx(scores["before"].nll, rel=tolerance)
        assert one.score.metrics == scores["after"].metrics
        assert abs(scores["after"].nll - scores["before"].nll) > 2e-2  # the adapters do something
    assert [one.majority for one in found if one.split == "general_text"] == [{}, {}]


def test_other_tasks_and_their_files(tiny: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    import dataclasses

    other = dataclasses.replace(CHAIN, name="longer", options={"max_terms": 4, "max_digits": 3})
    runs = rescore.find([tiny.folder])
    found = list(rescore.rescore(runs, [CHAIN, other], EvaluationSpec(name="e", splits=("test",)), tiny))
    assert [(one.dataset.name, one.score.examples) for one in found] == [("chain_sum", 8)] * 2 + [("longer", 8)] * 2
    for run in runs:
        plain = json.loads((run.folder / "evaluations" / "longer.json").read_text())
        assert plain["run_id"] == run.folder.name
        assert plain["splits"]["test"]["after"]["nll"] != plain["splits"]["test"]["before"]["nll"]
        assert plain["splits"]["test"]["majority"].keys() == {"exact_match"}
        rows = [
            json.loads(line) for line in (run.folder / "evaluations" / "longer-test.jsonl").read_text().splitlines()
        ]
        assert [row["moment"] for row in rows] == ["before"] * 8 + ["after"] * 8
    command.show(found, make_console())
    shown = capsys.readouterr().out
    assert shown.count("majority") == 2
    assert shown.count("base tiny") == 2
    assert all(f"{run.folder.name} {run.spec.placement.name} r{run.spec.rank}  " in shown for run in runs)
    assert shown.count("suite of chain_sum, longer") == 2


def test_predictions_name_the_units_of_their_task(tiny: Settings) -> None:
    """Of training and of scoring again alike; passages of the general text are units of their own."""
    expected = {e.id: e.group for e in tasks.load(CHAIN)["test"]}
    runs = rescore.find([tiny.folder])
    list(rescore.rescore(runs, [CHAIN], TEST, tiny))
    for run in runs:
        trained = lines(run.folder / PREDICTIONS)
        again = lines(run.folder / "evaluations" / "chain_sum-test.jsonl")
        assert {row["id"]: row["group"] for row in trained if row["split"] == "test"} == expected
        assert {row["id"]: row["group"] for row in again} == expected
        general = [row for row in trained if row["split"] == "general_text"]
        assert general
        assert not any("group" in row for row in general)
        data = read_record(run.folder).data
        assert data["test"]["groups"] == len(set(expected.values()))
        assert data["train"]["groups"] == len({e.group for e in tasks.load(CHAIN)["train"]})


def test_a_run_trained_without_texts_is_scored_again_without_texts(tiny: Settings, tmp_path: Path) -> None:
    run = rescore.find([tiny.folder])[0]
    private = tmp_path / "private" / run.folder.name
    shutil.copytree(run.folder, private)
    plain = json.loads((private / RECORD).read_text())
    del plain["seal"]
    plain["data"]["test"]["texts"] = None
    (private / RECORD).write_text(json.dumps(plain))
    list(rescore.rescore(rescore.find([private]), [CHAIN], TEST, tiny))
    hidden, shown = (
        lines(folder / "evaluations" / "chain_sum-test.jsonl") for folder in (private, run.folder)
    )  # fmt: skip
    combined, task = private.parent / "combined", private / "tasks" / "one"
    assert not any(map(rescore.keeps_texts, (private, combined, task)))
    assert all(map(rescore.keeps_texts, (run.folder, run.folder.parent / "combined")))
    groups = {row["group"] for row in shown}
    assert [row["id"] for row in hidden] == [row["id"] for row in shown]
    assert {row["group"] for row in hidden} == {hashlib.sha256(group.encode()).hexdigest()[:12] for group in groups}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_label_has_what_tells_a_run_from_the_others(tiny: Settings) -> None:
    run = rescore.find([tiny.folder])[0]
    spec = run.spec
    other = replace(spec, method=replace(spec.method, name="dora"), optim=replace(spec.optim, lr=0.1), seed=3)
    mixed = replace(run, folder=tiny.folder / "mixed", combined="add of 2")
    found = rescore.labels([run, replace(run, folder=tiny.folder / "b", spec=other), mixed])
    place = f"{spec.placement.name} r{spec.rank}"
    assert found[tiny.folder / "b"] == f"b {place} method=dora lr=0.1 seed=3"
    assert found[run.folder] == f"{run.folder.name} {place} method=lora lr=0.05 seed=0"
    assert found[tiny.folder / "mixed"] == "mixed add of 2"


def test_a_damaged_adapter_is_named(tiny: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(rescore.find([tiny.folder])[0].folder, folder)
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(DataError, match=r"damaged/adapter/adapter_model.safetensors: cannot be read: "):
        list(rescore.rescore(rescore.find([folder]), [], TEST, tiny))


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing: no completed run with an adapter in it; give outputs/STUDY"):
        rescore.find([tmp_path / "nothing"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "record.json").write_text("{}")
    with pytest.raises(DataError, match="no completed run"):
        rescore.find([tmp_path / "run"])


def test_texts_longer_than_a_models_learned_positions_are_refused(tiny: Settings) -> None:
    run = rescore.find([tiny.folder])[0]
    config = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 32, "vocab_size": 300}
    learned = replace(run.spec, model=replace(run.spec.model, name="tiny_gpt2", location="gpt2", config=config))
    with pytest.raises(Problems, match=r"dataset.max_length=64: model=tiny_gpt2 has learned 32 positions"):
        rescore.check([run, replace(run, spec=learned)], [CHAIN], TEST)
    rescore.check([run], [CHAIN], TEST)


def test_everything_wrong_is_said_at_once(tiny: Settings) -> None:
    runs = rescore.find([tiny.folder])
    bad = DatasetSpec(name="x", family="nowhere")
    with pytest.raises(Problems) as caught:
        rescore.check(runs, [bad], EvaluationSpec(name="e", splits=("tset",)))
    assert [line.split(":")[0] for line in caught.value.lines] == ["dataset.family=nowhere", "evaluation.splits=tset"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            ["folder", "rank=4"],
            SpecError,
            r"rank: evaluate takes overrides of dataset, evaluation, trainer.device, sweep.keep_texts only",
        ),
        (["folder", "dataset.test_examples=5"], SpecError, r"dataset.FIELD=... needs dataset=NAME"),
        (["dataset=chain_sum"], SpecError, r"no folder of runs given"),
        (["folder", "dataset=chainsum"], Problems, r"dataset=chainsum: no such dataset. .* Did you mean chain_sum\?"),
    ],
)
def test_a_wrong_command_says_what_is_right(
    arguments: list[str], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    monkeypatch.setattr("sys.argv", [str(root / "evaluate.py")])
    with pytest.raises(error, match=message):
        command.main(arguments)


def test_the_command_scores_and_prints(
    tiny: Settings, monkeypatch: pytest.MonkeyPatch, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", [str(root / "evaluate.py")])
    options = ["dataset=chain_sum,icd10_chapter", "dataset.test_examples=21", "trainer.device=cpu"]
    command.main([str(tiny.folder), *options])
    shown = capsys.readouterr().out
    assert "2 saved runs to score" in shown
    assert "icd10_chapter, test: 21 examples" in shown
    command.main(["--help"])
    assert "evaluate.py FOLDER" in capsys.readouterr().out


def test_the_majority_baseline_by_hand(make_example: Callable[..., Example]) -> None:
    splits = {
        "train": [make_example("yes")] * 3 + [make_example("no")] * 2,
        "test": [make_example("yes"), make_example("no"), make_example("no"), make_example("no", ("no", "never"))],
    }
    found = majority(splits, "test", ("exact_match", "choice_accuracy", "macro_f1", "pass_at_1"))
    assert found["exact_match"] == 0.25
    assert found["choice_accuracy"] == (1 + 0 + 0 + 0.5) / 4
    assert found["macro_f1"] == pytest.approx((2 / 5 + 0) / 2)
    assert "pass_at_1" not in found
    assert majority({"train": (), "test": splits["test"]}, "test", ("exact_match",)) == {}


@pytest.fixture
def make_example() -> Callable[..., Example]:
    return lambda response, choices=("yes", "no"): Example("i", "p", response, "g", choices=choices)


def test_lm_eval_agrees_with_us(tiny: Settings, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """acc_norm of the adapters, loaded by stock PEFT, is our choice_accuracy; and generation compares alike."""
    pytest.importorskip("lm_eval")
    path = tmp_path / "choices.jsonl"
    made = [{"prompt": f"Question {i}:", "response": WORDS[i % 4], "group": f"{i}"} for i in range(300)]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    choices = DatasetSpec(
        name="choices", family="hub", path=str(tmp_path), train_examples=5, test_examples=30, template="plain",
        metrics=("choice_accuracy",), max_length=64,
        options={
            "prompt": "{prompt}", "response": "{response}", "splits": {"train": "train"},
            "choices": list(WORDS),
        },
    )  # fmt: skip
    runs = rescore.find([tiny.folder])
    ours = list(rescore.rescore(runs, [choices], EvaluationSpec(name="e", splits=("test",)), tiny))
    by_them = EvaluationSpec(name="lm_eval", splits=("test",), options={"batch_size": 4})
    rescore.check(runs, [choices], by_them)
    theirs = list(rescore.harness(runs, [choices, CHAIN], by_them, tiny))
    for us, them in zip(ours, theirs, strict=True):
        assert us.run == them.run
        assert them.scores["choices"]["acc_norm"] == pytest.approx(us.score.metrics["choice_accuracy"])
        assert them.base["choices"]["acc_norm"] == pytest.approx(us.base.metrics["choice_accuracy"])
        assert them.scores["chain_sum"] == {"exact_match": 0.0}
        plain = json.loads((us.run.folder / "evaluations" / "lm_eval.json").read_text())
        assert plain["after"] == them.scores
    assert all(0 < us.base.metrics["choice_accuracy"] < 1 for us in ours)
    command.show_harness(theirs, make_console())
    assert capsys.readouterr().out.count("by lm-eval") == 2


@pytest.mark.parametrize("first", [0, 1, 2])
def test_lm_eval_gets_the_text_of_each_document_that_we_would_score(first: int) -> None:
    """Whichever comes first: what opens a choice depends on the end of its own prompt."""
    api = pytest.importorskip("lm_eval.api.task")
    from sweeper.rescoring import lm_harness

    words = ("yes", "perhaps")
    made = [("Really?", words), ("Really?\nAnswer:\n", words), ("Really?", (" yes", " perhaps"))]
    examples = [Example(f"{i}", prompt, own[1], "g", choices=own) for i, (prompt, own) in enumerate(made)]
    spec = replace(CHAIN, metrics=("choice_accuracy",))
    task = api.ConfigurableTask(
        config=dict(lm_harness.as_task(spec, [*examples[first:], *examples[:first]], None))  # type: ignore[arg-type]
    )
    task.build_all_requests(rank=0, world_size=1)
    texts = {"".join(request.args) for request in task.instances}
    assert texts == {f"Really?{between}{word}" for between in (" ", "\nAnswer:\n") for word in words}
    # per character the longer is the likelier, and a space that was put before it is none of its own
    doc = next(doc for doc in task.task_docs if doc["choices"] == list(words))
    assert task.process_results(doc, [(-3.4, False), (-7.1, False)])["acc_norm"] == 1


def test_a_dataset_that_many_runs_share_is_checked_once(tiny: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, checked = rescore.find([tiny.folder]), list[DatasetSpec]()
    monkeypatch.setattr("sweeper.tasks.check", lambda dataset, **_: checked.append(dataset))
    rescore.check(runs, [run.spec.dataset for run in runs], TEST)
    assert checked == [CHAIN]


def test_scores_of_lm_eval_stay_when_other_tasks_are_asked_for(
    tiny: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from sweeper.rescoring import lm_harness

    monkeypatch.setattr(lm_harness, "as_task", lambda *_: "ours")
    runs = [replace(rescore.find([tiny.folder])[0], folder=tmp_path)]
    monkeypatch.setattr(rescore, "adapted_model", lambda base, run: base.model)
    for name, value in (("one", 0.1), ("two", 0.2), ("one", 0.3)):
        scores = {name: {"acc": value}}
        monkeypatch.setattr(lm_harness, "score", lambda *_, scores=scores: scores)
        list(rescore.harness(runs, [], EvaluationSpec(name="lm_eval", splits=("test",)), tiny))
    plain = json.loads((tmp_path / "evaluations" / "lm_eval.json").read_text())
    assert plain["before"] == plain["after"] == {"one": {"acc": 0.3}, "two": {"acc": 0.2}}


def test_the_limit_is_for_tasks_of_lm_eval_alone(
    tiny: Settings, monkeypatch: pytest.MonkeyPatch, make_example: Callable[..., Example]
) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    from sweeper import models
    from sweeper.rescoring import lm_harness

    limits: dict[str, int | None] = {}

    def evaluate(tasks: Sequence[Any], limit: int | None, **_: Any) -> dict[str, Any]:
        limits.update({task if isinstance(task, str) else "ours": limit for task in tasks})
        return {"results": {}}

    monkeypatch.setattr(lm_eval, "simple_evaluate", evaluate)
    # the real one reads the files of all tasks, for ten seconds
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **_: SimpleNamespace(all_tasks=["wikitext"]))
    (run, _) = rescore.find([tiny.folder])
    base = models.load(run.spec.model, dtype=torch.float32, device=torch.device("cpu"))
    task = lm_harness.as_task(CHAIN, [make_example("yes")], base.tokenizer)
    lm_harness.score(base.model, base.tokenizer, [task, "wikitext"], {"limit": 2})
    assert limits == {"ours": None, "wikitext": 2}


def test_lm_eval_is_for_saved_adapters_and_not_for_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    from sweeper import tasks
    from sweeper.rescoring import lm_harness

    by_them = EvaluationSpec(name="lm_eval", splits=("test",), options={"tsks": []})
    with pytest.raises(SpecError, match=r"scores saved adapters: .* evaluate.py outputs/STUDY dataset=chain_sum"):
        tasks.check_evaluation(CHAIN, by_them)
    with pytest.raises(SpecError, match=r"evaluation.options=tsks: .* Did you mean tasks\?"):
        lm_harness.check(by_them)
    program = DatasetSpec(name="p", family="human_eval", metrics=("pass_at_1",), max_new_tokens=9)
    with pytest.raises(SpecError, match="evaluation=default does that in a sandbox"):
        lm_harness.as_task(program, [], None)  # type: ignore[arg-type]
    monkeypatch.setattr(lm_harness, "is_installed", lambda name: False)
    with pytest.raises(SpecError, match=r"needs the Python package lm-eval: make lm-eval$"):
        lm_harness.check(EvaluationSpec(name="lm_eval"))
