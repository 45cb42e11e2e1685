"""Nothing that another person can send or edit is unpickled: a payload is put in place of it and does not run."""

import json
import os
import pickle
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sweeper
from analysis import exchange
from analysis.load import load
from sweeper import models, record
from sweeper.adapters import peft_models
from sweeper.errors import DataError, ModelError, SpecError, SweeperError
from sweeper.models import files
from sweeper.record import ADAPTER, CHECKPOINT, RECORD
from sweeper.rescoring import rescore
from sweeper.spec import DatasetSpec, ModelSpec, RunSpec
from sweeper.study import storage
from sweeper.study.cmaes import PlainCmaEs
from sweeper.study.search_settings import SearchSettings
from sweeper.tasks import cache, hub, jsonl
from sweeper.training import checkpoint

SMOKE = ("experiment=smoke", "trainer.device=cpu", "trainer.max_steps=2", "study=tiny")


class Payload:
    """Makes a folder where it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.place),)


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    return tmp_path / "ran"


@pytest.fixture
def payload(ran: Path) -> bytes:
    return pickle.dumps(Payload(ran))


def test_the_payload_runs_where_something_unpickles_it(payload: bytes, ran: Path) -> None:
    pickle.loads(payload)
    assert ran.is_dir()


@pytest.fixture
def model_folder(tmp_path: Path, tiny_llama: Any) -> Path:
    """A model's folder without its weights."""
    folder = tmp_path / "model"
    tiny_llama.model.config.save_pretrained(folder)
    files.byte_tokenizer().save_pretrained(folder)
    return folder


def load_model(folder: Path) -> Any:
    spec = ModelSpec(name="path", source="path", location=str(folder))
    return models.load(spec, dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize("legacy", [True, False])
def test_weights_of_a_base_model(model_folder: Path, ran: Path, legacy: bool) -> None:
    torch.save({"weight": Payload(ran)}, model_folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ModelError, match="the model cannot be loaded"):
        load_model(model_folder)
    assert not ran.exists()


def test_a_bin_of_plain_tensors_is_read(model_folder: Path, tiny_llama: Any) -> None:
    torch.save(dict(tiny_llama.model.state_dict()), model_folder / "pytorch_model.bin")
    found = load_model(model_folder).model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in tiny_llama.model.state_dict().items())


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors"])
def test_an_adapter(name: str, tmp_path: Path, tiny_llama: Any, payload: bytes, ran: Path) -> None:
    folder = tmp_path / "run" / ADAPTER
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if name.endswith(".bin"):
        torch.save({"weight": Payload(ran)}, folder / name)
    else:
        (folder / name).write_bytes(payload)
    with pytest.raises(DataError):
        peft_models.adapted(tiny_llama, {"one": folder})
    with pytest.raises(DataError):
        rescore.read_adapter(folder.parent)
    assert not ran.exists()


def test_a_checkpoint(tmp_path: Path, payload: bytes, ran: Path) -> None:
    (tmp_path / CHECKPOINT).write_bytes(payload)
    with pytest.raises(checkpoint.Damaged):
        checkpoint.load(tmp_path)
    assert record.checkpoint_progress(tmp_path) is None
    torch.save({"progress": Payload(ran)}, tmp_path / CHECKPOINT)
    with pytest.raises(checkpoint.Damaged):
        checkpoint.load(tmp_path)
    assert not ran.exists()


def test_cached_tokens(tmp_path: Path, ran: Path) -> None:
    array = np.empty(1, dtype=object)
    array[0] = Payload(ran)
    np.savez_compressed(tmp_path / "tokens.npz", splits=array)
    assert cache.read(tmp_path / "tokens.npz") is None
    assert not ran.exists()


def test_a_record_and_an_imported_table(tmp_path: Path, payload: bytes, ran: Path) -> None:
    (tmp_path / "study" / "run").mkdir(parents=True)
    (tmp_path / "study" / "run" / RECORD).write_bytes(payload)
    assert [problem.kind for problem in load(tmp_path / "study").problems] == ["unreadable record"]
    assert record.status(tmp_path / "study" / "run") is None
    (tmp_path / "table.json").write_bytes(payload)
    with pytest.raises(ValueError, match=r"table\.json"):
        exchange.read(str(tmp_path / "table.json"))
    assert not ran.exists()


def test_a_searchs_journal(tmp_path: Path, payload: bytes, ran: Path) -> None:
    (tmp_path / storage.JOURNAL).write_bytes(payload + b"\n")
    with pytest.raises(SpecError, match="cannot be read"):
        storage.open_storage(SearchSettings(n_trials=2), tmp_path)
    assert not ran.exists()


def optuna_study(path: Path, sampler: Any) -> Any:
    import optuna

    kept = storage.open_storage(SearchSettings(n_trials=2), path)
    return optuna.create_study(storage=kept, study_name="s", sampler=sampler, load_if_exists=True)


def search(study: Any, trials: int) -> list[float]:
    study.optimize(lambda trial: trial.suggest_float("x", -1, 1) ** 2 + trial.suggest_float("y", -1, 1) ** 2, trials)
    return [trial.value for trial in study.trials]


def test_the_state_of_cmaes_in_a_study_of_somebody_elses(tmp_path: Path, payload: bytes, ran: Path) -> None:
    search(optuna_study(tmp_path, PlainCmaEs(seed=1, warn_independent_sampling=False)), 8)
    lines = (tmp_path / storage.JOURNAL).read_text().splitlines()
    changed = 0
    for place, line in enumerate(lines):
        plain = json.loads(line)
        del plain[storage.DIGEST]  # as an earlier version, or somebody else, wrote it
        for key in plain.get("system_attr", {}):
            if "optimizer" in key:
                plain["system_attr"][key] = payload.hex()
                changed += 1
        lines[place] = json.dumps(plain)
    assert changed
    (tmp_path / storage.JOURNAL).write_text("\n".join(lines) + "\n")
    refused = r"keeps a state of CMA-ES that cannot be read \(posix\.mkdir is no part of it\)"
    with pytest.raises(SpecError, match=refused):
        search(optuna_study(tmp_path, PlainCmaEs(seed=1, warn_independent_sampling=False)), 1)
    assert not ran.exists()


@pytest.mark.parametrize("options", [{}, {"use_separable_cma": True}, {"with_margin": True}])
def test_cmaes_goes_on_as_optunas_does(options: dict[str, Any], tmp_path: Path) -> None:
    import optuna

    found = []
    for name, kind in (("ours", PlainCmaEs), ("optuna", optuna.samplers.CmaEsSampler)):
        for trials in (9, 9):  # each from what the file holds
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                sampler = kind(seed=1, warn_independent_sampling=False, **options)
            values = search(optuna_study(tmp_path / name, sampler), trials)
        found.append(values)
    assert found[0] == found[1]
    assert len(found[0]) == 18


@pytest.mark.parametrize("name", ["train.pkl", "train.pickle", "train.npy", "train.pt", "data.jsonl", "data.py"])
def test_a_dataset(name: str, tmp_path: Path, payload: bytes, ran: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_bytes(payload)
    if name == "data.py":  # a script, which former versions of the library ran
        (tmp_path / "data" / name).write_text(f"import os\nos.mkdir({str(ran)!r})\n")
    options = {"prompt": "{a}", "response": "{b}"}
    with pytest.raises(DataError):
        hub.load(DatasetSpec(name="d", family="hub", path=str(tmp_path / "data"), options=options))
    with pytest.raises(DataError):
        jsonl.load(DatasetSpec(name="d", family="jsonl", path=str(tmp_path / "data" / name)))
    assert not ran.exists()


def test_every_file_that_a_run_leaves_or_keeps(
    tmp_path: Path, payload: bytes, ran: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Study and caches are replaced by payloads, file by file; commands that read them say so or make them again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SWEEPER_CACHE", str(tmp_path / "cache"))
    left = sweeper.train(*SMOKE)
    commands: Sequence[Callable[[], object]] = (
        lambda: sweeper.load_study("outputs/tiny"),
        lambda: rescore.find([Path("outputs/tiny")]),
        lambda: load("outputs/tiny"),
        lambda: sweeper.train(*SMOKE),
        lambda: sweeper.train(*SMOKE, "seed=1"),
    )
    kept = [path for top in ("outputs", "cache") for path in Path(top).rglob("*") if path.is_file()]
    assert {path.parts[0] for path in kept} == {"outputs", "cache"}
    assert left.folder / RECORD in kept
    for path in kept:
        path.write_bytes(payload)
    for command in commands:
        try:
            command()
        except SweeperError:
            continue
    assert not ran.exists()


def test_a_record_does_not_decide_that_foreign_code_is_run(
    tmp_path: Path, make_spec: Callable[..., RunSpec], make_record: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(model={"source": "path", "location": "/somewhere", "trust_remote_code": True})
    record.write_record(tmp_path / "run", make_record(spec))
    (tmp_path / "run" / ADAPTER).mkdir()
    (tmp_path / "run" / ADAPTER / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match="the code that /somewhere brings to be run; SWEEPER_TRUST_REMOTE_CODE=1"):
        rescore.find([tmp_path / "run"])
    monkeypatch.setenv(rescore.TRUST, "1")
    assert rescore.find([tmp_path / "run"])[0].spec == spec
