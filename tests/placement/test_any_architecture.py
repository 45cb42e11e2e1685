"""Any placement on any architecture: modules with ranks, the same ones every time, or one line that says why not."""

import json
from dataclasses import replace
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks import tiny_models
from sweeper import methods
from sweeper.errors import ModelError, SpecError
from sweeper.methods import METHODS
from sweeper.models.architecture import ROLES, Target, structure
from sweeper.placement.placement import PLACEMENTS
from sweeper.spec import RunSpec, run_spec, to_mapping
from tests import fuzzing

QUICK = settings(
    max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
SOME = ("llama", "gpt2", "mixtral", "jamba", "mamba", "bloom", "deepseek_v3", "zamba2")
LAYERS = (
    "all",
    "lower_half",
    "upper_half",
    "middle_half",
    "every_other",
    "first:1",
    "last:2",
    "first:99",
    "last:0",
    "",
)
PATTERNS = ("mlp", ".*", "q_proj$", "[", "(?i)MLP", "", "nothing at all", r"layers\.[01]\..*proj", "(a+)+$", "é", "*")
OUTLINES: dict[str, tuple[Target, ...]] = {}

roles = st.one_of(
    st.sampled_from(list(PLACEMENTS.values())), st.lists(st.sampled_from([*ROLES, "atn", ""]), max_size=4)
)
layers = st.one_of(st.sampled_from(LAYERS), st.lists(st.integers(-1, 6), max_size=4))
placements = st.fixed_dictionaries(
    {"roles": roles, "layers": layers, "embeddings": st.booleans(), "head": st.booleans()},
    optional={"patterns": st.lists(st.sampled_from(PATTERNS), min_size=1, max_size=2)},
)
allocations = st.one_of(
    st.just({"name": "uniform"}),
    st.fixed_dictionaries(
        {"name": st.just("matched"), "budget": st.sampled_from([None, 1, 1000, "50k", "2.4M", "-1", "x", 10**15])}
    ),
    st.fixed_dictionaries(
        {
            "name": st.just("pattern"),
            "pattern": st.dictionaries(
                st.sampled_from([*ROLES, "mlp", "[", ".*", "nothing"]), st.integers(-1, 40), max_size=3
            ),
        }
    ),
    st.just({"name": "importance"}),
)
specs = st.fixed_dictionaries(
    {
        "placement": placements, "allocation": allocations, "rank": st.sampled_from([1, 2, 4, 16, 64, 10**6]),
        "method": st.sampled_from(sorted(METHODS)), "alpha": st.sampled_from([None, 1.0, 32.0]),
    }
)  # fmt: skip


def outline(name: str) -> tuple[Target, ...] | None:
    """The modules of an architecture; None of one that this transformers cannot build."""
    if name not in OUTLINES:
        try:
            OUTLINES[name] = structure(tiny_models.outline(name))
        except (ModelError, ImportError, RuntimeError, ValueError, AttributeError, TypeError, StrictDataclassError):
            return None
    return OUTLINES[name]


def described(plain: dict[str, Any]) -> RunSpec:
    """A run with what was drawn.

    Raises:
        SpecError: it cannot be.
    """
    return run_spec(
        {
            "model": {"name": "m", "source": "random", "location": "llama"},
            "dataset": {"name": "jsonl", "family": "jsonl"},
            "optim": {"lr": 1e-3},
            "trainer": {"max_steps": 4, "batch_size": 2},
            "evaluation": {"name": "default"},
            **plain,
            "placement": {"name": "custom", **plain["placement"]},
            "method": {"name": plain["method"]},
        }
    )


def refused(name: str, targets: tuple[Target, ...], plain: dict[str, Any]) -> bool:
    """Whether a drawn run is refused on an architecture, in one line; where it is not, what it adapts is sound."""
    try:
        spec = described(plain)
        assert run_spec(json.loads(json.dumps(to_mapping(spec)))) == spec
        methods.check(spec)
        ranks = methods.module_ranks(spec, targets, tied=True)
        methods.check_places(spec, list(ranks))
    except (SpecError, ModelError) as error:
        lines = error.lines
    else:
        lines = ()
    if lines:
        assert all(line.strip() and "\n" not in line for line in lines), lines
        return True
    assert ranks
    assert set(ranks) <= set(targets)
    assert len({target.name for target in ranks}) == len(ranks)
    assert all(isinstance(rank, int) and rank > 0 for rank in ranks.values())
    assert list(ranks) == [target for target in targets if target in ranks], "not in the model's order"
    roles_reversed = replace(spec, placement=replace(spec.placement, roles=spec.placement.roles[::-1]))
    assert methods.module_ranks(roles_reversed, targets, tied=True) == ranks
    assert methods.trainable(spec.method, ranks, total=10**6) > 0
    return False


@QUICK
@given(plain=specs, name=st.sampled_from(SOME))
def test_a_placement_on_an_architecture_is_modules_or_a_line(plain: dict[str, Any], name: str) -> None:
    targets = outline(name)
    assert targets is not None
    refused(name, targets, plain)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(3000)
def test_many_placements_on_every_architecture() -> None:
    figures = fuzzing.Figures("placements on architectures", "placements")
    every = [name for name in tiny_models.names() if outline(name)]
    assert len(every) > 100

    @settings(parent=QUICK, max_examples=3000)
    @given(plain=specs, name=st.sampled_from(every))
    def draw(plain: dict[str, Any], name: str) -> None:
        targets = OUTLINES[name]
        try:
            figures.note((name, plain), refused=refused(name, targets, plain))
        except Exception as error:
            figures.note((name, plain), refused=True, traceback=f"{type(error).__name__}: {error}")
            raise

    try:
        draw()
    finally:
        figures.write()
    assert figures.accepted > 50
    assert figures.refused > 100
