"""What runs leave is proved before they train, and what stock PEFT cannot carry is said and carried otherwise."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from benchmarks import architectures, tiny_models
from sweeper import record
from sweeper.adapters import merge, peft_models
from sweeper.errors import ModelError, SpecError
from sweeper.models import proof
from sweeper.models.base import settle
from sweeper.placement.placement import PLACEMENTS
from sweeper.record import ADAPTER
from sweeper.rescoring import rescore
from sweeper.spec import ModelSpec, RunSpec
from sweeper.training import export, export_proof

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # PEFT's and transformers', about tiny configs and what is tied
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SWEEPER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def mixture() -> dict[str, Any]:
    """Fields of a run's model: a mixture of experts whose module names PEFT takes for those of the experts' weights."""
    config = tiny_models.config("deepseek_v3").to_diff_dict()
    fields = {key: value for key, value in config.items() if key not in ("model_type", "transformers_version")}
    return {"name": "mixture", "source": "random", "location": "deepseek_v3", "config": fields}


def run_on(model: dict[str, Any], make_run: Any, **changes: Any) -> RunSpec:
    return make_run("ff", model=model, **changes)


def test_lora_that_peft_would_put_elsewhere_names_the_weights(make_run: Any, run_all: Any, tmp_path: Path) -> None:
    spec = run_on(mixture(), make_run)
    run_all([spec])
    folder = tmp_path / "study" / spec.run_id
    done = record.read_record(folder)
    assert done.status == "completed", done.error
    assert "peft" not in done.saved
    config = json.loads((folder / ADAPTER / "adapter_config.json").read_text())
    assert config["target_parameters"]
    assert not config["target_modules"]
    base = peft_models.load_base(spec, "cpu", "float32")
    rows = proof.rows(base.model)
    (run,) = rescore.find([folder])
    with rescore.packed(base, [run]) as pack:
        ours = export_proof.log_probabilities(pack, 0, rows)
        before = export_proof.log_probabilities(pack, -1, rows)
    theirs = export_proof.stock_log_probabilities(export.as_stock(base, folder), rows)
    for one, other, bare in zip(theirs, ours, before, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(one, bare, rtol=1e-3, atol=1e-3)
    assert "gives the logits that were scored" in (folder / ADAPTER / "README.md").read_text()
    assert merge.merge(run, tmp_path / "merged", device="cpu")["max_logit_difference"] < 1e-4


def test_what_peft_cannot_carry_is_said_and_merges(make_run: Any, run_all: Any, tmp_path: Path) -> None:
    spec = run_on(mixture(), make_run, method={"name": "dora"}, optim={"lr": 1e-2})
    run_all([spec])
    folder = tmp_path / "study" / spec.run_id
    done = record.read_record(folder)
    assert done.status == "completed", done.error
    assert "does not work with use_dora" in done.saved["peft"]
    readme = (folder / ADAPTER / "README.md").read_text()
    assert done.saved["peft"] in readme
    assert "adapters.py merge RUN_FOLDER" in readme
    (run,) = rescore.find([folder])
    note = merge.merge(run, tmp_path / "merged", device="cpu")
    assert note["max_logit_difference"] < 1e-4
    merged = ModelSpec(name="path", source="path", location=str(tmp_path / "merged"))
    plain = peft_models.load_base(spec, "cpu", "float32")
    from sweeper import models

    again = models.load(merged, dtype=torch.float32, device=torch.device("cpu"))
    rows = proof.rows(again.model)
    found, bare = (export_proof.stock_log_probabilities(model, rows) for model in (again.model, plain.model))
    assert max(float((one - other).abs().max()) for one, other in zip(found, bare, strict=True)) > 1e-3


def test_a_method_that_peft_trains_is_not_put_elsewhere(make_run: Any, run_all: Any, tmp_path: Path) -> None:
    spec = run_on(mixture(), make_run, method={"name": "dora", "dropout": 0.1})  # this one leaves the pack
    run_all([spec])
    done = record.read_record(tmp_path / "study" / spec.run_id)
    assert done.status == "failed"
    assert done.error is not None
    assert "PEFT" in done.error["message"]


def test_a_proof_is_made_once_for_a_model_a_method_and_a_placement(
    make_run: Any, load: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, made = load("llama"), []
    stock = export_proof.prove
    monkeypatch.setattr(export_proof, "prove", lambda *args, **more: made.append(1) or stock(*args, **more))

    def find(placement: str, **changes: Any) -> export_proof.ExportProof:
        spec = make_run(placement, **changes)
        targets = [target for target in base.targets if target.role in PLACEMENTS[placement]]
        return export_proof.find(base, spec, dict.fromkeys(targets, spec.rank), cache / "exports")

    first = find("attn")
    assert first.refused is None
    assert first.difference is not None
    assert first.difference < 1e-4 < 0.5 <= first.effect
    assert find("attn", rank=8, seed=3, optim={"lr": 1e-4}) == first
    assert len(made) == 1
    find("ff")
    find("attn", method={"name": "dora"})
    assert len(made) == 3


def test_the_adapter_moves_well_above_what_engine_and_stock_differ_by(
    make_run: Any, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16 that is a good part of a nat, of which a smaller move could not be told."""
    base, spec = load("llama"), make_run("attn")
    stock, move, wanted = export_proof.stock_log_probabilities, export_proof._move, []
    monkeypatch.setattr(
        export_proof, "stock_log_probabilities", lambda model, rows: [one + 0.3 for one in stock(model, rows)]
    )
    monkeypatch.setattr(
        export_proof, "_move", lambda *args, **more: wanted.append(more["wanted"]) or move(*args, **more)
    )
    targets = [target for target in base.targets if target.role in PLACEMENTS["attn"]]
    found = export_proof.prove(base, spec, dict.fromkeys(targets, spec.rank))
    assert wanted == [pytest.approx(3, rel=1e-3)]
    assert found.refused is not None, "in float32, 0.3 nats are no rounding"


@pytest.mark.parametrize(
    "method", ["lora", "dora", "vera", "pissa", "relora", "sparse", "full_ft", "bitfit", "adalora"]
)
def test_every_method_comes_back_as_it_was(method: str, make_run: Any, load: Any) -> None:
    base = load("llama")
    spec = make_run("full", method={"name": method}, trainer={"max_steps": 20})
    targets = [target for target in base.targets if target.role in PLACEMENTS["full"]]
    found = export_proof.prove(base, spec, dict.fromkeys(targets, spec.rank))
    assert found.refused is None
    assert found.effect >= export_proof.EFFECT
    if method in ("lora", "dora", "adalora"):
        broken = export_proof.prove(base, spec, dict.fromkeys(targets, spec.rank), tamper=architectures.zero_one)
        assert broken.refused is not None


def test_a_module_that_is_not_called_is_refused(make_run: Any, run_all: Any, tmp_path: Path, monkeypatch: Any) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    def fused(self: Any, x: Any) -> Any:  # as a kernel that reads the weight itself
        return functional.linear(self.act_fn(self.gate_proj(x)) * self.up_proj(x), self.down_proj.weight)

    monkeypatch.setattr(LlamaMLP, "forward", fused)
    spec = make_run("ff")
    run_all([spec])
    done = record.read_record(tmp_path / "study" / spec.run_id)
    assert done.status == "failed"
    assert done.error is not None
    assert "does not call model.layers.0.mlp.down_proj" in done.error["message"]
    assert "would change nothing" in done.error["message"]


def test_an_adapter_names_its_base_so_that_peft_finds_it(make_run: Any, run_all: Any, tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    from sweeper.models.files import byte_tokenizer

    folder = tmp_path / "model"
    tiny_models.build("llama", prepare=settle).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    spec = make_run("attn", model={"name": "mine", "source": "path", "location": str(folder), "config": {}})
    run_all([spec])
    (run,) = rescore.find([tmp_path / "study" / spec.run_id])
    base = peft_models.load_base(run.spec, "cpu", "float32")
    rows = proof.rows(base.model)
    with rescore.packed(base, [run]) as pack:
        ours = export_proof.log_probabilities(pack, 0, rows)
    again = AutoPeftModelForCausalLM.from_pretrained(run.adapter).eval()
    for one, other in zip(export_proof.stock_log_probabilities(again, rows), ours, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    shutil.rmtree(folder)


def test_an_adapter_of_a_hub_model_names_the_revision(make_run: Any, load: Any, tmp_path: Path) -> None:
    hub = {"name": "hub", "source": "hub", "location": "someone/model", "revision": "v1.0", "config": {}}
    spec = make_run("attn", model=hub)
    targets = [target for target in load("llama").targets if target.role == "attn_q"]
    weights = {t.name: (torch.ones(4, t.in_features), torch.ones(4, t.out_features)) for t in targets}
    export.write_adapter(tmp_path, spec, targets, weights)
    config = json.loads((tmp_path / ADAPTER / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/model"
    assert config["revision"] == "v1.0"
    known = dataclasses.replace(spec, model=dataclasses.replace(spec.model, content=f"commit:{'a' * 40}"))
    export.write_adapter(tmp_path, known, targets, weights)
    assert json.loads((tmp_path / ADAPTER / "adapter_config.json").read_text())["revision"] == "a" * 40


def test_a_merge_is_compared_with_the_engine_and_not_with_peft(
    make_run: Any, run_all: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_run("attn", optim={"lr": 1e-2})
    run_all([spec])
    (run,) = rescore.find([tmp_path / "study" / spec.run_id])
    stock = peft_models.adapted

    def incomplete(base: Any, folders: Any) -> Any:
        model = stock(base, folders)
        with torch.no_grad():
            next(p for name, p in model.named_parameters() if "lora_B" in name).zero_()
        return model

    monkeypatch.setattr(peft_models, "adapted", incomplete)
    with pytest.raises(ModelError, match="merged model's logits differ"):
        merge.merge(run, tmp_path / "merged", device="cpu")


def test_places_of_a_tuner_are_checked(make_run: Any) -> None:
    base = architectures.base_of("deepseek_v3")
    from sweeper.methods import adapter

    spec = make_run("ff", method={"name": "dora", "dropout": 0.1})
    targets = [target for target in base.targets if target.role in PLACEMENTS["ff"]]
    with pytest.raises(SpecError, match="PEFT"):
        adapter(spec, dict.fromkeys(targets, 4)).build(base)  # type: ignore[union-attr]
