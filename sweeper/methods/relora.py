"""ReLoRA (Lialin et al. 2023): LoRA that is merged and begun afresh several times, so that the update's rank can grow.

Every `max_steps / (restarts + 1)` steps the adapter is merged, A is drawn anew, B is zero, the largest moments of the
optimiser alone are kept, and the learning rate climbs again from 0 to its schedule (the jagged cosine). Here the base
is shared and stays as it is: what was merged lives on as frozen rows, and the file is a LoRA of rank
r (restarts + 1). The paper's full-rank warm start is for training from scratch; a pretrained base is one.
"""

from dataclasses import replace

from sweeper.errors import SpecError
from sweeper.lora.forms import AdapterSpec, Restarts
from sweeper.methods import lora
from sweeper.methods.method import Method, Ranks
from sweeper.spec import MethodSpec, RunSpec


def _adapter(spec: RunSpec, ranks: Ranks) -> AdapterSpec:
    plain, restarts = lora.adapter(spec, ranks), _restarts(spec)
    whole = {name: rank * (restarts.count + 1) for name, rank in plain.ranks.items()}
    return replace(plain, ranks=whole, trained=plain.ranks, restarts=restarts)


def _restarts(spec: RunSpec) -> Restarts:
    count = RELORA.option(spec.method, "restarts")
    return Restarts(
        every=spec.trainer.max_steps // (count + 1),
        count=count,
        warmup=RELORA.option(spec.method, "warmup_steps"),
        prune=float(RELORA.option(spec.method, "prune")),
    )


def _check(spec: RunSpec) -> None:
    restarts = RELORA.option(spec.method, "restarts")
    if restarts < 1:
        raise SpecError(f"method.options.restarts must be at least 1, got {restarts}")
    if restarts >= spec.trainer.max_steps:
        raise SpecError(
            f"method.options.restarts={restarts} needs more than {restarts} steps, and trainer.max_steps is "
            f"{spec.trainer.max_steps}"
        )
    found = _restarts(spec)
    if not 0 <= found.warmup < found.every:
        raise SpecError(
            f"method.options.warmup_steps={found.warmup}: a restart every {found.every} steps leaves room for at most "
            f"{found.every - 1}"
        )
    if not 0 <= found.prune <= 1:
        raise SpecError(f"method.options.prune must be in [0, 1], got {found.prune}")


def _while_training(method: MethodSpec, rank: int) -> int:
    return rank * (int(RELORA.option(method, "restarts")) + 1)


RELORA = Method(
    adapter=_adapter,
    options={"restarts": 3, "warmup_steps": 4, "prune": 0.99},
    check=_check,
    inner_rank=_while_training,
)
