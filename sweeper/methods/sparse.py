"""LoRA whose A and B are mostly zero (see `sweeper.lora.forms.sparse`).

learnt  RoseLoRA (Wang et al. 2024): rows of A and columns of B are pruned by their smoothed sensitivity, along a cubic
        from `prune_from` to `prune_to`, which are shares of `max_steps`. Unlike in the paper the pattern is final then
random  a fixed pattern drawn from the run's seed (random masks: Xu & Zhang 2024), the baseline for the learnt one

The parameters counted are those that are not zero.
"""

from dataclasses import replace

from sweeper.errors import SpecError, unknown
from sweeper.lora.forms import AdapterSpec, sparse
from sweeper.methods import lora
from sweeper.methods.method import Method, Ranks
from sweeper.models.architecture import Target
from sweeper.spec import MethodSpec, RunSpec

PATTERNS = ("learnt", "random")


def _adapter(spec: RunSpec, ranks: Ranks) -> AdapterSpec:
    def option(name: str) -> float:
        return float(SPARSE.option(spec.method, name))

    steps = spec.trainer.max_steps
    first = int(option("prune_from") * steps)
    pattern = sparse.Sparsity(
        density=1 - option("sparsity"),
        learnt=SPARSE.option(spec.method, "pattern") == "learnt",
        first=first,
        last=max(first + 1, int(option("prune_to") * steps)),
        memory=option("memory"),
    )
    return replace(lora.adapter(spec, ranks), sparsity=pattern)


def _parameters(method: MethodSpec, target: Target, rank: int) -> int:
    density = 1 - float(SPARSE.option(method, "sparsity"))
    return rank * (sparse.kept(target.in_features, density) + sparse.kept(target.out_features, density))


def _check(spec: RunSpec) -> None:
    options = {name: SPARSE.option(spec.method, name) for name in SPARSE.options}
    if options["pattern"] not in PATTERNS:
        raise SpecError(unknown("method.options.pattern", options["pattern"], PATTERNS))
    if not 0 < options["sparsity"] < 1:
        raise SpecError(f"method.options.sparsity must be in (0, 1), got {options['sparsity']}")
    if not 0 <= options["memory"] < 1:
        raise SpecError(f"method.options.memory must be in [0, 1), got {options['memory']}")
    if not 0 <= options["prune_from"] < options["prune_to"] <= 1:
        raise SpecError(
            f"method.options.prune_from={options['prune_from']} must be below prune_to={options['prune_to']}, both in "
            "[0, 1]"
        )


SPARSE = Method(
    adapter=_adapter,
    parameters=_parameters,
    options={"sparsity": 0.9, "pattern": "learnt", "prune_from": 0.1, "prune_to": 0.7, "memory": 0.85},
    check=_check,
)
