"""What PEFT calls the adapter of a run: its configurations."""

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from sweeper.methods import lora, vera
from sweeper.methods.method import Ranks
from sweeper.models.architecture import Target
from sweeper.spec import RunSpec


def places(targets: Iterable[Target]) -> dict[str, Any]:
    """Where an adapter goes."""
    targets = list(targets)
    return {
        "target_modules": [target.name for target in targets],
        "fan_in_fan_out": any(target.kind == "conv1d" for target in targets),
        "task_type": "CAUSAL_LM",
    }


def lora_config(spec: RunSpec, ranks: Ranks, **more: Any) -> Any:
    """A LoRA with a rank for each module, all with the run's scale."""
    from peft import LoraConfig

    common = Counter(ranks.values()).most_common(1)[0][0]
    # PEFT takes each module's scale from its own rank and alpha
    other = {f"^{re.escape(target.name)}": rank for target, rank in ranks.items() if rank != common}
    configure: Any = LoraConfig  # its annotations are narrower than what it takes
    given = {
        "r": common,
        "lora_alpha": lora.alpha_of(spec, common),
        "lora_dropout": spec.method.dropout,
        "use_rslora": spec.method.rank_stabilised,
        "rank_pattern": other,
        "alpha_pattern": {name: lora.alpha_of(spec, rank) for name, rank in other.items()},
        **places(ranks),
    }
    return configure(**(given | more))


def vera_config(spec: RunSpec, targets: Iterable[Target], **more: Any) -> Any:
    """A VeRA; all modules have the run's rank."""
    from peft import VeraConfig

    configure: Any = VeraConfig
    return configure(
        r=spec.rank,
        projection_prng_key=vera.key(spec),
        d_initial=vera.initial(spec),
        vera_dropout=spec.method.dropout,
        **places(targets),
        **more,
    )
