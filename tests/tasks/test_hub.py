"""Column mapping of hub datasets, on tables made here; and what is said when there is no network."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

datasets = pytest.importorskip("datasets")

from sweeper import tasks  # noqa: E402
from sweeper.errors import DataError  # noqa: E402
from sweeper.spec import DatasetSpec  # noqa: E402

QA = DatasetSpec(
    name="qa",
    family="hub",
    path="some/where",
    options={"prompt": "{question}", "response": "{answer}", "splits": {"train": "train", "test": "test"}},
)


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts datasets in memory in place of the download."""

    def put(**splits: list[dict[str, Any]]) -> None:
        source = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()})
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: source)
        monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *args, **kwargs: None)

    return put


def rows(first: int, last: int) -> list[dict[str, Any]]:
    return [{"question": f"question {i}", "answer": f"answer {i}", "source": f"s{i // 5}"} for i in range(first, last)]


def test_published_test_is_kept_and_validation_is_cut_from_train(tables: Callable[..., None]) -> None:
    tables(train=rows(0, 80), test=rows(80, 100))
    tasks.check(QA)
    splits = tasks.load(QA)
    assert {e.prompt for e in splits["test"]} == {f"question {i}" for i in range(80, 100)}
    assert [len(splits[s]) for s in ("train", "validation")] == [70, 10]
    assert splits["test"][0].response == splits["test"][0].prompt.replace("question", "answer")


def test_train_loses_what_test_repeats(tables: Callable[..., None]) -> None:
    tables(train=[*rows(0, 80), {"question": "Question  85!", "answer": "x", "source": ""}], test=rows(80, 100))
    splits = tasks.load(QA)
    assert len(splits["test"]) == 20
    assert len(splits["train"]) + len(splits["validation"]) == 80


def test_rewrites_of_one_source_stay_together(tables: Callable[..., None]) -> None:
    tables(train=rows(0, 100))
    spec = replace(QA, options={"prompt": "{question}", "response": "{answer}", "group": "{source}"})
    groups = [{e.group for e in part} for part in tasks.load(spec).values()]
    assert sum(map(len, groups)) == 20


def test_columns_are_joined_and_empty_rows_left_out(tables: Callable[..., None]) -> None:
    made = [{"instruction": f"Do {i}", "input": "" if i % 2 else "{this}", "output": f"{i}"} for i in range(20)]
    tables(train=[*made, {"instruction": "empty", "input": "", "output": " "}])
    spec = replace(QA, options={"prompt": "{instruction}\n\n{input}", "response": "{output}"})
    prompts = {e.prompt for part in tasks.load(spec).values() for e in part}
    assert len(prompts) == 20
    assert {"Do 1", "Do 2\n\n{this}"} <= prompts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "{instruction}"}, r"names the column instruction, which train of some/where lacks; it has ques"),
        ({"prompt": None}, r"dataset.options.prompt is required"),
        ({"response": "{answer"}, r"dataset.options.response='\{answer': "),
        ({"splits": {"train": "train", "test": "dev"}}, r"has no split test: dev; it has train, test"),
        ({"splits": {"test": "test"}}, r"needs dataset.options.splits.train"),
    ],
)
def test_a_wrong_mapping_is_named(options: dict[str, Any], message: str, tables: Callable[..., None]) -> None:
    tables(train=rows(0, 50), test=rows(50, 60))
    with pytest.raises(DataError, match=message):
        tasks.check(replace(QA, options={**QA.options, **options}))


COLUMNS: dict[str, dict[str, Any]] = {
    "alpaca": dict.fromkeys(("instruction", "input", "output", "text"), ""),
    "arxiv": dict.fromkeys(("article", "abstract"), ""),
    "gsm8k": dict.fromkeys(("question", "answer"), ""),
    "legalbench": dict.fromkeys(("index", "answer", "question", "text"), "") | {"answer": ["Relevant", "Irrelevant"]},
    "mbpp": dict.fromkeys(("task_id", "text", "code"), "")
    | {"test_setup_code": [""], "test_list": [["assert f() == 1"] * 3]},
    "medmcqa": dict.fromkeys(("id", "question", "opa", "opb", "opc", "opd"), "") | {"cop": [0, 3]},
    "metamathqa": dict.fromkeys(("type", "query", "original_question", "response"), ""),
    "pubmed_qa": {
        "pubid": "", "question": "", "context": [{"contexts": ["Aim.", "Result."], "labels": ["A", "R"]}],
        "long_answer": "", "final_decision": ["yes", "no", "maybe"],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", COLUMNS)
def test_the_configurations_fit_the_columns_their_sources_publish(
    name: str, root: Path, tables: Callable[..., None]
) -> None:
    from omegaconf import OmegaConf

    from sweeper.spec import from_mapping

    made = [
        {key: values[i % len(values)] if values else f"{key} {i}" for key, values in COLUMNS[name].items()}
        for i in range(60)
    ]
    tables(train=made[:30], test=made[30:45], validation=made[45:])
    config: Any = OmegaConf.to_container(OmegaConf.load(root / "conf" / "dataset" / f"{name}.yaml"))
    spec = from_mapping(DatasetSpec, config)
    tasks.check(spec)
    splits = tasks.load(spec)
    for example in (e for part in splits.values() for e in part):
        assert not example.choices or example.response in example.choices
        assert "{" not in example.prompt + example.response
        compile(example.check, "check", "exec")


def test_a_number_chooses_the_answer_and_lists_become_lines(tables: Callable[..., None]) -> None:
    made = [{"q": f"q {i}", "a": "no", "b": f"yes {i}", "n": i % 2, "lines": ["x", str(i)]} for i in range(40)]
    tables(train=made)
    options = {"prompt": "{q}\n{lines}", "choices": ["{a}", "{b}"], "answer": "{n}"}
    found = [e for part in tasks.load(replace(QA, options=options)).values() for e in part]
    assert {e.choices[0] for e in found} == {"no"}
    assert sorted(e.response for e in found if e.response != "no") == sorted(f"yes {i}" for i in range(1, 40, 2))
    assert found[0].prompt.split("\n")[1:] == ["x", found[0].prompt.split("\n")[0].removeprefix("q ")]
    with pytest.raises(DataError, match=r"dataset.options.answer gives 'q 0', not a number below 2"):
        tasks.load(replace(QA, options=options | {"answer": "{q}"}))


def test_a_folder_of_files_is_read_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *args, **kwargs: pytest.fail("asked the network"))
    folder = tmp_path / "qa"
    folder.mkdir()
    for name, part in (("train", rows(0, 40)), ("test", rows(40, 50))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    spec = replace(QA, path=str(folder))
    tasks.check(spec)
    assert len(tasks.load(spec)["test"]) == 10
    with pytest.raises(DataError, match=r"cannot be loaded: .*'other' not found"):
        tasks.check(replace(spec, options={**spec.options, "config": "other"}))


def test_without_network_it_says_so_at_once_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    before = datasets.config.HF_HUB_OFFLINE
    message = r"^dataset=qa: some/where cannot be reached and is not in the local cache; use a dataset that needs no"
    with pytest.raises(DataError, match=message):
        tasks.check(QA)
    assert before == datasets.config.HF_HUB_OFFLINE


def test_a_hub_dataset_needs_a_path() -> None:
    with pytest.raises(DataError, match=r"needs dataset.path"):
        tasks.check(replace(QA, path=None))


def test_columns_stand_for_options(tables: Callable[..., None]) -> None:
    tables(train=[{**row, "meta.kind": "k"} for row in rows(0, 40)])
    short = replace(
        QA,
        options={"splits": None},
        columns={"prompt": r"{question}\n{meta.kind}", "response": "answer", "group": "source"},
    )
    long = replace(QA, options={"prompt": "{question}\nk", "response": "{answer}", "group": "{source}", "splits": None})
    tasks.check(short)
    assert tasks.load(short) == tasks.load(long)
    with pytest.raises(DataError, match=r"^dataset.columns.response names the column anser, .*it has question"):
        tasks.check(replace(short, columns={"prompt": "question", "response": "anser"}))
    with pytest.raises(DataError, match=r"^dataset.options.prompt is required, .*; the columns are question, answer,"):
        tasks.check(replace(QA, options={}))


def test_nothing_in_a_column_is_no_text(tables: Callable[..., None]) -> None:
    tables(train=[{**row, "more": None} for row in rows(0, 40)])
    spec = replace(QA, options={"prompt": "{question} {more}", "response": "{answer}"})
    assert not any("None" in e.prompt for part in tasks.load(spec).values() for e in part)


def test_conversations_and_running_text_need_no_columns(tables: Callable[..., None]) -> None:
    chats = [
        {"messages": [{"role": who, "content": f"{who} {i}"} for who in ("system", "user", "assistant")], "from": i}
        for i in range(40)
    ]
    spec = replace(QA, options={}, columns={"group": "from"})
    tables(train=chats)
    tasks.check(spec)
    found = tasks.load(spec)["train"][0]
    assert [turn.role for turn in found.turns] == ["system", "user", "assistant"]
    assert found.response == f"assistant {found.group}"
    tables(train=[{"text": f"Once {i} upon"} for i in range(40)], test=[{"text": "Once 7 upon."}])
    tasks.check(replace(QA, options={}))
    splits = tasks.load(replace(QA, options={}))
    assert all(e.prompt == "" for split in splits.values() for e in split)
    assert sum(map(len, splits.values())) == 40


def test_a_row_of_another_layout_is_named(tables: Callable[..., None]) -> None:
    spec = replace(QA, options={})
    tables(train=[*({"instruction": f"Say {i}.", "output": "x"} for i in range(40)), {"instruction": "", "output": ""}])
    tasks.check(spec)
    with pytest.raises(DataError, match=r"row train-40: missing prompt and response; it has instruction, output"):
        tasks.load(spec)
    tables(train=[{"messages": []}])
    with pytest.raises(DataError, match=r"row train-0: the conversation has no turn of the assistant"):
        tasks.check(spec)
