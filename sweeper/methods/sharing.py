"""How tasks share the ranks of an adapter: a tree of rank blocks, a row running through those on its task's path.

single        one block for all (no blocks at all: plain LoRA)
routed        experts behind a learnt gate (`sweeper.methods.experts`)
per_task      a block for each task, which is as if the task were trained alone
shared        a block for all and one for each
hierarchical  root, groups and tasks, as a tree of names says
stack         of a sequence: a new block for each task, on top of those before, which act on and no longer train
orthogonal    as stack, with a penalty on what a new block reads of what those before read (O-LoRA, Wang et al. 2023)
ewc           one adapter for all, held back where earlier tasks' likelihood depends on it (`sweeper.lora.elastic`)
merge         as if each task's adapter were folded into the weights before the next begins: stack's blocks on all rows
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sweeper.errors import SpecError, unknown
from sweeper.lora.blocks import Block, unaligned
from sweeper.lora.layout import BLOCK
from sweeper.models.architecture import Target, number_of_layers
from sweeper.placement import placement
from sweeper.spec import PlacementSpec, RunSpec

Ranks = Mapping[Target, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """A block's place in the tree: its tasks, and the levels and leaf that they tell."""

    name: str
    level: int
    acts: frozenset[int]
    trains: frozenset[int]
    leaf: bool = False


def _per_task(spec: RunSpec) -> list[Node]:
    return [_leaf(name, 0, task) for task, name in enumerate(names(spec))]


def _shared(spec: RunSpec) -> list[Node]:
    every = frozenset(range(len(names(spec))))
    root = Node(name="common", level=0, acts=every, trains=every)
    return [root, *(_leaf(name, 1, task) for task, name in enumerate(names(spec)))]


def _hierarchical(spec: RunSpec) -> list[Node]:
    known, seen = names(spec), list[str]()

    def walk(tree: Any, level: int, path: str) -> Iterator[Node]:
        if isinstance(tree, str):
            if tree not in known:
                raise SpecError(unknown("sharing.tree", tree, known))
            seen.append(tree)
            yield _leaf(tree, level, known.index(tree))
            return
        if not isinstance(tree, list | tuple) or not tree:
            raise SpecError(f"sharing.tree: {tree} is neither a task's name nor a list of such")
        below = [list(walk(one, level + 1, f"{path}.{number}")) for number, one in enumerate(tree, start=1)]
        every = frozenset[int]().union(*(node.acts for nodes in below for node in nodes))
        yield Node(name=path, level=level, acts=every, trains=every)
        yield from (node for nodes in below for node in nodes)

    nodes = list(walk(spec.sharing.tree, 0, "root"))
    for name in known:
        if seen.count(name) != 1:
            how = "is not in the tree" if name not in seen else "is in the tree twice"
            raise SpecError(f"sharing.tree: {name} {how}; each of {', '.join(known)} belongs in it once")
    return nodes


def _stack(spec: RunSpec) -> list[Node]:
    count = len(names(spec))
    return [
        Node(name=name, level=task, acts=frozenset(range(task, count)), trains=frozenset({task}), leaf=True)
        for task, name in enumerate(names(spec))
    ]


def _merge(spec: RunSpec) -> list[Node]:
    # a block that has not begun has B = 0, so it changes nothing before its task
    every = frozenset(range(len(names(spec))))
    return [replace(node, acts=every) for node in _stack(spec)]


SHARINGS: dict[str, Callable[[RunSpec], list[Node]]] = {
    "single": lambda spec: [],
    "routed": lambda spec: [],
    "per_task": _per_task,
    "shared": _shared,
    "hierarchical": _hierarchical,
    "stack": _stack,
    "orthogonal": _stack,
    "merge": _merge,
    "ewc": lambda spec: [],
}
STACKS = ("stack", "orthogonal", "merge")
IN_TURN = (*STACKS, "ewc")  # of a sequence


def names(spec: RunSpec) -> tuple[str, ...]:
    """The run's tasks."""
    return tuple(part.name for part in spec.dataset.parts)


def check(spec: RunSpec) -> None:
    """Raises SpecError for a sharing that there is not, or that the run's tasks and options do not fit."""
    sharing, steps, tasks = spec.sharing, spec.trainer.max_steps, len(spec.dataset.parts)
    if spec.dataset.family == "sequence" and 0 < steps < tasks:
        raise SpecError(
            f"trainer.max_steps={steps}: dataset=sequence has {tasks} tasks, which take a step each at least"
        )
    if sharing.name not in SHARINGS:
        raise SpecError(unknown("sharing", sharing.name, SHARINGS))
    given = [name for name, by in (("elasticity", 0.0), ("fisher_examples", 64)) if getattr(sharing, name) != by]
    if given and sharing.name != "ewc":
        raise SpecError(f"sharing.{given[0]} is for sharing=ewc, not {sharing.name}")
    if sharing.name == "single":
        return
    start = f"sharing={sharing.name}"
    if not spec.dataset.parts and sharing.name != "routed":
        raise SpecError(f"{start} needs several tasks: dataset=mixture 'dataset.parts=[icd10_chapter,gsm_symbolic]'")
    if sharing.name in IN_TURN and spec.dataset.family != "sequence":
        raise SpecError(f"{start} is for tasks one after another: dataset=sequence")
    if sharing.name in STACKS and spec.dataset.options.get("replay"):
        raise SpecError(f"{start}: its blocks train once, so dataset.options.replay would train those before again")
    if sharing.name == "merge" and spec.method.dropout:
        raise SpecError(
            f"{start}: what is folded into the weights has no dropout, so method.dropout must be 0, got "
            f"{spec.method.dropout}"
        )
    if sharing.orthogonality and sharing.name not in ("orthogonal", "merge"):
        raise SpecError(f"sharing.orthogonality is for sharing=orthogonal and merge, not {sharing.name}")
    if sharing.tree and sharing.name != "hierarchical":
        raise SpecError(f"sharing.tree is for sharing=hierarchical, not {sharing.name}")
    if spec.trainer.patience is not None:
        raise SpecError(f"{start}: trainer.patience would end all tasks at once")
    if sharing.name == "ewc":
        if sharing.levels or sharing.budget != "active" or sharing.common or sharing.private:
            raise SpecError(f"{start} has one adapter: sharing.levels, budget, common and private are of rank blocks")
        return
    depth = 1 + max((node.level for node in SHARINGS[sharing.name](spec)), default=0)
    depth = 1 if sharing.name in STACKS else depth
    if sharing.levels and len(sharing.levels) != depth:
        raise SpecError(field="sharing.levels", wanted=f"a rank for each of {depth} levels", got=sharing.levels)
    for name, own in (("common", sharing.common), ("private", sharing.private)):
        if own is not None and depth == 1:
            raise SpecError(f"sharing.{name}: {start} has one level, whose placement is the run's")
    if spec.placement.embeddings or spec.placement.head:
        raise SpecError(f"{start} is for modules inside the layers: placement.embeddings and placement.head cannot be")
    if any(spec.optim.penalties):
        raise SpecError(f"{start}: the penalties of optim are of a whole adapter, and it has several blocks")


def blocks(spec: RunSpec, ranks: Ranks) -> tuple[Block, ...]:
    """The rank blocks of a run; none where all tasks share all ranks.

    Args:
        ranks: what the run's allocation gives each module: the ranks that a row runs through in all, or those of all
            blocks (`sharing.budget`).

    Raises:
        SpecError: the ranks do not go round.
    """
    nodes = SHARINGS[spec.sharing.name](spec)
    if not nodes:
        return ()
    places = [_modules(spec, node, tuple(ranks)) for node in nodes]
    spread = {
        target: _spread(spec, nodes, [target.name in own for own in places], rank) for target, rank in ranks.items()
    }
    found = tuple(
        Block(
            name=node.name, level=node.level, acts=node.acts, trains=node.trains,
            ranks={target.name: own[number] for target, own in spread.items() if own[number]},
        )
        for number, node in enumerate(nodes)
    )  # fmt: skip
    for node, block in zip(nodes, found, strict=True):
        if not block.ranks and (node.leaf or not spec.sharing.levels):
            raise SpecError(
                f"sharing={spec.sharing.name}: rank={spec.rank} leaves nothing for the block of {node.name}; give a "
                "higher rank, or sharing.levels"
            )
    if (target := unaligned(found, tuple(ranks), BLOCK)) is not None:
        raise SpecError(
            f"sharing={spec.sharing.name}: a block would begin amid {BLOCK} values of {target.name} "
            f"({target.in_features} to {target.out_features}); give ranks that are a multiple of a higher power of two"
        )
    return found


def totals(ranks: Ranks, blocks: Sequence[Block]) -> Ranks:
    """Ranks of each module in all blocks; as they are without blocks."""
    if not blocks:
        return ranks
    found = {target: sum(block.ranks.get(target.name, 0) for block in blocks) for target in ranks}
    return {target: rank for target, rank in found.items() if rank}


def active(ranks: Ranks, blocks: Sequence[Block], task: int) -> Ranks:
    """Ranks of each module that a task's rows run through."""
    return totals(ranks, [block for block in blocks if task in block.acts]) if blocks else ranks


def computed(spec: RunSpec, blocks: Sequence[Block], task: int) -> Sequence[Block]:
    """The blocks that cost the rows of a task operations: all, but those that are folded into the weights by then."""
    return [block for block in blocks if task in block.trains] if spec.sharing.name == "merge" else blocks


def apart(blocks: Sequence[Block]) -> bool:
    """Whether some tasks' rows run through other blocks than others'; else one adapter serves all."""
    return len({block.acts for block in blocks} | {frozenset[int]().union(*(block.acts for block in blocks))}) > 1


def _leaf(name: str, level: int, task: int) -> Node:
    return Node(name=name, level=level, acts=frozenset({task}), trains=frozenset({task}), leaf=True)


def _modules(spec: RunSpec, node: Node, targets: Sequence[Target]) -> frozenset[str]:
    """The modules, of those that the run's placement has, where a node's block lies."""
    own: PlacementSpec | None = None
    if spec.sharing.name in ("shared", "hierarchical"):
        own = spec.sharing.private if node.leaf else spec.sharing.common if node.level == 0 else None
    every = frozenset(target.name for target in targets)
    if own is None:
        return every
    found = placement.resolve(targets, own, layers=number_of_layers(targets))
    return frozenset(target.name for target in found) & every


def _spread(spec: RunSpec, nodes: Sequence[Node], placed: Sequence[bool], rank: int) -> list[int]:
    """Ranks of each node's block in a module that has `rank` of them to give; 0 where the node has no place there."""
    levels, sharing = spec.sharing.levels, spec.sharing
    there = [number for number, own in enumerate(placed) if own]
    if levels:
        level = [0 if sharing.name in STACKS else node.level for node in nodes]
        return [levels[level[number]] if number in there else 0 for number in range(len(nodes))]
    if sharing.name in (*STACKS, "per_task"):
        if sharing.budget == "active":
            return [rank if own else 0 for own in placed]
        return _shared_out(rank, [float(own) for own in placed])
    if sharing.budget == "total":
        # every level has as much, and so has every block of a level
        depths = [nodes[number].level for number in there]
        weights = [1 / depths.count(node.level) if own else 0.0 for node, own in zip(nodes, placed, strict=True)]
        return _shared_out(rank, weights)
    found = [0] * len(nodes)
    depth = len({nodes[number].level for number in there})
    for number in there:
        node = nodes[number]
        above = [other for other in there if nodes[other].acts > node.acts]
        if node.leaf:
            found[number] = rank - sum(found[other] for other in above)
        else:
            found[number] = _shared_out(rank, [1.0] * depth)[len(above)]
    return found


def _shared_out(count: int, weights: Sequence[float]) -> list[int]:
    """A number in whole parts that go by the weights; what is left over goes to the largest remainders."""
    total = sum(weights)
    if not total:
        return [0] * len(weights)
    exact = [count * weight / total for weight in weights]
    found = [int(one + 1e-9) for one in exact]
    order = sorted(range(len(weights)), key=lambda i: (found[i] - exact[i], i))
    for i in order[: count - sum(found)]:
        found[i] += 1
    return found
