"""Every tuner of PEFT: it trains a causal language model through `method=peft`, or the table says why it does not."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PeftType

from sweeper import methods, models, record
from sweeper.errors import SpecError
from sweeper.methods.tuners import CAPTURED, NEEDED, UNABLE, tuners
from sweeper.tasks.package import is_installed

pytestmark = [
    # PEFT's own, about names of transformers and about what it is told
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
VIRTUAL = {"num_virtual_tokens": 4}
# what a tuner must be told on a model of width 32, and a learning rate that suits it
NEEDS: dict[str, tuple[dict[str, Any], float]] = {
    "ADAPTION_PROMPT": ({"adapter_len": 4, "adapter_layers": 2}, 0.1),
    "BEFT": ({}, 0.05),
    "C3A": ({"block_size": 16}, 0.02),
    "CARTRIDGE": (VIRTUAL, 0.1),
    "FOURIERFT": ({"n_frequency": 64, "scaling": 100.0}, 0.05),
    "IA3": ({}, 0.05),
    "LN_TUNING": ({}, 0.05),
    "MULTITASK_PROMPT_TUNING": ({**VIRTUAL, "num_tasks": 1}, 0.3),
    "OFT": ({"r": 0, "oft_block_size": 8}, 0.01),
    "P_TUNING": ({**VIRTUAL, "encoder_hidden_size": 16}, 0.05),
    "PREFIX_TUNING": (VIRTUAL, 0.1),
    "PROMPT_TUNING": (VIRTUAL, 0.3),
    "RANDLORA": ({}, 1e-3),
    "ROAD": ({"group_size": 16}, 0.05),
    "TRAINABLE_TOKENS": ({"token_indices": list(range(3, 100))}, 0.05),
    "UNILORA": ({}, 0.1),
    "VBLORA": ({"vector_length": 16, "num_vectors": 8}, 0.05),
    "WAVEFT": ({"n_frequency": 64}, 0.01),
}


@pytest.mark.parametrize("tuner", [kind.name for kind in PeftType])
def test_every_tuner_trains_or_says_why_not(tuner: str, make_run: Any, run_all: Any, load: Any, tmp_path: Path) -> None:
    arguments, lr = NEEDS.get(tuner, ({}, 0.01))
    method = {"name": "peft", "options": {"tuner": tuner.lower(), "arguments": arguments}}
    spec = make_run("full", method=method, optim={"lr": lr}, trainer={"max_steps": 30, "batch_size": 4})
    if tuner in UNABLE:
        with pytest.raises(SpecError, match=f"method.options.tuner={tuner}: {UNABLE[tuner][:20]}"):
            methods.check(spec)
        return
    module, package = NEEDED.get(tuner, ("torch", "torch"))
    if not is_installed(module):
        with pytest.raises(SpecError, match=f"tuner={tuner} needs the Python package {package}"):
            methods.check(spec)
        return
    base = load("llama")
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    run_all([spec])
    folder = tmp_path / "study" / spec.run_id
    done = record.read_record(folder)
    assert done.status == "completed", done.error
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert sum(losses[-8:]) < sum(losses[:8])
    assert done.trainable_parameters > 0
    assert all(torch.equal(value, before[name]) for name, value in base.model.state_dict().items())
    # and stock PEFT reads what it left
    from sweeper.lora.trainee import twin

    loaded = PeftModel.from_pretrained(twin(base.model), folder / "adapter")
    assert loaded.peft_config["default"].peft_type == PeftType[tuner]


def test_what_cannot_train_is_a_tuner_of_peft() -> None:
    names = {kind.name for kind in PeftType}
    assert set(UNABLE) <= names
    assert set(tuners()) | set(UNABLE) == names
    assert set(NEEDS) <= set(tuners())
    assert set(tuners()) >= CAPTURED


def test_a_tuner_that_there_is_not_is_named(make_run: Any) -> None:
    with pytest.raises(SpecError, match=r"method.options.tuner=LOCR: no such .* Did you mean LOKR\?"):
        methods.check(make_run("full", method={"name": "peft", "options": {"tuner": "locr"}}))
    with pytest.raises(SpecError, match=r"method.options.tuner=: "):
        methods.check(make_run("full", method={"name": "peft"}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"tuner": "prompt_tuning"},
            r"tuner=PROMPT_TUNING needs num_virtual_tokens: give '\+method.options.arguments=",
        ),
        ({"tuner": "trainable_tokens"}, "method.options.tuner=TRAINABLE_TOKENS needs token_indices: give"),
        (
            {"tuner": "prefix_tuning", "arguments": {"num_virtual_tokens": 65}},
            r"dataset.max_length=64 and num_virtual_tokens=65: .* 128 positions. Choose dataset.max_length at most 63",
        ),
    ],
)
def test_what_a_tuner_lacks_is_said_before(options: Any, message: str, make_run: Any, tiny_spec: Any) -> None:
    model = asdict(tiny_spec("gpt2"))
    with pytest.raises(SpecError, match=message):
        methods.check(make_run("full", model=model, method={"name": "peft", "options": options}))


def test_dropout_for_a_tuner_that_has_none_is_refused(make_run: Any) -> None:
    method = {"name": "peft", "dropout": 0.1, "options": {"tuner": "ia3"}}
    with pytest.raises(SpecError, match=r"method.dropout=0.1: method.options.tuner=IA3 has no dropout"):
        methods.check(make_run("full", method=method))
    methods.check(make_run("full", method=method | {"options": {"tuner": "loha"}}))


@pytest.mark.parametrize("tuner", [kind.name for kind in PeftType if kind.name not in {*UNABLE} - {"ADALORA"}])
def test_precision_changes_nothing_about_what_trains(tuner: str, make_run: Any, tiny_spec: Any, place: Any) -> None:
    if not is_installed(NEEDED.get(tuner, ("torch", "torch"))[0]):
        pytest.skip(f"{tuner} needs a package that is not installed")
    arguments = NEEDS.get(tuner, ({}, 0.0))[0]
    method = {"name": "peft", "options": {"tuner": tuner.lower(), "arguments": arguments}}
    spec = make_run("full", method={"name": "adalora"} if tuner == "ADALORA" else method)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        base = models.load(tiny_spec("llama"), dtype=dtype, device=torch.device("cpu"))
        ranks = dict.fromkeys(place(base, "full"), spec.rank)
        trained = methods.adapter(spec, ranks).build(base).trained()  # type: ignore[union-attr]
        found.append({name: tuple(parameter.shape) for name, parameter in trained.items()})
    assert found[0] == found[1] != {}
