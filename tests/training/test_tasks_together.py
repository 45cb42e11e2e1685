"""Runs of several tasks from spec to record: scores and adapters by task, stages of a sequence, resuming, bad input."""

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn import functional

import sweeper
from sweeper import config
from sweeper.adapters import command
from sweeper.errors import DataError, Problems, SpecError, SweeperError
from sweeper.record import Record, read_record
from sweeper.spec import DatasetSpec, RunSpec, Settings, SharingSpec
from sweeper.study import plan
from sweeper.tasks import encode
from sweeper.tasks.mixture import Mixing
from sweeper.training.mixing import Mixture

MakeTogether = Callable[..., RunSpec]


@pytest.fixture
def together(make_run: Callable[..., RunSpec], two_tasks: tuple[DatasetSpec, ...]) -> MakeTogether:
    """A run of two tasks: whether numbers are odd, and their last digit."""

    def make(
        sharing: str = "single", placement: str = "attn", *, family: str = "mixture",
        options: dict[str, Any] | None = None, share: dict[str, Any] | None = None, **changes: Any,
    ) -> RunSpec:  # fmt: skip
        spec = make_run(placement, **({"rank": 8, "trainer": {"batch_size": 4, "max_steps": 6}} | changes))
        dataset = DatasetSpec(name=family, family=family, parts=two_tasks, options=options or {})
        return dataclasses.replace(spec, dataset=dataset, sharing=SharingSpec(name=sharing, **(share or {})))

    return make


def recorded(tmp_path: Path, spec: RunSpec, study: str = "study") -> Record:
    return read_record(tmp_path / study / spec.run_id)


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_scores_predictions_and_sizes_are_by_task(together: MakeTogether, run_all: Any, tmp_path: Path) -> None:
    spec = together("shared", options={"sampling": "equal"}, evaluation={"every_steps": 3})
    run_all([spec])
    found = recorded(tmp_path, spec)
    assert set(found.scores) == {f"{s}{t}" for s in ("validation", "test") for t in ("", "/parity", "/digit")}
    after = {name: phases["after"] for name, phases in found.scores.items()}
    before = {name: phases["before"] for name, phases in found.scores.items()}
    own = [after["test/parity"].nll, after["test/digit"].nll]
    assert after["test"].nll == pytest.approx(sum(own) / 2)
    assert after["test"].metrics["worst_nll"] == max(own)
    gains = [before[f"test/{task}"].nll - after[f"test/{task}"].nll for task in ("parity", "digit")]
    assert after["test"].metrics["mean_gain"] == pytest.approx(sum(gains) / 2)
    assert after["test"].metrics["worst_gain"] == pytest.approx(min(gains))
    assert after["test"].examples == after["test/parity"].examples + after["test/digit"].examples
    folder = tmp_path / "study" / spec.run_id
    rows = lines(folder, "predictions.jsonl")
    assert {row["split"] for row in rows} == {f"{s}/{t}" for s in ("validation", "test") for t in ("parity", "digit")}
    assert all(("group" in row) == row["split"].endswith("digit") for row in rows)
    assert {row["split"] for row in lines(folder) if row.get("moment") == "3"} == {
        "validation", "validation/parity", "validation/digit"
    }  # fmt: skip
    sizes = {name: facts["examples"] for name, facts in found.data.items()}
    assert sizes["train"] == sizes["train/parity"] + sizes["train/digit"] == 80
    assert found.data["test"]["groups"] == found.data["test/parity"]["groups"] + found.data["test/digit"]["groups"]
    assert found.data["test/parity"]["majority"]
    assert [found.data[f"train/{task}"]["seen"] for task in ("parity", "digit")] == [12, 12]


def test_general_text_is_scored_through_each_tasks_blocks_whoever_shares_the_pack(
    together: MakeTogether, run_all: Any, tmp_path: Path
) -> None:
    splits = {"splits": ["validation", "test", "general_text"]}
    single, apart = (together(name, optim={"lr": 3e-2}, evaluation=splits) for name in ("single", "per_task"))
    run_all([single], "alone")
    run_all([single, apart], "packed")
    names = {"general_text", "general_text/parity", "general_text/digit"}
    for study, spec in (("alone", single), ("packed", single), ("packed", apart)):
        assert names <= set(recorded(tmp_path, spec, study).scores)
    alone, packed = (recorded(tmp_path, single, study).scores for study in ("alone", "packed"))
    own = recorded(tmp_path, apart, "packed").scores
    for name in names:
        assert packed[name]["after"].nll == pytest.approx(alone[name]["after"].nll, rel=1e-5)
    assert alone["general_text/parity"]["after"].nll == alone["general_text/digit"]["after"].nll
    assert own["general_text/parity"]["after"].nll != own["general_text/digit"]["after"].nll


def test_a_run_that_is_not_scored_on_test_is_not_scored_there_otherwise(
    together: MakeTogether, run_all: Any, tmp_path: Path
) -> None:
    spec = together("per_task", evaluation={"splits": ["validation"]})
    run_all([spec])
    found = recorded(tmp_path, spec)
    assert set(found.scores) == {"validation", "validation/parity", "validation/digit"}
    assert not {"through", "routing"} & set(found.sharing)


def test_a_task_that_no_step_would_have_is_refused() -> None:
    sizes, mixing = {"large": 10_000, "small": 3}, Mixing()
    with pytest.raises(SpecError, match="small would have no example in 6 steps of 4; give more steps"):
        Mixture.of(mixing, sizes, steps=6, per_step=4)
    alike = dataclasses.replace(mixing, sampling="equal")
    assert Mixture.of(alike, sizes, steps=6, per_step=4).counts.sum(0).min() == 12


def test_a_trained_model_has_an_adapter_for_each_task(together: MakeTogether, run_all: Any, tmp_path: Path) -> None:
    spec = together("per_task")
    run_all([spec])
    (run,) = sweeper.load_study(tmp_path / "study").runs
    assert set(run.model(device="cpu").peft_config) == {"parity", "digit"}
    with pytest.raises(DataError, match=r"give the folder of one adapter, such as .*tasks/digit"):
        command.main(["merge", str(run.folder), "--out", str(tmp_path / "out")])


def test_what_blocks_cost_is_recorded(together: MakeTogether, run_all: Any, tmp_path: Path) -> None:
    specs = [together(name, options={"sampling": "equal"}) for name in ("single", "shared", "per_task")]
    run_all(specs)
    single, shared, apart = (recorded(tmp_path, spec) for spec in specs)
    one = single.trainable_parameters
    assert single.sharing == {}
    assert shared.trainable_parameters == 3 * one / 2
    assert apart.trainable_parameters == 2 * one
    for found in (shared, apart):
        assert found.sharing["active_parameters"] == {"parity": one, "digit": one}
        assert found.efficiency.train_flops == pytest.approx(single.efficiency.train_flops, rel=1e-2)
    assert [block["name"] for block in shared.sharing["blocks"]] == ["common", "parity", "digit"]
    assert [block["steps"] for block in shared.sharing["blocks"]] == [6, 6, 6]


def test_each_task_is_scored_through_the_others_blocks_and_where_it_is_not_named(
    together: MakeTogether, run_all: Any, tmp_path: Path
) -> None:
    spec = together("per_task", optim={"lr": 3e-2})
    run_all([spec])
    found = recorded(tmp_path, spec)
    through = found.sharing["through"]
    assert {task: set(own) for task, own in through.items()} == {"parity": {"digit"}, "digit": {"parity"}}
    pairs = (("parity", "digit"), ("digit", "parity"))
    own = {task: found.scores[f"test/{task}"]["after"].nll for task in through}
    assert all(abs(through[task][other] - own[task]) > 1e-4 for task, other in pairs)
    routing = found.sharing["routing"]
    assert routing["router"] == "nearest centroid"
    counts = {task: sum(row.values()) for task, row in routing["confusion"].items()}
    assert counts == {task: found.scores[f"test/{task}"]["after"].examples for task in own}
    right = sum(row.get(task, 0) for task, row in routing["confusion"].items())
    assert routing["accuracy"] == right / sum(counts.values()) > 0.8  # the prompts have words of their own
    for task, _ in pairs:
        if routing["confusion"][task] == {task: counts[task]}:
            assert routing["scores"][task]["nll"] == pytest.approx(own[task], rel=1e-6)


@pytest.mark.parametrize("sharing", ["shared", "per_task", "hierarchical", "stack"])
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_each_tasks_adapter_gives_its_scores_in_stock_peft(
    sharing: str, together: MakeTogether, run_all: Any, load: Any, tmp_path: Path
) -> None:
    share = {"tree": ("parity", ("digit",))} if sharing == "hierarchical" else {}
    family = "sequence" if sharing == "stack" else "mixture"
    spec = together(sharing, "full", share=share, family=family, optim={"lr": 3e-2}, rank=12 if share else 8)
    run_all([spec])
    found, base = recorded(tmp_path, spec), load("llama")
    names = [part.name for part in spec.dataset.parts]
    place = tmp_path / "study" / spec.run_id / "tasks"
    model = PeftModel.from_pretrained(copy.deepcopy(base.model), place / names[0] / "adapter", adapter_name=names[0])
    model.load_adapter(place / names[1] / "adapter", names[1])
    for part in spec.dataset.parts:
        model.set_adapter(part.name)
        examples = encode(part, base.tokenizer, model_key="", cache=None)["test"].examples
        total = count = 0.0
        for example in examples:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([example.input_ids])).logits[0]
            targets = torch.tensor(example.input_ids[example.prompt_length :])
            total += float(functional.cross_entropy(logits[example.prompt_length - 1 : -1], targets, reduction="sum"))
            count += len(targets)
        assert total / count == pytest.approx(found.scores[f"test/{part.name}"]["after"].nll, rel=1e-5)
        assert total / count < found.scores[f"test/{part.name}"]["before"].nll


def test_every_task_is_scored_when_one_is_over(together: MakeTogether, run_all: Any, tmp_path: Path) -> None:
    specs = [together("single", family="sequence"), together("per_task", family="sequence")]
    run_all(specs)
    for spec in specs:
        curve = lines(tmp_path / "study" / spec.run_id)
        between = [row["split"] for row in curve if row.get("moment") == "3"]
        assert sorted(between) == sorted(f"{s}{t}" for s in ("validation", "test") for t in ("", "/parity", "/digit"))
    # a task with ranks of its own forgets nothing, to the bit, while the next one is learnt
    scored = {row["moment"]: row["nll"] for row in curve if row.get("split") == "test/parity"}
    assert scored["3"] == scored["after"] < scored["before"]
    assert recorded(tmp_path, specs[1]).sharing["blocks"][1]["steps"] == 3


def test_a_sequence_goes_on_in_the_middle_of_a_task(together: MakeTogether, run_all: Any, tmp_path: Path) -> None:
    spec = together("stack", family="sequence", trainer={"max_steps": 8, "batch_size": 4})
    run_all([spec], "whole")
    run_all([spec], "cut", stop_after=5)
    assert not (tmp_path / "cut" / spec.run_id / "record.json").exists()
    run_all([spec], "cut")
    whole, cut = recorded(tmp_path, spec, "whole"), recorded(tmp_path, spec, "cut")
    for name, phases in whole.scores.items():
        assert cut.scores[name]["after"].nll == pytest.approx(phases["after"].nll, rel=1e-6)
    curves = [
        [(row["split"], row["moment"]) for row in lines(tmp_path / study / spec.run_id) if row.get("moment") == "4"]
        for study in ("whole", "cut")
    ]
    assert curves[0] == curves[1] != []


def test_the_order_of_a_sequence_and_the_sharing_are_in_the_id(together: MakeTogether) -> None:
    spec = together("single", family="sequence")
    turned = dataclasses.replace(spec, dataset=dataclasses.replace(spec.dataset, parts=spec.dataset.parts[::-1]))
    assert len({spec.run_id, turned.run_id, together("per_task", family="sequence").run_id}) == 3


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["dataset.parts=[icd10_chapter]"], "made of two tasks or more"),
        (["dataset.parts=[icd10_chapter,icd10_chapter]"], "icd10_chapter is there twice"),
        (["dataset.parts=[icd10_chapter,human_eval]"], "dataset=human_eval is for evaluation only"),
        (["dataset.options.sampling=even"], "dataset.options.sampling=even: no such dataset.options.sampling. Choose"),
        (["dataset.options.temperature=2"], "is for dataset.options.sampling=temperature"),
        (["dataset.options.sampling=temperature", "dataset.options.temperature=0"], "must be above 0"),
        (["sharing=hierarchical", "sharing.tree=[icd10_chapter]"], "licence_category is not in the tree"),
        (
            ["sharing=hierarchical", "sharing.tree=[icd10_chapter,[licence_category,icd10_chapter]]"],
            "in the tree twice",
        ),
        (["sharing=hierarchical", "sharing.tree=[icd10_chapter,licence]"], "Did you mean licence_category?"),
        (["sharing=stack"], "sharing=stack is for tasks one after another: dataset=sequence"),
        (["dataset=sequence", "sharing=stack", "dataset.options.replay=0.5"], "train those before again"),
        (["sharing=per_task", "+sharing.orthogonality=1"], "is for sharing=orthogonal and merge, not per_task"),
        (["dataset=sequence", "trainer.max_steps=1"], "has 2 tasks, which take a step each at least"),
        (["sharing=shared", "rank=1"], "leaves nothing for the block of"),
        (["sharing=shared", "sharing.levels=[4]"], "a rank for each of 2 levels"),
        (["sharing=per_task", "method=dora"], "method=dora has no rank blocks; lora, rslora"),
        (["sharing=per_task", "placement.head=true"], "placement.embeddings and placement.head cannot be"),
        (["sharing=per_task", "optim.norm_penalty=0.1"], "the penalties of optim are of a whole adapter"),
        (["sharing=shared", "sharing.private=ff", "placement=attn"], "placement=ff"),
        (["dataset.options.weights=learnt"], "Choose from size, tokens, uncertainty, uniform"),
        (["dataset.options.surgery=pc"], "Choose from none, pcgrad"),
        (["dataset.options.surgery=pcgrad", "method=full_ft"], "is for adapters; method=full_ft trains alone"),
        (["dataset.options.surgery=pcgrad", "sharing=per_task"], "sharing=per_task has no block that several tasks"),
        (["dataset.options.surgery=pcgrad", "optim.norm_penalty=0.1"], "the penalties of optim are of no task"),
        (["dataset=sequence", "dataset.options.surgery=pcgrad"], "has one task; give dataset.options.replay"),
        (["evaluation.conflict=-1"], "evaluation.conflict must be at least 0"),
        (["evaluation.conflict=4", "method=bitfit"], "looks at adapters; method=bitfit trains alone"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line_before_work_starts(
    overrides: list[str], line: str, composer: Any, tmp_path: Path
) -> None:
    given = ["model=tiny_llama", f"output_root={tmp_path}"]
    if "dataset=sequence" not in overrides:
        given.append("dataset=mixture")
    if not any(one.startswith("dataset.parts") for one in overrides):
        given.append("dataset.parts=[icd10_chapter,licence_category]")

    def planned() -> plan.Plan:
        found = config.expand([*given, *overrides], composer)
        return plan.make(found.arms, found.settings)

    with pytest.raises(SweeperError) as caught:
        planned()
    (said,) = caught.value.lines
    assert line in said
    assert "\n" not in said


def test_sharing_without_tasks_is_one_line(make_run: Any, tmp_path: Path) -> None:
    spec = make_run(sharing={"name": "per_task"})
    with pytest.raises(Problems, match="sharing=per_task needs several tasks: dataset=mixture"):
        plan.check([spec], Settings(study="x", output_root=str(tmp_path)))


def test_the_seed_may_draw_the_order_of_the_tasks(composer: Any) -> None:
    words = ["dataset=sequence", "dataset.parts=[icd10_chapter,hpo_term,chain_sum]", "seed=0,1,2"]
    found = config.expand([*words, "dataset.options.order=seed"], composer)
    (arm,) = found.arms
    orders = [tuple(part.name for part in spec.dataset.parts) for spec in arm.defaults]
    assert len(set(orders)) == 3
    assert {tuple(sorted(order)) for order in orders} == {("chain_sum", "hpo_term", "icd10_chapter")}
    other = ["dataset=sequence", "dataset.parts=[chain_sum,icd10_chapter,hpo_term]", *words[2:]]
    assert [spec.run_id for spec in config.expand([*other, "dataset.options.order=seed"], composer).specs] == [
        spec.run_id for spec in arm.defaults
    ]
    again = dataclasses.replace(arm.default, seed=2)
    assert again.run_id == arm.defaults[2].run_id
    assert arm.make({}, 2).run_id == again.run_id


def test_an_order_that_is_given_is_no_part_of_what_runs_were_before(composer: Any) -> None:
    words = ["dataset=sequence", "dataset.parts=[icd10_chapter,hpo_term]"]
    plain, said = (config.expand([*words, *more], composer).specs[0] for more in ([], ["dataset.options.order=given"]))
    assert plain.run_id == said.run_id
    assert "order" not in plain.dataset.options


def test_what_is_of_several_tasks_is_refused_of_one(make_run: Any, tmp_path: Path) -> None:
    settings = Settings(study="x", output_root=str(tmp_path))
    with pytest.raises(Problems, match="conflict=3 is between tasks: dataset=mixture"):
        plan.check([make_run(evaluation={"conflict": 3})], settings)
    with pytest.raises(Problems, match=r"no such dataset\.options\. Choose from"):
        plan.check([make_run(dataset={"options": {"surgery": "pcgrad"}})], settings)


def test_options_that_came_later_change_no_id(together: MakeTogether) -> None:
    spec = together(options={"weights": "uniform"})
    assert together(options={"weights": "uniform", "surgery": "none"}).run_id == spec.run_id
    assert together(options={"weights": "uniform"}, evaluation={"conflict": 0}).run_id == spec.run_id
    assert together(options={"weights": "uniform", "surgery": "pcgrad"}).run_id != spec.run_id
    assert together(options={"weights": "uniform"}, evaluation={"conflict": 1}).run_id != spec.run_id


def test_learnt_weights_surgery_and_conflict_from_spec_to_record_and_through_a_stop(
    together: MakeTogether, run_all: Any, tmp_path: Path
) -> None:
    learnt = together(
        options={"sampling": "equal", "weights": "uncertainty"}, evaluation={"conflict": 3}, optim={"lr": 3e-2},
        trainer={"max_steps": 8, "batch_size": 4},
    )  # fmt: skip
    cut = together(
        "shared", options={"sampling": "equal", "surgery": "pcgrad", "weights": "uncertainty"},
        evaluation={"conflict": 1},
        trainer={"max_steps": 8, "batch_size": 4},
    )  # fmt: skip
    specs = [learnt, cut]
    run_all(specs, "whole")
    run_all(specs, "stopped", stop_after=9)
    run_all(specs, "stopped")
    for spec in specs:
        whole, stopped = (recorded(tmp_path, spec, study) for study in ("whole", "stopped"))
        curves = [
            [(row["loss"], row["log_variances"]) for row in lines(tmp_path / study / spec.run_id) if "loss" in row]
            for study in ("whole", "stopped")
        ]
        assert curves[0] == curves[1]
        assert len(curves[0]) == 8
        last = curves[0][-1][1]
        assert whole.weighing == stopped.weighing
        for task in ("parity", "digit"):
            assert whole.weighing[task]["log_variance"] == last[task] != 0
            assert whole.weighing[task]["weight"] == pytest.approx(math.exp(-last[task]))
        for name, phases in whole.scores.items():
            assert stopped.scores[name]["after"].nll == pytest.approx(phases["after"].nll, rel=1e-6)
    found, again = (recorded(tmp_path, learnt, study).conflict for study in ("whole", "stopped"))
    assert found.pop("seconds") > 0
    again.pop("seconds")
    assert found == again
    assert found["steps"] == [1, 4, 7]
    assert found["pairs"] == [["parity", "digit"]]
    assert len(found["adapter"]) == 3
    assert set(found["modules"]) == {module.name for module in recorded(tmp_path, learnt, "whole").modules}
    for own in found["modules"].values():
        assert [len(row) for row in own["cosine"]] == [1] * 3
        assert [len(row) for row in own["norms"]] == [2] * 3
    assert recorded(tmp_path, cut, "whole").conflict["steps"] == [1]
    apart = json.loads((tmp_path / "whole" / cut.run_id / "tasks" / "digit" / "combined.json").read_text())
    assert "conflict" not in apart["spec"]["evaluation"]


@pytest.mark.parametrize("sharing", ["shared", "stack"])
def test_spectra_are_by_block(
    sharing: str, together: MakeTogether, run_all: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family = "sequence" if sharing == "stack" else "mixture"
    spec = together(sharing, family=family, optim={"lr": 3e-2})
    run_all([spec])
    run = tmp_path / "study" / spec.run_id
    command.main(["spectra", str(run), "--device", "cpu", "--update-only"])
    shown = capsys.readouterr().out
    names = ("common", "parity", "digit") if sharing == "shared" else ("parity", "digit")
    assert all(name in shown for name in names)
    plain = json.loads((run / "spectra.json").read_text())
    found = {(one["block"], one["name"]): one for one in plain["blocks"]}
    modules = recorded(tmp_path, spec).modules
    assert set(found) == {(name, module.name) for name in names for module in modules}
    # where each block lies: whose adapter, and its ranks there
    where = {"common": ("digit", 0, 4), "parity": ("parity", 4, 8), "digit": ("digit", 4, 8)}
    if sharing == "stack":
        where = {"parity": ("digit", 0, 8), "digit": ("digit", 8, 16)}
    for (block, name), one in found.items():
        task, first, last = where[block]
        tensors = load_file(run / "tasks" / task / "adapter" / "adapter_model.safetensors")
        a, b = (tensors[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
        update = spec.alpha / spec.rank * b[:, first:last] @ a[first:last]
        values = torch.linalg.svdvals(update)
        assert one["rank"] == last - first
        assert one["update_norm"] == pytest.approx(float(update.norm()), rel=1e-4)
        assert one["singular_values"] == pytest.approx(values[: len(one["singular_values"])].tolist(), rel=1e-3)
        share = values / values.sum()
        assert one["effective_rank"] == pytest.approx(float(torch.special.entr(share).sum().exp()), rel=1e-3)
        assert one["tasks"] == (["parity", "digit"] if block == names[0] else [block])
    assert sum(one["energy_share"] for one in plain["blocks"]) == pytest.approx(1.0)


def test_a_run_that_trains_alone_learns_weights_and_goes_on_with_them(
    together: MakeTogether, run_all: Any, tmp_path: Path
) -> None:
    spec = together(options={"sampling": "equal", "weights": "uncertainty"}, method={"name": "bitfit"})
    run_all([spec], "whole")
    run_all([spec], "cut", stop_after=3)
    run_all([spec], "cut")
    whole, cut = (
        [row["log_variances"] for row in lines(tmp_path / study / spec.run_id) if "loss" in row]
        for study in ("whole", "cut")
    )
    assert whole == cut
    assert len(whole) == 6
    assert all(value != 0 for value in whole[-1].values())


def test_a_task_that_is_not_trained_on_is_scored_and_counts_for_nothing(
    together: MakeTogether, run_all: Any, tmp_path: Path
) -> None:
    specs = [
        together(name, options={"sampling": "equal", "unseen": ["digit"]}, trainer={"max_steps": 4, "batch_size": 4})
        for name in ("single", "per_task")
    ]
    run_all(specs)
    for spec in specs:
        found = recorded(tmp_path, spec)
        assert found.data["train/digit"]["seen"] == 0
        assert found.data["train/parity"]["seen"] == 16
        scores = found.scores
        assert scores["test"]["after"].nll == scores["test/parity"]["after"].nll
        gain = scores["validation/parity"]["before"].nll - scores["validation/parity"]["after"].nll
        assert scores["validation"]["after"].metrics["mean_gain"] == pytest.approx(gain)
    # its own block has not trained, so its rows see the base; routed, they go through the block that has
    assert scores["test/digit"]["after"].nll == pytest.approx(scores["test/digit"]["before"].nll, rel=1e-6)
    assert found.sharing["routing"]["confusion"]["digit"] == {"parity": found.scores["test/digit"]["after"].examples}
    assert found.sharing["routing"]["scores"]["digit"]["nll"] == pytest.approx(
        found.sharing["through"]["digit"]["parity"], rel=1e-6
    )


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("[hpo]", r"dataset.options.unseen=hpo: no such dataset.options.unseen. Choose from hpo_term, icd10_chapter"),
        ("[icd10_chapter,hpo_term]", "has every task"),
        ("hpo_term", r"must be a list, got hpo_term: write 'dataset.options.unseen=\[hpo_term\]'"),
    ],
)
def test_tasks_that_cannot_be_left_out_are_one_line(given: str, line: str, composer: Any, tmp_path: Path) -> None:
    words = ["dataset=mixture", "dataset.parts=[icd10_chapter,hpo_term]", f"dataset.options.unseen={given}"]
    specs = config.expand(words, composer).specs
    with pytest.raises(Problems, match=line):
        plan.check(specs, Settings(study="x", output_root=str(tmp_path)))
