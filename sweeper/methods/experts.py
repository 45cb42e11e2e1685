"""Experts behind a learnt gate: the ranks of an adapter as blocks of equal size, which a router opens (sharing=routed).

Soft gates weigh all experts, so a row runs through all ranks; where few are kept, through those of few.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sweeper.errors import SpecError
from sweeper.lora.forms import AdapterSpec
from sweeper.lora.forms.routed import form, router_size
from sweeper.models.architecture import Target
from sweeper.spec import RunSpec, SharingSpec

FEW = 4  # experts of a run of one task
ROUTED = "routed"

Ranks = Mapping[Target, int]


def count(spec: RunSpec) -> int:
    """How many experts a run has."""
    return spec.sharing.experts or len(spec.dataset.parts) or FEW


def kept(spec: RunSpec) -> int:
    """How many of them a row goes through."""
    return spec.sharing.kept or count(spec)


def check(spec: RunSpec) -> None:
    """Raises SpecError for options of a learnt gate that a run cannot have."""
    sharing, experts = spec.sharing, count(spec)
    if sharing.name != ROUTED:
        given = {name: getattr(sharing, name) for name in ("experts", "router", "kept", "tied", "balance")}
        defaults = SharingSpec()
        for name, value in given.items():
            if value != getattr(defaults, name):
                raise SpecError(f"sharing.{name} is for sharing={ROUTED}, not {sharing.name}")
        return
    if experts < 2:
        raise SpecError(field="sharing.experts", wanted="at least 2, or 0 for one a task", got=sharing.experts)
    if sharing.kept > experts:
        raise SpecError(field="sharing.kept", wanted=f"at most {experts}, the experts", got=sharing.kept)
    if sharing.tied and sharing.router != "prompt":
        raise SpecError("sharing.tied=true: one router for all modules reads the prompt: give sharing.router=prompt")
    if spec.optim.lr_ratio is not None:
        raise SpecError(f"sharing={ROUTED}: optim.lr_ratio is of A and B, and its router is neither")


def adapter(spec: RunSpec, ranks: Ranks, made: AdapterSpec) -> AdapterSpec:
    """The adapter with its ranks as experts.

    Args:
        ranks: what the allocation gives each module: what a row runs through, or all experts have (`sharing.budget`).

    Raises:
        SpecError: the ranks do not go round.
    """
    experts, few, found = count(spec), kept(spec), dict[str, int]()
    for target, rank in ranks.items():
        between = few if spec.sharing.budget == "active" else experts
        if rank % between:
            raise SpecError(
                f"sharing={ROUTED}: rank {rank} of {target.name} does not go round among {between} experts; give a "
                f"multiple of {between}"
            )
        found[target.name] = rank // between * experts
    options = {
        "experts": experts, "router": spec.sharing.router, "kept": few, "tied": spec.sharing.tied,
        "balance": spec.sharing.balance,
    }  # fmt: skip
    return replace(made, ranks=found, form=form(experts, spec.sharing.router), options=options)


def opened(made: AdapterSpec, gate: Mapping[str, Any]) -> AdapterSpec:
    """The adapter of a run that left experts which open like this."""
    options = {name: gate[name] for name in ("experts", "router", "kept", "tied", "balance")}
    return replace(made, form=form(int(gate["experts"]), str(gate["router"])), options=options)


def router_parameters(spec: RunSpec, ranks: Ranks) -> int:
    """Values of a run's routers; 0 without any. One for all modules counts once."""
    if spec.sharing.name != ROUTED:
        return 0
    sizes = [router_size(target, count(spec), spec.sharing.router) for target in ranks]
    return sizes[0] if spec.sharing.tied else sum(sizes)
