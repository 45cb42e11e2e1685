"""Dropout masks come from the run's own seed and step, the module and the place of a value; from nothing else."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sweeper.lora.lowrank import adapted_linear, keep_mask, row_index
from sweeper.training.pack import Pack
from sweeper.training.pack_config import PackConfig

CPU = torch.device("cpu")


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 0.9])
def test_the_right_share_is_kept(p: float) -> None:
    mask = keep_mask(12345, 678, row_index(4000, 50, CPU), 256, p)
    # tolerance: 5 standard deviations of a million independent draws; rows and columns likewise
    assert float(mask.float().mean()) == pytest.approx(1 - p, abs=5 * (p * (1 - p) / mask.numel()) ** 0.5 + 1e-9)
    for axis, count in ((0, 4000), (1, 256)):
        shares = mask.float().mean(axis)
        deviation = (p * (1 - p) / count) ** 0.5
        assert float((shares - (1 - p)).abs().max()) <= 6 * deviation + 1e-6
        assert float(shares.std()) == pytest.approx(deviation, rel=0.15, abs=1e-6)


def test_neighbouring_rows_and_features_are_independent() -> None:
    kept = keep_mask(1, 2, row_index(2000, 40, CPU), 200, 0.5).float()
    for a, b in ((kept[1:], kept[:-1]), (kept[:, 1:], kept[:, :-1])):
        assert float((a * b).mean()) == pytest.approx(0.25, abs=5 * (0.1875 / a.numel()) ** 0.5)


def test_the_mask_of_a_token_does_not_depend_on_the_padded_length() -> None:
    short, long = (
        keep_mask(9, 4, row_index(3 * tokens, tokens, CPU), 32, 0.4).view(3, tokens, 32) for tokens in (8, 24)
    )
    assert torch.equal(short, long[:, :8])
    assert not torch.equal(long[0], long[1])


@pytest.mark.parametrize("other", [{"seed": 10}, {"seed": 9 + (1 << 20)}, {"salt": 5}])
def test_another_seed_or_module_gives_another_mask(other: dict[str, int]) -> None:
    chosen = {"seed": 9, "salt": 4}
    rows = row_index(400, 40, CPU)
    one = keep_mask(rows=rows, features=100, p=0.5, **chosen)
    two = keep_mask(rows=rows, features=100, p=0.5, **(chosen | other))
    agree = float((one == two).float().mean())
    assert agree == pytest.approx(0.5, abs=5 * 0.5 / 200)


def masks(pack: Pack, slot: int) -> dict[tuple[int, str], Tensor]:
    """Masks of a slot by step and module over three steps, read off the operator's seeds and salts."""
    seen: dict[tuple[int, str], Tensor] = {}
    salts = {}
    for group in pack.store.groups:
        salts |= {int(salt): target.name for salt, target in zip(group.salts, group.targets, strict=True)}
    for step in range(3):
        pack.step()
        seed = int(pack.store.lanes.seeds[slot])
        for salt, name in salts.items():
            seen[step, name] = keep_mask(seed, salt, row_index(16, 8, CPU), 32, 0.5)
    return seen


def test_masks_differ_by_step_seed_and_module_but_not_by_pack_mates(
    load: Any, make_adapter: Any, make_job: Any, make_examples: Any
) -> None:
    base, examples = load("llama"), make_examples(0)

    def job(run_id: str, seed: int) -> Any:
        return make_job(run_id, make_adapter(base, "attn", 4, dropout=0.5, seed=seed), examples)

    runs = []
    for seeds in ([0], [1, 0], [1]):
        jobs = [job(str(seed), seed) for seed in seeds]
        with Pack(base, [one.adapter.ranks for one in jobs], PackConfig(batch_size=4)) as pack:
            for one in jobs:
                pack.add(one)
            runs.append(masks(pack, len(jobs) - 1))
    alone, beside, other = runs
    assert alone.keys() == beside.keys()
    assert all(torch.equal(alone[key], beside[key]) for key in alone)
    distinct = {tuple(mask.flatten().tolist()) for found in (alone, other) for mask in found.values()}
    assert len(distinct) == 2 * len(alone)


def test_what_is_dropped_is_neither_read_nor_given_a_gradient_and_the_rest_is_scaled_up() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, fan_in, fan_out, rank, p = 12, 10, 6, 3, 0.4
    x = torch.randn(rows, fan_in, generator=generator, requires_grad=True)
    weight = torch.zeros(fan_in, fan_out)
    params = torch.randn(64 + rank * fan_out, generator=generator, requires_grad=True)
    table = torch.tensor([[[rank, 0, 64, 0]]], dtype=torch.int32)
    scale, seed, salt, tokens = 1.5, 99, 7, 6
    y, _ = adapted_linear(
        x, [weight], [], params, params.detach(), table, torch.tensor([[scale]]), torch.tensor([0], dtype=torch.int32),
        torch.tensor([p]), torch.tensor([seed]), torch.tensor([salt]), None, None, 16, tokens, True,
    )  # fmt: skip
    mask = keep_mask(seed, salt, row_index(rows, tokens, CPU), fan_in, p)
    assert 0 < int(mask.sum()) < mask.numel()
    a, b = params[: rank * fan_in].view(rank, fan_in), params[64:].view(rank, fan_out)
    wanted = scale * (x * mask / (1 - p)) @ a.t() @ b
    torch.testing.assert_close(y, wanted)
    upstream = torch.randn(y.shape, generator=generator)
    ours = torch.autograd.grad(y, (x, params), upstream)
    for mine, other in zip(ours, torch.autograd.grad(wanted, (x, params), upstream), strict=True):
        torch.testing.assert_close(mine, other)
    assert not ours[0][~mask].any()


def test_evaluation_drops_nothing(load: Any, make_adapter: Any, make_job: Any, make_examples: Any) -> None:
    from sweeper.training.score import score

    base, examples = load("llama"), make_examples(0)
    found = []
    for dropout in (0.0, 0.9):
        adapter = make_adapter(base, "full", 4, dropout=dropout)
        one = make_job("x", adapter, examples)
        generator = torch.Generator().manual_seed(4)
        with Pack(base, [adapter.ranks], PackConfig(batch_size=4)) as pack:
            slot = pack.add(one)
            for _, b in pack.store.views(slot).values():
                b.copy_(0.1 * torch.randn(b.shape, generator=generator))
            found.append(score(pack, [slot], examples, budget=4096))
    assert found[0] == found[1]
