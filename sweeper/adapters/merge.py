"""An adapter merged into its base model, as a plain transformers model, checked to give the engine's logits."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sweeper import record
from sweeper.adapters import peft_models
from sweeper.errors import DataError, ModelError, gist
from sweeper.models import proof
from sweeper.rescoring import rescore
from sweeper.rescoring.rescore import Saved
from sweeper.spec import Precision

if TYPE_CHECKING:
    import torch

    from sweeper.models import BaseModel


def merge(run: Saved, out: Path, *, device: str = "auto", precision: Precision = "float32") -> dict[str, Any]:
    """Writes a run's model with the adapter in its weights to `out`, loads it again and compares with the engine.

    Returns what `out/merged.json` holds: where it comes from, and the largest difference of a logit.

    Raises:
        SweeperError: there is something at `out`, the adapter cannot be loaded or merged, or the logits differ by more
            than the rounding of the precision; `out` is not left behind.
    """
    if out.exists() and any(out.iterdir()):
        raise DataError(f"--out {out}: there is something in it already; give a new folder")
    base = peft_models.load_base(run.spec, device, precision)
    tuned = peft_models.own_weights(run.folder)
    if tuned is None:
        peft_models.untie(base, set(run.ranks))
    rows = proof.rows(base.model, base.tokenizer.all_special_ids)
    wanted = _engine_logits(base, run, rows) if _as_trained(run, tuned is not None) else None
    by_engine = bool(record.read_record(run.folder).saved.get("peft")) if not run.combined else False
    if tuned is not None:
        model = peft_models.with_weights(base, tuned)
    elif by_engine:  # PEFT does not give these logits, and the run's record says so
        model = peft_models.with_weights(base, _engine_weights(base, run))
    else:
        model = peft_models.adapted(base, {"default": run.adapter})
        if not hasattr(model, "merge_and_unload"):
            kind = model.peft_config["default"].peft_type.value
            raise DataError(f"merge: {run.folder.name} is {kind}, which changes no weight of the model")
    wanted = peft_models.logits(model, rows) if wanted is None else wanted
    with record.replacing_folder(out) as temporary:
        with peft_models.hushed():
            _save(_merged(model) if model is not base.model else model, base, temporary)
        found = _compared(base, temporary, rows, wanted)
        note = {"run_id": run.folder.name, "from": str(run.folder), "model": base.spec.name, **found}
        record.write_json(temporary / record.MERGED, note)
    return note


def _merged(model: Any) -> Any:
    try:
        return model.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError) as error:
        raise DataError(f"merge: PEFT cannot: {gist(error)}") from error


def _as_trained(run: Saved, weights: bool) -> bool:
    """Whether what was saved, `weights` or an adapter, is what the run's method leaves; else it was put there since."""
    from sweeper import methods
    from sweeper.lora.forms.peft import kind_of

    left = methods.find(run.spec.method.name).leaves(run.spec.method)
    return left == (None if weights else kind_of(rescore.read_config(run.folder)))


def _engine_logits(base: "BaseModel", run: Saved, rows: "list[torch.Tensor]") -> "list[torch.Tensor]":
    """What the engine makes of the saved run: float32 logits [T, V] of each row, on the CPU."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    with rescore.packed(base, [run]) as pack, torch.no_grad(), pack.evaluating():
        pack.use_lanes([0])
        lengths = torch.tensor([len(row) for row in rows], device=pack.device)
        states = pack.hidden(pad_sequence(rows, batch_first=True), lengths)
        return [pack.head.logits(state[: len(row)]).cpu() for state, row in zip(states, rows, strict=True)]


def _engine_weights(base: "BaseModel", run: Saved) -> "dict[str, torch.Tensor]":
    """Parameter name -> weight with the adapter in it: what the adapted module makes of each unit vector."""
    import torch

    targets = {target.name: target for target in base.targets}
    found = {}
    with rescore.packed(base, [run]) as pack, torch.no_grad(), pack.evaluating():
        pack.use_lanes([0])
        for name in run.ranks:
            target, module = targets[name], pack.model.get_submodule(name)
            if target.kind == "embedding":
                every = torch.arange(target.in_features, device=pack.device)
                found[f"{name}.weight"] = module(every[None])[0] / getattr(module.base, "embed_scale", 1.0)
                continue
            units = torch.eye(target.in_features, device=pack.device, dtype=pack.dtype)
            pack.store.lanes.tokens = target.in_features
            weight = module(units[None])[0] - module(torch.zeros_like(units[:1])[None])[0, 0]  # without the bias
            found[f"{name}.weight"] = weight if target.kind == "conv1d" else weight.t()
    return found


def _save(model: Any, base: "BaseModel", folder: Path) -> None:
    from sweeper import models

    model.save_pretrained(folder)
    config: Any = models.stock_config(base.spec)  # the one in memory has caching and dropout off
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    config.tie_word_embeddings = model.config.tie_word_embeddings
    config.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)


def _compared(
    base: "BaseModel", folder: Path, rows: "list[torch.Tensor]", wanted: "list[torch.Tensor]"
) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    dtype = str(base.model.dtype).removeprefix("torch.")
    loaded: Any
    with peft_models.hushed():
        loaded = AutoModelForCausalLM.from_pretrained(
            folder, dtype=base.model.dtype, trust_remote_code=base.spec.trust_remote_code
        )
    found = peft_models.logits(loaded.to(base.model.device).eval(), rows)
    difference = max(float((one - other).abs().max()) for one, other in zip(found, wanted, strict=True))
    tolerance = peft_models.LOGIT_TOLERANCE[dtype] * max(1.0, *(float(one.abs().max()) for one in wanted))
    if not difference <= tolerance:
        raise ModelError(
            f"merge: the merged model's logits differ by up to {difference:.3g}, more than the {tolerance:.3g} that "
            f"{dtype} explains; nothing was kept (--precision float32 merges more exactly)"
        )
    return {"precision": dtype, "max_logit_difference": difference, "tolerance": tolerance}
