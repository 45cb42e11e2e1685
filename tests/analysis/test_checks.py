import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from analysis import analyse, load
from analysis.checks import expected_parameters
from analysis.exchange import from_published
from analysis.tables import bold_arms, overall_best
from sweeper.record import PREDICTIONS, RECORD
from tests.analysis.synthetic import Truth, edit, write_study

DATA = Path(__file__).parent / "data"
GPT2_MEDIUM = {"model.config.n_layer": 24, "model.config.n_embd": 1024, "rank": 16, "method": "lora"}
SMOLLM2 = {
    "model.config.hidden_size": 576, "model.config.intermediate_size": 1536, "model.config.num_hidden_layers": 30,
    "model.config.num_attention_heads": 9, "model.config.num_key_value_heads": 3, "rank": 8, "method": "lora",
}  # fmt: skip


@pytest.mark.parametrize(
    ("row", "placement", "expected"),
    [
        (GPT2_MEDIUM, "attn", 2_359_296),
        (GPT2_MEDIUM, "ff", 3_932_160),
        (GPT2_MEDIUM, "full", 6_291_456),
        (SMOLLM2, "attn", 921_600),
        (SMOLLM2, "custom", None),
        ({"rank": 8, "method": "lora"}, "attn", None),
    ],
)
def test_expected_parameters(row: dict[str, object], placement: str, expected: int | None) -> None:
    assert expected_parameters({**row, "placement": placement}) == expected


def test_the_published_table_of_2025_is_contradicted() -> None:
    found = analyse(load(rows=from_published(DATA / "published_2025.json")), draws=50).tables["checks"]
    perplexity = found[found["check"] == "perplexity is not exp(NLL)"]["message"].to_list()
    assert any("gives perplexity 21.96, stated is 4283" in text for text in perplexity)
    assert any("3.481" in text and "2272" in text for text in perplexity)
    parameters = found[found["check"] == "parameters do not match the placement"]["message"].to_list()
    assert sorted(parameters) == [
        "attn at rank 16 has 2,359,296, stated is 4,325,376",
        "ff at rank 16 has 3,932,160, stated is 1,966,080",
    ]


def test_an_honest_study_has_no_contradictions(tmp_path: Path) -> None:
    study = write_study(tmp_path / "s", ranks=(4,), lrs=(1e-3, 3e-3, 1e-2), examples=120, steps=2)
    assert set(analyse(load(study), draws=50).tables["checks"]["check"]) == {"unequal budgets", "not confirmed"}


def _checks(study: Path) -> dict[str, str]:
    table = analyse(load(study), draws=50).tables["checks"]
    return {row["check"]: f"{row['subject']}: {row['message']}" for row in table.to_dict("records")}


def _runs(study: Path, **wanted: object) -> list[Path]:
    """Folders of the runs whose spec has these values: placement, seed, rank."""
    found = []
    for folder in sorted(path.parent for path in study.glob(f"*/{RECORD}")):
        spec = json.loads((folder / RECORD).read_text())["spec"]
        if all((spec[key]["name"] if key == "placement" else spec[key]) == value for key, value in wanted.items()):
            found.append(folder)
    return found


def test_arms_with_other_seeds_are_named_and_none_of_them_is_bold(tmp_path: Path) -> None:
    """Attention and feed-forward on seeds 0 to 2, full on 3 to 5: full cannot be tested, so nobody is the best."""
    truth = Truth(placements={"attn": 0.53, "ff": 0.42, "full": 0.12}, arm_example_sd=0.01)
    study = write_study(tmp_path / "s", truth=truth, ranks=(4,), seeds=(0, 1, 2, 3, 4, 5), examples=120, steps=2)
    gone = [*_runs(study, placement="attn"), *_runs(study, placement="ff")]
    for folder in gone:
        if json.loads((folder / RECORD).read_text())["spec"]["seed"] > 2:
            shutil.rmtree(folder)
    for seed in (0, 1, 2):
        for folder in _runs(study, placement="full", seed=seed):
            shutil.rmtree(folder)
    found = analyse(load(study), draws=200)
    said = _checks(study)
    assert "none of which all share" in said["different seeds"]
    assert "attn r4 and full r4, ff r4 and full r4: 2 pairs of arms share no seed" in said["no shared seeds"]
    assert bold_arms(found, "nll") == set()
    assert overall_best(found, "nll") == set()


def test_unequal_numbers_of_seeds_are_named(tmp_path: Path) -> None:
    study = write_study(tmp_path / "s", ranks=(4,), seeds=(0, 1, 2), examples=120, steps=2)
    shutil.rmtree(_runs(study, placement="ff", seed=2)[0])
    assert "arms have 2 to 3 seeds, of which all share 0, 1" in _checks(study)["different seeds"]


def test_test_sets_that_differ_are_named(tmp_path: Path) -> None:
    study = write_study(tmp_path / "s", ranks=(4,), examples=120, steps=2)
    for folder in _runs(study, placement="ff"):
        lines = (folder / PREDICTIONS).read_text().splitlines()
        (folder / PREDICTIONS).write_text("\n".join(line for line in lines if '-7"' not in line) + "\n")
    said = _checks(study)["different examples"]
    assert "arms were scored on 119 to 120 examples of which all share 119" in said


def test_a_score_that_is_no_number_is_named(tmp_path: Path) -> None:
    study = write_study(tmp_path / "s", ranks=(4,), examples=120, steps=2)

    def diverge(record: dict[str, Any]) -> None:
        record["scores"]["test"]["after"]["nll"] = None

    edit(_runs(study, placement="attn", seed=1)[0], diverge)
    assert "attn r4 seed=1: 1 of 9 completed runs have no finite test.nll" in _checks(study)["score is no number"]


def test_one_arm_and_seed_twice_is_named(tmp_path: Path) -> None:
    study = write_study(tmp_path / "s", ranks=(4,), examples=120, steps=2)
    one = _runs(study, placement="attn", seed=1)[0]
    shutil.copytree(one, study / "again")

    def other(record: dict[str, Any]) -> None:
        record["run_id"] = "ffffffffffff"

    edit(study / "again", other)
    assert "2 runs share arm, trial and seed" in _checks(study)["repeated run"]


def test_more_looks_in_one_arm_are_named(tmp_path: Path) -> None:
    study = write_study(tmp_path / "s", ranks=(4,), lrs=(1e-3, 3e-3, 1e-2), examples=120, steps=2)
    for folder in _runs(study, placement="ff"):
        if json.loads((folder / RECORD).read_text())["spec"]["optim"]["lr"] == 1e-2:
            shutil.rmtree(folder)
    assert "arms chose from 2 to 3 trials" in _checks(study)["unequal trials"]


@pytest.mark.parametrize(("groups", "check"), [(12, "few groups"), (60, None)])
def test_few_groups_are_named(groups: int, check: str | None, tmp_path: Path) -> None:
    study = write_study(tmp_path / "s", ranks=(4,), examples=120, steps=2, groups=groups)
    said = _checks(study)
    assert ("few groups" in said) == (check is not None)
    assert check is None or "120 examples of 12 independent groups" in said[check]


def test_records_that_say_nothing_of_groups_are_named(tmp_path: Path) -> None:
    study = write_study(tmp_path / "s", ranks=(4,), examples=120, steps=2)
    for folder in _runs(study):
        edit(folder, lambda record: record.update(data={}))
    assert "each example counts as independent" in _checks(study)["no groups"]


def test_changes_that_no_commit_has_are_named(tmp_path: Path) -> None:
    study = write_study(tmp_path / "s", ranks=(4,), examples=120, steps=2)
    first, second, *_ = _runs(study)
    edit(first, lambda record: record["environment"].update(git_commit="0123456789ab+"))
    edit(second, lambda record: record["environment"].update(git_commit=None))
    said = _checks(study)
    assert "1 of 9 runs are of a tree with changes" in said["uncommitted changes"]
    assert "1 of 9 runs do not say of which commit they are" in said["unknown commit"]
    assert "0123456789ab, 0123456789ab+" in said["several commits"]


def test_an_arm_is_named_with_its_task_where_there_are_several(tmp_path: Path) -> None:
    study = write_study(
        tmp_path / "s", ranks=(4,), seeds=(0,), datasets=("gsm_symbolic", "icd10_chapter"), examples=120, steps=2
    )
    found = analyse(load(study), draws=50).tables["checks"].set_index("check")
    first = "gsm_symbolic: attn r4, gsm_symbolic: ff r4, gsm_symbolic: full r4, icd10_chapter: attn r4"
    assert found.loc["one seed", "subject"] == f"{first} and 2 more"


def test_seeds_alone_never_pass_for_examples(tmp_path: Path) -> None:
    study = write_study(tmp_path / "s", ranks=(4,), lrs=(1e-3, 3e-3), examples=120, steps=2)
    for folder in study.iterdir():
        (folder / PREDICTIONS).unlink()
    found = analyse(load(study), draws=50)
    check = found.tables["checks"].set_index("check").loc["no scores of single examples"]
    assert (
        check["message"] == "3 of 3 arms have no nll of single examples: their intervals say nothing of other examples"
    )
    tests = found.tables["tests"].query("family == 'placement'")
    assert tests["p"].notna().all()
    assert tests[["effect", "examples"]].isna().all(axis=None)


def test_contradictions_in_records_are_found(tmp_path: Path) -> None:
    study = write_study(tmp_path / "s", ranks=(4,), seeds=(0,), examples=120, steps=2)
    attn, ff = (load(study).runs.set_index("placement")["folder"][name] for name in ("attn", "ff"))
    edit(Path(attn), lambda plain: plain.update(trainable_parameters=4_325_376))
    edit(Path(ff), lambda plain: plain["modules"][0].update(role="attn_o"))
    found = analyse(load(study), draws=50).tables["checks"]
    messages = " ".join(found[found["check"] == "parameters do not match the placement"]["message"])
    assert "the record states 4,325,376" in messages
    assert "but attn_o modules have ranks" in messages
    assert {"one seed", "one learning rate"} <= set(found["check"])


@pytest.mark.parametrize("old", [1, 3])
def test_memory_of_former_versions_is_named_where_it_may_be_wrong(old: int, tmp_path: Path) -> None:
    """On CUDA alone: on a CPU what is saved for the backward pass was counted then, too."""
    study = write_study(tmp_path / "s", ranks=(4,), seeds=(0,), lrs=(1e-3,), examples=120, steps=2)
    folders = sorted(study.iterdir())
    for folder in folders:
        edit(folder, lambda plain: plain["environment"].update(device_type="cpu"))
    found = analyse(load(study), draws=50)
    assert "memory measured cold" not in set(found.tables["checks"]["check"])
    for place, folder in enumerate(folders):
        edit(folder, lambda plain: plain["environment"].update(device_type="cuda"))
        if place >= old:
            edit(folder, lambda plain: plain["efficiency"].update(memory_measured="warm pass"))
    found = analyse(load(study), draws=50)
    check = found.tables["checks"].set_index("check").loc["memory measured cold", "message"]
    assert f"the peak memory of {old} of 3 runs" in check
    assert ("do not compare" in check) == (old < 3)
    assert any(f"Memory of {old} runs" in line for line in found.notes)


def test_runs_of_the_former_order_are_arms_of_their_own(tmp_path: Path) -> None:
    """Accumulated runs alone: without accumulation the order is what it was."""
    study = write_study(tmp_path / "s", ranks=(4,), seeds=(0, 1), lrs=(1e-3,), examples=20, steps=2)
    for folder in study.iterdir():
        seed = json.loads((folder / RECORD).read_text())["spec"]["seed"]
        order = {"order": "by step"} if seed else {}
        edit(folder, lambda plain, order=order: plain["data"].update(train={"examples": 9, "majority": {}, **order}))
    assert len(analyse(load(study), draws=50).found.arms) == 3
    for folder in study.iterdir():
        edit(folder, lambda plain: plain["spec"]["trainer"].update(accumulation=2))
    found = analyse(load(study), draws=50).found
    assert sorted(arm.label for arm in found.arms) == sorted(
        f"{name} r4{order}" for name in ("attn", "ff", "full") for order in ("", " order=by pass")
    )


MADE_WITH = {
    "precision": "bfloat16", "device": "NVIDIA H200", "device_type": "cuda", "attention": "sdpa",
    "versions": {"torch": "2.13.0", "hydra-core": "1.3.8"}, "sandbox_python": "CPython 3.11.7",
    "content": {"model": None, "dataset": "sha256:aa"},
}  # fmt: skip


def conditions(study: Path, change: dict[str, object], everywhere: dict[str, object] = MADE_WITH) -> dict[str, str]:
    """Findings on a study whose run of attn was made with something else: check -> message."""
    for row in load(study).runs.to_dict("records"):
        made = everywhere | (change if row["placement"] == "attn" else {})
        edit(Path(row["folder"]), lambda plain, made=made: plain.update(environment=made))
    found = analyse(load(study), draws=50).tables["checks"]
    different = found[found["check"].str.startswith("different ")]
    return dict(zip(different["check"], different["message"], strict=True))


@pytest.mark.parametrize(
    ("change", "check", "shown"),
    [
        ({"precision": "float32"}, "precision", ("bfloat16", "float32")),
        ({"device_type": "cpu"}, "device kind", ("cuda", "cpu")),
        ({"device": "NVIDIA H100"}, "device", ("NVIDIA H200", "NVIDIA H100")),
        ({"attention": "eager"}, "attention", ("sdpa", "eager")),
        ({"versions": {"torch": "2.11.0"}}, "library version (torch)", ("2.13.0", "2.11.0")),
        ({"sandbox_python": "CPython 3.12.1"}, "Python of the sandbox", ("CPython 3.11.7", "CPython 3.12.1")),
        ({"content": {"dataset": "sha256:bb"}}, "data version", ("sha256:aa", "sha256:bb")),
        ({"resumed_from": {"precision": "float32"}}, "precision", ("bfloat16", "float32, then bfloat16")),
        ({"resumed_from": {"versions": {"torch": "2"}}}, "library version (torch)", ("2.13.0", "2, then 2.13.0")),
    ],
)
def test_what_the_runs_of_a_comparison_were_not_all_made_with_is_named(
    change: dict[str, object], check: str, shown: tuple[str, str], tmp_path: Path
) -> None:
    study = write_study(tmp_path / "s", ranks=(4,), seeds=(0,), examples=120, steps=2)
    most, one = shown
    message = f"{most} in 2 runs (ff r4, full r4); {one} in 1 run (attn r4)"
    assert conditions(study, change) == {f"different {check}": message}


def test_what_changes_no_number_or_is_not_said_is_no_finding(tmp_path: Path) -> None:
    study = write_study(tmp_path / "s", ranks=(4,), seeds=(0,), examples=120, steps=2)
    assert conditions(study, {}) == {}
    versions = {"versions": {"torch": "2.13.0", "hydra-core": "1.3.9"}, "git_commit": "other", "attention": None}
    assert conditions(study, {**versions, "content": {}}) == {}


def test_of_a_run_on_former_data_the_last_counts_and_moved_data_is_one_task(tmp_path: Path) -> None:
    study = write_study(tmp_path / "s", ranks=(4,), seeds=(0,), examples=120, steps=2)
    folders = load(study).runs.set_index("placement")["folder"]

    def content(value: str | None, path: str = "/here", **fields: str) -> Callable[[dict[str, Any]], None]:
        def change(plain: dict[str, Any]) -> None:
            plain["spec"]["dataset"] |= {"path": path} | ({} if value is None else {"content": f"sha256:{value}"})
            plain.update(fields)

        return change

    edit(Path(folders["attn"]), content(None, finished="2026-01-01T00:00:00+00:00"))
    again = study / "0123456789ab"
    shutil.copytree(folders["attn"], again)
    edit(again, content("bb", run_id="0123456789ab", finished="2026-01-02T00:00:00+00:00"))
    edit(Path(folders["ff"]), content("bb", "/there"))
    edit(Path(folders["full"]), content("bb", "/there"))
    found = load(study)
    assert sorted(found.runs["run_id"]) == sorted({"0123456789ab", *(Path(folders[n]).name for n in ("ff", "full"))})
    assert [problem.kind for problem in found.problems] == ["former data"]
    analysis = analyse(found, draws=50)
    assert len(analysis.found.settings) == 1
    assert "dataset.content" not in found.fields


def test_examples_left_out_or_cut_are_a_finding_above_one_in_a_hundred(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", ranks=(4,), lrs=(1e-3, 3e-3, 1e-2), examples=120, steps=2)
    sizes = {"train": {"examples": 990, "truncated": 9, "dropped": 10}, "test": {"examples": 120, "dropped": 0}}
    for path in folder.glob("*/record.json"):
        edit(path.parent, lambda plain: plain.update(data=sizes))
    assert "shortened examples" not in set(analyse(load(folder), draws=50).tables["checks"]["check"])
    sizes["train"] |= {"examples": 988, "dropped": 12}
    sizes["test"] |= {"truncated": 30}
    for path in folder.glob("*/record.json"):
        edit(path.parent, lambda plain: plain.update(data=sizes))
    found = analyse(load(folder), draws=50).tables["checks"]
    (message,) = found[found["check"] == "shortened examples"]["message"]
    assert message == (
        "dataset.max_length: 12 of 1,000 train examples are left out (their response is too long); "
        "30 of 120 test examples are cut at the prompt's start"
    )
