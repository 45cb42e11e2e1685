"""The table of methods: options, names, counts."""

from collections.abc import Callable
from typing import Any

import pytest

from sweeper import config, methods
from sweeper.errors import SpecError
from sweeper.methods.method import Method
from sweeper.spec import MethodSpec, RunSpec
from sweeper.study import plan


@pytest.mark.parametrize(
    ("method", "line"),
    [
        ({"name": "lorra"}, r"method=lorra: no such method. Choose from .* Did you mean lora\?"),
        ({"name": "lora", "options": {"ratio": 4}}, "method.options.ratio: method=lora has no such option"),
        ({"name": "rslora"}, "cannot be false"),
    ],
)
def test_what_cannot_be_is_named(method: dict[str, Any], line: str, make_spec: Callable[..., RunSpec]) -> None:
    with pytest.raises(SpecError, match=line):
        methods.check(make_spec(method=method))


def test_options_have_the_type_of_their_default() -> None:
    method = Method(options={"ratio": 16.0, "prune": True, "steps": 3, "any": None})
    method.check_options(MethodSpec(name="x", options={"ratio": 4, "prune": False, "steps": 1, "any": [1]}))
    for wrong in ({"ratio": True}, {"prune": 1}, {"steps": 1.5}, {"steps": "1"}):
        with pytest.raises(SpecError, match=f"method.options.{next(iter(wrong))} must be"):
            method.check_options(MethodSpec(name="x", options=wrong))


def test_vera_may_have_more_directions_than_a_module_has_sides(composer: Any) -> None:
    lines = ["model=tiny_llama", "method=vera", "rank=4096"]
    (spec,) = config.expand(lines, composer).specs
    chosen = plan.module_ranks(spec)
    assert methods.trainable(spec.method, dict.fromkeys(chosen, 4096)) == sum(4096 + t.out_features for t in chosen)
    with pytest.raises(SpecError, match="rank=4096 is above"):
        plan.module_ranks(config.expand(["model=tiny_llama", "rank=4096"], composer).specs[0])
