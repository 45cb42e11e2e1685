"""A slot's adapter as a PEFT folder, so that it loads with `PeftModel.from_pretrained`."""

import json
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from sweeper.methods import lora
from sweeper.placement import Target
from sweeper.record import ADAPTER
from sweeper.spec import RunSpec


def write_adapter(
    folder: Path, spec: RunSpec, targets: Sequence[Target], weights: Mapping[str, tuple[Tensor, Tensor]]
) -> int:
    """Writes `folder/adapter/` and returns the bytes of its weights.

    Args:
        targets: the adapted modules. weights: module name -> (A [rank, in], B transposed [rank, out]).
    """
    final, temporary = folder / ADAPTER, folder / f".{ADAPTER}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    tensors = {}
    for target in targets:
        a, b = weights[target.name]
        key = f"base_model.model.{target.name}"
        if target.kind == "embedding":
            tensors[f"{key}.lora_embedding_A"] = a.cpu().contiguous()
            tensors[f"{key}.lora_embedding_B"] = b.t().cpu().contiguous()
        else:
            tensors[f"{key}.lora_A.weight"] = a.cpu().contiguous()
            tensors[f"{key}.lora_B.weight"] = b.t().cpu().contiguous()
    save_file(tensors, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
    ranks = {target.name: weights[target.name][0].shape[0] for target in targets}
    config = _config(spec, targets, ranks)
    (temporary / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _config(spec: RunSpec, targets: Sequence[Target], ranks: Mapping[str, int]) -> dict[str, Any]:
    from peft import LoraConfig

    common = Counter(ranks.values()).most_common(1)[0][0]
    # PEFT takes each module's scale from its own rank and alpha
    other = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != common}
    build: Any = LoraConfig  # its annotations are narrower than what it takes
    config = build(
        r=common,
        lora_alpha=lora.alpha_of(spec, common),
        lora_dropout=spec.method.dropout,
        use_rslora=spec.method.rank_stabilised,
        target_modules=[target.name for target in targets],
        fan_in_fan_out=any(target.kind == "conv1d" for target in targets),
        rank_pattern=other,
        alpha_pattern={name: lora.alpha_of(spec, rank) for name, rank in other.items()},
        task_type="CAUSAL_LM",
        base_model_name_or_path=spec.model.location,
        inference_mode=True,
    ).to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
