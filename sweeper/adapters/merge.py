"""An adapter merged into its base model, as a plain transformers model, checked to give the same logits."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sweeper import record
from sweeper.adapters import peft_models
from sweeper.errors import DataError, ModelError, gist
from sweeper.rescoring.rescore import Saved
from sweeper.spec import Precision

if TYPE_CHECKING:
    import torch

    from sweeper.models import BaseModel

ROWS, LENGTH = 4, 32  # of the random tokens that are compared


def merge(run: Saved, out: Path, *, device: str = "auto", precision: Precision = "float32") -> dict[str, Any]:
    """Writes a run's model with the adapter in its weights to `out`, loads it again and compares.

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
        model = peft_models.adapted(base, {"default": run.adapter})
        if not hasattr(model, "merge_and_unload"):
            kind = model.peft_config["default"].peft_type.value
            raise DataError(f"merge: {run.folder.name} is {kind}, which changes no weight of the model")
    else:
        model = peft_models.with_weights(base, tuned)
    ids = _ids(base)
    wanted = peft_models.logits(model, ids)
    with record.replacing_folder(out) as temporary:
        with peft_models.hushed():
            _save(model if tuned else _merged(model), base, temporary)
        found = _compared(base, temporary, ids, wanted)
        note = {"run_id": run.folder.name, "from": str(run.folder), "model": base.spec.name, **found}
        record.write_json(temporary / record.MERGED, note)
    return note


def _merged(model: Any) -> Any:
    try:
        return model.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError) as error:
        raise DataError(f"merge: PEFT cannot: {gist(error)}") from error


def _ids(base: "BaseModel") -> "torch.Tensor":
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(base.model.config.get_text_config().vocab_size, (ROWS, LENGTH), generator=generator).to(
        base.model.device
    )


def _save(model: Any, base: "BaseModel", folder: Path) -> None:
    from sweeper import models

    model.save_pretrained(folder)
    config: Any = models.stock_config(base.spec)  # the one in memory has caching and dropout off
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    config.tie_word_embeddings = model.config.tie_word_embeddings
    config.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)


def _compared(base: "BaseModel", folder: Path, ids: "torch.Tensor", wanted: "torch.Tensor") -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    dtype = str(base.model.dtype).removeprefix("torch.")
    loaded: Any
    with peft_models.hushed():
        loaded = AutoModelForCausalLM.from_pretrained(
            folder, dtype=base.model.dtype, trust_remote_code=base.spec.trust_remote_code
        )
    ours = peft_models.logits(loaded.to(base.model.device).eval(), ids)
    difference = float((ours - wanted).abs().max())
    tolerance = peft_models.LOGIT_TOLERANCE[dtype] * max(1.0, float(wanted.abs().max()))
    if not difference <= tolerance:
        raise ModelError(
            f"merge: the merged model's logits differ by up to {difference:.3g}, more than the {tolerance:.3g} that "
            f"{dtype} explains; nothing was kept (--precision float32 merges more exactly)"
        )
    return {"precision": dtype, "max_logit_difference": difference, "tolerance": tolerance}
