"""What a run costs, in closed form: trainable parameters, floating-point operations, bytes. Arithmetic only.

Counting rules. One multiply-add is 2 operations. Counted: every matrix of the blocks, the head at every token
(supervised or not), the two products of attention over the full square of positions (a causal kernel may do half),
and the adapters. Not counted: recurrences and convolutions of token mixers, embedding look-ups, norms, activations,
softmax, loss, optimiser, MoE routers, and the second forward pass of activation checkpointing, which is no work of the
model's.

What lies below the lowest adapter needs no gradient, so the backward pass ends there; of the first adapted layer only
what comes after its first adapter is counted. Blocks are taken to be sequential (attention, then feed-forward); for
parallel ones (GPT-NeoX, Falcon) that one layer may be counted a little too high.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from sweeper.models.architecture import EMBEDDING, FUSED, HEAD, Target, number_of_layers

# an adapter is float32 and under AdamW has a gradient and two moments for each parameter
ADAPTER_BYTES, GRADIENT_BYTES, MOMENT_BYTES = 4, 4, 8
# logits held at once in float32 beside their own precision; beyond that they are made chunk by chunk
LOGIT_VALUES = 1 << 28

Ranks = Mapping[Target, int]
Place = tuple[int, int]

# what writes to the residual stream
INTO_STREAM = ("attn_o", "ff_down", "mixer_out")
# order of the roles inside a sequential block
_STAGE = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_qk", "attn_kv", "mixer_in"), 0) | {
    "attn_o": 1,
    "mixer_out": 1,
    "ff_gate": 2,
    "ff_up": 2,
    "ff_gate_up": 2,
    "ff_experts": 2,
    "ff_down": 3,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes at a run's peak, by purpose. `activations` is a rough estimate, the rest is exact."""

    base: int
    adapter: int
    gradients: int
    optimiser: int
    activations: int

    @property
    def total(self) -> int:
        return self.base + self.adapter + self.gradients + self.optimiser + self.activations


def uniform(targets: Iterable[Target], rank: int) -> dict[Target, int]:
    """The same rank for every target."""
    return dict.fromkeys(targets, rank)


def lora_parameters(ranks: Ranks) -> int:
    """Trainable parameters: A is rank x in, B is out x rank, for every adapted module (Hu et al. 2021)."""
    return sum(rank * (target.in_features + target.out_features) for target, rank in ranks.items())


def forward_flops_per_token(targets: Iterable[Target], *, length: int) -> float:
    """Operations of the frozen model's forward pass for one token of a sequence of `length` tokens."""
    return float(sum(_product(target) + 2 * _attention_product(target, length) for target in targets))


def train_flops_per_token(
    targets: Iterable[Target], ranks: Ranks, *, length: int, dense: Collection[Target] = ()
) -> float:
    """Operations of training for one token of a sequence of `length` tokens; `targets` is the whole model.

    `dense` are modules whose own matrices are trained, which is one more product each (about 6 operations per weight
    where all are); they, and modules where what is trained costs nothing, have rank 0.

    With adapters in every layer that is about 4 per weight of the frozen matrices (forward, and backward to the
    activations), 6 per adapter parameter, and 12 * length * width a layer for attention.
    """
    targets = list(targets)
    layers = number_of_layers(targets)
    flops = forward_flops_per_token(targets, length=length)
    if not ranks:
        return flops
    first = min(_place(target, layers) for target in ranks)
    live = _roles_with_gradient(targets, ranks, first, layers)
    for target in targets:
        if first < _place(target, layers):
            flops += _product(target)
        flops += _attention_gradients(live.get(target.layer, set())) * _attention_product(target, length)
    flops += sum(_product(target) for target in dense)
    for target, rank in ranks.items():
        inner = 0 if target.kind == "embedding" else 2 * rank * target.in_features
        outer = 2 * rank * target.out_features
        # forward, gradients of A and B, gradient of A's output, and that of the input where anything below trains
        flops += 2 * inner + 3 * outer + (inner if first < _place(target, layers) else 0)
    return flops


def train_flops(
    targets: Iterable[Target], ranks: Ranks, *, length: int, tokens: int, dense: Collection[Target] = ()
) -> float:
    """Operations of a run that sees `tokens` tokens (padding included) in sequences of `length`."""
    return train_flops_per_token(targets, ranks, length=length, dense=dense) * tokens


def quantised_bytes(targets: Iterable[Target], *, base_parameters: int, bytes_per_value: int) -> int:
    """The base of QLoRA: 4 bits a weight of the blocks and 8.125 for each 64 of them, the rest as it was."""
    inside = sum(t.in_features * t.out_features for t in targets if t.layer is not None and t.kind != "embedding")
    return round(inside * (0.5 + 8.125 / 8 / 64)) + (base_parameters - inside) * bytes_per_value


def probe_flops_per_token(targets: Iterable[Target], scored: Iterable[Target] | None, *, length: int) -> float:
    """Operations of an importance probe for one token: a forward pass, and where gradients of the weights of `scored`
    are looked at a backward pass from the loss to the embedding as well.
    """
    targets = list(targets)
    blocks = sum(_product(target) for target in targets)
    attention = sum(_attention_product(target, length) for target in targets)
    if scored is None:
        head = sum(_product(target) for target in targets if target.role == HEAD)
        return float(blocks - head + 2 * attention)
    return float(2 * blocks + 6 * attention + sum(_product(target) for target in scored))


def activation_bytes(
    targets: Iterable[Target],
    ranks: Ranks,
    *,
    batch_size: int,
    length: int,
    bytes_per_value: int,
    checkpointing: bool = False,
) -> int:
    """Rough estimate of what is kept for the backward pass of a batch, within about a factor of two.

    For a layer of hidden size h: 8 h for residuals and norms, queries, keys and values twice (before and after
    positions), attention's output, three times the feed-forward width where it is gated and twice otherwise, and the
    adapters' inner values. Attention keeps no square (scaled_dot_product_attention). Layers below the lowest adapter
    keep nothing; with checkpointing a layer keeps its input, and one layer at a time everything.
    """
    targets = list(targets)
    layers = number_of_layers(targets)
    lowest = min((_place(target, layers)[0] for target in ranks), default=layers)
    per_layer = [0.0] * layers
    for target in targets:
        if target.layer is not None and target.layer >= lowest:
            per_layer[target.layer] += _kept(target) * bytes_per_value + ranks.get(target, 0) * bytes_per_value
    hidden = max((target.out_features for target in targets if target.role in INTO_STREAM), default=0)
    per_layer = [kept + 8 * hidden * bytes_per_value if kept else 0.0 for kept in per_layer]
    tokens = batch_size * length
    kept = sum(per_layer)
    if checkpointing:
        kept = sum(hidden * bytes_per_value for value in per_layer if value) + max(per_layer, default=0.0)
    vocabulary = max((target.out_features for target in targets if target.role == HEAD), default=0)
    logits = min(tokens * vocabulary, LOGIT_VALUES) * (bytes_per_value + 4)
    return int(kept * tokens) + logits


def memory(
    targets: Iterable[Target],
    ranks: Ranks,
    *,
    base_parameters: int,
    bytes_per_value: int,
    batch_size: int,
    length: int,
    checkpointing: bool = False,
    values: int | None = None,
    base_bytes: int | None = None,
) -> Memory:
    """Peak memory of one run alone, by what it is for; `bytes_per_value` is 4 for float32, 2 for bfloat16.

    `values` is the number of values that the adapter holds, where they are not those of a LoRA of these ranks;
    `base_bytes` what the frozen weights take, where that is not all of them in that precision.
    """
    values = lora_parameters(ranks) if values is None else values
    return Memory(
        base=base_parameters * bytes_per_value if base_bytes is None else base_bytes,
        adapter=values * ADAPTER_BYTES,
        gradients=values * GRADIENT_BYTES,
        optimiser=values * MOMENT_BYTES,
        activations=activation_bytes(
            targets,
            ranks,
            batch_size=batch_size,
            length=length,
            bytes_per_value=bytes_per_value,
            checkpointing=checkpointing,
        ),
    )


def _place(target: Target, layers: int) -> Place:
    """A module's position between input and loss; equal for modules that run in parallel."""
    if target.role == HEAD:
        return layers, 0
    if target.role == EMBEDDING or target.layer is None:
        return -1, 0
    return target.layer, _STAGE.get(target.role, 0)


def _product(target: Target) -> int:
    """Operations of the module's matrix product for one token."""
    return 0 if target.kind == "embedding" else 2 * target.in_features * target.out_features


def _attention_product(target: Target, length: int) -> int:
    """Operations for one token of one of the two products of attention; the output projection knows the width."""
    return 2 * length * target.in_features if target.role == "attn_o" else 0


def _roles_with_gradient(
    targets: Sequence[Target], ranks: Ranks, first: Place, layers: int
) -> dict[int | None, set[str]]:
    """For each layer, which of query, key and value need a gradient: adapted, or downstream of an adapted module."""
    live: dict[int | None, set[str]] = {}
    for target in targets:
        if target in ranks or first < _place(target, layers):
            live.setdefault(target.layer, set()).update(FUSED.get(target.role, (target.role,)))
    return live


def _attention_gradients(live: set[str]) -> int:
    """Number of products in attention's backward pass: to the weights, and to each of query, key and value."""
    return len(live & {"attn_q", "attn_k", "attn_v"}) + bool(live & {"attn_q", "attn_k"})


def _kept(target: Target) -> int:
    """Values per token that this module saves for the backward pass."""
    if target.role in INTO_STREAM:
        return target.in_features
    return target.out_features * (2 if target.role.startswith("attn_") else 1)
