"""Experts behind a learnt gate: packed runs equal a plain PyTorch model of them, and what they leave loads as one."""

import copy
import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sweeper import methods
from sweeper.adapters.routed import routed_model
from sweeper.errors import DataError, SpecError
from sweeper.lora import gating
from sweeper.lora.forms import AdapterSpec, Capacity
from sweeper.lora.optimizer import learning_rate
from sweeper.models import BaseModel
from sweeper.record import read_record
from sweeper.rescoring import rescore
from sweeper.spec import EvaluationSpec, RunSpec, Settings, SharingSpec
from sweeper.training import experts
from sweeper.training.generate import generate
from sweeper.training.memory import GATE_BYTES, STATE_BYTES, run_bytes
from sweeper.training.pack import open_pack
from sweeper.training.pack_config import PackConfig
from sweeper.training.run_state import RunState

STEPS = 20
MakeRouted = Callable[..., RunState]


@pytest.fixture
def routed(make_job: Any, make_adapter: Any, make_examples: Any, place: Any) -> MakeRouted:
    """A run with experts: `routed(base, "ff", experts=3, router="prompt")`."""

    def make(
        base: BaseModel, placement: str = "full", *, rank: int = 6, seed: int = 0, dropout: float = 0.0, **sharing: Any
    ) -> RunState:
        job = make_job(
            f"{placement}-{seed}", make_adapter(base, placement, rank, seed=seed), make_examples(seed), steps=STEPS,
            batch_size=4, lr=5e-3, max_grad_norm=0.3, seed=seed,
        )  # fmt: skip
        method = dataclasses.replace(job.spec.method, name="lora", dropout=dropout)
        spec = dataclasses.replace(
            job.spec, sharing=SharingSpec(name="routed", **sharing), rank=rank, alpha=2.0 * rank, method=method
        )
        adapter = methods.adapter(spec, dict.fromkeys(place(base, placement), rank))
        return dataclasses.replace(job, run=dataclasses.replace(job.run, spec=spec), adapter=adapter)

    return make


class Reference:
    """A run as the papers have it: every module has experts and a router; the highest few of a softmax are kept.

    The loss has `balance` times the mean over modules of K sum_i F_i P_i (Fedus et al. 2022, eq. 4), with F_i the share
    of tokens sent to expert i and P_i its mean probability.
    """

    def __init__(self, base: BaseModel, job: RunState, begin: dict[str, tuple[Tensor, ...]]) -> None:
        assert isinstance(job.adapter, AdapterSpec)
        self.job, self.given, self.scales = job, job.adapter.options, job.adapter.scales
        self.model = copy.deepcopy(base.model).requires_grad_(False)
        self.bare = copy.deepcopy(base.model).requires_grad_(False)
        self.parts = {name: [nn.Parameter(one.clone()) for one in parts[:3]] for name, parts in begin.items()}
        if self.given["tied"]:
            first = next(iter(self.parts.values()))[2]
            for parts in self.parts.values():
                parts[2] = first
        for name in begin:
            self.model.get_submodule(name).register_forward_hook(self._hook(name))
        values = {id(one): one for parts in self.parts.values() for one in parts}
        optim = job.spec.optim
        self.values = list(values.values())
        self.optimizer = torch.optim.AdamW(
            self.values, lr=1.0, betas=(optim.beta1, optim.beta2), eps=optim.eps, weight_decay=0.0
        )
        self.mask = self.features = torch.zeros(0)
        self.lost: list[Tensor] = []

    def _hook(self, name: str) -> Any:
        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            (x,), (a, b, router), count = inputs, self.parts[name], self.given["experts"]
            read = self.features[:, None] if self.given["router"] == "prompt" else x
            p = (read @ router.t()).softmax(-1)
            best = p.topk(self.given["kept"], dim=-1)
            gates = torch.zeros_like(p).scatter(-1, best.indices, best.values)
            gates = gates / gates.sum(-1, keepdim=True)
            valid = torch.ones(p.shape[:2]) if self.given["router"] == "prompt" else self.mask
            soft = self.given["kept"] == count
            sent = gates.detach() if soft else torch.zeros_like(p).scatter(-1, best.indices, 1 / self.given["kept"])
            f = (sent * valid[..., None]).sum((0, 1)) / valid.sum()
            mean = (p * valid[..., None]).sum((0, 1)) / valid.sum()
            self.lost.append(count * (f * mean).sum())
            a, b = a.view(count, -1, a.shape[1]), b.view(count, -1, b.shape[1])
            every = [(x @ a[k].t()) @ b[k] for k in range(count)]
            return output + self.scales[name] * sum(gates[..., k, None] * every[k] for k in range(count))

        return add

    def read(self, ids: Tensor, prompts: Sequence[int]) -> None:
        """What a router of prompts goes by; ids are padded on the right, so that no prompt sees the padding."""
        with torch.no_grad():
            hidden = self.bare.base_model(input_ids=ids).last_hidden_state
        means = torch.stack([one[:length].mean(0) for one, length in zip(hidden, prompts, strict=True)])
        means = means - means.mean(1, keepdim=True)
        means = means / means.square().mean(1, keepdim=True).sqrt()
        self.features = means @ gating.projection(means.shape[1])

    def step(self, step: int, rows: Sequence[Any]) -> float:
        length = max(len(one.input_ids) for one in rows)
        ids = torch.tensor([[*one.input_ids, *[0] * (length - len(one.input_ids))] for one in rows])
        lengths = torch.tensor([len(one.input_ids) for one in rows])
        self.mask = (torch.arange(length) < lengths[:, None]).float()
        self.read(ids, [one.prompt_length for one in rows])
        self.lost = []
        logits = self.model(input_ids=ids, attention_mask=self.mask.long()).logits
        targets = [torch.tensor(one.input_ids[one.prompt_length :]) for one in rows]
        total = sum(
            functional.cross_entropy(
                logits[i, one.prompt_length - 1 : len(one.input_ids) - 1], targets[i], reduction="sum"
            )
            for i, one in enumerate(rows)
        )
        loss = total / sum(map(len, targets))
        (loss + self.given["balance"] * torch.stack(self.lost).mean()).backward()
        torch.nn.utils.clip_grad_norm_(self.values, self.job.spec.optim.max_grad_norm or math.inf)
        self.optimizer.param_groups[0]["lr"] = learning_rate(self.job.spec.optim, step, STEPS)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def run(self) -> list[float]:
        job = self.job
        return [self.step(step, [job.examples[i] for i in job.order.batch(step)]) for step in range(STEPS)]


def begun(base: BaseModel, job: RunState) -> dict[str, tuple[Tensor, ...]]:
    with open_pack(base, [job.adapter], PackConfig(batch_size=4)) as pack:
        pack.add(job)
        pack.store.one_pass(1.0).__enter__()
        return {name: parts[:3] for name, parts in pack.snapshot(0).items()}


KINDS: list[tuple[str, dict[str, Any]]] = [
    ("full", {"experts": 3}),
    ("ff", {"experts": 3, "kept": 2, "balance": 0.5, "seed": 1}),
    ("attn", {"experts": 2, "router": "prompt", "kept": 1, "balance": 0.1, "seed": 2}),
    ("full", {"experts": 3, "router": "prompt", "tied": True, "seed": 3}),
]


@pytest.mark.parametrize("kind", [pytest.param("gpt2", marks=pytest.mark.slow), "llama"])
def test_a_pack_of_experts_equals_plain_pytorch(
    kind: str, load: Any, routed: MakeRouted, make_job: Any, make_adapter: Any, make_examples: Any, train: Any
) -> None:
    base = load(kind)
    jobs = [routed(base, placement, **fields) for placement, fields in KINDS]
    plain = make_job("plain", make_adapter(base, "full", 4), make_examples(0), steps=STEPS, batch_size=4)
    packed = train(base, [*jobs, plain], capacities=[*(job.capacity for job in jobs), plain.capacity])
    for job in jobs:
        reference = Reference(base, job, begun(base, job))
        assert packed[job.run_id].losses == pytest.approx(reference.run(), rel=1e-4)
        for name, parts in packed[job.run_id].adapter.items():
            for ours, theirs in zip(parts[:3], reference.parts[name], strict=True):
                torch.testing.assert_close(ours, theirs.data, rtol=0, atol=1e-4)
    alone = train(base, [plain])["plain"]
    assert packed["plain"].losses == pytest.approx(alone.losses, rel=1e-5)


def test_who_shares_the_pack_changes_nothing_and_slots_change_hands(
    load: Any, routed: MakeRouted, make_job: Any, make_adapter: Any, make_examples: Any, train: Any
) -> None:
    base = load("llama")
    jobs = [routed(base, placement, **fields) for placement, fields in KINDS[:3]]
    plain = make_job("plain", make_adapter(base, "full", 8), make_examples(0), steps=5, batch_size=4)
    most = Capacity.union(job.capacity for job in (*jobs, plain))
    one_slot = train(base, [jobs[1], plain, jobs[0], jobs[2]], capacities=[most])
    for job in (*jobs, plain):
        alone = train(base, [job], capacities=[job.capacity])[job.run_id]
        assert one_slot[job.run_id].losses == pytest.approx(alone.losses, rel=1e-5)


def test_experts_of_which_all_agree_are_plain_lora(load: Any, routed: MakeRouted, train: Any) -> None:
    """With every expert the same and a soft gate, the gates add up to one."""
    base = load("llama")
    job = routed(base, "ff", experts=2, rank=4)
    begin = begun(base, job)
    alike = {name: (torch.cat([a[:2], a[:2]]), b, router) for name, (a, b, router) in begin.items()}
    moments = {name: tuple(torch.zeros_like(part) for part in parts) for name, parts in alike.items()}
    weights = {name: (*alike[name], *moments[name], *moments[name]) for name in alike}
    trained = train(base, [dataclasses.replace(job, weights=weights)], capacities=[job.capacity])[job.run_id]
    for a, b, *_ in trained.adapter.values():
        torch.testing.assert_close(a[:2], a[2:], atol=2e-2, rtol=0)
        assert b.abs().max() > 0


def test_balance_pulls_the_experts_together(load: Any, routed: MakeRouted, train: Any) -> None:
    base = load("llama")

    def balance(weight: float, *, trained: bool) -> float:
        job = routed(base, "ff", experts=4, kept=1, rank=4, balance=weight)
        if trained:
            found = train(base, [job], capacities=[job.capacity])[job.run_id]
            weights = {name: tuple(parts) for name, parts in found.adapter.items()}
        else:
            weights = {}
        with open_pack(base, [job.adapter], PackConfig(batch_size=4)) as pack:
            pack.add(job)
            for name, parts in pack.store.views(0).items():
                for own, value in zip(parts, weights.get(name, ()), strict=False):
                    own.copy_(value)
            pack.store.publish(0)
            _, losses = experts.opened(pack, 0, job.examples)
        return sum(losses) / len(losses)

    before, pulled, left = balance(0.0, trained=False), balance(1.0, trained=True), balance(0.0, trained=True)
    assert pulled < before
    assert pulled < left
    assert pulled >= 1 - 1e-6


def test_a_fresh_run_with_experts_is_the_base(load: Any, routed: MakeRouted) -> None:
    base = load("llama")
    for placement, fields in KINDS:
        job = routed(base, placement, **fields)
        assert all(not b.any() for _, b, _ in begun(base, job).values())
        firsts = [a.view(fields["experts"], -1, a.shape[1]) for a, _, _ in begun(base, job).values()]
        assert all(not one[0].equal(one[1]) for one in firsts)


def test_ranks_of_experts(load: Any, routed: MakeRouted) -> None:
    base = load("llama")

    def rank(**fields: Any) -> set[int]:
        adapter = routed(base, "ff", **fields).adapter
        assert isinstance(adapter, AdapterSpec)
        return set(adapter.ranks.values())

    assert rank(experts=3) == {6}
    assert rank(experts=3, kept=1) == {18}
    assert rank(experts=3, kept=1, budget="total") == {6}
    with pytest.raises(SpecError, match=r"rank 6 of .* does not go round among 4 experts; give a multiple of 4"):
        rank(experts=4)


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"name": "routed", "experts": 1}, "sharing.experts must be at least 2"),
        ({"name": "routed", "experts": 2, "kept": 3}, "sharing.kept must be at most 2"),
        ({"name": "routed", "tied": True}, "give sharing.router=prompt"),
        ({"name": "single", "kept": 2}, "sharing.kept is for sharing=routed, not single"),
    ],
)
def test_what_a_gate_cannot_be_is_one_line(fields: dict[str, Any], line: str, make_run: Any) -> None:
    with pytest.raises(SpecError, match=line):
        methods.check(dataclasses.replace(make_run(), sharing=SharingSpec(**fields)))


def test_runs_with_experts_from_spec_to_record_and_back(
    make_run: Callable[..., RunSpec], run_all: Any, tmp_path: Path, load: Any
) -> None:
    plain = make_run(trainer={"max_steps": 6, "batch_size": 4}, rank=8, alpha=16.0)
    specs = [
        dataclasses.replace(plain, sharing=SharingSpec(name="routed", kept=1, experts=4, balance=0.01)),
        dataclasses.replace(plain, sharing=SharingSpec(name="routed", router="prompt", experts=2, tied=True)),
    ]
    run_all(specs, "whole")
    run_all(specs, "stopped", stop_after=5)
    run_all(specs, "stopped")
    for spec in specs:
        whole, stopped = (read_record(tmp_path / study / spec.run_id) for study in ("whole", "stopped"))
        assert whole.scores["test"]["after"].nll == pytest.approx(stopped.scores["test"]["after"].nll, rel=1e-6)
        found = whole.sharing
        assert found["experts"] == spec.sharing.experts
        (gates,) = found["usage"].values()
        assert sum(gates) == pytest.approx(1, abs=1e-4)
        assert found["balance"] >= 0.5
        assert whole.trainable_parameters == sum(m.parameters for m in whole.modules) + found["router_parameters"]
        folder = tmp_path / "whole" / spec.run_id
        options = json.loads((folder / "experts/router.json").read_text())
        assert options["experts"] == spec.sharing.experts
    assert not (tmp_path / "whole" / specs[0].run_id / "adapter").exists()
    runs = rescore.find([tmp_path / "whole"], gates=True)
    settings = Settings(study="x", device="cpu", output_root=str(tmp_path))
    for one in rescore.rescore(runs, [], EvaluationSpec(name="default", splits=("test",)), settings):
        wanted = read_record(one.run.folder).scores["test"]["after"]
        assert one.score.nll == pytest.approx(wanted.nll, rel=1e-5)
    with pytest.raises(DataError, match="so it has no adapter for PEFT"):
        rescore.find([tmp_path / "whole"])
    for broken in ("[]", json.dumps({**options, "experts": 10**9}), json.dumps({**options, "kept": "all"}), "{"):
        (folder / "experts/router.json").write_text(broken)
        with pytest.raises(DataError, match="its record cannot be read"):
            rescore.find([folder], gates=True)


def test_what_a_run_leaves_loads_as_one_model(load: Any, routed: MakeRouted, train: Any, tmp_path: Path) -> None:
    from sweeper.training.export import write_experts
    from sweeper.training.run_state import UNPROVED

    base = load("llama")
    for placement, fields in KINDS:
        job = routed(base, placement, **fields)
        assert isinstance(job.adapter, AdapterSpec)
        trained = train(base, [job], capacities=[job.capacity])[job.run_id].adapter
        weights = {name: tuple(parts[:3]) for name, parts in trained.items()}
        run = dataclasses.replace(job.run, folder=tmp_path / job.run_id)
        targets = [target for target in base.targets if target.name in weights]
        write_experts(run, job.spec, job.adapter, targets, weights, UNPROVED)
        reference = Reference(base, job, weights)
        model = routed_model(copy.deepcopy(base.model), run.folder)
        rows = job.examples[:4]
        length = max(len(one.input_ids) for one in rows)
        ids = torch.tensor([[*one.input_ids, *[0] * (length - len(one.input_ids))] for one in rows])
        prompts = torch.tensor([one.prompt_length for one in rows])
        reference.step(0, rows)  # so that it has read the prompts
        with torch.no_grad():
            loaded = model(ids, prompts)
        for name, parts in reference.parts.items():
            for own, value in zip(parts, weights[name], strict=True):
                own.data.copy_(value)
        with torch.no_grad():
            torch.testing.assert_close(loaded, reference.model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
        if fields.get("router") == "prompt":
            with pytest.raises(DataError, match="give prompt_lengths"):
                model(ids)
    with pytest.raises(DataError, match="no experts in it"):
        routed_model(base.model, tmp_path)


def test_gates_are_in_the_memory_that_a_run_is_thought_to_need(load: Any, routed: MakeRouted) -> None:
    base = load("llama")
    job = routed(base, "ff", experts=2, rank=4)
    assert isinstance(job.adapter, AdapterSpec)
    ranks = {target: job.adapter.ranks[target.name] for target in base.targets if target.name in job.adapter.ranks}
    job = dataclasses.replace(job, ranks=ranks)
    plain = dataclasses.replace(
        job, adapter=dataclasses.replace(job.adapter, form="lora", options={}),
        run=dataclasses.replace(job.run, spec=dataclasses.replace(job.spec, sharing=SharingSpec())),
    )  # fmt: skip
    more = run_bytes(base, job, None) - run_bytes(base, plain, None)
    routers = STATE_BYTES * sum(2 * target.in_features for target in ranks)
    tokens = 4 * int(job.order.lengths.max())
    assert more == routers + GATE_BYTES * 16 * tokens * len(ranks)


@pytest.mark.parametrize("number", range(len(KINDS)))
def test_text_is_generated_through_the_gates(number: int, load: Any, routed: MakeRouted, train: Any) -> None:
    """Greedily, through the cache, what the plain model with the same experts would write."""
    base = load("llama")
    placement, fields = KINDS[number]
    job = routed(base, placement, **fields)
    trained = train(base, [job], capacities=[job.capacity])[job.run_id].adapter
    reference = Reference(base, job, {name: tuple(parts[:3]) for name, parts in trained.items()})
    prompts = [one.input_ids[: one.prompt_length] for one in job.examples[:3]]
    with open_pack(base, [job.adapter], PackConfig(batch_size=4)) as pack:
        pack.add(dataclasses.replace(job, weights=dict(trained), done=STEPS))
        (written,) = generate(pack, [0], prompts, max_new_tokens=6, stop_ids=[-1], rows=2)
    with torch.no_grad():
        for prompt, ours in zip(prompts, written, strict=True):
            reference.read(torch.tensor([prompt]), [len(prompt)])
            row = list(prompt)
            for _ in range(6):
                reference.mask = torch.ones(1, len(row))
                row.append(int(reference.model(input_ids=torch.tensor([row])).logits[0, -1].argmax()))
            assert ours.ids == tuple(row[len(prompt) :])
