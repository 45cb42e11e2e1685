"""TRL's own losses (1.16.0) on token rows: its trainers' methods, without their data handling.

A trainer is made without its `__init__`, which would load, tokenise and prepare; its loss reads a handful of fields.
"""

import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from sweeper.objectives.objective import Row

Loss = Callable[[Any, Sequence[Sequence[Row]]], Tensor]
"""Of a model, the rows of some examples and their references."""


def load() -> Any:
    """The package and its experimental part, whose import warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import trl
        from trl.experimental import cpo, orpo
        from trl.trainer.utils import add_fused_lm_head

    return SimpleNamespace(
        DPO=trl.DPOTrainer, KTO=trl.KTOTrainer, CPO=cpo.CPOTrainer, ORPO=orpo.ORPOTrainer, fuse=add_fused_lm_head
    )


def _bare(kind: type, **fields: Any) -> Any:
    trainer = object.__new__(kind)
    whole = {
        "aux_loss_enabled": False, "is_encoder_decoder": False, "pad_token_id": 0, "padding_value": 0, "_tp_size": 1,
        "_total_train_tokens": 0, "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)},
        "accelerator": SimpleNamespace(
            device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
        ),
    }  # fmt: skip
    vars(trainer).update(whole | fields)
    return trainer


def _padded(rows: Sequence[Row], prefix: str = "") -> dict[str, Tensor]:
    length = max(len(row.input_ids) for row in rows)
    ids, attention, completion = (torch.zeros(len(rows), length, dtype=torch.int64) for _ in range(3))
    for i, row in enumerate(rows):
        ids[i, : len(row.input_ids)] = torch.tensor(row.input_ids)
        attention[i, : len(row.input_ids)] = 1
        completion[i, row.prompt_length : len(row.input_ids)] = 1
    return {f"{prefix}input_ids": ids, f"{prefix}attention_mask": attention, f"{prefix}completion_mask": completion}


def dpo(loss_type: str, beta: float) -> Loss:
    kind = load()
    trainer = _bare(
        kind.DPO, beta=beta, loss_types=[loss_type], loss_weights=[1.0], ld_alpha=None, label_smoothing=0.0,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", use_weighting=False,
    )  # fmt: skip

    def loss(model: Any, examples: Sequence[Sequence[Row]]) -> Tensor:
        _fused(kind, model)
        trainer.model = model
        better, worse = zip(*examples, strict=True)
        inputs = _padded([*better, *worse]) | {
            "ref_chosen_logps": torch.tensor([row.reference for row in better]),
            "ref_rejected_logps": torch.tensor([row.reference for row in worse]),
        }
        found: Tensor = trainer._compute_loss(model, inputs, False)
        return found

    return loss


def kto(beta: float, desirable: float, undesirable: float) -> Loss:
    kind = load()
    trainer = _bare(
        kind.KTO, beta=beta, loss_type="kto", calculate_KL=True, precompute_ref_logps=True,
        desirable_weight=desirable, undesirable_weight=undesirable,
    )  # fmt: skip

    def loss(model: Any, examples: Sequence[Sequence[Row]]) -> Tensor:
        _fused(kind, model)
        trainer.model = model
        every = [row for rows in examples for row in rows]
        own, mismatched = ([row for row in every if bool(row.value) is real] for real in (True, False))
        inputs = (
            _padded(own)
            | _padded(mismatched, "KL_")
            | {
                "label": torch.tensor([row.value > 0 for row in own]),
                "ref_logps": torch.tensor([row.reference for row in own]),
                "ref_KL_logps": torch.tensor([row.reference for row in mismatched]),
            }
        )
        found: Tensor = trainer._compute_loss(model, inputs, False)
        return found

    return loss


def cpo(loss_type: str, beta: float, alpha: float, smoothing: float, gamma: float = 0.0) -> Loss:
    trainer = _bare(
        load().CPO, beta=beta, loss_type=loss_type, cpo_alpha=alpha, alpha=0.0, label_smoothing=smoothing,
        simpo_gamma=gamma,
    )  # fmt: skip
    return _of_batches(trainer)


def orpo(beta: float) -> Loss:
    return _of_batches(_bare(load().ORPO, beta=beta))


def _of_batches(trainer: Any) -> Loss:
    def loss(model: Any, examples: Sequence[Sequence[Row]]) -> Tensor:
        batch: dict[str, Tensor] = {}
        for name, rows in zip(("chosen", "rejected"), zip(*examples, strict=True), strict=True):
            # ORPO's rows may be scored from their start, with the prompt's length as their value
            starts = [Row(row.input_ids, int(row.value) or row.prompt_length) for row in rows]
            padded = _padded(starts)
            ids = padded["input_ids"]
            batch |= {
                f"{name}_input_ids": ids, f"{name}_attention_mask": padded["attention_mask"],
                f"{name}_labels": ids.masked_fill(padded["completion_mask"] == 0, -100),
            }  # fmt: skip
        found: Tensor = trainer.get_batch_loss_metrics(model, batch)[0]
        return found

    return loss


def _fused(kind: Any, model: Any) -> None:
    if not getattr(model, "fused_for_test", False):
        kind.fuse(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
        model.fused_for_test = True
