"""Base models, adapters and datasets from somebody else: each that is not what it should be ends in one line, soon, and
runs nothing.
"""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sweeper import models
from sweeper.adapters import peft_models
from sweeper.errors import DataError, ModelError, SweeperError
from sweeper.models import files
from sweeper.record import ADAPTER
from sweeper.rescoring import rescore
from sweeper.spec import DatasetSpec, ModelSpec
from sweeper.tasks import check_template, jsonl, template


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    return tmp_path / "ran"


def ends_in_lines(kind: type[SweeperError], act: Callable[[], object]) -> str:
    """What an act says that may fail by errors of one kind alone, in lines that can be read; empty where it works."""
    lines: tuple[str, ...] = ()
    try:
        act()
    except kind as error:
        lines = error.lines
    assert all(line.strip() and len(line) < 1500 for line in lines), [line[:3000] for line in lines]
    return "\n".join(lines)


# ---- base models ----


@pytest.fixture
def model_folder(tmp_path: Path, tiny_llama: Any) -> Path:
    folder = tmp_path / "model"
    tiny_llama.model.save_pretrained(folder)
    files.byte_tokenizer().save_pretrained(folder)
    return folder


def load_model(folder: Path) -> models.BaseModel:
    spec = ModelSpec(name="path", source="path", location=str(folder))
    return models.load(spec, dtype=torch.float32, device=torch.device("cpu"))


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


CODE = "import os\nos.mkdir({ran!r})\nclass Anything:\n    def __init__(self, *a, **k): pass\n"


@pytest.mark.parametrize("place", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_code_that_a_base_model_brings_is_not_run(place: str, model_folder: Path, ran: Path) -> None:
    (model_folder / "evil.py").write_text(CODE.format(ran=str(ran)))
    (model_folder / "custom_generate").mkdir()
    (model_folder / "custom_generate" / "generate.py").write_text(CODE.format(ran=str(ran)))
    classes = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer")
    brings = dict.fromkeys(classes, "evil.Anything") | {"AutoTokenizer": ["evil.Anything", "evil.Anything"]}
    if (model_folder / place).is_file():
        edit(model_folder / place, auto_map=brings, custom_generate="evil.py")
    try:
        found = load_model(model_folder)
        found.tokenizer("text")
    except ModelError:
        pass
    edit(model_folder / "config.json", model_type="never_heard_of", auto_map=brings)
    with pytest.raises(ModelError):
        load_model(model_folder)
    assert not ran.exists()


TEMPLATES = [
    "{{ cycler.__init__.__globals__.os.mkdir('RAN') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__['__builtins__']['__import__']('os').mkdir('RAN') }}",
    "{% for x in ().__class__.__base__.__subclasses__() %}{{ x.__init__.__globals__ }}{% endfor %}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ messages.append(1) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.mkdir('RAN') }}",
    "{{ lipsum.__globals__.os.popen('mkdir RAN').read() }}",
    "{{ strftime_now.__globals__ }}",
    "{% for a in range(100000000) %}x{% endfor %}",
    "{{ ",
    "{% for %}",
]


@pytest.mark.parametrize("text", TEMPLATES)
def test_a_chat_template_reaches_nothing(text: str, ran: Path) -> None:
    tokenizer = files.byte_tokenizer()
    tokenizer.chat_template = text.replace("RAN", str(ran))
    made: list[str] = []

    def render() -> None:
        check_template(DatasetSpec(name="d", family="jsonl", template="chat"), tokenizer, model="m")
        made.append(template.chat("x", None, tokenizer)[0])

    ends_in_lines(DataError, render)
    rendered = "".join(made)
    assert not ran.exists()
    assert "root:" not in rendered
    assert "<class" not in rendered


def header(plain: Any, *, length: int | None = None) -> bytes:
    text = plain if isinstance(plain, bytes) else json.dumps(plain).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HEADERS = {
    "a length without end": header({"a": TENSOR}, length=2**63),
    "a length of 99 MB": header({"a": TENSOR}, length=99_000_000),
    "a shape of 10^18 values": header({"a": TENSOR | {"shape": [10**9, 10**9]}}) + bytes(8),
    "a shape that overflows": header({"a": TENSOR | {"shape": [2**32, 2**32, 2]}}) + bytes(8),
    "a negative shape": header({"a": TENSOR | {"shape": [-2]}}) + bytes(8),
    "offsets beyond the file": header({"a": TENSOR | {"data_offsets": [0, 8 << 40]}}) + bytes(8),
    "offsets that overlap": header({"a": TENSOR, "b": TENSOR}) + bytes(8),
    "offsets the wrong way": header({"a": TENSOR | {"data_offsets": [8, 0]}}) + bytes(8),
    "another type": header({"a": TENSOR | {"dtype": "OBJECT"}}) + bytes(8),
    "nesting": header(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    "a list": header([1, 2, 3]),
    "no JSON": header(b"\x80\x04\x95"),
    "nothing": b"",
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_of_safetensors_is_a_line(name: str, tmp_path: Path, model_folder: Path) -> None:
    folder = tmp_path / "run" / ADAPTER
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    (folder / "adapter_model.safetensors").write_bytes(HEADERS[name])
    with pytest.raises(DataError, match=r"adapter_model\.safetensors"):
        rescore.read_adapter(folder.parent)
    (model_folder / "model.safetensors").write_bytes(HEADERS[name])
    with pytest.raises(ModelError):
        load_model(model_folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 10**9}, {"num_hidden_layers": 10**7}, {"vocab_size": 10**13}, {"vocab_size": -1},
        {"num_attention_heads": 0}, {"hidden_size": "x"}, {"num_hidden_layers": None}, {"rope_theta": "x"},
        {"architectures": ["os.system"]}, {"model_type": "../../x"}, {"quantization_config": {"quant_method": "x"}},
        {"hidden_act": "__import__"}, {"torch_dtype": "os"}, {"dtype": "x"}, {"rope_scaling": {"rope_type": []}},
    ],
)  # fmt: skip
def test_a_configuration_that_is_none_is_a_line(changes: dict[str, Any], model_folder: Path) -> None:
    edit(model_folder / "config.json", **changes)
    ends_in_lines(ModelError, lambda: load_model(model_folder))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' * 100_000, "[1]", "3", "", '{"x": ' + "9" * 10_000 + "}"])
@pytest.mark.parametrize("place", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_json_of_a_base_model_that_is_a_bomb_is_a_line(place: str, text: str, model_folder: Path) -> None:
    (model_folder / place).write_text(text)
    ends_in_lines(ModelError, lambda: load_model(model_folder))


# ---- adapters ----

CONFIG: dict[str, Any] = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"],
}  # fmt: skip
ADAPTERS: dict[str, dict[str, Any]] = {
    "a rank without end": {"r": 10**9},
    "a rank that would take all memory": {"r": 2_000_000},
    "a pattern of ranks without end": {"rank_pattern": {"q_proj": 2_000_000}},
    "a rank that is text": {"r": "x"},
    "a negative rank": {"r": -1},
    "no rank": {"r": None},
    "modules that are a number": {"target_modules": 3},
    "modules that are no pattern": {"target_modules": "["},
    "modules that there are not": {"target_modules": ["../../etc"]},
    "parameters that there are not": {"target_parameters": ["x.y"]},
    "an alpha that is text": {"lora_alpha": "x"},
    "patterns that are a list": {"rank_pattern": [1]},
    "a pattern that is none": {"rank_pattern": {"[": 3}},
    "another type": {"peft_type": "OS.SYSTEM"},
    "a type that is a number": {"peft_type": 3},
    "no type": {"peft_type": None},
    "code of Megatron's": {"megatron_config": {"a": 1}, "megatron_core": "evil_megatron"},
    "a library of its own": {"auto_mapping": {"parent_library": "evil_megatron", "base_model_class": "Anything"}},
    "a file of corda's": {"init_lora_weights": "corda", "corda_config": {"cache_file": "evil.pt"}},
    "a beginning of its own": {"init_lora_weights": "evil"},
    "prompts by a tokenizer": {
        "peft_type": "PROMPT_TUNING", "prompt_tuning_init": "TEXT", "tokenizer_name_or_path": "FOLDER",
        "tokenizer_kwargs": {"trust_remote_code": True}, "inference_mode": False, "num_virtual_tokens": 2,
        "prompt_tuning_init_text": "x",
    },
    "adapters elsewhere": {"peft_type": "XLORA", "adapters": {"0": "/nowhere"}, "hidden_size": 64},
    "a whole module": {"modules_to_save": ["lm_head", "model"]},
    "tokens that there are not": {"trainable_token_indices": [10**9]},
    "layers that are text": {"layers_to_transform": "x", "layers_pattern": "(a+)+$"},
    "a base elsewhere": {"base_model_name_or_path": "../../../etc/passwd", "revision": "../x"},
}  # fmt: skip


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapters_configuration_is_a_line_and_runs_nothing(
    name: str, tmp_path: Path, tiny_llama: Any, ran: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run" / ADAPTER
    folder.mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path))  # as the folder that a script lies in is
    (tmp_path / "evil_megatron.py").write_text(CODE.format(ran=str(ran)))
    (folder / "evil.py").write_text(CODE.format(ran=str(ran)))
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.A", None]}}))
    changes = json.loads(json.dumps(ADAPTERS[name]).replace("FOLDER", str(folder)))
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | changes))
    key = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    shapes = {"A": (2, 64), "B": (64, 2)}
    tensors = {key.format(n, part): torch.ones(shape) for n in range(4) for part, shape in shapes.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    before = {name for name, _ in tiny_llama.model.named_modules()}
    ends_in_lines(DataError, lambda: peft_models.remove(peft_models.adapted(tiny_llama, {"one": folder})))
    assert not ran.exists()
    assert "evil_megatron" not in sys.modules
    assert {name for name, _ in tiny_llama.model.named_modules()} == before


# ---- datasets ----

DATASETS = {
    "a number without end": '{"prompt": "a", "response": "b", "x": ' + "9" * 10_000 + "}",
    "deeply nested": '{"prompt": "a", "response": "b", "x": ' + "[" * 200_000 + "]" * 200_000 + "}",
    "only brackets": "[" * 200_000,
    "half a surrogate": '{"prompt": "\\ud800", "response": "b"}',
    "a control character": '{"prompt": "a\\u0000\\u001b[2J", "response": "b"}',
    "NaN": '{"prompt": NaN, "response": "b"}',
    "a prompt that is a list": '{"prompt": ["a"], "response": "b"}',
    "a key twice": '{"prompt": "a", "prompt": "c", "response": "b"}',
    "a check that is none": '{"prompt": "a", "response": "b", "check": 3}',
    "nothing but spaces": " \n \n",
    "bytes that are no text": b"\xff\xfe\x00",
    "a null byte": b"\0\0\0\0",
    "an id without end": '{"prompt": "a", "response": "b", "id": ' + "9" * 5000 + "}",
    "a split that is none": '{"prompt": "a", "response": "b", "split": "../../x"}',
}


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet"])
@pytest.mark.parametrize("name", DATASETS)
def test_a_dataset_is_examples_or_a_line(name: str, suffix: str, tmp_path: Path) -> None:
    content = DATASETS[name]
    file = tmp_path / f"data.{suffix}"
    file.write_bytes(content if isinstance(content, bytes) else "\n".join([content] * 40).encode())
    said = ends_in_lines(DataError, lambda: jsonl.load(DatasetSpec(name="d", family="jsonl", path=str(file))))
    assert not said or str(file) in said


def test_a_line_of_many_megabytes_is_read(tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": f"{n} " + "x" * (1 << 20), "response": "b"}) for n in range(30)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    found = jsonl.load(DatasetSpec(name="d", family="jsonl", path=str(tmp_path / "data.jsonl")))
    assert sum(map(len, found.values())) > 20


def test_what_is_no_plain_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "data.jsonl")
    for path in (tmp_path / "data.jsonl", Path("/dev/zero"), tmp_path):
        code = (
            "import sys\nfrom sweeper.errors import DataError\nfrom sweeper.spec import DatasetSpec\n"
            "from sweeper.tasks import jsonl\n"
            f"try: jsonl.load(DatasetSpec(name='d', family='jsonl', path={str(path)!r}))\n"
            "except DataError as error: print(error)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True, cwd=tmp_path
        )
        assert f"dataset.path={path}: " in done.stdout
