"""VeRA (Kopiczko et al. 2024): A and B are random, frozen and shared by all modules; their scalings train.

    W' = W + diag(b) B0 diag(d) A0,  with d = `d_initial` and b = 0 at the start

There is no alpha: b takes its place. The matrices come from `projection_key` as PEFT draws them, not from the seed.
"""

from sweeper.errors import SpecError
from sweeper.lora.forms import AdapterSpec
from sweeper.methods.method import Method, Ranks
from sweeper.models.architecture import Target
from sweeper.spec import MethodSpec, RunSpec

MOST = 1 << 16  # any rank: what trains is a scaling of each random direction, and there may be more than dimensions


def _adapter(spec: RunSpec, ranks: Ranks) -> AdapterSpec:
    return AdapterSpec(
        ranks={target.name: rank for target, rank in ranks.items()},
        scales={target.name: 1.0 for target in ranks},
        dropout=spec.method.dropout,
        seed=spec.seed,
        form="vera",
        options={"initial": float(VERA.option(spec.method, "d_initial")), "key": _key(spec)},
    )


def _parameters(method: MethodSpec, target: Target, rank: int) -> int:
    return rank + target.out_features


def _check(spec: RunSpec) -> None:
    if spec.optim.orthogonality_penalty or spec.optim.norm_penalty:
        raise SpecError("method=vera trains neither A nor B: of the penalties it takes optim.update_penalty alone")
    if _key(spec) < 0:
        raise SpecError(f"method.options.projection_key must be at least 0, got {_key(spec)}")


def _key(spec: RunSpec) -> int:
    """The seed of the shared matrices; what PEFT calls projection_prng_key."""
    return int(VERA.option(spec.method, "projection_key"))


VERA = Method(
    adapter=_adapter,
    parameters=_parameters,
    options={"d_initial": 0.1, "projection_key": 0},
    check=_check,
    even=True,
    scaled=False,
    highest=lambda target: MOST,
    leaves=lambda method: "vera",
    ranges={"optim.lr": (1e-3, 1e-1)},
)
