"""LoRA in plain PyTorch, to compare with: hooks on a copy of the model, torch's AdamW, one task after another."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sweeper.lora.forms import AdapterSpec
from sweeper.lora.optimizer import learning_rate
from sweeper.models import BaseModel
from sweeper.tasks.example import Tokens, scored
from sweeper.training.run_state import RunState

Pairs = Mapping[str, tuple[Tensor, Tensor]]  # module name -> A [rank, in], B [rank, out]


def nll(model: nn.Module, examples: Sequence[Tokens]) -> tuple[Tensor, int]:
    """NLL summed over the response tokens of some examples, and how many those are."""
    length = max(len(one.input_ids) for one in examples)
    ids = torch.tensor([[*one.input_ids, *[0] * (length - len(one.input_ids))] for one in examples])
    mask = torch.tensor([[1] * len(one.input_ids) + [0] * (length - len(one.input_ids)) for one in examples])
    logits = model(input_ids=ids, attention_mask=mask).logits
    total, count = torch.zeros(()), 0
    for row, one in enumerate(examples):
        for start, end in scored(one):
            targets = torch.tensor(one.input_ids[start:end])
            total = total + functional.cross_entropy(logits[row, start - 1 : end - 1], targets, reduction="sum")
            count += end - start
    return total, count


class Plain:
    """A model with a LoRA that trains, and the optimiser of it."""

    def __init__(self, base: BaseModel, job: RunState, begin: Pairs) -> None:
        assert isinstance(job.adapter, AdapterSpec)
        self.job, self.scales = job, job.adapter.scales
        self.model = copy.deepcopy(base.model).requires_grad_(False)
        self.kinds = {target.name: target.kind for target in base.targets}
        self.hooks = [self.model.get_submodule(name).register_forward_hook(self._hook(name)) for name in begin]
        self.begin(begin)

    def begin(self, values: Pairs) -> None:
        """Trains an adapter of these values from now on, with a fresh optimiser."""
        self.pairs = {name: (nn.Parameter(a.clone()), nn.Parameter(b.clone())) for name, (a, b) in values.items()}
        self.values = [value for pair in self.pairs.values() for value in pair]
        optim = self.job.spec.optim
        self.optimizer = torch.optim.AdamW(
            self.values, lr=1.0, betas=(optim.beta1, optim.beta2), eps=optim.eps, weight_decay=optim.weight_decay
        )

    def _hook(self, name: str) -> Callable[..., Tensor]:
        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            a, b = self.pairs[name]
            read = a.t()[inputs[0]] if self.kinds[name] == "embedding" else inputs[0] @ a.t()
            return output + self.scales[name] * read @ b

        return add

    @torch.no_grad()
    def fold(self) -> None:
        """W += s B A, and B = 0."""
        for name, (a, b) in self.pairs.items():
            weight: Any = self.model.get_submodule(name).weight
            update = self.scales[name] * a.t() @ b
            weight += update if self.kinds[name] == "conv1d" else update.t()
            b.zero_()

    def step(
        self, step: int, steps: int, examples: Sequence[Tokens], penalty: Callable[[], Any] = lambda: 0.0
    ) -> float:
        """One optimiser step of `steps` in all (from 0); returns the mean NLL before it."""
        total, count = nll(self.model, examples)
        loss = total / count
        self.descend(loss + penalty(), step, steps)
        return float(loss.detach())

    def descend(self, loss: Tensor, step: int, steps: int) -> None:
        """One optimiser step of `steps` in all (from 0) down a loss."""
        loss.backward()
        optim = self.job.spec.optim
        torch.nn.utils.clip_grad_norm_(self.values, optim.max_grad_norm or math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(optim, step, steps)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def fisher(self, examples: Sequence[Tokens]) -> list[Tensor]:
        """Mean over examples of the squared gradient of each one's summed NLL."""
        found = [torch.zeros_like(value) for value in self.values]
        for one in examples:
            gradients = torch.autograd.grad(nll(self.model, [one])[0], self.values)
            found = [own + gradient.square() / len(examples) for own, gradient in zip(found, gradients, strict=True)]
        return found
