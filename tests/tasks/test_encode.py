"""Templates, tokens and their cache."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sweeper import tasks
from sweeper.errors import DataError
from sweeper.spec import DatasetSpec
from sweeper.tasks import FAMILIES, EncodedSplit, cache, jsonl
from sweeper.tasks.template import PREAMBLE, TEMPLATES, tokenise
from tests.tasks.conftest import NO_SYSTEM

Make = Callable[..., Any]


@pytest.fixture
def spec(write_jsonl: Callable[..., str]) -> DatasetSpec:
    path = write_jsonl(*[{"prompt": f"Wie heißt {i}?", "response": f"Nummer {i}"} for i in range(60)])
    return DatasetSpec(name="mine", family="jsonl", path=path, max_length=300)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("starts", [False, True])
@pytest.mark.parametrize("max_length", [300, 30])
def test_prompt_is_a_prefix_and_the_response_is_whole_and_ended(
    template: str, system: str | None, starts: bool, max_length: int, spec: DatasetSpec, make_tokenizer: Make
) -> None:
    spec = replace(spec, template=template, system=system, max_length=max_length)
    tokenizer = make_tokenizer(starts=starts)
    text = {e.id: e for part in tasks.load(spec).values() for e in part}
    for split in tasks.encode(spec, tokenizer, model_key="m", cache=None).values():
        for example in split.examples:
            alone, _ = tokenise(template, text[example.id].prompt, "", system, tokenizer)
            kept = list(example.input_ids[: example.prompt_length])
            assert kept[1:] == alone[len(alone) - len(kept) + 1 :]
            assert not starts or template == "chat" or kept[0] == tokenizer.bos_token_id
            response = example.input_ids[example.prompt_length :]
            assert response[-1] == tokenizer.eos_token_id
            assert tokenizer.decode(response[:-1]).strip() == text[example.id].response
            assert len(example.input_ids) <= max_length


def test_chat_is_what_the_template_of_the_tokenizer_says(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    prompt, response = tokenise("chat", "hi", "yes", "Be brief.", tokenizer)
    turns = [{"role": r, "content": c} for r, c in (("system", "Be brief."), ("user", "hi"), ("assistant", "yes"))]
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    assert tokenizer.decode([*prompt, *response]) == whole.removesuffix("\n")


def test_a_chat_template_without_system_turn_gets_it_in_the_users(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(NO_SYSTEM)
    prompt, _ = tokenise("chat", "hi", "yes", "Be brief.", tokenizer)
    assert tokenizer.decode(prompt) == "<start>user\nBe brief.\n\nhi<end>\n<start>assistant\n"


def test_chat_without_a_chat_template_is_the_instruction_format(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(None)
    assert tokenise("chat", "hi", "yes", None, tokenizer) == tokenise("alpaca", "hi", "yes", None, tokenizer)
    prompt, response = tokenise("chat", "hi", "yes", None, tokenizer)
    assert tokenizer.decode(prompt) == f"{PREAMBLE}\n\n### Instruction:\nhi\n\n### Response:\n"
    assert tokenizer.decode(response) == "yes<end>"


def test_plain_puts_one_space_before_a_response_that_has_none(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    decoded = [tokenizer.decode(ids) for ids in tokenise("plain", "Chapter:", "eye", "Answer.", tokenizer)]
    assert decoded == ["Answer.\nChapter:", " eye<end>"]
    assert tokenizer.decode(tokenise("plain", "Chapter:\n", "eye", None, tokenizer)[1]) == "eye<end>"
    assert tokenizer.decode(tokenise("plain", "def f():", "\n    pass", None, tokenizer)[1]) == "\n    pass<end>"


def test_a_tokenizer_that_cannot_end_a_response_is_refused(make_tokenizer: Make) -> None:
    with pytest.raises(DataError, match="no end-of-text token"):
        tokenise("plain", "a", "b", None, make_tokenizer(ends=None))


def test_long_prompts_lose_their_left_and_long_responses_are_left_out(
    write_jsonl: Callable[..., str], make_tokenizer: Make
) -> None:
    rows = [{"prompt": f"{i:03}", "response": "r", "split": tasks.SPLITS[i % 3]} for i in range(40)]
    rows += [{"prompt": "x" * 50 + f"end {i}", "response": "r", "split": "train", "id": f"long-{i}"} for i in range(3)]
    rows += [{"prompt": f"p{i}", "response": "r" * 20, "split": "train", "id": f"lost-{i}"} for i in range(2)]
    spec = DatasetSpec(name="m", family="jsonl", path=write_jsonl(*rows), max_length=16, template="plain")
    tokenizer = make_tokenizer(starts=True)
    train = tasks.encode(spec, tokenizer, model_key="m", cache=None)["train"]
    assert train.truncated == 3
    assert sorted(train.dropped) == ["lost-0", "lost-1"]
    long = next(e for e in train.examples if e.id == "long-1")
    assert tokenizer.decode(long.input_ids) == "<s>" + "x" * 7 + "end 1 r<end>"
    assert len(long.input_ids) == 16


def test_every_choice_has_room_after_the_same_prompt(write_jsonl: Callable[..., str], make_tokenizer: Make) -> None:
    choices = ["no", "yes, on the whole"]
    rows = [{"prompt": f"{i:02} " + "x" * 40, "response": choices[i % 2], "choices": choices} for i in range(20)]
    spec = DatasetSpec(name="m", family="jsonl", path=write_jsonl(*rows), max_length=32, template="plain")
    for split in tasks.encode(spec, make_tokenizer(), model_key="m", cache=None).values():
        assert split.truncated == len(split.examples) > 0
        assert len({e.prompt_length for e in split.examples}) == 1
        for example in split.examples:
            assert max(example.prompt_length + len(choice.ids) for choice in example.choices) <= spec.max_length


def test_a_length_that_leaves_a_split_empty_is_refused(spec: DatasetSpec, make_tokenizer: Make) -> None:
    with pytest.raises(DataError, match=r"dataset.max_length=8 is too short for every response of the train split"):
        tasks.encode(replace(spec, max_length=8), make_tokenizer(), model_key="m", cache=None)


def test_the_commonest_answer_is_that_of_the_examples_that_are_kept(
    write_jsonl: Callable[..., str], make_tokenizer: Make
) -> None:
    """A long answer may be the commonest and yet be left out everywhere."""
    rows = [{"prompt": f"p {i}", "response": "no", "split": tasks.SPLITS[i % 3]} for i in range(30)]
    rows += [{"prompt": f"q {i}", "response": "y" * 40, "split": tasks.SPLITS[i % 3]} for i in range(60)]
    path = write_jsonl(*rows)
    spec = DatasetSpec(name="m", family="jsonl", path=path, max_length=24, template="plain")
    splits = tasks.encode(spec, make_tokenizer(), model_key="m", cache=None)
    assert [len(split.dropped) for split in splits.values()] == [20, 20, 20]
    assert all(split.majority == {"exact_match": 1.0} for split in splits.values())


def test_what_was_left_out_or_cut_is_remarked_by_split(write_jsonl: Callable[..., str], make_tokenizer: Make) -> None:
    rows = [{"prompt": f"{i:03}", "response": "r", "split": tasks.SPLITS[i % 3]} for i in range(40)]
    rows += [{"prompt": "x" * 50 + f"end {i}", "response": "r", "split": "train"} for i in range(3)]
    rows += [{"prompt": f"p{i}", "response": "r" * 20, "split": "test"} for i in range(2)]
    spec = DatasetSpec(name="m", family="jsonl", path=write_jsonl(*rows), max_length=16, template="plain")
    tokenizer = make_tokenizer()
    assert tasks.remarks(spec, tokenizer, tasks.encode(spec, tokenizer, model_key="m", cache=None)) == [
        "dataset.max_length: 2 of 15 test examples are left out (their response is too long); "
        "3 of 17 train examples are cut at the prompt's start"
    ]
    roomy = replace(spec, max_length=100)
    assert tasks.remarks(roomy, tokenizer, tasks.encode(roomy, tokenizer, model_key="m", cache=None)) == []


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[DatasetSpec]:
    """The specs for which text was loaded, that is, the misses of the cache."""
    seen: list[DatasetSpec] = []

    class Counted:
        OPTIONS = jsonl.OPTIONS
        check = staticmethod(jsonl.check)
        version = staticmethod(jsonl.version)

        @staticmethod
        def load(spec: DatasetSpec) -> Any:
            seen.append(spec)
            return jsonl.load(spec)

    monkeypatch.setitem(FAMILIES, "jsonl", Counted())  # type: ignore[arg-type]
    return seen


def test_tokens_are_made_once(
    spec: DatasetSpec, make_tokenizer: Make, tmp_path: Path, loads: list[DatasetSpec]
) -> None:
    folder = tmp_path / "deep" / "cache"
    first = tasks.encode(spec, make_tokenizer(), model_key="m", cache=folder)
    again = tasks.encode(replace(spec, name="other", max_new_tokens=9), make_tokenizer(), model_key="m", cache=folder)
    assert first == again == tasks.encode(spec, make_tokenizer(), model_key="m", cache=None)
    assert len(loads) == 2
    assert [f.suffix for f in folder.iterdir()] == [".npz"]


def test_whatever_changes_the_tokens_changes_the_key(
    spec: DatasetSpec, make_tokenizer: Make, tmp_path: Path, loads: list[DatasetSpec]
) -> None:
    def misses(spec: DatasetSpec, tokenizer: Any, model_key: str = "m") -> int:
        before = len(loads)
        tasks.encode(spec, tokenizer, model_key=model_key, cache=tmp_path / "cache")
        return len(loads) - before

    tokenizer = make_tokenizer()
    assert misses(spec, tokenizer) == 1
    assert misses(spec, tokenizer) == 0
    assert misses(replace(spec, split_seed=1), tokenizer) == 1
    assert misses(replace(spec, template="plain"), tokenizer) == 1
    assert misses(replace(spec, system="s"), tokenizer) == 1
    assert misses(replace(spec, max_length=200), tokenizer) == 1
    assert misses(spec, tokenizer, model_key="n") == 1
    assert misses(spec, make_tokenizer(NO_SYSTEM)) == 1
    assert misses(spec, make_tokenizer(ends="<start>")) == 1
    assert misses(spec, make_tokenizer(starts=True)) == 1
    with Path(str(spec.path)).open("a") as file:
        file.write('{"prompt": "one", "response": "more"}\n')
    assert misses(spec, tokenizer) == 1


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text", "folder"])
def test_a_damaged_cache_file_is_made_again(
    damage: str, spec: DatasetSpec, make_tokenizer: Make, tmp_path: Path, loads: list[DatasetSpec]
) -> None:
    folder = tmp_path / "cache"
    first = tasks.encode(spec, make_tokenizer(), model_key="m", cache=folder)
    (file,) = folder.iterdir()
    content = bytearray(file.read_bytes())
    if damage == "flip":
        for index in range(100, len(content), 50):
            content[index] ^= 0xFF
    file.write_bytes({"cut": content[: len(content) // 2], "flip": content, "text": b"hello"}.get(damage, b""))
    if damage == "folder":
        file.unlink()
        file.mkdir()
    assert tasks.encode(spec, make_tokenizer(), model_key="m", cache=folder) == first
    assert len(loads) == 2
    if damage != "folder":
        assert cache.read(file) == first


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.npz"
    kept = {"train": EncodedSplit(())}
    cache.write(path, kept)

    def fail(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        cache.write(path, {"train": EncodedSplit((), 3)})
    assert cache.read(path) == kept
    assert [f.name for f in tmp_path.iterdir()] == ["a.npz"]


def test_the_default_task_is_short_for_the_default_model(root: Path, tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    from sweeper import models
    from sweeper.spec import ModelSpec, from_mapping

    def read(group: str, name: str) -> Any:
        return OmegaConf.to_container(OmegaConf.load(root / "conf" / group / f"{name}.yaml"))

    tokenizer = models.load_tokenizer(from_mapping(ModelSpec, read("model", "smollm2_135m")))
    spec = from_mapping(DatasetSpec, read("dataset", "icd10_chapter"))
    tasks.check(spec)
    splits = tasks.encode(spec, tokenizer, model_key="smollm2_135m", cache=tmp_path)
    lengths = [len(e.input_ids) for split in splits.values() for e in split.examples]
    assert sum(lengths) / len(lengths) < 18
    assert all(split.truncated == 0 and not split.dropped for split in splits.values())
    assert {e.input_ids[-1] for split in splits.values() for e in split.examples} == {
        tokenizer.convert_tokens_to_ids("<|im_end|>")
    }


@pytest.mark.parametrize("pattern", ["%d %b %Y", "%Y-%m-%d", "%A, %B %-d, %Y", "%H:%M"])
def test_a_template_that_writes_the_date_is_given_a_fixed_one(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Llama 3.2's does, which else makes other tokens of the same data every day."""
    from datetime import datetime

    from sweeper.models.files import byte_tokenizer
    from sweeper.tasks import template

    asked = "{%- if not date_string is defined %}{%- set date_string = strftime_now('" + pattern + "') %}{%- endif %}"
    text = asked + "\n\nToday: {{ date_string }}\n{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = text.replace(f"strftime_now('{pattern}')", repr(template.TODAY.strftime(pattern)))
    wanted, _ = template.chat("Hi", None, tokenizer)
    tokenizer.chat_template = text

    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Later":
            return cls(2031, 5, 6)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Later)
    assert template.chat("Hi", None, tokenizer) == (wanted, False)
    assert template.TODAY.strftime(pattern) in wanted


def test_a_chat_template_that_refuses_an_example_names_its_line(
    write_jsonl: Callable[..., str], make_tokenizer: Make
) -> None:
    rows = [{"id": f"no {i}", "prompt": f"What is {i}?", "response": str(i)} for i in range(60)]
    path = write_jsonl(*rows)
    spec = DatasetSpec(name="mine", family="jsonl", path=path, max_length=300)
    refusing = (
        "{% if '17' in messages[0].content %}{{ raise_exception('No 17 here') }}{% endif %}{{ messages[0].content }}"
    )
    with pytest.raises(
        DataError, match=r"my.jsonl:18: the model's chat template raises TemplateError \(No 17 here\); "
    ):
        tasks.encode(spec, make_tokenizer(refusing), model_key="m", cache=None)
    tasks.check_template(spec, make_tokenizer(refusing), model="m")
    with pytest.raises(
        DataError, match=r"^model=m with dataset=mine: .* raises UndefinedError \('str object' has no attr"
    ):
        tasks.check_template(spec, make_tokenizer("{{ messages[0].content.x.y }}"), model="m")
    plain = replace(spec, template="plain")
    assert tasks.encode(plain, make_tokenizer(refusing), model_key="m", cache=None)["train"].examples
