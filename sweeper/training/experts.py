"""Which experts of a run the examples of each task go through, once it has trained.

Shapes: N examples, n rows of a lane (tokens, or prompts), K experts, M modules, P tasks.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sweeper import methods
from sweeper.lora import gating
from sweeper.lora.forms import AdapterSpec
from sweeper.lora.forms.routed import Seen
from sweeper.tasks.example import Encoded, EncodedSplit
from sweeper.training.batches import collate
from sweeper.training.pack import Pack
from sweeper.training.run_state import RunState

MOST = 64  # test examples of a task that are looked at
TOKENS = 4096  # of one forward pass, padding included


@torch.no_grad()
def usage(pack: Pack, slot: int, state: RunState) -> dict[str, Any]:
    """How a run's routers open its experts for the test examples of each task.

    Returns:
        `usage`: task -> mean gate of each expert over tokens, modules and examples. `told_apart`: the share of examples
        whose likeliest expert is one that their task uses more than any other does. `balance`: the load-balancing
        loss, a mean over modules; 1 where all experts have as much.
    """
    split = state.splits["test"]
    parts: Mapping[str, EncodedSplit] = split.parts or {state.spec.dataset.name: split}
    gates, losses = {}, list[float]()
    for name, part in parts.items():
        gates[name], lost = opened(pack, slot, part.examples[:MOST])
        losses += lost
    return {
        "usage": {name: [round(float(one), 6) for one in rows.mean(0)] for name, rows in gates.items()},
        "told_apart": _told_apart(list(gates.values())),
        "balance": sum(losses) / max(len(losses), 1),
    }


def recorded(state: RunState) -> dict[str, Any]:
    """The experts of a run as `Record.sharing` has them."""
    assert isinstance(state.adapter, AdapterSpec)
    options, method = state.adapter.options, state.spec.method
    modules = methods.trainable(method, state.ranks)
    routers = methods.routers(state.spec, state.ranks)
    return {
        "experts": options["experts"], "router": options["router"], "kept": options["kept"], "tied": options["tied"],
        "router_parameters": routers,
        "active_parameters": modules * options["kept"] // options["experts"] + routers,
        **state.usage,
    }  # fmt: skip


@torch.no_grad()
def opened(pack: Pack, slot: int, examples: Sequence[Encoded]) -> tuple[Tensor, list[float]]:
    """Mean gates of each example [N, K], and the load-balancing loss of every module in every pass."""
    lanes, rows, losses = pack.store.lanes, list[Tensor](), list[float]()
    with pack.evaluating():
        pack.use_lanes([slot])
        start = 0
        while start < len(examples):
            longest = len(examples[start].input_ids)
            count = 1
            while start + count < len(examples):
                longest = max(longest, len(examples[start + count].input_ids))
                if longest * (count + 1) > TOKENS:
                    break
                count += 1
            chosen = examples[start : start + count]
            start += count
            batch = collate([chosen], [[1.0] * count], fixed=False).to(pack.device)
            lanes.watched = []
            try:
                pack.pass_through(batch)
                seen: list[Seen] = [one for one in lanes.watched if bool(one.on[0])]
            finally:
                lanes.watched = None
            rows.append(torch.stack([_by_example(one, count) for one in seen]).mean(0).cpu())
            losses += [_balance(one) for one in seen]
    return torch.cat(rows), losses


def _by_example(seen: Seen, count: int) -> Tensor:
    """Mean gates of each example over its tokens [N, K]."""
    gates, valid = (one[0].view(count, -1, *one.shape[2:]) for one in (seen.gates, seen.valid))
    mean: Tensor = (gates * valid[..., None]).sum(1) / valid.sum(1).clamp(min=1)[:, None]
    return mean


def _balance(seen: Seen) -> float:
    share = gating.shares(seen.probabilities, seen.gates, seen.kept, seen.valid)
    return float(gating.balance(seen.probabilities, share, seen.valid)[0])


def _told_apart(opened: Sequence[Tensor]) -> float:
    """Share of examples whose likeliest expert belongs to their task: it is likeliest for more of its examples."""
    experts = opened[0].shape[1]
    counts = torch.stack([torch.bincount(rows.argmax(1), minlength=experts) for rows in opened])
    shares = counts / counts.sum(1, keepdim=True)  # so that tasks of many examples do not own all experts
    owner = shares.argmax(0)
    right = sum(float(shares[owner[expert], expert]) for expert in range(experts) if shares[:, expert].sum() > 0)
    return right / len(opened)
