"""Mixture of LoRA Experts (Wu et al. 2024): learnt gates over frozen adapters.

A gate normalises the members' outputs side by side, multiplies them by its matrix e and takes the softmax at a
temperature that it learns. Its loss is the NLL plus `balance` times -sum log q, q being the mean over gates of each
member's share, so that none is left out. Only e and the temperatures train, by AdamW on a few examples.

Three things the paper leaves to its setting are decided here. Its e is as long as its sequences; here a gate sees one
token, or a token would be gated by those after it. A gate of a layer sees the outputs of the first of its modules that
runs, and holds for all of them (`gates=module`: one for each). The normalisation is layer norm without weights, and e
begins at zero: every member alike.

Shapes: K members, O out, N leading dimensions of the rows.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from sweeper.adapters.library.asked import Asked
from sweeper.adapters.library.bench import Bench, Task
from sweeper.adapters.library.experts import Experts, Gated
from sweeper.adapters.library.made import Made, few
from sweeper.errors import SpecError
from sweeper.tasks.example import Encoded

BATCH = 4  # examples of a step


class Gate(nn.Module):
    """One gate: e [K * O, K] and the logarithm of a temperature, over the members that are `present_K`."""

    present_K: Tensor

    def __init__(self, outputs: int, present_K: Tensor) -> None:
        super().__init__()
        count = len(present_K)
        self.e = nn.Parameter(torch.zeros(count * outputs, count, device=present_K.device))
        self.log_temperature = nn.Parameter(torch.zeros((), device=present_K.device))
        self.register_buffer("present_K", present_K)

    def forward(self, outputs: Tensor) -> Tensor:
        """Gates [N, K] of the members' outputs [N, K, O]."""
        flat = outputs.float().flatten(-2)
        logits = functional.layer_norm(flat, flat.shape[-1:]) @ self.e / self.log_temperature.exp()
        return logits.masked_fill(~self.present_K, -torch.inf).softmax(-1)


class Gates(nn.Module):
    """A gate for each layer, or for each module.

    Args:
        leaders: module name -> the module whose outputs its gate sees; the gates are those of the leaders.
    """

    def __init__(self, experts: Sequence[Experts], leaders: Mapping[str, str]) -> None:
        super().__init__()
        self.leaders = dict(leaders)
        present: dict[str, Tensor] = {}
        for one in experts:
            leader = self.leaders[one.target.name]
            present[leader] = present.get(leader, torch.zeros_like(one.present_K)) | one.present_K
        out = {one.target.name: one.target.out_features for one in experts}
        self.numbers = {name: number for number, name in enumerate(present)}
        self.each = nn.ModuleList(Gate(out[name], here) for name, here in present.items())
        self.now: dict[str, Tensor] = {}

    def forward(self, one: Experts, x: Tensor, z: Tensor) -> Tensor:
        """The gates [N, K] of a module; `experts.Gated` calls it."""
        leader = self.leaders[one.target.name]
        if leader == one.target.name:
            self.now[leader] = self.each[self.numbers[leader]](one.outputs(z))
        return self.now[leader]


def balance(gates: Sequence[Tensor]) -> Tensor:
    """-sum over members of log q, q the mean over gates, each [tokens, K], and their tokens.

    At least K log K, where all members have equal shares.
    """
    q = torch.stack([one.mean(0) for one in gates]).mean(0)
    return -q.clamp(min=1e-12).log().sum()


def mole(bench: Bench, asked: Asked, task: Task) -> Made:
    """Gates trained on a few examples of a task."""
    examples = few(task, asked)
    gates = Gates(bench.experts, _leaders(bench, examples, asked.gates))
    router = Gated(gates)
    before = bench.nll(router, examples)
    losses = train(bench, gates, examples, asked)
    gates.requires_grad_(False)
    facts = {
        "gates": asked.gates, "parameters": sum(p.numel() for p in gates.parameters()), "losses": losses,
        "nll_at_start": before, "nll": bench.nll(router, examples), "examples": [example.id for example in examples],
    }  # fmt: skip
    return Made(router, facts)


def train(bench: Bench, gates: Gates, examples: Sequence[Encoded], asked: Asked) -> list[float]:
    """Trains the gates; the loss of every step."""
    optimizer = torch.optim.AdamW(gates.parameters(), lr=asked.lr, weight_decay=0.0)
    router, losses = Gated(gates), []
    for _, batch in zip(range(asked.steps), _batches(examples, asked.seed), strict=False):
        optimizer.zero_grad()
        loss = step_loss(bench, gates, router, batch, weight=asked.balance)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    gates.now.clear()
    return losses


def step_loss(bench: Bench, gates: Gates, router: Gated, batch: Sequence[Encoded], *, weight: float) -> Tensor:
    """Mean NLL of the response tokens plus `weight` times the balancing loss over all tokens."""
    gates.now.clear()
    nll = bench.loss(router, batch)
    lengths = torch.tensor([len(example.input_ids) for example in batch], device=nll.device)
    seen = []
    for one in gates.now.values():
        mask = torch.arange(one.shape[-2], device=nll.device) < lengths[:, None]
        seen.append(one[mask] if one.shape[:-1] == mask.shape else one.flatten(0, -2))
    return nll + weight * balance(seen)


def _batches(examples: Sequence[Encoded], seed: int) -> Iterator[list[Encoded]]:
    """Batches without end, each pass over the examples in an order of its own."""
    rng = np.random.default_rng([seed, 1])
    while True:
        order = rng.permutation(len(examples)).tolist()
        for start in range(0, len(order), BATCH):
            yield [examples[i] for i in order[start : start + BATCH]]


def _leaders(bench: Bench, examples: Sequence[Encoded], by: str) -> dict[str, str]:
    """The module whose outputs decide, of every module: by layer the first that runs.

    Raises:
        SpecError: modules of a layer see different rows, as a mixture's experts do.
    """
    ran: list[tuple[Experts, torch.Size]] = []

    def see(one: Experts, x: Tensor, z: Tensor) -> Tensor:
        ran.append((one, x.shape[:-1]))
        return torch.zeros(*x.shape[:-1], len(one.present_K), device=x.device)

    bench.pass_over(Gated(see), examples[:1])
    first: dict[object, tuple[Experts, torch.Size]] = {}
    leaders = {}
    for one, rows in ran:
        key = one.target.layer if by == "layer" else one.target.name
        leader, wanted = first.setdefault(key, (one, rows))
        if rows != wanted:
            raise SpecError(
                f"rules=mole gates=layer: {one.target.name} sees other rows than {leader.target.name} of its layer: "
                "choose gates=module"
            )
        leaders[one.target.name] = leader.target.name
    # an expert of a mixture that no token went to decides for itself
    return {one.target.name: leaders.get(one.target.name, one.target.name) for one in bench.experts}
