"""Rules that fold adapters into one, and those that learn from examples, beside plain PyTorch."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from sweeper.adapters.library import arrow, folding, lorahub, mole
from sweeper.adapters.library.asked import Asked
from sweeper.adapters.library.bench import Bench
from sweeper.adapters.library.experts import Experts, Gated, Router
from sweeper.models import BaseModel
from sweeper.rescoring import rescore
from sweeper.rescoring.rescore import Saved
from sweeper.spec import RunSpec
from sweeper.tasks.example import Encoded

IDS = torch.tensor([[5, 9, 40, 7, 200, 31, 8, 77], [250, 3, 3, 90, 12, 4, 66, 101]])
Base = Callable[[RunSpec], BaseModel]
Make = Callable[..., Saved]


def updates(run: Saved, base: BaseModel) -> dict[str, Tensor]:
    """dW [out, in] of every module, by hand."""
    saved = rescore.read_adapter(run.folder)
    scale = run.spec.alpha / run.spec.rank
    return {
        t.name: scale * saved.parts(t)[1].t() @ saved.parts(t)[0] for t in base.targets if saved.has(t)
    }  # fmt: skip


def changed(base: BaseModel, dw: Mapping[str, Tensor]) -> Any:
    """A copy of the base with updates added to its weights."""
    model = copy.deepcopy(base.model)
    for name, update in dw.items():
        module: Any = model.get_submodule(name)
        module.weight.data += update if isinstance(module, torch.nn.Linear) else update.t()
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def routed(bench: Bench, router: Router) -> Tensor:
    bench.installed.use(router)
    return logits(bench.base.model)


def examples(count: int = 6) -> list[Encoded]:
    rows = torch.randint(3, 280, (count, 12), generator=torch.Generator().manual_seed(3)).tolist()
    return [Encoded(f"e{i}", tuple(row[: 7 + i % 5]), 3) for i, row in enumerate(rows)]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_weighted_sum_of_updates(saved: Make, base: Base, kind: str) -> None:
    runs = [saved("a", kind, "attn", rank=3), saved("b", kind, "full", rank=5, seed=1, alpha=3.0)]
    own, w = base(runs[0].spec), (0.7, -0.4)
    parts = [updates(run, own) for run in runs]
    wanted: dict[str, Tensor] = {}
    for weight, part in zip(w, parts, strict=True):
        for name, dw in part.items():
            wanted[name] = wanted.get(name, torch.zeros_like(dw)) + weight * dw
    with Bench(own, runs) as bench:
        assert not folding.alike(bench.experts)
        found = routed(bench, folding.by_update(bench.experts, torch.tensor(w)))
        single = routed(bench, bench.alone(1))
        mean = folding.uniform(bench, Asked(), None).router  # type: ignore[arg-type]
        halves = routed(bench, mean)  # type: ignore[arg-type]
    assert (found - logits(changed(own, wanted))).abs().max() < 1e-5
    assert (single - logits(changed(own, parts[1]))).abs().max() < 1e-5
    both = {name: (parts[0].get(name, 0) + dw) / 2 for name, dw in parts[1].items()}
    assert (halves - logits(changed(own, both))).abs().max() < 1e-5


def test_lorahub_combines_factors_as_its_paper_does(saved: Make, base: Base) -> None:
    runs = [saved("a"), saved("b", seed=1), saved("c", seed=2)]
    own, w = base(runs[0].spec), (0.7, -0.4, 1.2)
    files = [rescore.read_adapter(run.folder) for run in runs]
    wanted = {}
    for target in own.targets:
        if files[0].has(target):
            pairs = [file.parts(target) for file in files]
            a = sum(x * pair[0] for x, pair in zip(w, pairs, strict=True))
            b = sum(x * pair[1].t() for x, pair in zip(w, pairs, strict=True))
            wanted[target.name] = runs[0].spec.alpha / runs[0].spec.rank * (b @ a)
    with Bench(own, runs) as bench:
        assert folding.alike(bench.experts)
        found = routed(bench, folding.by_factor(bench.experts, torch.tensor(w)))
        apart = routed(bench, folding.by_update(bench.experts, torch.tensor(w)))
    assert (found - logits(changed(own, wanted))).abs().max() < 1e-5
    assert (found - apart).abs().max() > 1e-2  # which is no sum of updates


def test_another_scale_or_rank_is_not_alike(saved: Make, base: Base) -> None:
    runs = [saved("a"), saved("b", seed=1), saved("c", seed=2, alpha=9.0), saved("d", seed=2, placement="attn_qv")]
    for others, same in (((0, 1), True), ((0, 2), False), ((0, 3), False)):
        with Bench(base(runs[0].spec), [runs[k] for k in others]) as bench:
            assert folding.alike(bench.experts) is same


def test_the_search_finds_the_least_within_bounds() -> None:
    def loss(w: Sequence[float]) -> float:
        assert all(-1.5 <= one <= 1.5 for one in w)
        return (w[0] - 0.8) ** 2 + (w[1] + 2.5) ** 2

    weights, least, first = lorahub.search(loss, 2, budget=200, seed=1)
    assert weights == pytest.approx([0.8, -1.5], abs=0.05)
    assert least == loss(weights)
    assert first == loss([0.0, 0.0])
    assert lorahub.search(loss, 2, budget=200, seed=1)[0] == weights


def test_the_search_keeps_the_base_where_nothing_is_better() -> None:
    def loss(w: Sequence[float]) -> float:
        return 1.0 + sum(map(abs, w)) if all(one == 0 for one in w) else math.nan

    assert lorahub.search(loss, 3, budget=15, seed=0) == ([0.0, 0.0, 0.0], 1.0, 1.0)


def expert_outputs(own: BaseModel, runs: Sequence[Saved], name: str, x: Tensor) -> Tensor:
    """[R, T, K, O]: what each adapter makes of a module's input."""
    parts = [updates(run, own).get(name) for run in runs]
    out = next(part for part in parts if part is not None).shape[0]
    return torch.stack([x @ p.t() if p is not None else x.new_zeros(*x.shape[:-1], out) for p in parts], dim=2)


def reference(
    own: BaseModel, runs: Sequence[Saved], e: Mapping[int, Tensor], tau: Mapping[int, Tensor], rows: Sequence[Encoded]
) -> tuple[Tensor, Tensor]:
    """NLL and balancing loss of gates by layer, from the paper's formulas, each row by itself."""
    nlls, gates_of = [], []
    for row in rows:
        model: Any = copy.deepcopy(own.model)
        now: dict[int, Tensor] = {}
        for target in own.targets:
            if not any(target.name in run.ranks for run in runs):
                continue

            def add(_: Any, args: Any, out: Tensor, target: Any = target, now: Any = now) -> Tensor:
                outputs = expert_outputs(own, runs, target.name, args[0])
                if target.role == "attn_q":  # the first of a layer
                    flat = outputs.flatten(2)
                    flat = (flat - flat.mean(-1, keepdim=True)) / (
                        flat.var(-1, correction=0, keepdim=True) + 1e-5
                    ).sqrt()
                    now[target.layer] = ((flat @ e[target.layer]) / tau[target.layer]).softmax(-1)
                return out + (now[target.layer][..., None] * outputs).sum(2)

            model.get_submodule(target.name).register_forward_hook(add)
        found = model(input_ids=torch.tensor([row.input_ids]), use_cache=False).logits[0].log_softmax(-1)
        response = range(row.prompt_length, len(row.input_ids))
        nlls += [-found[t - 1, row.input_ids[t]] for t in response]
        gates_of.append(torch.stack([now[layer][0] for layer in sorted(now)], dim=1))
    q = torch.cat(gates_of).mean((0, 1))
    return torch.stack(nlls).mean(), -q.log().sum()


def test_gates_of_mole_are_those_of_its_paper(saved: Make, base: Base) -> None:
    runs = [saved("a", placement="full"), saved("b", placement="full", rank=3, seed=1), saved("c", seed=2)]
    own, rows = base(runs[0].spec), examples(4)
    with Bench(own, runs) as bench:
        gates = mole.Gates(bench.experts, mole._leaders(bench, rows, "layer"))
        assert set(gates.leaders.values()) == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for gate in gates.each:
                gate.e.copy_(0.2 * torch.randn(gate.e.shape, generator=generator))
                gate.log_temperature.fill_(0.3)
        loss = mole.step_loss(bench, gates, Gated(gates), rows, weight=0.5)
        loss.backward()  # type: ignore[no-untyped-call]
        assert all(p.grad is None for p in own.model.parameters())
    e = {i: gate.e.detach().clone().requires_grad_() for i, gate in enumerate(gates.each)}  # type: ignore[union-attr, operator]
    tau = {i: torch.tensor(math.exp(0.3), requires_grad=True) for i in e}
    nll, balance = reference(own, runs, e, tau, rows)
    wanted = nll + 0.5 * balance
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    wanted.backward()  # type: ignore[no-untyped-call]
    for i, gate in enumerate(gates.each):
        assert torch.allclose(gate.e.grad, e[i].grad, rtol=1e-3, atol=1e-7)  # type: ignore[arg-type]
        assert float(gate.log_temperature.grad) == pytest.approx(float(tau[i].grad) * math.exp(0.3), rel=1e-3)  # type: ignore[arg-type]


def test_only_gates_train_and_begin_with_every_member_alike(saved: Make, base: Base) -> None:
    runs = [saved("a", placement="full"), saved("b", placement="full", seed=1)]
    own, rows, asked = base(runs[0].spec), examples(), Asked(rules=("mole",), steps=12, lr=0.01)
    with Bench(own, runs) as bench:
        before = {name: p.clone() for name, p in own.model.state_dict().items()}
        factors = [(one.a_SI.clone(), one.b_SO.clone()) for one in bench.experts]
        gates = mole.Gates(bench.experts, mole._leaders(bench, rows, "module"))
        fresh = routed(bench, Gated(gates))
        mean = routed(bench, folding.by_update(bench.experts, torch.tensor([0.5, 0.5])))
        assert (fresh - mean).abs().max() < 1e-5
        losses = mole.train(bench, gates, rows, asked)
        assert sum(losses[-3:]) < sum(losses[:3])
        assert all(bool(gate.e.detach().any()) for gate in gates.each)  # type: ignore[union-attr, operator]
        after = own.model.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in before.items())
        for one, (a, b) in zip(bench.experts, factors, strict=True):
            assert torch.equal(one.a_SI, a)
            assert torch.equal(one.b_SO, b)


def test_a_gate_of_a_token_does_not_see_those_after_it(saved: Make, base: Base) -> None:
    runs = [saved("a", placement="full"), saved("b", placement="full", seed=1)]
    with Bench(base(runs[0].spec), runs) as bench:
        gates = mole.Gates(bench.experts, mole._leaders(bench, examples(1), "layer"))
        with torch.no_grad():
            for gate in gates.each:
                gate.e.normal_(generator=torch.Generator().manual_seed(1))  # type: ignore[union-attr, operator]
        whole = routed(bench, Gated(gates))
        with torch.no_grad():
            part = bench.base.model(input_ids=IDS[:, :5], use_cache=False).logits  # type: ignore[operator]
    assert (whole[:, :5] - part).abs().max() < 1e-5


def test_the_balancing_loss_is_least_where_shares_are_equal() -> None:
    even = torch.full((5, 4), 0.25)
    assert float(mole.balance([even])) == pytest.approx(4 * math.log(4))
    one, other = torch.eye(2), torch.tensor([[0.9, 0.1], [0.8, 0.2]])
    assert float(mole.balance([one, other])) == pytest.approx(-math.log(0.675) - math.log(0.325))


def test_shares_of_tokens_leave_padding_out(saved: Make, base: Base) -> None:
    runs, rows = [saved("a"), saved("b", seed=1)], examples(5)
    with Bench(base(runs[0].spec), runs) as bench:

        def gates(one: Experts, x: Tensor, z: Tensor) -> Tensor:
            first = torch.zeros(*x.shape[:-1], 2)
            first[..., 0] = 1.0
            first[:, 3:] = torch.tensor([0.0, 1.0])  # from the fourth token on the second member
            return first

        shares = bench.top(Gated(gates), rows)
    tokens = sum(len(row.input_ids) for row in rows)
    assert shares is not None
    assert shares.tolist() == pytest.approx([15 / tokens, 1 - 15 / tokens])


def test_every_rule_works_in_half_precision(saved: Make) -> None:
    from sweeper import models

    runs, rows = [saved("a", placement="full"), saved("b", seed=1)], examples()
    for_half, for_full = (
        models.load(runs[0].spec.model, dtype=dtype, device=torch.device("cpu"))
        for dtype in (torch.bfloat16, torch.float32)
    )
    nlls: list[list[float]] = []
    for own in (for_half, for_full):
        with Bench(own, runs) as bench:
            gates = mole.Gates(bench.experts, mole._leaders(bench, rows, "layer"))
            mole.train(bench, gates, rows, Asked(rules=("mole",), steps=2))
            routers = [
                bench.alone(0), folding.by_update(bench.experts, torch.tensor([0.3, -0.2])),
                arrow.gated(bench.experts, top_k=2, temperature=1.0), Gated(gates),
            ]  # fmt: skip
            nlls.append([bench.nll(router, rows) for router in routers])
    assert nlls[0] == pytest.approx(nlls[1], abs=0.03)
