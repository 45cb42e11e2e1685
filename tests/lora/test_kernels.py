"""The Triton kernels compute what the CPU implementation does.

Needs a GPU, or Triton's interpreter and numpy < 2.4: TRITON_INTERPRET=1 pytest tests/lora/test_kernels.py.
"""

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from sweeper.lora import lowrank, seeds
from sweeper.lora.optimizer import PackedAdamW, hyperparameters
from sweeper.lora.store import AdapterStore
from sweeper.models import loss
from sweeper.spec import OptimSpec

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.skipif(not (torch.cuda.is_available() or INTERPRETED), reason="needs CUDA, or TRITON_INTERPRET=1"),
    # the interpreter computes with numpy, which remarks on what a row of infinities gives
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")


@dataclass
class Case:
    """Arguments of `adapted_linear`: three slots, of which two members are absent here and there, and four lanes."""

    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor]
    params: Tensor
    work: Tensor
    table: Tensor
    scale: Tensor
    lanes: Tensor
    dropout: Tensor
    seeds: Tensor
    salts: Tensor
    gates: Tensor | None
    gate_rows: Tensor | None
    hidden: int
    tokens: int

    def on(self, device: torch.device) -> list[Any]:
        values = vars(self).values()
        return [
            value.to(device) if isinstance(value, Tensor)
            else [part.to(device) for part in value] if isinstance(value, list)
            else value
            for value in values
        ]  # fmt: skip


def padded(values: int) -> int:
    return -(-values // 64) * 64


def case(widths: tuple[int, ...], ranks: list[list[int]], *, bias: bool, fan_in: int = 40, rows: int = 15) -> Case:
    generator = torch.Generator().manual_seed(0)
    widest = -(-max(map(max, ranks)) // 16) * 16
    table = torch.zeros(len(ranks), len(widths), 4, dtype=torch.int32)
    end = 0
    for slot, by_member in enumerate(ranks):
        for member, rank in enumerate(by_member):
            b = end + padded(rank * fan_in)
            table[slot, member] = torch.tensor([rank, end, b, member * widest])
            end = b + padded(rank * widths[member])
    lanes = torch.tensor([2, 0, -1, 1], dtype=torch.int32)
    params = torch.randn(end, generator=generator)
    return Case(
        x=torch.randn(len(lanes) * rows, fan_in, generator=generator),
        weights=[torch.randn(fan_in, width, generator=generator) for width in widths],
        biases=[torch.randn(width, generator=generator) for width in widths] if bias else [],
        params=params,
        work=params,
        table=table,
        scale=torch.rand(len(ranks), len(widths), generator=generator) + 0.5,
        lanes=lanes,
        dropout=torch.tensor([0.0, 0.3, 0.5]),
        seeds=torch.tensor([11, 22, 4_000_000_000]),
        salts=torch.tensor([7, 8, 3_999_999_999][: len(widths)]),
        gates=None,
        gate_rows=None,
        hidden=widest * len(widths),
        tokens=5,
    )  # fmt: skip


CASES = {
    "one": lambda: case((24,), [[4], [9], [16]], bias=True),
    "three": lambda: case((20, 12, 12), [[4, 0, 4], [40, 8, 3], [0, 5, 0]], bias=False),
    "alike": lambda: case((20, 12, 12), [[4, 0, 4], [9, 16, 3], [0, 5, 0]], bias=False, fan_in=130, rows=70),
    "two": lambda: case((24, 70), [[4, 8], [0, 0], [7, 2]], bias=True),
    "wide": lambda: case((150, 70), [[4, 1], [0, 0], [70, 33]], bias=True, fan_in=130, rows=70),
}


def gated(chosen: Case) -> Case:
    """With gates for equal shares of the rows, some of them closed."""
    generator = torch.Generator().manual_seed(2)
    factors, opened = (torch.rand(6, chosen.hidden, generator=generator) for _ in range(2))
    rows = len(chosen.lanes) * (5 if len(chosen.x) // len(chosen.lanes) % 5 == 0 else 1)
    return dataclasses.replace(chosen, gates=factors * (opened > 0.3), gate_rows=torch.arange(rows) % 6)


def routed(chosen: Case) -> Case:
    """With gates of every row's own."""
    generator = torch.Generator().manual_seed(2)
    factors, opened = (torch.rand(len(chosen.x), chosen.hidden, generator=generator) for _ in range(2))
    return dataclasses.replace(chosen, gates=factors * (opened > 0.3))


GATES: dict[str, Callable[[Case], Case]] = {"none": lambda chosen: chosen, "blocks": gated, "rows": routed}


def assert_close(ours: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(ours.cpu(), wanted, rtol=1e-4, atol=1e-4 * max(1.0, float(wanted.abs().max())))


def adapted_rows(chosen: Case) -> Tensor:
    """Where the kernels must write the scaled hidden: rows of a lane, columns of the ranks its slot has."""
    written = torch.zeros(len(chosen.x), chosen.hidden, dtype=torch.bool)
    share = len(chosen.x) // len(chosen.lanes)
    for lane, slot in enumerate(chosen.lanes.tolist()):
        if slot >= 0:
            for rank, _, _, column in chosen.table[slot].tolist():
                written[lane * share : (lane + 1) * share, column : column + rank] = True
    return written


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_low_rank_products_and_their_gradients(name: str, drop: bool, gate: str) -> None:
    from sweeper.lora import kernels

    chosen = GATES[gate](CASES[name]())
    here, there = chosen.on(torch.device("cpu")), chosen.on(DEVICE)
    *ys, h = lowrank.adapted_linear(*here, drop)
    x, weights, biases, _, *rest = there
    ours = [x @ w for w in weights]
    ours = [y + b for y, b in zip(ours, biases, strict=True)] if biases else ours
    ours_h = kernels.forward(x, ours, *rest, drop)
    for mine, wanted in zip(ours, ys, strict=True):
        assert_close(mine, wanted)
    written = adapted_rows(chosen)
    assert_close(ours_h.cpu()[written], h[written])

    generator = torch.Generator().manual_seed(1)
    dys = [torch.randn(y.shape, generator=generator) for y in ys]
    x, weights, _, _, work, *tensors, _, tokens = here
    dx, dparams, dgates = lowrank.adapted_linear_backward(dys, x, weights, work, h, *tensors, tokens, drop)
    x, weights, _, _, work, *tensors, _, tokens = there
    ours_dys = [dy.to(DEVICE) for dy in dys]
    ours_dx, ours_dparams = lowrank.frozen_gradient(ours_dys, weights), torch.zeros_like(work)
    ours_dgates = torch.zeros_like(dgates, device=DEVICE)
    kernels.backward(ours_dys, x, ours_dx, work, ours_dparams, ours_dgates, ours_h, *tensors, tokens, drop)
    if gate == "rows":
        assert_close(ours_dgates.cpu()[written], dgates[written])
        assert dgates[written].any()
    assert_close(ours_dx, dx)
    assert_close(ours_dparams, dparams)
    assert dparams.any()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("vocabulary", [50, 5000])
def test_token_loss(vocabulary: int, softcap: float | None, grad: bool) -> None:
    from sweeper.models import loss_kernel

    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(6, vocabulary, generator=generator)
    targets, weights = torch.randint(vocabulary, (6,), generator=generator), torch.rand(6, generator=generator)
    targets[1] = logits[1].argmax()
    weights[2] = 0
    wanted, ours = logits.clone(), logits.clone().to(DEVICE)
    nll, correct = loss.token_loss(wanted, targets, weights, softcap, grad=grad)
    ours_nll, ours_correct = loss_kernel.token_loss(ours, targets.to(DEVICE), weights.to(DEVICE), softcap, grad=grad)
    assert_close(ours_nll, nll)
    assert torch.equal(ours_correct.bool().cpu(), correct)
    assert bool(correct[1])
    torch.testing.assert_close(ours.cpu(), wanted, rtol=1e-4, atol=1e-6)
    assert torch.equal(wanted, logits) is not grad


def test_a_row_without_weight_stays_zero_where_its_logits_overflow() -> None:
    from sweeper.models import loss_kernel

    logits = torch.randn(2, 40, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    logits[1] = torch.inf
    targets, weights = torch.tensor([3, 0], device=DEVICE), torch.tensor([1.0, 0.0], device=DEVICE)
    loss_kernel.token_loss(logits, targets, weights, None, grad=True)
    assert logits[0].isfinite().all()
    assert not logits[1].any()


@pytest.mark.parametrize("rated", [False, True])
def test_adamw(rated: bool, load: Any, make_adapter: Any) -> None:
    """Slot 1 is idle, slot 3's gradient is not finite; where rated, A of slot 0 is frozen and B of slot 2 is fast."""
    from sweeper.lora import kernels

    base = load("llama")
    adapters = [
        make_adapter(base, "attn", 3), make_adapter(base, "full", 5, seed=1), make_adapter(base, "ff", 2, seed=2),
        make_adapter(base, "attn", 2, seed=3),
    ]  # fmt: skip
    if rated:
        adapters[0] = dataclasses.replace(adapters[0], rate_a=0.0)
        adapters[2] = dataclasses.replace(adapters[2], rate_b=4.0)
    store = AdapterStore(base.model, base.targets, [adapter.capacity for adapter in adapters], torch.device("cpu"))
    assert (store.rates is not None) is rated
    for slot, adapter in enumerate(adapters):
        store.assign(slot, adapter)
    rates = None if store.rates is None else store.rates.to(DEVICE)
    stores = [flat.clone().to(DEVICE) for flat in (store.params, store.grads, store.exp_avg, store.exp_avg_sq)]
    start = store.params.clone()
    packed = PackedAdamW(store)
    norms = torch.zeros(len(adapters), device=DEVICE)
    slot_of = store.block_slot.to(DEVICE)
    squares = kernels.Squares(slot_of, len(adapters))
    params, *others = stores
    work = params.bfloat16()
    optims = {
        0: OptimSpec(lr=1e-2, weight_decay=0.3, max_grad_norm=0.1),
        2: OptimSpec(lr=1e-3, max_grad_norm=None, eps=1e-3),
        3: OptimSpec(lr=1e-2),
    }
    generator = torch.Generator().manual_seed(0)
    for step in range(3):
        store.grads.copy_(0.1 * torch.randn(store.grads.shape, generator=generator))
        store.grads[store.layout.by_slot[3][0].a] = torch.inf
        stores[1].copy_(store.grads)
        packed.set({slot: [hyperparameters(optim, step, 5)] for slot, optim in optims.items()})
        kernels.adamw(params, work, *others, rates, slot_of, packed.table.to(DEVICE), norms, squares)
        wanted = packed.step()
        assert_close(norms, wanted)
    for mine, theirs in zip(stores, (store.params, store.grads, store.exp_avg, store.exp_avg_sq), strict=True):
        torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-5, atol=1e-6)
    # the interpreter truncates where a GPU rounds
    torch.testing.assert_close(work, params.bfloat16(), rtol=0 if DEVICE.type == "cuda" else 2**-7, atol=0)
    for slot, moved in enumerate((True, False, True, False)):
        assert any(not torch.equal(store.params[a:b], start[a:b]) for a, b in store.spans[slot]) is moved


@pytest.mark.parametrize("blocks", [1, 7, 40_000 if torch.cuda.is_available() else 3_000])
def test_squares_are_added_up_by_slot_and_to_the_same_bits_each_time(blocks: int) -> None:
    """Slot 1 of four has no block; the others' lie among one another."""
    from sweeper.lora import kernels
    from sweeper.lora.layout import BLOCK

    generator = torch.Generator().manual_seed(0)
    slot_of = torch.tensor([0, 2, 3])[torch.randint(0, 3, (blocks,), generator=generator)]
    grads = torch.randn(blocks * BLOCK, generator=generator).exp()
    rates = (torch.rand(grads.shape, generator=generator) > 0.5).float()
    squares, found = kernels.Squares(slot_of.to(DEVICE), 4), torch.empty(4, device=DEVICE)
    for given in (None, rates):
        chosen = grads if given is None else grads * given
        wanted = torch.zeros(4, dtype=torch.float64)
        wanted.index_add_(0, slot_of, chosen.view(-1, BLOCK).double().square().sum(1))
        again = set()
        for _ in range(3):
            squares.add_up(grads.to(DEVICE), None if given is None else given.to(DEVICE), found)
            assert_close(found, wanted.float())
            again.add(tuple(found.tolist()))
        assert len(again) == 1


def test_sensitivities_of_the_slots_that_learn_a_pattern(load: Any, make_adapter: Any) -> None:
    """Slots 0 and 2 learn one, with a memory of their own; an infinite gradient counts as none."""
    from sweeper.lora import kernels
    from sweeper.lora.forms import Sparsity, sparse

    base = load("llama")
    plain = make_adapter(base, "full", 5)
    learning = [
        dataclasses.replace(plain, sparsity=Sparsity(density=0.5, learnt=True, first=1, last=9, memory=memory))
        for memory in (0.9, 0.25)
    ]
    adapters = {0: learning[0], 1: plain, 2: learning[1]}
    store = AdapterStore(base.model, base.targets, [learning[0].capacity] * 3, torch.device("cpu"))
    for slot, adapter in adapters.items():
        store.assign(slot, adapter)
    generator = torch.Generator().manual_seed(0)
    for flat in (store.params, store.grads, store.copies["sensitivity"]):
        flat.copy_(torch.randn(flat.shape, generator=generator))
    store.grads[store.layout.by_slot[2][0].a] = torch.inf
    found = store.copies["sensitivity"].clone().to(DEVICE)
    memory = torch.tensor([0.9, torch.nan, 0.25], device=DEVICE)
    moved = [tensor.to(DEVICE) for tensor in (store.params, store.grads, store.block_slot)]
    kernels.accumulate_sensitivity(*moved[:2], found, moved[2], memory)
    before = store.copies["sensitivity"].clone()
    sparse.accumulate_sensitivity(store, {0: 0.9, 2: 0.25})
    assert_close(found, store.copies["sensitivity"])
    for slot, moved in enumerate((True, False, True)):
        changed = [not store.copies["sensitivity"][a:b].equal(before[a:b]) for a, b in store.spans[slot]]
        assert any(changed) is moved


@pytest.mark.parametrize("seed", [3_333_333_333, seeds.for_rows(3_333_333_333, 12)])
def test_dropout_masks_have_the_same_bits(seed: int) -> None:
    """With A the identity and B the identity, an adapter of full rank shows its mask."""
    from sweeper.lora import kernels

    size, tokens, rows = 16, 6, 30
    params = torch.cat([torch.eye(size).flatten(), torch.eye(size).flatten()])
    table = torch.tensor([[[size, 0, size * size, 0]]], dtype=torch.int32)
    arguments = [
        torch.ones(rows, size), [torch.zeros(rows, size)], params, table, torch.ones(1, 1),
        torch.zeros(1, dtype=torch.int32), torch.tensor([0.25]), torch.tensor([seed]), torch.tensor([17]),
    ]  # fmt: skip
    there = [[p.to(DEVICE) for p in value] if isinstance(value, list) else value.to(DEVICE) for value in arguments]
    kernels.forward(*there, None, None, size, tokens, True)
    (y,) = there[1]
    index = lowrank.row_index(rows, tokens, torch.device("cpu"))
    mask = lowrank.keep_mask(seed, 17, index, size, 0.25)
    assert torch.equal(y.cpu() != 0, mask)


def test_norms_of_adapted_weights() -> None:
    """Slot 1 holds no DoRA, slot 2 has one of two members alone; one weight lies transposed, as a Linear's does."""
    from sweeper.lora import form_kernels
    from sweeper.lora.forms.dora import Gain

    chosen = case((70, 24), [[4, 9], [5, 5], [100, 0]], bias=False, fan_in=130)
    chosen.weights[0] = chosen.weights[0].t().contiguous().t()
    gain = Gain(chosen.weights, torch.zeros(3, 192), (0, 128))
    for slot, member in ((0, 0), (0, 1), (2, 0)):
        gain.switch(slot, member, True)
    ours = gain.norm.to(DEVICE)
    form_kernels.norms(
        [weight.to(DEVICE) for weight in gain.weights], [squares.to(DEVICE) for squares in gain.squares], gain.columns,
        gain.on.to(DEVICE), ours, chosen.params.to(DEVICE), chosen.table.to(DEVICE), chosen.scale.to(DEVICE),
    )  # fmt: skip
    for slot, member in ((0, 0), (0, 1), (2, 0)):
        rank, a, b, _ = chosen.table[slot, member].tolist()
        weight = chosen.weights[member]
        fan_in, width = weight.shape
        first = chosen.params[a : a + rank * fan_in].view(rank, fan_in)
        second = chosen.params[b : b + rank * width].view(rank, width)
        gain.measure(slot, member, first, second, chosen.scale[slot, member])
        whole = weight + chosen.scale[slot, member] * first.t() @ second
        column = gain.columns[member]
        torch.testing.assert_close(gain.norm[slot, column : column + width], whole.norm(dim=0), rtol=1e-4, atol=1e-4)
    assert_close(ours, gain.norm)


@pytest.mark.parametrize("copied", [False, True])
def test_factors_of_shared_matrices_and_their_gradients(copied: bool, load: Any, make_adapter: Any) -> None:
    from sweeper.lora import form_kernels
    from sweeper.lora.forms import Capacity

    base = load("gpt2")
    vera = dataclasses.replace(make_adapter(base, "full", 9), form="vera", scales={})
    vera = dataclasses.replace(vera, scales=dict.fromkeys(vera.ranks, 1.0))
    wide = Capacity.union([vera.capacity, make_adapter(base, "attn", 20).capacity])
    store = AdapterStore(base.model, base.targets, [wide, vera.capacity], torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for slot in (0, 1):
        store.assign(slot, vera)
    for parts in store.views(0).values():
        for part in parts:
            part.copy_(torch.randn(part.shape, generator=generator))
    store.grads.copy_(torch.randn(store.grads.shape, generator=generator))
    ours, gradients = store.params.clone().to(DEVICE), store.grads.clone().to(DEVICE)
    work = ours.bfloat16() if copied else ours
    attached: Any = store.attached["vera"]
    for slot, shared in attached.matrices.items():
        there = [tensor.to(DEVICE) for tensor in (*shared.tensors, attached.places[slot])]
        form_kernels.derive(ours, work, *there)
        form_kernels.project(gradients, *there)
    start = store.params.clone()
    with store.one_pass(1.0):
        pass
    assert not store.params.equal(start)
    assert_close(ours, store.params)
    assert_close(gradients, store.grads)
    # the interpreter truncates where a GPU rounds
    torch.testing.assert_close(work.float(), ours, rtol=2**-7, atol=0)
