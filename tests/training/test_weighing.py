"""Learnt weights of the tasks' losses: a packed run equals autograd on plain PyTorch, and changes no other."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sweeper.lora.optimizer import learning_rate
from sweeper.training.pack import Pack
from sweeper.training.pack_config import PackConfig
from sweeper.training.weighing import STATE
from tests.training.several import NAMES, Plain, begun, run_of, trained

LEARNT = {"weights": "uncertainty"}


class Reference(Plain):
    """Kendall et al.'s loss by autograd, its log variances under torch's own Adam."""

    def run(self) -> tuple[list[float], Tensor]:
        s = [nn.Parameter(torch.zeros(())) for _ in NAMES]
        optim = self.optim
        adam = torch.optim.Adam(s, lr=1.0, betas=(optim.beta1, optim.beta2), eps=optim.eps)
        losses = []
        for step in range(self.job.steps):
            means = self.losses(self.job.order.step(step))
            loss = torch.stack([torch.exp(-s[task]) * mean + s[task] / 2 for task, mean in means.items()]).sum()
            loss.backward()
            losses.append(float(loss.detach()))
            for group in adam.param_groups:
                group["lr"] = learning_rate(optim, step, self.job.steps)
            adam.step()
            adam.zero_grad()
            self.step(step, set(means))
        return losses, torch.stack(s).detach()


@pytest.mark.parametrize(
    ("sharing", "options"),
    [
        ("single", {"sampling": "equal"}),
        ("single", {"sampling": "temperature", "temperature": 0.3}),  # some steps lack a task
        ("shared", {"sampling": "equal"}),
    ],
)
def test_learnt_weights_equal_plain_pytorch(sharing: str, options: dict[str, Any], load: Any, train: Any) -> None:
    base = load("gpt2")
    job = run_of(base, options | LEARNT, sharing, optim={"lr": 5e-3, "schedule": "linear"})
    reference = Reference(base, job, begun(base, job, train))
    losses, s = reference.run()
    results, kept = trained(base, [job])
    ours = results[job.run_id]
    assert [one.loss for one in ours] == pytest.approx(losses, rel=1e-4)
    assert ours[-1].variances == pytest.approx(s.tolist(), abs=1e-4)
    reference.assert_close(kept[job.run_id])
    assert max(map(abs, ours[-1].variances)) > 0.02  # something was learnt


def test_a_task_without_rows_in_a_step_keeps_its_weight(load: Any) -> None:
    base = load("gpt2")
    job = run_of(base, {"sampling": "temperature", "temperature": 0.3} | LEARNT)
    results, _ = trained(base, [job])
    assert job.mixture is not None
    seen = job.mixture.counts > 0
    assert not seen.all()
    before = (0.0, 0.0, 0.0)
    for step, one in enumerate(results[job.run_id]):
        for task in range(len(NAMES)):
            stays = one.variances[task] == before[task]
            assert stays == (not seen[step, task] or step == 0)  # warm-up begins at a rate of 0
        before = one.variances


def test_passes_of_a_step_give_what_one_gives(load: Any) -> None:
    base = load("gpt2")
    whole = run_of(base, {"sampling": "equal"} | LEARNT, name="whole", steps=10)
    cut = run_of(base, {"sampling": "equal"} | LEARNT, name="cut", steps=10, batch_size=2, accumulation=3)
    one, kept = trained(base, [whole])
    three, also = trained(base, [cut], batch_size=2, accumulation=3)
    assert [r.loss for r in three["cut"]] == pytest.approx([r.loss for r in one["whole"]], rel=1e-5)
    assert three["cut"][-1].variances == pytest.approx(one["whole"][-1].variances, abs=1e-5)
    for name, parts in kept["whole"].items():
        for ours, other in zip(parts[:1], also["cut"][name][:1], strict=True):
            torch.testing.assert_close(ours, other, rtol=0, atol=1e-4)


def test_who_shares_a_pack_with_learnt_weights_keeps_every_bit(load: Any) -> None:
    base = load("gpt2")
    plain = run_of(base, {"sampling": "equal"}, "shared", name="plain")
    uniform = run_of(base, {"sampling": "equal"}, seed=3, name="beside")
    learnt = run_of(base, {"sampling": "equal"} | LEARNT, seed=3, name="beside")
    results, kept = zip(*(trained(base, [plain, other]) for other in (uniform, learnt)), strict=True)
    assert [one.loss for one in results[0]["plain"]] == [one.loss for one in results[1]["plain"]]
    assert all(one.variances == () for one in results[1]["plain"])
    assert STATE not in kept[1]["plain"]
    for name, parts in kept[0]["plain"].items():
        assert all(mine.equal(other) for mine, other in zip(parts, kept[1]["plain"][name], strict=True))
    assert [one.loss for one in results[0]["beside"]] != [one.loss for one in results[1]["beside"]]


def test_learnt_weights_go_on_where_they_were(load: Any) -> None:
    base = load("gpt2")
    job = run_of(base, {"sampling": "equal"} | LEARNT)
    whole, kept = trained(base, [job])
    first, half = trained(base, [job], steps=9)
    rest = dataclasses.replace(job, done=9, weights=half[job.run_id])
    second, end = trained(base, [rest], steps=11)
    again = [*first[job.run_id], *second[job.run_id]]
    assert [one.loss for one in again] == [one.loss for one in whole[job.run_id]]
    assert [one.variances for one in again] == [one.variances for one in whole[job.run_id]]
    for name, parts in kept[job.run_id].items():
        assert all(mine.equal(other) for mine, other in zip(parts, end[job.run_id][name], strict=True))


def test_a_slot_that_changes_hands_begins_at_zero_and_makes_room(load: Any) -> None:
    base = load("gpt2")
    learnt = run_of(base, {"sampling": "equal"} | LEARNT, steps=3)
    plain = run_of(base, {"sampling": "equal"}, seed=1, steps=3)
    alone = [trained(base, [job])[0][job.run_id] for job in (learnt, plain)]
    with Pack(base, [learnt.capacity], PackConfig(batch_size=6)) as pack:
        for job, wanted in ((learnt, alone[0]), (plain, alone[1]), (learnt, alone[0])):
            slot = pack.add(dataclasses.replace(job))
            for _ in range(3):
                pack.step()
            assert [one.loss for one in pack.drain()] == [one.loss for one in wanted]
            pack.remove(slot)
