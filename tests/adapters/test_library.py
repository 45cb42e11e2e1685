"""A library that was trained, routed and scored by the command; what is wrong is said before a model is loaded."""

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sweeper import models
from sweeper.adapters import command
from sweeper.adapters.library import centroid, members, saving, scoring
from sweeper.adapters.library.asked import FREE, RULES, Asked, parse
from sweeper.adapters.library.bench import Bench, ByExample
from sweeper.errors import Problems, SpecError, SweeperError
from sweeper.models import BaseModel
from sweeper.record import read_json, read_record
from sweeper.rescoring import rescore
from sweeper.rescoring.rescore import Saved
from sweeper.spec import DatasetSpec, RunSpec, from_mapping
from tests.adapters import trained

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*Already found a `peft_config`")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of two tasks, trained apart."""
    root = tmp_path_factory.mktemp("library")
    folder = trained.train(root, {"fruit": {}, "metal": {}})
    trained.dataset(root, "mixed")
    return folder


@pytest.fixture(scope="module")
def own(study: Path) -> BaseModel:
    spec = rescore.find([study])[0].spec
    return models.load(spec.model, dtype=torch.float32, device=torch.device("cpu"))


def runs_of(study: Path) -> list[Saved]:
    """Of fruit, then of metal."""
    return sorted(rescore.find([study]), key=lambda run: run.spec.dataset.name)


def mixed(study: Path) -> list[str]:
    plain = trained.dataset(study.parent, "mixed")
    fields = {key: value for key, value in plain.items() if key not in ("family", "metrics")}
    return [
        "dataset=jsonl", *(f"dataset.{key}={value}" for key, value in fields.items()),
        "dataset.metrics=[exact_match,choice_accuracy]",
    ]  # fmt: skip


def test_what_rules_are_compared_with_is_what_the_runs_recorded(study: Path, own: BaseModel) -> None:
    runs = runs_of(study)
    with Bench(own, runs) as bench:
        asked = Asked(rules=("uniform",))
        found = [
            one for task in members.trained_on(runs) for one, _ in scoring.compare(bench, task, asked, generation=True)
        ]
    by = {(one.task, one.rule): one for one in found}
    for run in runs:
        name, record = run.spec.dataset.name, read_record(run.folder).scores["test"]
        assert by[name, "base"].score.nll == pytest.approx(record["before"].nll, rel=1e-5)
        assert by[name, "own"].score.nll == pytest.approx(record["after"].nll, rel=1e-5)
        assert by[name, "own"].score.metrics == record["after"].metrics
        assert by[name, "own"].facts == {"member": run.folder.name}
        assert by[name, "base"].score.nll > by[name, "uniform"].score.nll > by[name, "own"].score.nll
        assert all(by[name, rule].right is None for rule in ("base", "own", "best_member", "uniform"))
        assert len(by[name, "own"].rows) == 16


def test_centroids_send_prompts_to_the_member_that_knows_them(study: Path, own: BaseModel) -> None:
    runs = runs_of(study)
    with Bench(own, runs) as bench:
        asked = Asked(rules=("centroid",))
        found = {
            (one.task, one.rule): one
            for task in members.trained_on(runs)
            for one, _ in scoring.compare(bench, task, asked, generation=False)
        }
        task = bench.task(runs[0].spec.dataset)
        made = centroid.centroid(bench, Asked(), task)
        assert isinstance(made.router, ByExample)
        # whatever the members, each example's score is that of the one it went to
        half = ByExample(
            {e.id: i % 2 for i, e in enumerate(task.splits["test"].examples)}, [bench.alone(0), bench.alone(1)]
        )
        joint = bench.evaluate(half, task.splits["test"].examples, task.dataset, generation=False)
        apart = [
            bench.evaluate(bench.alone(k), task.splits["test"].examples, task.dataset, generation=False)
            for k in (0, 1)
        ]  # fmt: skip
    for name in ("fruit", "metal"):
        assert found[name, "centroid"].right == 1.0
        assert found[name, "centroid"].score.nll == pytest.approx(found[name, "own"].score.nll, rel=1e-6)
    for i, row in enumerate(joint.rows):
        assert row["nll"] == pytest.approx(apart[i % 2].rows[i]["nll"], rel=1e-5)
        assert row["choice"] == apart[i % 2].rows[i]["choice"]
    assert joint.score.nll == pytest.approx(sum(row["nll"] for row in joint.rows) / joint.score.tokens)


def test_route_scores_a_task_that_no_member_knows(
    study: Path, own: BaseModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["route", str(study), f"rules={','.join(RULES)}", "examples=6", "steps=20", "lr=0.01", "budget=30"]
    out, save = tmp_path / "found", tmp_path / "kept"
    command.main([*words, "--device", "cpu", "--out", str(out), "--save", str(save), *mixed(study)])
    shown = capsys.readouterr().out
    (file,) = out.glob("*.json")
    plain = read_json(file.read_text())
    results = {one["rule"]: one for one in plain["results"]}
    assert list(results) == ["base", "best_member", *RULES]  # no member was trained on it
    assert all(rule in shown for rule in results)
    assert all(one["right"] is None and one["cost"] > 0 for one in results.values())
    assert results["lorahub"]["facts"]["form"] == "product of sums"
    assert len(results["lorahub"]["facts"]["examples"]) == 6
    assert results["mole"]["facts"]["nll"] < results["mole"]["facts"]["nll_at_start"]
    assert {tuple(one["trained_on"]) for one in plain["members"]} == {("fruit",), ("metal",)}
    rows = [json.loads(line) for line in file.with_suffix(".jsonl").read_text().splitlines()]
    assert {row["rule"] for row in rows} == set(results)
    for rule, one in results.items():
        mine = [row for row in rows if row["rule"] == rule]
        assert sum(row["nll"] for row in mine) / sum(row["tokens"] for row in mine) == pytest.approx(
            one["score"]["nll"], rel=1e-6
        )
    _check_saved_adapter(own, save / "lorahub-mixed", results["lorahub"]["score"]["nll"], study)
    _check_readme(own, save / "arrow", runs_of(study))
    command.main([*words, *mixed(study), "steps=21", "--device", "cpu", "--out", str(out)])
    assert len(list(out.glob("*.json"))) == 2  # another comparison beside it


def _check_saved_adapter(own: BaseModel, folder: Path, nll: float, study: Path) -> None:
    """It is an ordinary LoRA of the members' rank that stock PEFT loads, with the scores it was found to have."""
    from peft import PeftModel

    (run,) = rescore.find([folder])
    assert set(run.ranks.values()) == {4}
    model = PeftModel.from_pretrained(copy.deepcopy(own.model), str(folder / "adapter")).eval()
    task: Any = from_mapping(DatasetSpec, trained.dataset(study.parent, "mixed"))
    total = tokens = 0.0
    with Bench(own, runs_of(study)) as bench:
        for example in bench.task(task).splits["test"].examples:
            ids = torch.tensor([example.input_ids])
            with torch.no_grad():
                found = model(input_ids=ids).logits[0].log_softmax(-1)
            for t in range(example.prompt_length, ids.shape[1]):
                total, tokens = total - float(found[t - 1, ids[0, t]]), tokens + 1
    assert total / tokens == pytest.approx(nll, rel=1e-5)


def _check_readme(own: BaseModel, folder: Path, runs: list[Saved]) -> None:
    """What it shows runs as it stands, and names every member."""
    text = (folder / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    scope: dict[str, Any] = {"base_model": copy.deepcopy(own.model)}
    exec(code, scope)
    assert scope["model"].active_adapter == "arrow_router"
    assert all(str(run.adapter) in text for run in runs)


def test_members_are_chosen_by_field_and_task(saved: Callable[..., Saved]) -> None:
    runs = [saved("a"), saved("b", seed=1), saved("c", rank=8), saved("d", placement="full", seed=1)]
    study = runs[0].folder.parent
    assert [run.folder.name for run in members.choose([study], {})] == ["a", "b", "c", "d"]
    assert [run.folder.name for run in members.choose([study], {"rank": ["4"]})] == ["a", "b", "d"]
    assert [run.folder.name for run in members.choose([study], {"placement": ["attn"], "seed": ["1", "0"]})] == [
        "a", "b", "c",
    ]  # fmt: skip
    assert len(members.choose([study], {"trained_on": ["chain_sum", "other"]})) == 4
    assert [run.folder.name for run in members.choose([study], {}, but=[runs[1].folder])] == ["a", "c", "d"]
    with pytest.raises(SpecError, match=r"rnk=4: no such field\. Choose from .*rank.*Did you mean rank\?"):
        members.choose([study], {"rnk": ["4"]})
    with pytest.raises(SpecError, match=r"two members or more, and rank=8 leaves 1; there are a \(chain_sum\), b"):
        members.choose([study], {"rank": ["8"]})


def test_a_task_of_a_run_is_a_member_and_a_mixture_knows_all_of_its_tasks(saved: Callable[..., Saved]) -> None:
    run = saved("a")
    task, other = (dataclasses.replace(run.spec.dataset, name=name) for name in ("one", "two"))
    joint = dataclasses.replace(run.spec.dataset, name="mixture", family="mixture", parts=(task, other))
    spec = dataclasses.replace(run.spec, dataset=task)
    part = dataclasses.replace(run, folder=Path("s/RUN/tasks/one"), spec=spec, combined="per_task RUN")
    both = dataclasses.replace(run, spec=dataclasses.replace(run.spec, dataset=joint))
    sums = dataclasses.replace(run, folder=Path("s/mix"), combined="add of 2")  # which names its first part's task
    runs = [part, both, sums, run]
    assert [members.name(one) for one in runs] == ["RUN/one", "a", "mix", "a"]
    assert members.own(runs, task) == [0, 1]
    assert members.own(runs, other) == [1]
    assert [one.name for one in members.trained_on(runs)] == ["one", "two", "chain_sum"]
    assert members.own(runs, dataclasses.replace(task, train_examples=5)) == [0, 1]
    assert members.own(runs, dataclasses.replace(task, path="elsewhere")) == []
    assert saving.folder_of([part]) == Path("s/library")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["rules=arow"], r"rules=arow: no such rules\. Choose from arrow, centroid, lorahub.*Did you mean arrow\?"),
        (["rules="], "rules= names none. Choose from uniform, centroid, arrow, lorahub, mole"),
        (["top_k=3"], "top_k must be at most 2, the number of members, got 3"),
        (["top_k=two"], "top_k must be a whole number, got two"),
        (["--seed", "-1"], r"--seed must be at least 0 and below 2\^32, got -1"),
        (["temperature=0"], "temperature must be above 0, got 0.0"),
        (["examples=0"], "examples must be at least 1, got 0"),
        (["alpha=-1"], "alpha must be at least 0, got -1.0"),
        (["gates=block"], "gates=block: no such gates. Choose from layer, module"),
        (["rules=uniform", "general=x"], "general=x is for rules=arrow, got rules=uniform"),
        (["placment=attn"], "placment=attn: no such field.*Did you mean placement.*what is asked: rules, examples"),
        (["evaluation.splits=[validation]"], "evaluation.splits: route scores the test split; of the evaluation it"),
        (["dataset=hpo_trm"], r"dataset=hpo_trm: no such dataset\. .*Did you mean hpo_term\?"),
    ],
)
def test_what_is_typed_wrong_is_one_line(saved: Callable[..., Saved], words: list[str], line: str) -> None:
    runs = [saved("a"), saved("b", seed=1)]
    with pytest.raises(SweeperError, match=line) as raised:
        command.main(["route", str(runs[0].folder.parent), *words, "--device", "cpu"])
    assert len(raised.value.lines) == 1


def test_what_cannot_be_a_member_is_one_line(saved: Callable[..., Saved], by_peft: Callable[..., Saved]) -> None:
    from peft import VeraConfig

    first, head = saved("a"), saved("head", placement="custom", roles=["attn_q"], head=True)
    other, vera = saved("gpt", "gpt2"), by_peft("vera", VeraConfig, r=4)
    bare = saved("bare", seed=3)
    for run, line in (
        (other, "route: a is an adapter of tiny_llama and gpt of tiny_gpt2: adapters of one base model can be members"),
        (vera, "route: vera is VERA, and only plain LoRA updates can be members of a library"),
        (head, "route: head adapts lm_head, and a library routes modules inside the layers alone: placement=attn"),
    ):
        with pytest.raises(SpecError, match=line):
            members.check([first, run])
    spec = dataclasses.replace(first.spec, method=dataclasses.replace(first.spec.method, name="qlora"))
    with pytest.raises(
        SpecError, match=r"bare was trained on a quantised base \(method=qlora\), a was not: select one"
    ):
        members.check([first, dataclasses.replace(bare, spec=spec)])
    shutil.rmtree(bare.adapter)
    with pytest.raises(SpecError, match=r"bare left no adapter \(method=lora\): members are runs of LoRA, such as"):
        members.check([first, bare])


def test_problems_are_said_together(saved: Callable[..., Saved], base: Callable[[RunSpec], BaseModel]) -> None:
    runs = [saved("a"), saved("b", seed=1)]
    task = runs[0].spec.dataset
    with pytest.raises(Problems) as raised:
        scoring.check(runs, [task, task], parse({"top_k": "5"}), runs[0].spec.evaluation)
    assert raised.value.lines == (
        "top_k must be at most 2, the number of members, got 5",
        "dataset=chain_sum is there twice: score one of the two",
    )  # fmt: skip


def test_help_names_the_rules(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["route", "--help"])
    shown = capsys.readouterr().out
    assert all(rule in shown for rule in RULES)
    assert f"(default: {','.join(FREE)})" in shown
