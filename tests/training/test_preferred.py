"""Runs on preferences from their data to their records: what they are judged by, what they share, what is refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sweeper import objectives
from sweeper.arms import single
from sweeper.errors import SpecError
from sweeper.record import Score, read_record
from sweeper.spec import DatasetSpec, ObjectiveSpec
from sweeper.study import search_check
from sweeper.study.search_settings import SearchSettings
from sweeper.training import preferred, reference
from sweeper.training.pack import Pack
from sweeper.training.pack_config import PackConfig
from tests.training.plain import Plain
from tests.training.test_preferences import labelled, pairs

NAMES = ("preference_accuracy", "preference_margin", "kl")


@pytest.fixture
def closed(parity: dict[str, Any]) -> dict[str, Any]:
    """Numbers that are even or odd, each with both answers to choose among, as pairs."""
    path = Path(parity["path"])
    rows = [json.loads(line) | {"choices": ["0", "1"]} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return parity | {"metrics": ["choice_accuracy"], "options": {"preferences": "wrong_choice"}}


def test_all_objectives_train_in_one_pack_and_are_scored_alike(
    closed: dict[str, Any], make_run: Any, run_all: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    measure = reference.measure

    def counted(base: Any, rows: Any) -> list[float]:
        asked.append(len(rows))
        return measure(base, rows)

    monkeypatch.setattr(reference, "measure", counted)
    chosen = ("nll", "dpo", "ipo", "kto", "simpo")
    specs = [
        make_run("full", dataset=closed, objective={"name": name}, trainer={"max_steps": 12}, optim={"lr": 2e-2})
        for name in chosen
    ]
    run_all(specs)
    assert asked == [100]  # both answers of 50 examples; those to other prompts, which KTO looks at, are the same two
    records = {name: read_record(tmp_path / "study" / spec.run_id) for name, spec in zip(chosen, specs, strict=True)}
    for name, record in records.items():
        assert record.status == "completed"
        assert record.efficiency.pack_runs == len(chosen)
        before, after = record.scores["test"]["before"], record.scores["test"]["after"]
        assert [before.metrics[one] for one in NAMES] == [0.5, 0, 0]
        assert after.metrics["kl"] > 0
        assert "choice_accuracy" in after.metrics
        # of two answers of a token the choice is the likelier one, and the margin is that of the log-ratio
        assert after.metrics["preference_margin"] != 0, name
    run_all([make_run("attn", dataset=closed, objective={"name": "dpo"})], study="another")
    assert asked == [100]  # kept on disk


@pytest.mark.parametrize("kind", ["pairs", "labels"])
def test_scores_are_those_of_the_stock_model(
    kind: str, load: Any, make_job: Any, make_adapter: Any, train: Any
) -> None:
    base = load("llama")
    examples = pairs(3) if kind == "pairs" else labelled(3)
    job = make_job("x", make_adapter(base, "full", 4), pairs(4), lr=3e-2)
    trained = train(base, [job])["x"].adapter
    twin = Plain(base, job, {name: parts[:2] for name, parts in trained.items()})
    begun = dataclasses.replace(job, weights={name: parts[:2] for name, parts in trained.items()})
    with Pack(base, [job.adapter.ranks] * 2, PackConfig(batch_size=4)) as pack:
        pack.add(begun)
        scored, bare = preferred.queue(pack, [0, -1], examples, budget=100)()
    assert bare.whole == {"preference_accuracy": 0.5, "preference_margin": 0.0, "kl": 0.0}

    def log_p(model: Any, ids: tuple[int, ...], start: int) -> torch.Tensor:
        with torch.no_grad():
            return torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1], -1)

    ratios, divergence, tokens = [], 0.0, 0
    for example in examples:
        prompt = example.input_ids[: example.prompt_length]
        own = []
        for ids in (example.input_ids, (*prompt, *example.rejected)) if kind == "pairs" else (example.input_ids,):
            run, reference = (log_p(model, ids, len(prompt)) for model in (twin.model, base.model))
            targets = torch.tensor(ids[len(prompt) :])[:, None]
            own.append(float((run - reference).gather(1, targets).sum()))
            if ids is example.input_ids and example.label is not False:
                divergence += float((run.exp() * (run - reference)).sum())
                tokens += len(targets)
        ratios.append(own)
    assert scored.whole["kl"] == pytest.approx(divergence / tokens, rel=1e-4)
    if kind == "pairs":
        margins = [a - b for a, b in ratios]
        assert scored.whole["preference_margin"] == pytest.approx(sum(margins) / len(margins), rel=1e-4, abs=1e-5)
        assert scored.whole["preference_accuracy"] == sum(m > 0 for m in margins) / len(margins)
        assert [scored.rows[e.id]["preference_margin"] for e in examples] == pytest.approx(margins, rel=1e-3, abs=1e-5)
    else:
        good, bad = ([r for (r,), e in zip(ratios, examples, strict=True) if e.label is kind] for kind in (True, False))
        gaps = [a - b for a in good for b in bad]
        assert scored.whole["preference_accuracy"] == sum(gap > 0 for gap in gaps) / len(gaps)
        assert scored.whole["preference_margin"] == pytest.approx(sum(gaps) / len(gaps), rel=1e-4)


def test_a_pair_on_which_a_run_trained_comes_to_be_preferred(
    closed: dict[str, Any], make_run: Any, run_all: Any, tmp_path: Path
) -> None:
    path = Path(closed["path"])
    rows = [json.loads(line) | {"response": "0"} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = make_run("full", dataset=closed, objective={"name": "dpo"}, trainer={"max_steps": 20}, optim={"lr": 1e-2})
    run_all([spec])
    after = read_record(tmp_path / "study" / spec.run_id).scores["validation"]["after"].metrics
    assert after["preference_accuracy"] > 0.8
    assert after["preference_margin"] > 1


def test_labelled_responses_train_and_bad_ones_have_no_likelihood(
    make_run: Any, run_all: Any, tmp_path: Path, parity: dict[str, Any]
) -> None:
    path = Path(parity["path"])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for n, row in enumerate(rows):
        row |= {"completion": row.pop("response"), "label": n % 3 > 0}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = make_run("ff", dataset=parity, objective={"name": "kto"})
    run_all([spec])
    record = read_record(tmp_path / "study" / spec.run_id)
    good = sum(row["label"] for row in rows if row["split"] == "test")
    assert record.scores["test"]["after"].examples == good
    assert set(NAMES) <= record.scores["test"]["after"].metrics.keys()


def test_patience_waits_for_what_the_objective_is_judged_by(make_job: Any, make_adapter: Any, load: Any) -> None:
    job = make_job("x", make_adapter(load("llama"), "attn", 2), pairs(0)).with_spec(objective=ObjectiveSpec(name="dpo"))

    def scored(nll: float, accuracy: float) -> Score:
        return Score(nll=nll, tokens=1, examples=1, metrics={"preference_accuracy": accuracy})

    assert job.judge(scored(1.0, 0.6))
    assert job.judge(scored(2.0, 0.7))
    assert not job.judge(scored(0.5, 0.7))
    plain = job.with_spec(objective=ObjectiveSpec())
    assert plain.judge(scored(1.0, 0.6))
    assert not plain.judge(scored(2.0, 0.7))


@pytest.mark.parametrize(
    ("name", "rows", "line"),
    [
        ("dpo", {"response": "x"}, "objective=dpo needs pairs (prompt, chosen and rejected; of a task with choices"),
        (
            "kto",
            {"response": "x"},
            "or labelled responses (prompt, completion and label), and dataset=file has one resp",
        ),
        ("nll", {"completion": "x", "label": True}, "objective=nll needs a response or pairs"),
        ("dpo", {"completion": "x", "label": True}, "and dataset=file has responses that are labelled good or bad"),
    ],
)
def test_data_that_cannot_serve_is_refused_in_one_line(
    name: str, rows: dict[str, Any], line: str, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"question {i}", **rows}) + "\n" for i in range(30)))
    dataset = DatasetSpec(name="file", family="file", path=str(path))
    with pytest.raises(SpecError) as caught:
        objectives.check_data(ObjectiveSpec(name=name), dataset)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_trials_are_judged_by_what_their_objective_is(make_spec: Any) -> None:
    from sweeper.arms import Dimension

    space = (Dimension(key="optim.lr", kind="float", low=1e-4, high=1e-2, log=True),)

    def arm(name: str) -> Any:
        return dataclasses.replace(single(make_spec(objective={"name": name})), space=space)

    asked = SearchSettings(objectives=())
    for names, wanted in ((("nll",), "nll"), (("dpo", "kto"), "preference_accuracy"), ((), "nll")):
        found = search_check.resolved(asked, [arm(name) for name in names])
        assert found.objectives == (f"validation.{wanted}",)
    assert search_check.resolved(SearchSettings(), [arm("dpo")]).objectives == ("validation.nll",)
    assert search_check.resolved(asked, [arm("dpo")]).directions == ("maximize",)
    with pytest.raises(SpecError, match=r"judged by different scores .nll by validation.nll, dpo by validation.pref"):
        search_check.resolved(asked, [arm("nll"), arm("dpo")])


def test_what_trains_alone_is_scored_as_what_packs(
    closed: dict[str, Any], make_run: Any, run_all: Any, tmp_path: Path
) -> None:
    """Full fine-tuning has a model to itself, so the base is another pass."""
    method = {"name": "full_ft", "options": {"modules": "all", "save": False}}
    spec = make_run("full", dataset=closed, objective={"name": "dpo"}, method=method, optim={"lr": 1e-3})
    run_all([spec])
    record = read_record(tmp_path / "study" / spec.run_id)
    assert record.status == "completed"
    after = record.scores["test"]["after"].metrics
    assert after["kl"] > 0
    assert after["preference_margin"] != 0


def test_tasks_of_preferences_are_a_mixture(
    closed: dict[str, Any], make_run: Any, run_all: Any, tmp_path: Path
) -> None:
    other = Path(closed["path"]).with_name("other.jsonl")
    other.write_text(Path(closed["path"]).read_text().replace(" is", " was"))
    parts = [closed, closed | {"name": "other", "path": str(other)}]
    mixture = {"name": "mixture", "family": "mixture", "parts": parts, "options": {"sampling": "equal"}}
    specs = [
        make_run("attn", dataset=mixture, objective={"name": name}, trainer={"batch_size": 4})
        for name in ("nll", "dpo")
    ]
    run_all(specs)
    for spec in specs:
        record = read_record(tmp_path / "study" / spec.run_id)
        assert record.efficiency.pack_runs == 2
        parted = [record.scores[f"test/{name}"]["after"].metrics for name in ("parity", "other")]
        for name in NAMES:
            mean = sum(part[name] for part in parted) / 2
            assert record.scores["test"]["after"].metrics[name] == pytest.approx(mean)
