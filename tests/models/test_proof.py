"""A model is proved before it is trained: the right number on any architecture, or a refusal with the reason."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks import architectures, tiny_models
from sweeper import models
from sweeper.errors import ModelError, SpecError
from sweeper.models import forward, proof
from sweeper.models.base import settle
from sweeper.models.verdict import HeadForm
from sweeper.spec import ModelSpec

CPU = torch.device("cpu")

# of every kind: what attends with biases, windows, chunks, sinks or states; mixtures; tied, scaled and capped heads
CROSS_SECTION = (
    "llama", "gpt2", "gpt_neox", "opt", "gptj", "bloom", "falcon (alibi)", "mpt", "gpt_neo", "mistral", "gemma2",
    "gemma3_text", "llama4_text", "gpt_oss", "cohere", "phi3", "qwen2_moe", "deepseek_v3", "glm4_moe", "doge", "mamba",
    "falcon_mamba", "rwkv", "recurrent_gemma", "jamba", "falcon_h1", "qwen3_next", "minimax", "zamba2", "bert", "xlnet",
    "bart",
)  # fmt: skip
CACHELESS = {"mamba", "falcon_mamba", "rwkv", "recurrent_gemma", "minimax", "xlnet", "bart"}

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # about tiny configs
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.mark.parametrize("name", CROSS_SECTION)
def test_the_engine_gives_the_stock_models_numbers(name: str) -> None:
    row = architectures.look(name)
    assert row.passes, row
    assert row.cached == ("whole rows" if name in CACHELESS else "cache")
    assert all(row.faults.values()), row.faults
    assert len(row.faults) == (3 if name in CACHELESS else 5)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bert (encoder)", "looks at the tokens that follow"),
        ("gemma3_text (bidirectional)", "looks at the tokens that follow"),
        ("doge (experts)", "its rows are not independent"),
        ("llama (dynamic rope)", "rotary positions faster or slower by the length of a batch beyond 16 tokens"),
        ("reformer", "cannot run rows padded to one length"),
    ],
)
def test_what_is_refused_names_a_reason_in_the_model(name: str, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        proof.prove(tiny_models.build(name, prepare=settle))


def test_heads_are_read_off_the_model() -> None:
    def scaled(config: Any) -> Any:
        for name, value in (("logit_scale", 0.25), ("logits_scaling", 3.0), ("final_logit_softcapping", 30.0)):
            if hasattr(config, name):
                setattr(config, name, value)
        return settle(config)

    names = ("gemma2", "cohere", "granite", "bert")
    forms = {name: proof.prove(tiny_models.build(name, prepare=scaled)).head for name in names}
    assert forms == {
        "gemma2": HeadForm(softcap=30.0), "cohere": HeadForm(divisor=4.0), "granite": HeadForm(divisor=3.0),
        "bert": HeadForm(stock=True),
    }  # fmt: skip


class Counting(nn.Module):
    """An inner model that counts the texts' tokens by the mask it is given, as some long-context models do."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.get_input_embeddings = inner.get_input_embeddings

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **more: Any) -> Any:
        out = self.inner(input_ids=input_ids, attention_mask=attention_mask, **more)
        seen = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        out.last_hidden_state = out.last_hidden_state * (1 + 0.1 * seen.float().cumsum(1)[..., None])
        if attention_mask is None and len(input_ids) > 1:  # nothing says where texts end: their padding is read
            out.last_hidden_state = out.last_hidden_state + 0.1 * input_ids.float().mean()
        return out


def test_text_from_whole_rows_is_said() -> None:
    from sweeper.spec import DatasetSpec, EvaluationSpec
    from sweeper.training import generate

    slow, quick = (architectures.base_of(name) for name in ("mamba", "llama"))
    written = DatasetSpec(name="t", family="jsonl", metrics=("bleu",), max_new_tokens=4)
    asked = EvaluationSpec(name="e", generate=True)
    assert "from whole rows, which is slower" in (generate.remark(slow, written, asked) or "")
    assert generate.remark(quick, written, asked) is None
    assert generate.remark(slow, written, EvaluationSpec(name="e")) is None
    assert generate.remark(slow, DatasetSpec(name="t", family="jsonl"), asked) is None


def test_a_model_that_reads_the_mask_is_given_its_own() -> None:
    model = tiny_models.build("llama", prepare=settle)
    model.model = Counting(model.model)
    stock = model.forward

    def alone_or_masked(input_ids: Any, attention_mask: Any = None, **more: Any) -> Any:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return stock(input_ids=input_ids, attention_mask=mask, **more)

    model.forward = alone_or_masked
    found = proof.prove(model)
    assert found.padding == "masked"
    assert found.differences["causal"] > 0.01 > found.differences["masked"]


@pytest.mark.parametrize("small", [True, False])
def test_an_encoder_is_refused_in_bfloat16_too(small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not small:  # as of a model that is too large to be looked at in float32
        monkeypatch.setattr(proof, "SMALL", 0)
    with pytest.raises(ModelError, match="looks at the tokens that follow"):
        proof.prove(tiny_models.build("bert (encoder)", prepare=settle).bfloat16())


@pytest.mark.parametrize("name", ["llama", "mamba", "gpt_oss", "jamba"])
def test_a_large_model_in_bfloat16_is_judged_by_its_own_rounding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "SMALL", 0)
    model = tiny_models.build(name, prepare=settle).bfloat16()
    assert proof.prove(model).padding == "causal"
    monkeypatch.setattr(forward, "hidden_states", architectures.padding_seen)
    with pytest.raises(ModelError, match="in a padded batch than alone"):
        proof.prove(model)


def test_a_model_is_left_as_it_was() -> None:
    model = tiny_models.build("llama", prepare=settle).train().bfloat16()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    proof.prove(model)
    assert model.training
    assert model.dtype == torch.bfloat16
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_faults_are_found_in_each_precision(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.build("llama", prepare=settle).to(dtype)
    assert proof.prove(model).padding == "causal"
    monkeypatch.setattr(forward, "hidden_states", architectures.padding_seen)
    with pytest.raises(ModelError, match="other log-probabilities in a padded batch than alone"):
        proof.prove(model)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama and a tokenizer."""
    from sweeper.models.files import byte_tokenizer

    folder = tmp_path_factory.mktemp("saved") / "model"
    tiny_models.build("llama", prepare=settle).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelSpec:
    monkeypatch.setenv("SWEEPER_CACHE", str(tmp_path / "cache"))
    folder = shutil.copytree(saved, tmp_path / "model")
    return ModelSpec(name="mine", source="path", location=str(folder))


def load(spec: ModelSpec) -> models.BaseModel:
    return models.load(spec, dtype=torch.float32, device=CPU)


def change(spec: ModelSpec, **tensors: Any) -> None:
    """Replaces tensors of a saved model, named with `__` for dots; None takes one away."""
    file = Path(spec.location) / "model.safetensors"
    held: dict[str, Any] = load_file(file)
    held |= {name.replace("__", "."): value for name, value in tensors.items()}
    save_file({name: value for name, value in held.items() if value is not None}, file, metadata={"format": "pt"})


def test_a_verdict_is_kept_and_made_again_for_other_weights(copied: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(copied).verdict
    proved: list[Any] = []
    stock = proof.prove
    monkeypatch.setattr(proof, "prove", lambda *args: proved.append(args) or stock(*args))
    assert load(copied).verdict == first
    assert not proved
    change(copied, model__norm__weight=torch.full((32,), 2.0))
    assert load(copied).verdict.padding == "causal"
    assert len(proved) == 1


def test_a_refusal_is_kept_too(copied: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "hidden_states", architectures.padding_seen)
    with pytest.raises(ModelError, match="model=mine: LlamaForCausalLM gives a row other"):
        load(copied)
    monkeypatch.setattr(proof, "prove", lambda *args: pytest.fail("proved again"))
    with pytest.raises(ModelError, match="model=mine: LlamaForCausalLM gives a row other"):
        load(copied)


def test_what_a_device_lacks_is_no_verdict(copied: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        full = torch.OutOfMemoryError("CUDA out of memory")
        patched.setattr(forward, "hidden_states", lambda *args: (_ for _ in ()).throw(full))
        with pytest.raises(torch.OutOfMemoryError):
            load(copied)
    assert load(copied).verdict.padding == "causal"


def test_a_checkpoint_that_lacks_tensors_is_refused(copied: ModelSpec) -> None:
    change(copied, model__layers__1__mlp__up_proj__weight=None)
    with pytest.raises(ModelError, match=r"has no values for model\.layers\.1\.mlp\.up_proj\.weight"):
        load(copied)


def test_a_checkpoint_of_other_shapes_is_refused(copied: ModelSpec) -> None:
    change(copied, model__norm__weight=torch.ones(31))
    with pytest.raises(ModelError, match=r"model=mine: .*norm\.weight"):
        load(copied)


def test_a_bias_that_the_model_has_no_place_for_is_refused(copied: ModelSpec) -> None:
    change(copied, model__layers__0__self_attn__q_proj__bias=torch.ones(32))
    with pytest.raises(ModelError, match=r"no place for the checkpoint's model\.layers\.0\.self_attn\.q_proj\.bias"):
        load(copied)
    change(copied, model__layers__0__self_attn__q_proj__bias=None, vision_tower__patch__weight=torch.ones(3))
    load(copied)  # what belongs to no layer of the language model changes none of its numbers


def test_a_classifier_is_no_language_model(copied: ModelSpec) -> None:
    from transformers import LlamaForSequenceClassification

    config = tiny_models.config("llama")
    config.tie_word_embeddings = False
    LlamaForSequenceClassification(config).save_pretrained(copied.location)
    with pytest.raises(ModelError, match=r"has no values for lm_head\.weight, as a LlamaForCausalLM"):
        load(copied)


def test_a_tied_head_is_no_missing_tensor(copied: ModelSpec) -> None:
    model = tiny_models.build("gpt2", prepare=settle)
    model.save_pretrained(copied.location)
    assert "lm_head.weight" not in load_file(Path(copied.location) / "model.safetensors")
    assert load(copied).verdict.padding == "causal"


def test_texts_longer_than_positions_that_stretch_are_refused(copied: ModelSpec) -> None:
    config = json.loads((Path(copied.location) / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    config["max_position_embeddings"] = 64
    (Path(copied.location) / "config.json").write_text(json.dumps(config))
    models.check_length(copied, 64)
    with pytest.raises(SpecError, match=r"max_length=65: beyond 64 tokens the longest row .* Choose at most 64"):
        models.check_length(copied, 65)


REFUSED = {
    "cpmant", "gemma3n", "gemma4_assistant", "gemma4_unified_assistant", "jetmoe", "laguna", "musicgen",
    "musicgen_melody", "prophetnet", "reformer", "xlstm", "llama (dynamic rope)", "phi3 (longrope)", "doge (experts)",
    "bert (encoder)", "roberta (encoder)", "gemma3 (bidirectional)", "gemma3_text (bidirectional)", "xlm (masked)",
    "xlnet (bidirectional)",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_of_every_class_only_these_are_refused() -> None:
    rows = {name: architectures.look(name, faults=False) for name in tiny_models.names()}
    assert {name for name, row in rows.items() if row.refused} == REFUSED
    assert [name for name, row in rows.items() if not (row.passes or row.refused)] == []
