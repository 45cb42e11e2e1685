"""A run's experts and routers on a plain transformers model: what `experts/` of its folder is loaded with.

Shapes: B rows, T tokens, K experts, I in, O out, R rank of an expert.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sweeper.errors import DataError
from sweeper.lora import gating
from sweeper.record import ADAPTER, EXPERTS, ROUTER, ROUTERS


class Opened(nn.Module):
    """A linear module of the base with experts beside it.

    Args:
        a: [K, R, I]. b: [K, O, R]. router: [K, values it reads]. kept: experts of a row.
    """

    def __init__(self, base: nn.Module, a: Tensor, b: Tensor, router: Tensor, scale: float, kept: int) -> None:
        super().__init__()
        self.base: Any = base
        self.scale, self.kept = scale, kept
        self.a, self.b, self.router = nn.Buffer(a), nn.Buffer(b), nn.Buffer(router)
        self.features: Tensor | None = None
        self.open = True

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.base(x)
        if not self.open:
            return found
        read = x if self.features is None else self.features[:, None]
        probabilities = (read @ self.router.to(read.dtype).t()).float().softmax(-1)
        kept = torch.full((len(x),), self.kept, device=x.device)
        gates = gating.gates(probabilities, kept)
        hidden = torch.einsum("bti,kri->btkr", x, self.a.to(x.dtype))
        return found + self.scale * torch.einsum("btkr,kor,btk->bto", hidden, self.b.to(x.dtype), gates.to(x.dtype))


class RoutedModel(nn.Module):
    """A causal language model with experts; called with token ids and the lengths of the rows' prompts."""

    def __init__(self, model: Any, opened: list[Opened], *, prompt: bool) -> None:
        super().__init__()
        self.model, self.prompt = model, prompt
        self.opened = tuple(opened)  # modules of the model already

    def forward(self, input_ids: Tensor, prompt_lengths: Tensor | None = None, **more: Any) -> Tensor:
        """Logits [B, T, V] of ids [B, T], padded on the right.

        Args:
            prompt_lengths: [B] tokens of each row's prompt, which a router of prompts needs.

        Raises:
            DataError: they are missing.
        """
        features = None
        if self.prompt:
            if prompt_lengths is None:
                raise DataError("this run's router reads prompts: give prompt_lengths, the tokens of each row's prompt")
            features = self._read(input_ids, prompt_lengths, **more)
        for one in self.opened:
            one.features = features
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False, **more).logits
        return logits

    @torch.no_grad()
    def _read(self, ids: Tensor, lengths: Tensor, **more: Any) -> Tensor:
        for one in self.opened:
            one.open = False
        hidden = self.model.base_model(input_ids=ids, use_cache=False, **more).last_hidden_state
        for one in self.opened:
            one.open = True
        return gating.read(hidden, lengths, gating.projection(hidden.shape[-1]).to(hidden.device))


def routed_model(base_model: Any, run: str | Path) -> RoutedModel:
    """Puts a run's experts and routers on its base model, in place.

    Raises:
        DataError: the folder has none.
    """
    folder = Path(run) / EXPERTS
    if not (folder / ROUTER).is_file():
        raise DataError(f"{run}: no experts in it; a run of sharing=routed has a folder {EXPERTS}/")
    options = json.loads((folder / ROUTER).read_text())
    routers = load_file(folder / ROUTERS)
    experts = [load_file(folder / str(n) / ADAPTER / "adapter_model.safetensors") for n in range(options["experts"])]
    opened = []
    for name, router in routers.items():
        a, b = (
            torch.stack([expert[f"base_model.model.{name}.lora_{half}.weight"] for expert in experts])
            for half in ("A", "B")
        )
        parent, _, leaf = name.rpartition(".")
        where = base_model.get_submodule(parent)
        device = next(base_model.parameters()).device
        one = Opened(
            getattr(where, leaf), a.to(device), b.to(device), router.to(device), options["scales"][name],
            options["kept"],
        )  # fmt: skip
        setattr(where, leaf, one)
        opened.append(one)
    return RoutedModel(base_model, opened, prompt=options["router"] == "prompt")
