"""Combinations against hand arithmetic; what PEFT reads of them is what we meant; what does not fit is refused."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, VeraConfig

from sweeper.adapters import merge, peft_models, spectra
from sweeper.adapters.combine import METHODS, Combination, check, combine
from sweeper.errors import DataError, SpecError
from sweeper.rescoring import rescore
from sweeper.rescoring.rescore import Saved
from sweeper.spec import EvaluationSpec, Settings
from tests.adapters.conftest import base_of, updates_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True:UserWarning"),
]

Make = Callable[..., Saved]
Deltas = dict[str, torch.Tensor]


def made(runs: list[Saved], out: Path, **asked: Any) -> Deltas:
    """dW of the combination, as PEFT itself has it after loading."""
    combine(runs, Combination(**asked), out, device="cpu")
    base = peft_models.load_base(runs[0].spec, "cpu", "float32")
    model = peft_models.adapted(base, {"default": out / "adapter"})
    layers = model.base_model.model.named_modules()
    found = {name: layer for name, layer in layers if hasattr(layer, "get_delta_weight")}
    deltas = {name: layer.get_delta_weight("default").detach() for name, layer in found.items()}
    return {
        t.name: deltas[t.name] if t.kind == "linear" else deltas[t.name].t() for t in base.targets if t.name in deltas
    }


def same(found: Deltas, wanted: Deltas) -> None:
    assert found.keys() == wanted.keys() != set()
    for name, delta in wanted.items():
        torch.testing.assert_close(
            found[name], delta, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def weighted(runs: list[Saved], weights: list[float]) -> Deltas:
    found: Deltas = {}
    for run, weight in zip(runs, weights, strict=True):
        for name, delta in updates_of(run).items():
            found[name] = found.get(name, torch.zeros_like(delta)) + weight * delta
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("weights", [(), (0.5, -1.5)])
def test_add_is_the_sum_of_updates(kind: str, weights: tuple[float, ...], saved: Make, tmp_path: Path) -> None:
    """Of other ranks, in other modules, some of uneven rank: the sum is exact."""
    runs = [saved("a", kind, "attn", rank=4, ranks={"attn_o": 2}), saved("b", kind, "full", rank=3, seed=1)]
    found = made(runs, tmp_path / "mix", method="add", weights=weights)
    same(found, weighted(runs, list(weights) or [1.0, 1.0]))


def test_interpolation_goes_from_one_to_the_other(saved: Make, tmp_path: Path) -> None:
    runs = [saved("a"), saved("b", seed=1, rank=2)]
    for t in (0.0, 0.25, 1.0):
        found = made(runs, tmp_path / f"mix{t}", method="interpolate", t=t)
        same(found, weighted(runs, [1 - t, t]))


def test_rank_stabilised_and_plain_adapters_add(saved: Make, tmp_path: Path) -> None:
    runs = [saved("a", method={"rank_stabilised": True}), saved("b", seed=1)]
    same(made(runs, tmp_path / "one", method="add"), weighted(runs, [1, 1]))
    same(made(runs[::-1], tmp_path / "two", method="add"), weighted(runs, [1, 1]))


def test_embedding_and_head_add(saved: Make, tmp_path: Path) -> None:
    runs = [saved(name, "gpt_neox", "attn", embeddings=True, head=True, seed=seed) for seed, name in enumerate("ab")]
    same(made(runs, tmp_path / "mix", method="add"), weighted(runs, [1, 1]))


def test_linear_adds_factors(saved: Make, base: Any, tmp_path: Path) -> None:
    """PEFT's linear adds A and B, each with the root of its weight: not the sum of updates."""
    runs = [saved("a"), saved("b", seed=1)]
    found = made(runs, tmp_path / "mix", method="linear", weights=(1.0, 4.0))
    factors = [rescore.read_adapter(run.folder) for run in runs]
    targets = {target.name: target for target in base(runs[0].spec).targets}
    scale = 2.0  # alpha / rank of both
    for name, delta in found.items():
        (a1, b1), (a2, b2) = (one.parts(targets[name]) for one in factors)
        torch.testing.assert_close(delta, scale * (b1.t() + 2 * b2.t()) @ (a1 + 2 * a2), rtol=1e-4, atol=1e-5)


def test_svd_is_the_best_of_its_rank(saved: Make, tmp_path: Path) -> None:
    runs = [saved("a"), saved("b", seed=1)]
    found = made(runs, tmp_path / "mix", method="svd", rank=3)
    for name, delta in weighted(runs, [1, 1]).items():
        u, s, vh = torch.linalg.svd(delta)
        torch.testing.assert_close(found[name], (u[:, :3] * s[:3]) @ vh[:3], rtol=1e-3, atol=1e-4)


def test_ties_keeps_the_largest_and_elects_a_sign(saved: Make, tmp_path: Path) -> None:
    """Yadav et al. 2023: trim to the density, elect the sign of the larger mass, average those that agree."""
    runs = [saved("a"), saved("b", seed=1)]
    found = made(runs, tmp_path / "mix", method="ties_svd", density=0.5, rank=32)
    one, two = (updates_of(run) for run in runs)
    for name in found:
        trimmed = []
        for delta in (one[name], two[name]):
            threshold = delta.abs().flatten().topk(delta.numel() // 2).values[-1]
            trimmed.append(torch.where(delta.abs() >= threshold, delta, 0.0))
        stacked = torch.stack(trimmed)
        agree = stacked.sign() == stacked.sum(0).sign()
        wanted = (stacked * agree).sum(0) / agree.sum(0).clamp_min(1)
        torch.testing.assert_close(found[name], wanted, rtol=1e-3, atol=1e-3)


def test_dare_is_random_and_seeded(saved: Make, tmp_path: Path) -> None:
    runs = [saved("a"), saved("b", seed=1)]
    asked = {"method": "dare_linear_svd", "density": 0.5, "rank": 8}
    one, again = (made(runs, tmp_path / name, **asked) for name in ("one", "again"))
    other = made(runs, tmp_path / "other", **asked, seed=1)
    same(one, again)
    assert any(not torch.allclose(one[name], other[name]) for name in one)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "interpolate"])
def test_every_method_makes_an_adapter(method: str, saved: Make, tmp_path: Path) -> None:
    runs = [saved("a", "gpt2", "full"), saved("b", "gpt2", "full", seed=1)]
    found = made(runs, tmp_path / "mix", method=method)
    assert len(found) == 8
    assert all(float(delta.abs().max()) > 0 for delta in found.values())


def test_the_note_says_what_it_is_made_of(saved: Make, tmp_path: Path) -> None:
    runs = [saved("a"), saved("b", seed=1, rank=3)]
    note = combine(runs, Combination(weights=(2.0, 1.0)), tmp_path / "mix", device="cpu")
    assert note == json.loads((tmp_path / "mix" / "combined.json").read_text())
    assert [source["run_id"] for source in note["from"]] == ["a", "b"]
    assert (note["method"], note["weights"], set(note["ranks"].values())) == ("add", [2.0, 1.0], {7})


def test_a_combination_is_scored_merged_and_looked_at_like_a_run(saved: Make, tmp_path: Path) -> None:
    runs = [saved("a", placement="attn", size=0.05), saved("b", placement="ff", seed=1, size=0.05)]
    combine(runs, Combination(), tmp_path / "mix", device="cpu")
    (found,) = rescore.find([tmp_path / "mix"])
    assert found.combined == "add of 2"
    settings = Settings(study="study", output_root=str(tmp_path), device="cpu")
    evaluation = EvaluationSpec(name="default", splits=("test",))
    (score,) = rescore.rescore([found], [], evaluation, settings)
    merge.merge(found, tmp_path / "merged", device="cpu")
    # the same by another way: the merged model is a base model of its own
    merged = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert merged["model_type"] == "llama"
    (alone,) = rescore.rescore([runs[0]], [], evaluation, settings)
    assert abs(score.score.nll - score.base.nll) > 1e-3
    assert score.score.nll != pytest.approx(alone.score.nll, rel=1e-4)
    ((_, modules),) = spectra.spectra([found], spectra.Look(), device="cpu")
    assert {one.rank for one in modules} == {4}
    assert (tmp_path / "mix" / "spectra.json").is_file()


def test_its_score_is_that_of_the_merged_model(saved: Make, tmp_path: Path) -> None:
    import dataclasses

    from sweeper.spec import ModelSpec

    runs = [saved("a", size=0.05), saved("b", placement="full", seed=1, size=0.05)]
    combine(runs, Combination(weights=(0.5, 1.0)), tmp_path / "mix", device="cpu")
    (mix,) = rescore.find([tmp_path / "mix"])
    merge.merge(mix, tmp_path / "merged", device="cpu")
    model = ModelSpec(name="merged", source="path", location=str(tmp_path / "merged"))
    plain = dataclasses.replace(runs[0], spec=dataclasses.replace(runs[0].spec, model=model))
    settings = Settings(study="study", output_root=str(tmp_path), device="cpu")
    evaluation = EvaluationSpec(name="default", splits=("test",))
    (score,) = rescore.rescore([mix], [], evaluation, settings)
    (again,) = rescore.rescore([plain], [], evaluation, settings)
    assert again.base.nll == pytest.approx(score.score.nll, rel=1e-4)


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"method": "tie"}, r"--method=tie: no such --method. Choose from add, .* Did you mean ties\?"),
        ({"t": 0.5}, "--t is the share of the second adapter in --method interpolate"),
        ({"method": "interpolate"}, "--t is the share of the second adapter in --method interpolate"),
        ({"method": "linear", "rank": 4}, "--rank 4 needs a method with svd in its name"),
        ({"method": "svd", "density": 0.5}, "--density 0.5: ties, dare and magnitude_prune take one"),
        ({"weights": (1.0, math.nan)}, "--weights must be finite, got 1.0, nan"),
        ({"method": "interpolate", "t": math.inf}, "--t must be finite, got inf"),
        ({"method": "ties", "density": 1.5}, "--density 1.5: ties, dare and magnitude_prune take one"),
    ],
)
def test_a_wrong_request_says_what_is_right(fields: dict[str, Any], line: str) -> None:
    with pytest.raises(SpecError, match=line):
        Combination(**fields)


def test_what_cannot_be_combined_is_refused(saved: Make, by_peft: Make, tmp_path: Path) -> None:
    a, b = saved("a"), saved("b", "gpt2")
    with pytest.raises(SpecError, match="combine: a is an adapter of tiny_llama and b of tiny_gpt2: adapters of one"):
        check([a, b], tmp_path / "mix")
    for name, config, kind in (("v", VeraConfig, "VERA"), ("d", LoraConfig, "DORA")):
        other = by_peft(name, config, r=4, **({"use_dora": True} if kind == "DORA" else {}))
        with pytest.raises(SpecError, match=f"{name} is {kind}, and only plain LoRA updates can be combined"):
            check([a, other], tmp_path / "mix")
    bare = saved("w")
    (bare.adapter / "adapter_config.json").unlink()
    with pytest.raises(SpecError, match="w is no adapter, and only plain LoRA updates"):
        check([a, bare], tmp_path / "mix")
    with pytest.raises(SpecError, match="--weights: give 2, one for each adapter, not 3"):
        combine([a, a], Combination(weights=(1, 2, 3)), tmp_path / "mix")
    with pytest.raises(SpecError, match="give two, not 3"):
        combine([a, a, a], Combination(method="interpolate", t=0.5), tmp_path / "mix")
    with pytest.raises(DataError, match="that is a run's folder; give a new one"):
        combine([a, a], Combination(), a.folder)
    with pytest.raises(DataError, match="combine --method linear: PEFT cannot: All adapters must have the same r"):
        combine([a, saved("c", rank=3)], Combination(method="linear"), tmp_path / "mix", device="cpu")
    assert not (tmp_path / "mix").exists()
    assert base_of(a.spec).model is not None
