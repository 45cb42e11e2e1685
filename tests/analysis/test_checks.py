from pathlib import Path

import pytest

from analysis import analyse, load
from analysis.checks import expected_parameters
from analysis.exchange import from_published
from sweeper.record import PREDICTIONS
from tests.analysis.synthetic import edit, write_study

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
    assert set(analyse(load(study), draws=50).tables["checks"]["check"]) == {"unequal budgets"}


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
    assert tests[["p_permutation", "effect", "examples"]].isna().all(axis=None)


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
