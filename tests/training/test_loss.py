"""The chunked frozen-head loss is torch's cross-entropy, in value and gradient."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sweeper.models import loss
from sweeper.models.loss import Head
from sweeper.models.verdict import HeadForm

LANES, TARGETS, HIDDEN, VOCABULARY = 3, 5, 12, 41


def head(*, bias: bool = False, softcap: float | None = None, divisor: float = 1.0) -> Head:
    module = torch.nn.Linear(HIDDEN, VOCABULARY, bias=bias).requires_grad_(False)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    return Head(module, HeadForm(softcap=softcap, divisor=divisor))


def data() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(LANES * TARGETS, HIDDEN, generator=generator)
    targets = torch.randint(VOCABULARY, (LANES, TARGETS), generator=generator)
    weights = torch.rand(LANES, TARGETS, generator=generator)
    weights[0, 3:] = 0
    weights[2, 4:] = 0
    return hidden, targets, weights


def reference(of: Head, hidden: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    logits = functional.linear(hidden, of.module.weight, of.module.bias) / of.form.divisor
    if of.form.softcap is not None:
        logits = of.form.softcap * torch.tanh(logits / of.form.softcap)
    nll = functional.cross_entropy(logits, targets.flatten(), reduction="none").view(targets.shape)
    return (nll * weights).sum(1), nll


@pytest.mark.parametrize("chunk", [1 << 28, 4 * VOCABULARY, 1])
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": True}, {"softcap": 2.0}, {"divisor": 8.0}, {"bias": True, "softcap": 3.0, "divisor": 0.5}],
    ids=str,
)
def test_loss_and_gradient_are_torchs(options: dict, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_LOGITS", chunk)
    ours_head = head(**options)
    hidden, targets, weights = data()
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    losses, scores = ours_head.scores(ours, targets, weights)
    wanted, nll = reference(ours_head, theirs, targets, weights)
    torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scores.nll, nll.detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(scores.correct, ours_head.logits(hidden).argmax(-1).view(targets.shape) == targets)
    (losses * torch.tensor([1.0, 0.5, 3.0])).sum().backward()
    (wanted * torch.tensor([1.0, 0.5, 3.0])).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)
    assert float(ours.grad.abs().max()) > 1e-2


@pytest.mark.parametrize("frozen", [True, False])
def test_rows_without_weight_give_nothing_even_where_logits_overflow(frozen: bool) -> None:
    made = head()
    if not frozen:  # an adapted head has a `group`; everything else is the same
        adapted = torch.nn.Linear(HIDDEN, VOCABULARY, bias=False)
        adapted.weight = made.module.weight
        adapted.group = SimpleNamespace(lanes=SimpleNamespace(tokens=1))
        made = Head(adapted)
    hidden, targets, weights = data()
    clean = hidden.clone().requires_grad_()
    broken = hidden.clone()
    broken[weights.flatten() == 0] = torch.inf
    broken.requires_grad_()
    wanted, ours = (made.scores(rows, targets, weights)[0] for rows in (clean, broken))
    assert torch.equal(ours, wanted)
    wanted.sum().backward()
    ours.sum().backward()
    live = weights.flatten() > 0
    assert torch.equal(broken.grad[live], clean.grad[live])
    if frozen:
        assert not broken.grad[~live].any()


def test_one_lane_going_nan_leaves_the_others() -> None:
    made = head()
    hidden, targets, weights = data()
    clean = hidden.clone().requires_grad_()
    broken = hidden.clone()
    broken[TARGETS : 2 * TARGETS] = torch.nan
    broken.requires_grad_()
    wanted, ours = (made.scores(rows, targets, weights)[0] for rows in (clean, broken))
    wanted.sum().backward()
    ours.sum().backward()
    assert ours.isnan().tolist() == [False, True, False]
    for lane in (0, 2):
        rows = slice(lane * TARGETS, (lane + 1) * TARGETS)
        assert torch.equal(ours[lane], wanted[lane])
        assert torch.equal(broken.grad[rows], clean.grad[rows])


def test_scores_alone_need_no_gradient() -> None:
    hidden, targets, weights = data()
    losses, _ = head().scores(hidden, targets, weights)
    assert not losses.requires_grad
    torch.testing.assert_close(losses, reference(head(), hidden, targets, weights)[0])
