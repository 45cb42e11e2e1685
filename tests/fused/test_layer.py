"""The decoder of our own gives what the stock model gives, with and without adapters, and their gradients.

Needs a GPU, or Triton's interpreter and numpy < 2.4: TRITON_INTERPRET=1 pytest tests/fused/test_layer.py.
"""

import os
from typing import Any

import pytest
import torch

from sweeper.fused.decoder import Decoder, known
from sweeper.fused.rows import Rows
from sweeper.lora.forms import AdapterSpec
from sweeper.lora.store import AdapterStore
from sweeper.models.architecture import structure
from sweeper.models.forward import hidden_states, inner_model

pytest.importorskip("triton")
layer = pytest.importorskip("sweeper.fused.layer")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.skipif(not (torch.cuda.is_available() or INTERPRETED), reason="needs CUDA, or TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
ATTN, FF = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
LENGTHS = [[5, 9, 3], [17, 2, 1], [4, 4, 4], [30, 8, 1], [6, 6, 6], [201, 7, 2]]
SHARE = 216
PRECISIONS = [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16]
CLOSE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def llama(kind: str = "LlamaConfig", **other: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 100, "max_position_embeddings": 256,
        "rope_theta": 100.0,
    }  # fmt: skip
    config = getattr(transformers, kind)(**sizes | other)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            parameter.data.uniform_(0.5, 1.5)
    return model.eval().requires_grad_(False)


@pytest.fixture(params=["llama", "biased", "one head of keys", "wide heads"])
def model(request: Any) -> Any:
    kinds: dict[str, dict[str, Any]] = {
        "llama": {}, "biased": {"kind": "Qwen2Config"}, "one head of keys": {"num_key_value_heads": 1},
        "wide heads": {"head_dim": 64},
    }  # fmt: skip
    return llama(**kinds[request.param])


def spec(model: Any, modules: tuple[str, ...], rank: int, seed: int, layers: tuple[int, ...] = (0, 1)) -> AdapterSpec:
    found = [t.name for t in structure(model) if t.name.rpartition(".")[2] in modules and t.layer in layers]
    return AdapterSpec(ranks=dict.fromkeys(found, rank), scales=dict.fromkeys(found, 2.0), dropout=0.0, seed=seed)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize(
    ("rank", "many"), [(20, False), (20, True), (70, True)], ids=["few rows", "many rows", "wide ranks"]
)
def test_rows_without_padding_are_rows_alone(
    model: Any, dtype: torch.dtype, rank: int, many: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six lanes of other placements and ranks, and an empty one, against each sequence through the stock model.

    With `many`, by the kernels that a batch of many rows has: several tiles a program, the norms by themselves.
    """
    if many:
        monkeypatch.setattr(layer, "FEW", 0)
        monkeypatch.setattr(layer, "SHORT", 0)
    model = model.to(DEVICE, dtype)
    assert known(model)
    specs = [
        spec(model, ATTN, 4, 0), spec(model, FF, 3, 1), spec(model, (*ATTN, *FF), rank, 2),
        spec(model, ("q_proj", "v_proj"), 8, 3), spec(model, FF, 8, 4, (1,)), spec(model, ("o_proj",), 1, 5),
    ]  # fmt: skip
    store = AdapterStore(model, structure(model), [one.capacity for one in specs], DEVICE)
    store.install()
    drawn = torch.Generator().manual_seed(1)
    for slot, one in enumerate(specs):
        store.assign(slot, one)
        for parts in store.views(slot).values():
            for part in parts:
                part.copy_(torch.randn(part.shape, generator=drawn) * 0.1)
        store.publish(slot)
    lanes, slots = store.lanes, [*range(len(specs)), -1]
    ids = torch.randint(0, 100, (len(slots) * SHARE,), generator=drawn).to(DEVICE)
    rows = Rows.of(LENGTHS, SHARE, len(slots))
    rows = Rows(rows.starts.to(DEVICE), rows.stops.to(DEVICE))
    upstream = torch.randn(len(slots) * SHARE, 96, generator=drawn).to(DEVICE)
    inside = torch.zeros(len(slots) * SHARE, dtype=torch.bool)
    for lane, own in enumerate(LENGTHS):
        inside[lane * SHARE : lane * SHARE + sum(own)] = True
    upstream[~inside.to(DEVICE)] = 0

    lanes.host_slots, lanes.slots = tuple(slots), torch.tensor(slots, dtype=torch.int32, device=DEVICE)
    found = Decoder(model)(ids, rows, torch.arange(len(ids), device=DEVICE), lanes)
    (found.float() * upstream).sum().backward()
    gradients = store.grads.clone()
    store.grads.zero_()
    for lane, own in enumerate(LENGTHS):
        first = lane * SHARE
        for length in own:
            part = slice(first, first + length)
            lanes.host_slots, lanes.slots = (slots[lane],), torch.tensor([slots[lane]], dtype=torch.int32).to(DEVICE)
            alone = hidden_states(inner_model(model), ids[None, part], torch.tensor([length]).to(DEVICE), "causal")[0]
            (alone.float() * upstream[part]).sum().backward()
            assert (found[part] - alone).norm() <= CLOSE[dtype] * alone.norm()
            first += length
    for slot in range(len(specs)):
        ours, stock = (torch.cat([p.flatten() for p in store.pieces(slot, s)]) for s in (gradients, store.grads))
        assert stock.norm() > 0
        assert (ours - stock).norm() <= CLOSE[dtype] * stock.norm()
    store.close()


@pytest.mark.parametrize(
    ("kind", "other"),
    [
        ("Qwen3Config", {}), ("LlamaConfig", {"hidden_act": "gelu"}), ("LlamaConfig", {"mlp_bias": True}),
        ("GraniteConfig", {"residual_multiplier": 0.5}), ("MistralConfig", {"sliding_window": 8}),
        ("GPT2Config", {"n_embd": 32, "n_head": 2, "n_layer": 2}),
    ],
)  # fmt: skip
def test_what_is_built_or_computes_otherwise_is_not_taken(kind: str, other: dict[str, Any]) -> None:
    assert not known(llama(kind, **other).to(DEVICE))
