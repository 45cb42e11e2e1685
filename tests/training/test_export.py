"""An exported adapter loads in stock PEFT and gives the engine's logits."""

import copy
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from sweeper import methods
from sweeper.lora.forms import AdapterSpec
from sweeper.models import BaseModel
from sweeper.placement.placement import Target
from sweeper.record import ADAPTER
from sweeper.spec import RunSpec
from sweeper.training.export import write_adapter
from sweeper.training.pack import Pack
from sweeper.training.pack_config import PackConfig
from sweeper.training.run_state import RunState

pytestmark = [
    # PEFT still asks transformers by a name that is about to go
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    # a head of GPT-2 is no Conv1D, and PEFT mends the flag for it
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True:UserWarning"),
    # merging into tied weights would change both ends; nothing is merged here
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning"),
]


def random_state(adapter: AdapterSpec, targets: Mapping[str, Target]) -> dict[str, tuple[torch.Tensor, ...]]:
    """An adapter well away from the identity, with moments of zero."""
    generator = torch.Generator().manual_seed(1)
    state = {}
    for name, rank in adapter.ranks.items():
        a = 0.3 * torch.randn(rank, targets[name].in_features, generator=generator)
        b = 0.3 * torch.randn(rank, targets[name].out_features, generator=generator)
        state[name] = (a, b, *(torch.zeros_like(part) for part in (a, b, a, b)))
    return state


def engine_logits(base: BaseModel, job: RunState, ids: torch.Tensor) -> torch.Tensor:
    with Pack(base, [job.adapter.ranks], PackConfig(batch_size=4)) as pack, torch.no_grad():
        pack.add(job)
        pack.model.eval()
        pack.use_lanes([0])
        return pack.head.logits(pack.hidden(ids, torch.full((len(ids),), ids.shape[1])))


def check(
    base: BaseModel, spec: RunSpec, ranks: Mapping[Target, int], make_job: Any, examples: Any, folder: Path
) -> PeftModel:
    adapter = methods.adapter(spec, ranks)
    state = random_state(adapter, {target.name: target for target in ranks})
    job = make_job("x", adapter, examples)
    job.weights = state
    ids = torch.arange(3, 51).view(3, 16)
    ours = engine_logits(base, job, ids)
    size = write_adapter(folder, spec, list(ranks), {name: parts[:2] for name, parts in state.items()})
    assert size == 4 * sum(rank * (target.in_features + target.out_features) for target, rank in ranks.items())
    loaded = PeftModel.from_pretrained(copy.deepcopy(base.model), folder / ADAPTER)
    with torch.no_grad():
        theirs = loaded(input_ids=ids).logits
        plain = base.model(input_ids=ids).logits
    assert float((ours - plain).abs().max()) > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    return loaded


CASES = [
    ("llama", "full", {}),
    ("llama", "attn", {"layers": "last:1"}),
    ("llama", "ends", {"embeddings": True}),
    ("llama", "ff", {"head": True}),
    ("gpt2", "full", {}),
    ("gpt2", "attn", {"embeddings": True, "head": True}),
    ("gpt_neox", "full", {"embeddings": True, "head": True}),
    ("qwen2", "full", {}),
    ("phi3", "full", {}),
    ("gemma2", "full", {"head": True}),
    ("gemma3_text", "ff", {"embeddings": True}),
    ("opt", "full", {"layers": "every_other"}),
    ("bloom", "full", {}),
    ("falcon", "full", {}),
]


@pytest.mark.parametrize(("kind", "name", "fields"), CASES, ids=lambda value: str(value))
def test_exported_adapter_gives_the_engines_logits(
    kind: str, name: str, fields: dict[str, Any], load: Any, place: Any, make_spec: Any, make_job: Any,
    make_examples: Any, tmp_path: Path,
) -> None:  # fmt: skip
    base = load(kind)
    ranks = dict.fromkeys(place(base, name, **fields), 3)
    check(base, make_spec(rank=3, alpha=5), ranks, make_job, make_examples(0), tmp_path)


@pytest.mark.parametrize("rank_stabilised", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_exported_adapter_whose_modules_differ_in_rank(
    kind: str, rank_stabilised: bool, load: Any, place: Any, make_spec: Any, make_job: Any, make_examples: Any,
    tmp_path: Path,
) -> None:  # fmt: skip
    base = load(kind)
    targets = place(base, "full", embeddings=True)
    ranks = {target: (4, 4, 2, 9)[place % 4] for place, target in enumerate(targets)}
    spec = make_spec(rank=4, alpha=6, method={"rank_stabilised": rank_stabilised})
    loaded = check(base, spec, ranks, make_job, make_examples(0), tmp_path)
    for target, rank in ranks.items():
        assert loaded.base_model.model.get_submodule(target.name).r["default"] == rank
        scale = 6 / 4**0.5 if rank_stabilised else 6 / 4
        assert loaded.base_model.model.get_submodule(target.name).scaling["default"] == pytest.approx(scale)


def test_rank_stabilised_adapter(
    load: Any, place: Any, make_spec: Any, make_job: Any, make_examples: Any, tmp_path: Path
) -> None:
    base = load("llama")
    spec = make_spec(rank=9, alpha=4, method={"rank_stabilised": True})
    loaded = check(base, spec, dict.fromkeys(place(base, "attn"), 9), make_job, make_examples(0), tmp_path)
    assert loaded.peft_config["default"].use_rslora


def test_exporting_again_replaces_the_folder(load: Any, place: Any, make_spec: Any, tmp_path: Path) -> None:
    targets = place(load("llama"), "attn")
    (tmp_path / ADAPTER).mkdir()
    (tmp_path / ADAPTER / "left over").write_text("")
    spec = make_spec(model=dataclasses.asdict(load("llama").spec))
    weights = {t.name: (torch.zeros(2, t.in_features), torch.zeros(2, t.out_features)) for t in targets}
    write_adapter(tmp_path, spec, targets, weights)
    assert sorted(path.name for path in tmp_path.iterdir()) == [ADAPTER]
    files = sorted(path.name for path in (tmp_path / ADAPTER).iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors"]
    modes = {(tmp_path / ADAPTER / name).stat().st_mode for name in files}
    assert len(modes) == 1, "weights are for everyone who may read the configuration"
    config = json.loads((tmp_path / ADAPTER / files[0]).read_text())
    assert sorted(config["target_modules"]) == sorted(target.name for target in targets)
    assert config["base_model_name_or_path"] == "llama"
