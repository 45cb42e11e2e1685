"""Every file under conf/ composes to a run, or says which field it wants."""

from pathlib import Path
from typing import Any

import pytest

from sweeper import config
from sweeper.errors import Problems

CONF = Path(__file__).parent.parent / "conf"
GROUPS = (
    "allocation",
    "dataset",
    "evaluation",
    "method",
    "model",
    "objective",
    "optim",
    "placement",
    "sharing",
    "tracking",
    "trainer",
)
OPTIONS = [(group, path.stem) for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]
PRESETS = {("sharing", "by_domain"): "hierarchical", ("placement", "lattice"): "attn_q"}  # or the first that it has
AXES = {"lattice": ["placement=lattice"]}  # of overlays whose group is one, which their sweep gives
NEEDS = {
    ("allocation", "pattern"): "allocation.pattern={attn_q: 4}",
    ("dataset", "file"): "dataset.path=data.csv",
    ("dataset", "hub"): "dataset.path=user/set",
    ("dataset", "jsonl"): "dataset.path=data.jsonl",
    ("dataset", "mixture"): "dataset.parts=[icd10_chapter,hpo_term]",
    ("dataset", "sequence"): "dataset.parts=[icd10_chapter,hpo_term]",
    ("method", "peft"): "method.options.tuner=ia3",
    ("model", "path"): "model.location=folder",
    ("placement", "custom"): "placement.patterns=[q_proj]",
    ("sharing", "hierarchical"): "sharing.tree=[[icd10_chapter,hpo_term]]",
}


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_is_a_valid_run(group: str, option: str, composer: Any) -> None:
    more = [NEEDS[group, option]] if (group, option) in NEEDS else []
    found = config.expand([f"{group}={option}", *more], composer)
    named = found.settings.tracking if group == "tracking" else getattr(getattr(found.specs[0], group), "name", option)
    assert named == PRESETS.get((group, option), option)


@pytest.mark.parametrize(("group", "option"), list(NEEDS))
def test_what_must_be_given_is_asked_for(group: str, option: str, composer: Any) -> None:
    with pytest.raises(Problems) as caught:
        config.expand([f"{group}={option}"], composer)
    assert NEEDS[group, option].split("=")[0] in str(caught.value)


@pytest.mark.parametrize("option", [path.stem for path in sorted((CONF / "experiment").glob("*.yaml"))])
def test_every_overlay_composes(option: str, composer: Any) -> None:
    assert (CONF / "experiment" / f"{option}.yaml").read_text().startswith("# @package _global_\n")
    assert config.expand([f"experiment={option}", *AXES.get(option, [])], composer).settings.study == option
