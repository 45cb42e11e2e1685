"""Sums of roles as placements, and every subset of some as an axis."""

from typing import Any

import pytest

from sweeper import config
from sweeper.errors import Problems, SpecError
from sweeper.placement import lattice
from sweeper.placement.placement import PLACEMENTS

FIXED = ["model=tiny_llama", "dataset=icd10_chapter"]


def names(composer: Any, *words: str) -> list[str]:
    return [spec.placement.name for spec in config.expand([*FIXED, *words], composer).specs]


def lines(composer: Any, *words: str) -> tuple[str, ...]:
    with pytest.raises(Problems) as caught:
        config.expand([*FIXED, *words], composer)
    return tuple(caught.value.lines)


@pytest.mark.parametrize(
    ("text", "roles"),
    [
        ("q", ("attn_q",)), ("v+q", ("attn_q", "attn_v")), ("attn+down", (*PLACEMENTS["attn"], "ff_down")),
        ("attn_q+ff_up", ("attn_q", "ff_up")), ("q+attn_qv", ("attn_q", "attn_v")), ("attn", None), ("nothing", None),
    ],
)  # fmt: skip
def test_a_sum_names_its_roles(text: str, roles: tuple[str, ...] | None) -> None:
    assert lattice.roles_of(text) == roles


def test_a_placement_has_one_name_however_it_is_written() -> None:
    for name, roles in PLACEMENTS.items():
        assert lattice.name_of(tuple(reversed(roles))) == name
    every = lattice.placements([*lattice.SHORT])
    assert len(set(every)) == len(every) == 127
    for name in every:
        roles = PLACEMENTS.get(name) or lattice.roles_of(name)
        assert roles is not None
        assert lattice.name_of(roles) == name


@pytest.mark.parametrize(
    ("of", "sizes", "wanted"),
    [
        (["q", "v"], None, ("attn_q", "v", "attn_qv")),
        (["q", "k", "v"], [1, 3], ("attn_q", "k", "v", "q+k+v")),
        (["q+k", "v+o", "gate+up", "down"], 4, ("full",)),
        (["attn", "ff"], None, ("attn", "ff", "full")),
    ],
)
def test_the_subsets_of_parts(of: list[str], sizes: Any, wanted: tuple[str, ...]) -> None:
    assert lattice.placements(of, sizes) == wanted


@pytest.mark.parametrize(
    ("of", "sizes", "line"),
    [
        ([], None, "placement.of must be a list of roles such as"),
        ("q", None, "placement.of must be a list of roles such as"),
        (["q", "attn"], None, "placement.of: q and attn have both q"),
        (["q", "vv"], None, "placement.of=vv: no such placement.of."),
        (["q+x"], None, "placement=q+x: x: no such part."),
        (["q", "v"], [3], "placement.sizes=3: a subset of 2 parts has 1 to 2 of them"),
    ],
)
def test_what_cannot_be_is_one_line(of: Any, sizes: Any, line: str) -> None:
    with pytest.raises(SpecError) as caught:
        lattice.placements(of, sizes)
    assert str(caught.value).startswith(line)


def test_a_lattice_is_an_axis_beside_others(composer: Any) -> None:
    assert names(composer, "placement=lattice", "placement.of=[q+k,v+o,down]") == [
        "attn_qk", "attn_vo", "ff_out", "attn", "q+k+down", "v+o+down", "q+k+v+o+down",
    ]  # fmt: skip
    assert names(composer, "placement=lattice,attn_qv", "placement.of=[gate,up]") == ["gate", "up", "ff_in", "attn_qv"]
    both = config.expand(
        [*FIXED, "placement=lattice", "placement.of=[q,v]", "rank=2,4", "placement.layers=first:1"], composer
    )
    assert [(spec.placement.name, spec.rank) for spec in both.specs] == [
        (name, rank) for name in ("attn_q", "v", "attn_qv") for rank in (2, 4)
    ]
    assert {spec.placement.layers for spec in both.specs} == {"first:1"}


def test_the_whole_lattice_is_composed_once(composer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, stock = [], type(composer).compose
    monkeypatch.setattr(type(composer), "compose", lambda self, words: calls.append(words) or stock(self, words))
    assert len(set(names(composer, "placement=lattice"))) == 127
    assert len(calls) < 25  # Hydra needs some 40 ms for each


def test_a_sum_is_the_run_of_the_preset_that_has_its_roles(composer: Any) -> None:
    (ours,) = config.expand([*FIXED, "placement=v+q"], composer).specs
    (theirs,) = config.expand([*FIXED, "placement=attn_qv"], composer).specs
    assert ours == theirs
    assert ours.run_id == theirs.run_id


def test_sums_are_no_options_in_a_list_of_them(composer: Any) -> None:
    names(composer, "placement=lattice", "placement.of=[q,down]")
    (line,) = lines(composer, "placement=atn")
    assert "q+down" not in line
    assert " custom," in line


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["placement=q+x"], "placement=q+x: x: no such part."),
        (["placement=lattice", "placement.sizes=[9]"], "placement.sizes=9: a subset of 7 parts has 1 to 7 of them"),
        (["placement=lattice", "placement.of=[q,attn]"], "placement.of: q and attn have both q"),
        (["placement=attn", "placement.of=[q]"], "placement.of: no such field."),
        (["placement=tag(tune,choice(lattice,attn))"], "placement=lattice is an axis of many placements: sweep over"),
    ],
)
def test_a_command_that_cannot_be_is_one_line(words: list[str], line: str, composer: Any) -> None:
    (told,) = lines(composer, *words)
    assert told.startswith(line)
