"""A model's decoder, where it is of the Llama family: recognised by its modules, and by giving the same numbers."""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sweeper.fused.beside import Beside
from sweeper.fused.rows import Rows
from sweeper.lora.wrappers import Adapted, Lanes
from sweeper.models.forward import inner_model

PARTS = {"embed_tokens", "layers", "norm", "rotary_emb"}
LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
FEED_FORWARD = {"gate_proj", "up_proj", "down_proj"}
STATIC = {"default", "linear", "llama3", "yarn"}  # ways of turning that are the same whatever a row's length
CHANNELS = (32, 64, 128)  # of a head, that the kernels are made for
MOST_POSITIONS = 1 << 17
CLOSE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""How far hidden states may be from the stock model's, by their norms; another architecture is tens of per cent off."""
TRIED = (19, 7, 1, 40)  # tokens of the rows on which they are compared
_KNOWN: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


class Decoder:
    """Runs token ids through a model whose layers are recognised, with the adapters of the present lanes.

    Args:
        coded: train with frozen products in 8-bit floats (`sweeper.fused.fp8`).

    Attributes:
        longest: tokens of the longest sequence it can be given.
    """

    def __init__(self, model: Any, *, coded: bool = False) -> None:
        from sweeper.fused.attention import Heads
        from sweeper.fused.fp8 import Matrix8
        from sweeper.fused.layer import Layer, Turns

        inner: Any = inner_model(model)
        self.inner = inner
        part, config = inner.layers[0].self_attn, model.config
        channels = int(part.head_dim)
        heads = Heads(
            queries=_base(part.q_proj).out_features // channels, keys=_base(part.k_proj).out_features // channels,
            channels=channels, scale=float(part.scaling),
        )  # fmt: skip
        self.longest = min(int(config.max_position_embeddings), MOST_POSITIONS)
        weight = inner.embed_tokens.weight
        positions = torch.arange(self.longest, device=weight.device)[None]
        cosines, sines = (turn[0] for turn in inner.rotary_emb(weight[:1], position_ids=positions))
        turns = Turns(*(turn[:, : channels // 2].contiguous() for turn in (cosines, sines)))
        beside = Beside(weight.device)
        self.layers = [Layer(layer, heads, turns, beside) for layer in inner.layers]
        self.coded = coded
        for site in (site for layer in self.layers for site in layer.sites if coded):
            site.matrix8 = Matrix8(site.weight)

    def __call__(self, ids: Tensor, rows: Rows, index: Tensor, lanes: Lanes) -> Tensor:
        """Hidden states [len(index), D] of some of the rows, after the last norm.

        Args:
            ids: [N] token ids of the lanes one after another. index: rows that are wanted.
        """
        return self.states(self.inner.embed_tokens(ids), rows, index, lanes)

    def states(self, embedded: Tensor, rows: Rows, index: Tensor, lanes: Lanes) -> Tensor:
        """As a call, of embedded tokens [N, D]."""
        from sweeper.fused.layer import last_norm, through

        coded = self.coded and bool(self.inner.training)
        hidden = through(self.layers, embedded, rows, lanes, coded=coded)
        return last_norm(hidden.index_select(0, index), self.inner.norm)


def known(model: Any) -> bool:
    """Whether a bare model is one that `Decoder` runs; the first time it is tried."""
    if model not in _KNOWN:
        _KNOWN[model] = recognised(model) and agrees(model)
    return _KNOWN[model]


def recognised(model: Any) -> bool:
    """Whether a model is built as these layers are; not yet whether it gives their numbers."""
    inner: Any = inner_model(model)
    if inner is None or _names(inner) != PARTS or not len(inner.layers):
        return False
    rotary, config = inner.rotary_emb, model.config
    windows = set(getattr(config, "layer_types", None) or ["full_attention"])
    if getattr(rotary, "rope_type", None) not in STATIC or windows != {"full_attention"}:
        return False
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return False
    return all(_is_layer(layer) for layer in inner.layers) and len({_sizes(layer) for layer in inner.layers}) == 1


def _is_layer(layer: Any) -> bool:
    if _names(layer) != LAYER or _names(layer.self_attn) != ATTENTION or _names(layer.mlp) - {"act_fn"} != FEED_FORWARD:
        return False
    attention, inner = layer.self_attn, layer.mlp
    plain = all(
        type(getattr(part, name)) is nn.Linear for part, own in ((attention, ATTENTION), (inner, FEED_FORWARD))
        for name in own
    )  # fmt: skip
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    silu = type(inner.act_fn).__name__ in ("SiLU", "SiLUActivation") or getattr(inner.act_fn, "__name__", "") == "silu"
    outputs = (attention.o_proj, inner.gate_proj, inner.up_proj, inner.down_proj)
    biased = [getattr(attention, name).bias is None for name in ("q_proj", "k_proj", "v_proj")]
    return (
        plain and silu and len(set(biased)) == 1
        and all(hasattr(one, "variance_epsilon") and type(one).__name__.endswith("RMSNorm") for one in norms)
        and all(one.bias is None for one in outputs)
        and getattr(attention, "head_dim", 0) in CHANNELS and hasattr(attention, "scaling")
    )  # fmt: skip


def _sizes(layer: Any) -> tuple[Any, ...]:
    """What `Decoder` reads off the first layer for all of them."""
    part = layer.self_attn
    return part.head_dim, part.scaling, part.q_proj.out_features, part.k_proj.out_features, part.v_proj.out_features


def _names(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _base(module: Any) -> Any:
    return module.base if isinstance(module, Adapted) else module


def agrees(model: Any) -> bool:
    """Whether rows of several lengths, and their gradients, come out of a bare model as they do of the stock one.

    The stock model is given each of them alone. A device that the kernels are too large for says no.
    """
    from triton import TritonError

    inner, device = inner_model(model), model.device
    drawn = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (sum(TRIED),), generator=drawn).to(device)
    upstream = torch.randn(sum(TRIED), inner.embed_tokens.weight.shape[1], generator=drawn).to(device, model.dtype)
    held = Rows.of([TRIED], sum(TRIED))
    rows, index = Rows(held.starts.to(device), held.stops.to(device)), torch.arange(sum(TRIED), device=device)
    given = [inner.embed_tokens(ids).detach().requires_grad_() for _ in range(2)]
    with torch.enable_grad():
        try:
            found = Decoder(model).states(given[0], rows, index, Lanes.of(1, device))
            found.backward(upstream)
        except TritonError:
            return False
        wanted = torch.cat([
            inner(inputs_embeds=one[None], use_cache=False)[0][0] for one in given[1].split(TRIED)
        ])  # fmt: skip
        wanted.backward(upstream)
    pairs = (found, wanted), (given[0].grad, given[1].grad)
    return all((ours - stock).float().norm() <= CLOSE[model.dtype] * stock.float().norm() for ours, stock in pairs)
