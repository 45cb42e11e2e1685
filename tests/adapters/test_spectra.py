"""Spectra of updates with known answers, by every way a run can have changed its model."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    BeftConfig,
    LNTuningConfig,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import save_file

from sweeper.adapters import command, peft_models, spectra
from sweeper.adapters.spectra import Look, ModuleSpectrum
from sweeper.errors import DataError, SpecError
from sweeper.placement import spectrum
from sweeper.record import ADAPTER, RECORD, WEIGHTS
from sweeper.rescoring.rescore import Saved
from sweeper.training.export import write_adapter
from tests.adapters.conftest import base_of, updates_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True:UserWarning"),
]

Make = Callable[..., Saved]


def found(run: Saved, look: Look | None = None) -> dict[str, ModuleSpectrum]:
    ((same, modules),) = spectra.spectra([run], look or Look(), device="cpu")
    assert same is run
    return {one.name: one for one in modules}


def weights_of(run: Saved) -> dict[str, torch.Tensor]:
    """W [out, in] of every module that a run adapts."""
    base = base_of(run.spec)
    return {name: spectrum.weight_of(base.model.get_submodule(name)) for name in run.ranks}


def plant(run: Saved, update: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]) -> Saved:
    """Writes a run's adapter anew: `update` says of each W the B [out, rank] and A [rank, in] whose product is dW."""
    targets = [target for target in base_of(run.spec).targets if target.name in run.ranks]
    scale = run.spec.alpha / run.spec.rank
    made = {name: update(weight) for name, weight in weights_of(run).items()}
    write_adapter(run.folder, run.spec, targets, {name: (a, b.t() / scale) for name, (b, a) in made.items()})
    return run


KINDS = [("llama", {}), ("gpt2", {}), ("gpt_neox", {"embeddings": True, "head": True})]


@pytest.mark.parametrize(("kind", "place"), KINDS, ids=str)
def test_more_of_what_the_base_has(kind: str, place: Any, saved: Make) -> None:
    """Twice the base's two strongest directions: they overlap fully, amplify by the factor, and nothing is new."""

    def update(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        own = spectrum.decompose(weight).top(2)
        return 2 * own.left * own.values, own.right.t()

    run = plant(saved("a", kind, "full", rank=2, **place), update)
    weights = weights_of(run)
    for name, one in found(run).items():
        values = spectrum.decompose(weights[name]).values[:2]
        assert one.rank == 2
        assert one.overlap_left == pytest.approx(1, abs=1e-3)
        assert one.overlap_right == pytest.approx(1, abs=1e-3)
        assert one.amplification == pytest.approx(2, rel=1e-3)
        assert one.singular_values == pytest.approx((2 * values).tolist(), rel=1e-3)
        assert one.update_norm == pytest.approx(float(2 * values.norm()), rel=1e-3)
        assert one.relative_norm == pytest.approx(one.update_norm / float(weights[name].norm()), rel=1e-3)
        assert one.effective_rank == pytest.approx(spectrum.effective_rank(values), rel=1e-3)
        assert (one.intruder_dimensions, one.examined) == (0, 10)


@pytest.mark.parametrize(("kind", "place"), KINDS[:2], ids=str)
def test_a_strong_direction_that_the_base_lacks_is_an_intruder(kind: str, place: Any, saved: Make) -> None:
    def update(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        own = spectrum.decompose(weight)
        new = own.left.mean(1, keepdim=True)  # as far from each of the base's directions as from every other
        return 5 * own.values[0] * new / new.norm(), own.right[:, :1].t()

    run = plant(saved("a", kind, "full", rank=1, **place), update)
    assert {one.intruder_dimensions for one in found(run).values()} == {1}
    assert {one.intruder_dimensions for one in found(run, Look(epsilon=0.05)).values()} == {0}
    assert {one.stable_rank for one in found(run).values()} == {1.0}


def test_energy_is_shared_out_among_modules(saved: Make) -> None:
    """Norms of 1, 2 and 3 in the layers' feed-forward: shares of 1, 4 and 9."""
    sizes = {"ff_gate": 1.0, "ff_up": 2.0, "ff_down": 3.0}
    run = saved("a", "llama", "ff", rank=1)
    base = base_of(run.spec)
    targets = [target for target in base.targets if target.name in run.ranks]
    unit = {t.name: (torch.eye(1, t.in_features), torch.eye(1, t.out_features) * sizes[t.role] / 2) for t in targets}
    write_adapter(run.folder, run.spec, targets, unit)
    for one in found(run).values():
        assert one.update_norm == pytest.approx(sizes[one.role], rel=1e-5)
        assert one.energy_share == pytest.approx(sizes[one.role] ** 2 / 28, rel=1e-5)


def test_orthogonal_updates_have_full_effective_rank(saved: Make) -> None:
    run = plant(saved("a", rank=4), lambda w: (torch.eye(w.shape[0], 4), torch.eye(4, w.shape[1])))
    for one in found(run).values():
        assert one.effective_rank == pytest.approx(4, rel=1e-5)
        assert one.stable_rank == pytest.approx(4, rel=1e-5)


def test_a_low_rank_update_and_the_same_as_whole_weights(saved: Make) -> None:
    run = saved("a", "gpt2", "full", rank=3)
    by_factors = found(run)
    base = base_of(run.spec)
    whole = saved("b", "gpt2", "full", rank=3)
    (whole.folder / WEIGHTS).mkdir()
    changed = {f"{name}.weight": delta for name, delta in updates_of(run).items()}
    tuned = {name: base.model.get_parameter(name) + delta.t() for name, delta in changed.items()}
    tuned["transformer.h.0.ln_1.bias"] = torch.ones(32)
    save_file({name: value.contiguous() for name, value in tuned.items()}, whole.folder / WEIGHTS / "model.safetensors")
    by_weights = found(whole)
    assert by_weights.keys() == by_factors.keys() == run.ranks.keys()
    for name, one in by_factors.items():
        other = by_weights[name]
        assert other.singular_values[:3] == pytest.approx(one.singular_values, rel=1e-3)
        assert other.update_norm == pytest.approx(one.update_norm, rel=1e-4)
        assert other.effective_rank == pytest.approx(one.effective_rank, rel=1e-2)
        assert other.amplification == pytest.approx(one.amplification, rel=1e-2)
        assert other.intruder_dimensions == one.intruder_dimensions


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (LoraConfig, {"r": 4, "use_dora": True}),
        (VeraConfig, {"r": 8}),
        (AdaLoraConfig, {"init_r": 6, "target_r": 2, "total_step": 9}),
    ],
    ids=["dora", "vera", "adalora"],
)
def test_other_kinds_go_through_pefts_merge(config: Any, fields: Any, by_peft: Make) -> None:
    run = by_peft("a", config, **fields)
    own, other = (peft_models.load_base(run.spec, "cpu", "float32").model for _ in range(2))
    merged = PeftModel.from_pretrained(other, run.adapter).merge_and_unload()
    modules = found(run)
    assert modules.keys() == run.ranks.keys()
    for name, one in modules.items():
        delta = merged.get_parameter(f"{name}.weight") - own.get_parameter(f"{name}.weight")
        assert one.update_norm == pytest.approx(float(delta.norm()), rel=1e-4)
        largest = torch.linalg.svdvals(delta)[: len(one.singular_values)]
        assert one.singular_values == pytest.approx(largest.tolist(), rel=1e-2, abs=1e-5)
    assert any(one.rank > 4 for one in modules.values())


def test_many_runs_on_one_base_are_as_each_alone(saved: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [saved("a"), saved("b", placement="full", rank=2, seed=1), saved("c", "gpt2"), saved("d", size=0)]
    alone = {run.folder.name: found(run) for run in runs}
    monkeypatch.setattr(spectra, "TOGETHER", 2)
    together = {}
    for run, modules in spectra.spectra(runs, Look(), device="cpu"):
        together[run.folder.name] = {one.name: one for one in modules}
    assert together == alone
    assert {one.update_norm for one in alone["d"].values()} == {0.0}
    assert {one.rank for one in alone["d"].values()} == {0}


def test_the_record_stays_and_the_file_is_plain_json(saved: Make) -> None:
    run = saved("a")
    before = (run.folder / RECORD).read_bytes()
    modules = found(run)
    assert (run.folder / RECORD).read_bytes() == before
    plain = json.loads((run.folder / "spectra.json").read_text())
    assert (plain["schema"], plain["run_id"], plain["top"], plain["epsilon"]) == (1, "a", 10, 0.5)
    assert [ModuleSpectrum(**row) for row in plain["modules"]] == list(modules.values())


def test_without_the_bases_spectrum(saved: Make) -> None:
    run = saved("a")
    whole, part = found(run), found(run, Look(base=False))
    for name, one in part.items():
        assert (one.intruder_dimensions, one.overlap_left, one.examined) == (None, None, None)
        assert (one.update_norm, one.effective_rank) == (whole[name].update_norm, whole[name].effective_rank)


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
def test_virtual_tokens_and_norms_have_no_spectrum_on_any_architecture(saved: Make) -> None:
    configs = [PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), LNTuningConfig(task_type="CAUSAL_LM")]
    for place, config in enumerate(configs):
        run = saved(str(place), "gpt2")
        own = peft_models.load_base(run.spec, "cpu", "float32").model
        get_peft_model(own, config).save_pretrained(run.adapter)
        assert found(run) == {}


@pytest.mark.filterwarnings("ignore:Detected that the base layer has no bias:UserWarning")
def test_an_adapter_that_peft_cannot_merge_is_named(by_peft: Make) -> None:
    run = by_peft("a", BeftConfig)
    with pytest.raises(DataError, match=rf"spectra: {run.folder}: PEFT cannot merge it: Base layer has no bias"):
        found(run)


def test_what_changes_no_matrix_has_no_spectrum(saved: Make, capsys: pytest.CaptureFixture[str]) -> None:
    prompt, bias, plain = saved("a"), saved("b"), saved("c")
    own = peft_models.load_base(prompt.spec, "cpu", "float32").model
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(own, config).save_pretrained(prompt.folder / ADAPTER)
    (bias.folder / WEIGHTS).mkdir()
    save_file({"model.layers.0.mlp.up_proj.bias": torch.ones(48)}, bias.folder / WEIGHTS / "model.safetensors")
    command.main(["spectra", str(plain.folder.parent), "--device", "cpu"])
    shown = "".join(capsys.readouterr().out.split())
    for run in (prompt, bias):
        assert f"{run.folder}:changednomatrixofthemodel" in shown
        assert not (run.folder / "spectra.json").exists()
    assert (plain.folder / "spectra.json").is_file()
    with pytest.raises(DataError, match="no run changed a matrix of its model"):
        command.main(["spectra", str(prompt.folder), "--device", "cpu"])


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"top": 0}, "--top must be at least 1"),
        ({"epsilon": 0.0}, "--epsilon is a cosine: above 0"),
        ({"epsilon": 2.0}, "--epsilon is a cosine: above 0 and at most 1, got 2"),
    ],
)
def test_a_wrong_request_says_what_is_right(fields: dict[str, Any], line: str) -> None:
    with pytest.raises(SpecError, match=line):
        Look(**fields)
