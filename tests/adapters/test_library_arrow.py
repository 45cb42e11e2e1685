"""Arrow gives what PEFT's `create_arrow_model` gives, general knowledge subtracted or not."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from sweeper.adapters.library import arrow, experts
from sweeper.adapters.library.asked import Asked
from sweeper.adapters.library.bench import Bench
from sweeper.adapters.library.experts import Gated
from sweeper.errors import SpecError
from sweeper.models import BaseModel
from sweeper.rescoring.rescore import Saved
from sweeper.spec import RunSpec

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*Already found a `peft_config`")
IDS = torch.tensor([[5, 9, 40, 7, 200, 31, 8, 77], [250, 3, 3, 90, 12, 4, 66, 101]])


def by_peft(base: BaseModel, runs: Sequence[Saved], general: Sequence[Saved] = (), **config: Any) -> torch.Tensor:
    from peft import ArrowConfig, create_arrow_model

    model = create_arrow_model(
        copy.deepcopy(base.model), [str(run.adapter) for run in runs],
        ArrowConfig(**config, use_gks=bool(general), rng_seed=0),
        general_adapter_paths=[str(run.adapter) for run in general] or None,
    ).eval()  # fmt: skip
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def logits(bench: Bench, router: Gated | None) -> torch.Tensor:
    bench.installed.use(router)
    with torch.no_grad():
        found: torch.Tensor = bench.base.model(input_ids=IDS, use_cache=False).logits
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (2, 0.3), (3, 2.0)])
def test_arrow_is_that_of_peft(
    saved: Callable[..., Saved], base: Callable[[RunSpec], BaseModel], kind: str, top_k: int, temperature: float
) -> None:
    # a first direction that stands out: PEFT's 15 steps of power iteration find no other
    runs = [saved(f"m{i}", kind, "full", seed=i, decay=0.3, alpha=4.0 + 4 * i) for i in range(3)]
    own = base(runs[0].spec)
    wanted = by_peft(own, runs, top_k=top_k, router_temperature=temperature)
    with Bench(own, runs) as bench:
        found = logits(bench, arrow.gated(bench.experts, top_k=top_k, temperature=temperature))
        bare = logits(bench, None)
    assert (found - wanted).abs().max() < 1e-5
    assert (bare - wanted).abs().max() > 1e-2
    assert torch.equal(bare, own.model(input_ids=IDS, use_cache=False).logits)  # the base has its modules back


def test_general_knowledge_is_subtracted_as_by_peft(
    saved: Callable[..., Saved], base: Callable[[RunSpec], BaseModel]
) -> None:
    runs = [saved(f"m{i}", seed=i, decay=0.3, alpha=4.0 + 4 * i) for i in range(3)]
    general = [saved(f"g{i}", seed=10 + i, decay=0.3, size=0.1, alpha=40.0 + i) for i in range(2)]
    own = base(runs[0].spec)
    wanted = by_peft(own, runs, general, top_k=2, router_temperature=0.5)
    with Bench(own, runs) as bench:
        task: Any = None
        asked = Asked(rules=("arrow",), top_k=2, temperature=0.5, general=tuple(str(run.folder) for run in general))
        made = arrow.arrow(bench, asked, task)
        assert isinstance(made.router, Gated)
        found = logits(bench, made.router)
        without = logits(bench, arrow.gated(bench.experts, top_k=2, temperature=0.5))
        assert made.facts["general"] == ["g0", "g1"]
    assert (found - wanted).abs().max() < 1e-5
    assert (found - without).abs().max() > 1e-3


def test_a_prototype_is_the_first_right_singular_vector(
    saved: Callable[..., Saved], base: Callable[[RunSpec], BaseModel]
) -> None:
    runs = [saved("a", placement="attn", rank=3), saved("b", placement="full", rank=5, seed=1)]
    for one in experts.read(base(runs[0].spec), runs):
        for k, own in enumerate(arrow.prototypes(one)):
            a, b = one.of(k)
            if not len(a):
                assert not own.any()
                continue
            right = torch.linalg.svd((b.t() @ a).double()).Vh[0]
            assert abs(float(own.double() @ right)) == pytest.approx(1, abs=1e-6)


def test_members_that_do_not_adapt_a_module_are_no_candidates(
    saved: Callable[..., Saved], base: Callable[[RunSpec], BaseModel]
) -> None:
    runs = [saved("a", placement="attn", rank=3), saved("b", placement="full", rank=5, seed=1)]
    with Bench(base(runs[0].spec), runs) as bench:
        seen: dict[str, torch.Tensor] = {}
        router = arrow.gated(bench.experts, top_k=2, temperature=1.0)
        router.seen = lambda one, gates: seen.update({one.target.name: gates})
        logits(bench, router)
        assert len(seen) == len(runs[1].ranks)
        for one in bench.experts:
            gates = seen[one.target.name]
            assert torch.allclose(gates.sum(-1), torch.ones(2, 8))
            assert bool((gates[..., 0] > 0).all()) == (one.target.name in runs[0].ranks)


def test_general_adapters_of_another_shape_are_refused(saved: Callable[..., Saved]) -> None:
    a, b, wide = saved("a", seed=1), saved("b"), saved("wide", rank=8)
    arrow.check_general([a, b], [a])
    with pytest.raises(SpecError, match=r"general: .*a has rank 4 in 8 modules \(attn\), wide rank 8 in 8 modules"):
        arrow.check_general([a, b], [wide])
