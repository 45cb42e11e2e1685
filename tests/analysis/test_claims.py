"""A sentence is written only where its test supports it."""

from pathlib import Path

from analysis import analyse, load
from analysis.__main__ import main
from analysis.claims import claims, sentences
from sweeper.record import note_command
from tests.analysis.synthetic import Truth, write_study

SURE = Truth(placements={"attn": 0.45, "ff": 0.30, "full": 0.20}, arm_example_sd=0.005, seed_sd=0.001, cell_sd=0.005)
EQUAL = Truth(placements={"attn": 0.3, "ff": 0.3, "full": 0.3}, per_doubling=0.0)


def test_a_difference_that_is_there_is_claimed_with_all_that_supports_it(tmp_path: Path) -> None:
    write_study(tmp_path / "s", truth=SURE, ranks=(4,), examples=120, steps=2, groups=40)
    found = claims(analyse(load(tmp_path / "s"), draws=300))
    texts = [claim.text for claim in found if claim.family == "placement" and claim.supported]
    assert len(texts) == 4
    assert any(text.startswith("full r4 has lower test NLL than attn r4 by 0.24") for text in texts)
    assert all("(adjusted p " in text and "3 seeds, 40 groups)" in text for text in texts[:3])
    assert next(claim.text for claim in found if claim.family == "base model").startswith(
        "against base model, 3 of 3 arms better (3 seeds"
    )
    assert (
        texts[3]
        == "3 of 3 comparisons of placements at equal rank found a difference: full better in 2, ff better in 1."
    )


def test_arms_that_do_not_differ_are_not_said_to(tmp_path: Path) -> None:
    write_study(tmp_path / "s", truth=EQUAL, ranks=(4, 8), examples=120, steps=2, seed=3)
    found = claims(analyse(load(tmp_path / "s"), draws=300))
    placement = [claim for claim in found if claim.family == "placement"]
    assert [claim.supported for claim in placement] == [False]
    assert placement[0].text.startswith("no difference between placements at equal rank was established in 6 compari")
    assert not any("has lower test NLL than" in claim.text for claim in found)


def test_a_choice_that_was_not_confirmed_weakens_its_claim(tmp_path: Path) -> None:
    write_study(tmp_path / "s", truth=SURE, ranks=(4,), lrs=(1e-3, 3e-3), examples=120, steps=2)
    texts = sentences(analyse(load(tmp_path / "s"), draws=300))
    claim = next(text for text in texts if "has lower test NLL than" in text)
    assert "hyperparameters not confirmed on fresh seeds" in claim
    assert "at the edge of what was tried" in claim


def test_the_file_has_claims_checks_and_where_the_numbers_come_from(tmp_path: Path) -> None:
    study = write_study(tmp_path / "s", truth=SURE, ranks=(4,), examples=40, steps=2)
    note_command(study, "python train.py -m placement=attn,ff,full")
    assert main([str(study), "--out", str(tmp_path / "out"), "--no-figures", "--draws", "100"]) == 0
    text = (tmp_path / "out" / "claims.md").read_text()
    assert "has the lowest measured test NLL" in text
    assert "- few evaluation examples: " in text
    assert "- Command: python train.py -m placement=attn,ff,full\n- Source: commit 0123456789ab (9 runs).\n" in text
    for kind in ("md", "tex"):
        table = (tmp_path / "out" / "tables" / f"tests.{kind}").read_text()
        assert "Source: commit 0123456789ab (9 runs). Hardware: H200. Versions: torch 2.13.0" in table
