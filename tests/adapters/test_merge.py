"""A merged model is a plain transformers model with the adapted one's logits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    BeftConfig,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sweeper.adapters import merge, peft_models
from sweeper.errors import DataError, ModelError
from sweeper.record import WEIGHTS
from sweeper.rescoring.rescore import Saved
from tests.adapters.conftest import base_of, updates_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True:UserWarning"),
]

IDS = torch.arange(3, 67).view(2, 32)
Make = Callable[..., Saved]


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: Any) -> torch.Tensor:
    return torch.stack(peft_models.logits(model, list(IDS)))


CASES = [
    ("llama", "full", {}),
    ("gpt2", "full", {}),
    ("gpt_neox", "full", {"embeddings": True, "head": True}),
    ("llama", "attn", {"embeddings": True}),
    ("llama", "attn", {"head": True}),
    ("gpt2", "ff", {"embeddings": True, "head": True}),
]


@pytest.mark.parametrize(("kind", "placement", "place"), CASES, ids=str)
def test_logits_are_those_of_peft(kind: str, placement: str, place: Any, saved: Make, tmp_path: Path) -> None:
    run = saved("a", kind, placement, ranks={"attn_o": 2, "ff_down": 7}, **place)
    note = merge.merge(run, tmp_path / "merged", device="cpu")
    base = peft_models.load_base(run.spec, "cpu", "float32")
    plain = logits(base.model)
    wanted = logits(peft_models.adapted(base, {"default": run.adapter}))
    found = logits(load(tmp_path / "merged"))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert float((wanted - plain).abs().max()) > 0.05
    assert note["max_logit_difference"] < 1e-4
    assert json.loads((tmp_path / "merged" / "merged.json").read_text()) == note


def test_weights_are_base_plus_update(saved: Make, tmp_path: Path) -> None:
    run = saved("a", "llama", "attn")
    merge.merge(run, tmp_path / "merged", device="cpu")
    model, own = load(tmp_path / "merged"), base_of(run.spec).model
    changed = updates_of(run)
    for name, parameter in own.named_parameters():
        wanted = parameter + changed.get(name.removesuffix(".weight"), 0)
        torch.testing.assert_close(model.get_parameter(name), wanted, rtol=1e-5, atol=1e-6)
    assert len(changed) == 8


def test_the_folder_is_a_model_like_any_other(saved: Make, tmp_path: Path) -> None:
    from sweeper import models
    from sweeper.spec import ModelSpec

    run = saved("a", "gpt2", "full")
    merge.merge(run, tmp_path / "merged", device="cpu")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["architectures"] == ["GPT2LMHeadModel"]
    assert config["resid_pdrop"] == 0.1  # the engine's own switches are not left in it
    assert config["use_cache"]
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").eos_token == "<|im_end|>"
    spec = ModelSpec(name="path", source="path", location=str(tmp_path / "merged"))
    again = models.load(spec, dtype=torch.float32, device=torch.device("cpu"))
    torch.testing.assert_close(logits(again.model), logits(load(tmp_path / "merged")))


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (LoraConfig, {"r": 4, "use_dora": True}),
        (VeraConfig, {"r": 8}),
        (LoHaConfig, {"r": 2}),
        (AdaLoraConfig, {"init_r": 6, "target_r": 2, "total_step": 9}),
    ],
    ids=["dora", "vera", "loha", "adalora"],
)
def test_other_kinds_of_adapters(config: Any, fields: Any, by_peft: Callable[..., Saved], tmp_path: Path) -> None:
    run = by_peft("a", config, **fields)
    merge.merge(run, tmp_path / "merged", device="cpu")
    base = peft_models.load_base(run.spec, "cpu", "float32")
    wanted = logits(PeftModel.from_pretrained(base.model, run.adapter))
    torch.testing.assert_close(logits(load(tmp_path / "merged")), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Detected that the base layer has no bias:UserWarning")
def test_what_cannot_be_merged_is_refused_in_a_line(saved: Make, by_peft: Callable[..., Saved], tmp_path: Path) -> None:
    prompt, bias = saved("a", "gpt2"), by_peft("b", BeftConfig)
    own = peft_models.load_base(prompt.spec, "cpu", "float32").model
    get_peft_model(own, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).save_pretrained(prompt.adapter)
    with pytest.raises(DataError, match=r"merge: a is PROMPT_TUNING, which changes no weight of the model"):
        merge.merge(prompt, tmp_path / "merged", device="cpu")
    with pytest.raises(DataError, match=r"merge: PEFT cannot: Base layer has no bias"):
        merge.merge(bias, tmp_path / "merged", device="cpu")
    assert not (tmp_path / "merged").exists()


def test_weights_that_were_trained_themselves(saved: Make, tmp_path: Path) -> None:
    run = saved("a", "llama")
    base = peft_models.load_base(run.spec, "cpu", "float32")
    name = "model.layers.1.mlp.up_proj.weight"
    (run.folder / WEIGHTS).mkdir()
    new = base.model.get_parameter(name) * 1.5
    save_file({name: new}, run.folder / WEIGHTS / "model.safetensors")
    merge.merge(run, tmp_path / "merged", device="cpu")
    model = load(tmp_path / "merged")
    for other, parameter in base.model.named_parameters():
        torch.testing.assert_close(model.get_parameter(other), new if other == name else parameter)
    save_file({"model.layers.0.mlp.up_proj.bias": torch.zeros(48)}, run.folder / WEIGHTS / "model.safetensors")
    with pytest.raises(DataError, match=r"tiny_llama has no model.layers.0.mlp.up_proj.bias: training added it"):
        merge.merge(run, tmp_path / "other", device="cpu")


def test_in_bfloat16_rounding_is_allowed_for(saved: Make, tmp_path: Path) -> None:
    run = saved("a", "llama", "full")
    note = merge.merge(run, tmp_path / "merged", device="cpu", precision="bfloat16")
    assert 1e-4 < note["max_logit_difference"] <= note["tolerance"]
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_merge_that_is_not_equal_leaves_nothing(saved: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = saved("a", "llama")
    honest = peft_models.logits
    seen: list[int] = []

    def shifted(model: Any, ids: torch.Tensor) -> torch.Tensor:
        seen.append(1)
        return [one + 0.01 * len(seen) for one in honest(model, ids)]

    monkeypatch.setattr(peft_models, "logits", shifted)
    with pytest.raises(ModelError, match=r"logits differ by up to 0.01, more than the 0.0001 that float32 explains"):
        merge.merge(run, tmp_path / "merged", device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["study"]


def test_nothing_is_overwritten(saved: Make, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine").write_text("")
    with pytest.raises(DataError, match="there is something in it already; give a new folder"):
        merge.merge(saved("a"), tmp_path / "merged", device="cpu")
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["mine"]
