#!/usr/bin/env python3
"""LoRA with stock PEFT as an expert would make it fast: the yardstick that a referee asks for.

    python -m benchmarks.strong_peft --concurrent 9          # on a GPU: SmolLM2-135M's shape, 4 x 256
    python -m benchmarks.strong_peft --rows gsm_symbolic --concurrent 9     # rows as long as a task's, batch 8
    python -m benchmarks.strong_peft --device cpu --model tiny --batch 2 --length 16 --seconds 0.2

Every decoder layer and the head's loss are compiled; forward, backward, clipping and AdamW are one CUDA graph; adapters
are bfloat16, as the base is. `--concurrent` runs so many graphs at once, each on a stream of its own. Training only, on
random tokens: rows of one length without padding; or rows as long as a task's, in the batches that our own runs see,
each padded to the next of few lengths with a graph for each, and the head on the targets alone. Each line is a JSON
object with `run_steps_per_second`; the last has the highest of all. A CPU compiles, but has no graphs or streams: there
it shows that it works.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from benchmarks.shapes import SHAPES, random_model
from benchmarks.token_lengths import lengths
from benchmarks.turns import wait_for_turn
from sweeper.training.batches import DataOrder

ATTN = ("q_proj", "k_proj", "v_proj", "o_proj")
FF = ("gate_proj", "up_proj", "down_proj")
MODULES = {"attn": ATTN, "ff": FF, "full": (*ATTN, *FF)}
BATCHES = 64  # different ones, which steps cycle through


def target_loss(hidden_BTD: Tensor, weight_VD: Tensor, index_K: Tensor, targets_K: Tensor) -> Tensor:
    """Mean NLL of the tokens that follow some places; what fills them up has a target of -100."""
    logits = functional.linear(hidden_BTD.flatten(0, 1).index_select(0, index_K), weight_VD)
    return functional.cross_entropy(logits.float(), targets_K)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """`rows` is the task whose rows' lengths are taken; None for rows of `length`."""

    model: str
    batch: int
    length: int
    device: str
    seconds: float
    rows: str | None = None
    fp8: bool = False

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"


class Linear8(torch.nn.Linear):
    """A frozen linear module in 8-bit floats: scales by row of its input and by output, also in its backward pass."""

    def prepare(self) -> None:
        self.there, self.back = scaled(self.weight.data), scaled(self.weight.data.t().contiguous())

    def forward(self, input: Tensor) -> Tensor:
        found: Tensor = _Product8.apply(input.flatten(0, -2), *self.there, *self.back)
        return found.view(*input.shape[:-1], -1)


class _Product8(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, back: Tensor, back_scales: Tensor) -> Tensor:
        ctx.save_for_backward(back, back_scales)
        return product8(x, codes, scales)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return product8(grads[0], *ctx.saved_tensors), None, None, None, None


def scaled(values: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit floats [N, I] and the scale [N, 1] of each row."""
    scales = values.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / 448.0
    return (values.float() / scales).to(torch.float8_e4m3fn), scales


def product8(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    own, factors = scaled(x)
    found: Tensor = torch._scaled_mm(
        own, codes.t(), scale_a=factors, scale_b=scales.t(), out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return found


def in_8_bits(model: Any) -> None:
    """Has the linear modules of a model's layers compute in 8-bit floats."""
    for module in model.model.layers.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = Linear8
            module.prepare()


@dataclass(frozen=True)
class Inputs:
    """Padded tokens [B, T], the places that predict targets [K] and these [K]."""

    tokens: Tensor
    index: Tensor
    targets: Tensor

    def copy_(self, other: "Inputs") -> None:
        for mine, new in zip(vars(self).values(), vars(other).values(), strict=True):
            mine.copy_(new)


def batches_of(setting: Setting, seed: int) -> list[Inputs]:
    """The batches of a run, each as long as those of its kind are padded to."""
    vocabulary = SHAPES[setting.model]["vocab_size"]
    if setting.rows is None:
        places = torch.arange(setting.batch * setting.length).view(setting.batch, -1)[:, :-1].flatten()
        drawn = [torch.randint(0, vocabulary, (setting.batch, setting.length)) for _ in range(BATCHES)]
        found = [Inputs(tokens, places, tokens[:, 1:].flatten()) for tokens in drawn]
    else:
        rows = lengths(setting.rows)
        order = DataOrder([total for _, total in rows], setting.batch, seed)
        chosen = [[rows[i] for i in order.step(step)] for step in range(BATCHES)]
        padded = [bucket(max(total for _, total in own)) for own in chosen]
        most: dict[int, int] = {}
        for own, length in zip(chosen, padded, strict=True):
            most[length] = max(most.get(length, 0), sum(total - prompt for prompt, total in own))
        found = [
            ragged(own, length, -(-most[length] // 32) * 32, vocabulary)
            for own, length in zip(chosen, padded, strict=True)
        ]
    return [Inputs(*(value.to(setting.device) for value in vars(one).values())) for one in found]


def bucket(length: int) -> int:
    """The length that a batch is padded to: few are, and little of it is padding."""
    step = 8 if length <= 64 else 32
    return -(-length // step) * step


def ragged(rows: Sequence[tuple[int, int]], length: int, width: int, vocabulary: int) -> Inputs:
    tokens = torch.randint(0, vocabulary, (len(rows), length))
    index, targets = torch.zeros(width, dtype=torch.int64), torch.full((width,), -100)
    filled = 0
    for row, (prompt, total) in enumerate(rows):
        part = slice(filled, filled + total - prompt)
        index[part], targets[part] = row * length + torch.arange(prompt - 1, total - 1), tokens[row, prompt:total]
        filled = part.stop
    return Inputs(tokens, index, targets)


class ExpertRun:
    """One LoRA run of PEFT. Calling it with a number trains a step on the batch of that number."""

    def __init__(self, setting: Setting, placement: str, rank: int, loss: Callable[..., Tensor], seed: int = 0) -> None:
        self.loss = loss
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(MODULES[placement]), task_type="CAUSAL_LM")
        dtype = torch.bfloat16 if setting.cuda else torch.float32
        base = random_model(setting.model, setting.device, dtype)
        if setting.fp8:
            in_8_bits(base)
        self.model = get_peft_model(base, config, autocast_adapter_dtype=False).train()
        self.causal: Any = self.model.base_model.model
        for layer in self.causal.model.layers:
            layer.compile(dynamic=setting.rows is not None)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=True, capturable=setting.cuda)
        self.batches = batches_of(setting, seed)
        self.stream = torch.cuda.Stream() if setting.cuda else None
        self.pool = torch.cuda.graph_pool_handle() if setting.cuda else None
        self.graphs: dict[int, tuple[Inputs, torch.cuda.CUDAGraph]] = {}
        for one in self.batches if setting.cuda else []:
            if one.tokens.shape[1] not in self.graphs:
                self.graphs[one.tokens.shape[1]] = self._capture(one)

    def __call__(self, number: int) -> None:
        batch = self.batches[number % BATCHES]
        if batch.tokens.shape[1] not in self.graphs:
            self._step(batch)
            return
        held, graph = self.graphs[batch.tokens.shape[1]]
        held.copy_(batch)
        graph.replay()

    def _step(self, batch: Inputs) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        hidden = self.causal.model(input_ids=batch.tokens, use_cache=False).last_hidden_state
        self.loss(hidden, self.causal.lm_head.weight, batch.index, batch.targets).backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0, foreach=True)
        self.optimizer.step()

    def _capture(self, batch: Inputs) -> tuple[Inputs, torch.cuda.CUDAGraph]:
        assert self.stream is not None
        held = Inputs(*(value.clone() for value in vars(batch).values()))
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(2):
                self._step(held)
        torch.cuda.current_stream().wait_stream(self.stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream, pool=self.pool):
            self._step(held)
        return held, graph


def one_after_another(runs: Sequence[Callable[[int], None]], setting: Setting) -> float:
    """Run-steps per second over all arms: as many steps of each, so their harmonic mean."""
    rates = []
    for run in runs:
        rates.append(rate(run, setting))
        tell(arm=len(rates), run_steps_per_second=round(rates[-1], 2))
    return len(rates) / sum(1 / one for one in rates)


def at_once(runs: Sequence[ExpertRun], setting: Setting) -> float:
    """Run-steps per second of several runs, each a graph on its own stream."""

    def step(number: int) -> None:
        for run in runs:
            with torch.cuda.stream(run.stream):
                run(number)

    return len(runs) * rate(step, setting)


def rate(step: Callable[[int], None], setting: Setting) -> float:
    """Calls a second, over about `setting.seconds`, after calls that do not count."""

    def timed(count: int) -> float:
        wait(setting)
        began = time.perf_counter()
        for number in range(count):
            step(number)
        wait(setting)
        return (time.perf_counter() - began) / count

    timed(3)
    if setting.rows:  # each batch as often as the others
        return 1 / timed(BATCHES)
    return 1 / timed(min(200, max(5, int(setting.seconds / timed(2)))))


def wait(setting: Setting) -> None:
    if setting.cuda:
        torch.cuda.synchronize()


def tell(**found: Any) -> None:
    print(json.dumps(found), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--batch", type=int, default=None, help="default 4; 8 with --rows")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rows", help="a task whose rows' lengths are taken")
    parser.add_argument("--fp8", action="store_true", help="frozen products in 8-bit floats, as ours can be")
    parser.add_argument("--turn", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--arms", default="attn:8,ff:8,full:8", help="placement:rank, ...")
    parser.add_argument("--concurrent", type=int, default=0, help="also so many runs at once, a stream each")
    parser.add_argument("--seconds", type=float, default=1.5, help="that a rate is measured over")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    setting = Setting(
        model=args.model, batch=args.batch or (8 if args.rows else 4), length=args.length, device=args.device,
        seconds=args.seconds, rows=args.rows, fp8=args.fp8,
    )  # fmt: skip
    if args.concurrent and not setting.cuda:
        parser.error("--concurrent needs a GPU: runs at once are graphs on streams")
    ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = lambda *_, **__: None  # rows without padding need the causal kernel alone
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.accumulated_recompile_limit = 1024
    loss = torch.compile(target_loss, dynamic=args.rows is not None)
    arms = [(placement, int(rank)) for placement, _, rank in (arm.partition(":") for arm in args.arms.split(","))]
    count = max(len(arms), args.concurrent)
    runs = [ExpertRun(setting, *arms[number % len(arms)], loss, seed=number) for number in range(count)]
    wait_for_turn(args.turn)
    rates = [one_after_another(runs[: len(arms)], setting)]
    tell(one_after_another=len(arms), run_steps_per_second=round(rates[0], 2))
    if args.concurrent:
        rates.append(at_once(runs[: args.concurrent], setting))
        tell(concurrent=args.concurrent, run_steps_per_second=round(rates[-1], 2))
    tell(best=True, run_steps_per_second=round(max(rates), 2), rates=[round(one, 2) for one in rates])


if __name__ == "__main__":
    main()
