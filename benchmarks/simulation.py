#!/usr/bin/env python3
"""Are intervals and tests what they say they are? Simulated studies with a known truth, through the analysis itself.

    python -m benchmarks.simulation                       # every cell, 2,000 replicates: some minutes on two cores
    python -m benchmarks.simulation --cells normal --replicates 500

A cell is a design: arms, seeds, groups × examples, and how scores vary. In each replicate equal arms give coverage
(share of arms' 95% intervals that hold the truth; `worst` is that of the arm where it is least), the family-wise error
(share of studies in which the tests of `compare.tests` find any difference) and the same of others' tests: a paired t
over seeds with Holm, the t with a variance pooled over arms, and a sign-flip test over groups with Holm. Then one arm
is moved by the difference that the pooled t finds in half of all studies, and the power against it is compared. `width`
is that of our interval over the one with the true variance. `benchmarks.simulation_rivals` has tests and intervals that
were tried instead.
"""

import argparse
import multiprocessing
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations

import numpy as np
from scipy import special

from analysis import compare, stats
from analysis.arms import Arm, Arrangement, Scores, Setting, aligned, share_variances
from analysis.stats import Array, Draws

DRAWS = Draws(500, seed=0)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A design. Standard deviations: of seeds (arm by arm), of groups and examples in all arms alike, of groups and
    examples in each arm by itself, of single cells. `level` of a 0/1 score is its probability."""

    name: str
    arms: int = 4
    seeds: int = 3
    groups: int = 200
    each: int = 1
    seed_sd: tuple[float, ...] = (0.01,)
    shared_sd: float = 0.12
    group_sd: float = 0.03
    example_sd: float = 0.02
    cell_sd: float = 0.02
    skewed: bool = False
    binary: float | None = None
    tokens: bool = False


def cells() -> dict[str, Cell]:
    base = Cell(name="normal")
    found = [
        base, replace(base, name="normal, 5 seeds", seeds=5), replace(base, name="normal, 10 seeds", seeds=10),
        replace(base, name="twelve arms", arms=12), replace(base, name="twelve arms, 5 seeds", arms=12, seeds=5),
        *(
            replace(base, name=f"{groups} groups of {each}, {seeds} seeds", groups=groups, each=each, seeds=seeds)
            for groups, each in ((20, 10), (10, 20), (13, 16), (100, 4))
            for seeds in (3, 5)
        ),
        replace(base, name="seeds alone", group_sd=0, example_sd=0, cell_sd=0.001),
        replace(base, name="seeds alone, 5 seeds", seeds=5, group_sd=0, example_sd=0, cell_sd=0.001),
        *(
            replace(base, name=f"skewed seeds, {n} seeds", seeds=n, skewed=True, seed_sd=(0.05,), groups=100)
            for n in (3, 5, 10)
        ),
        replace(base, name="one arm's seeds twice as wide", seed_sd=(0.02, 0.01, 0.01, 0.01), group_sd=0.01),
        replace(base, name="one arm's seeds eight times as wide", seed_sd=(0.08, 0.01, 0.01, 0.01), group_sd=0.01),
        replace(base, name="seeds 1, 2, 4, 8, 5 seeds", seeds=5, seed_sd=(0.08, 0.04, 0.02, 0.01), group_sd=0.01),
        *(
            replace(base, name=f"accuracy {p}, {groups} groups of {each}", binary=p, groups=groups, each=each)
            for p in (0.02, 0.5, 0.97)
            for groups, each in ((200, 1), (20, 10))
        ),
        replace(base, name="token weights", tokens=True, groups=50, each=4),
        Cell(name="nearly constant", seed_sd=(1e-6,), shared_sd=0, group_sd=1e-6, example_sd=1e-6, cell_sd=1e-6),
    ]  # fmt: skip
    return {one.name: one for one in found}


def weights(cell: Cell, rng: np.random.Generator) -> Array:
    count = cell.groups * cell.each
    return rng.integers(2, 20, count).astype(float) if cell.tokens else np.ones(count)


def draw(cell: Cell, rng: np.random.Generator) -> Array:
    """Scores (A, R, E) of arms without any difference, of mean 0, or of probability `binary`."""
    A, R, G, n = cell.arms, cell.seeds, cell.groups, cell.each

    def per_example(shape: tuple[int, ...], groups: float, examples: float) -> Array:
        one = rng.normal(0, groups, (*shape, G)).repeat(n, axis=-1)
        return one + rng.normal(0, examples, (*shape, G * n))

    seed_A = np.resize(np.array(cell.seed_sd), A)
    noise_AR = rng.lognormal(0, 1, (A, R)) if cell.skewed else rng.normal(size=(A, R))
    if cell.skewed:
        noise_AR = (noise_AR - np.exp(0.5)) / np.sqrt((np.e - 1) * np.e)
    x = per_example((1, 1), cell.shared_sd, cell.shared_sd / 2) + per_example((A, 1), cell.group_sd, cell.example_sd)
    x = x + (seed_A[:, None] * noise_AR)[:, :, None] + rng.normal(0, cell.cell_sd, (A, R, G * n))
    if cell.binary is None:
        return x
    scale = 3.0 if n > 1 else 1.0  # groups that share a lot
    latent = scale * x / np.std(x)
    cut = special.ndtri(1 - cell.binary) * (scale**2) ** 0.5
    return (latent > cut).astype(float)


def arrangement(cell: Cell, x_ARE: Array, w_E: Array) -> Arrangement:
    """A study with one setting, as `analysis.arms.arrange` makes it of records."""
    R, E = x_ARE.shape[1:]
    groups = tuple(f"g{i // cell.each}" for i in range(E)) if cell.each > 1 else ()
    arms = []
    for i, x_RE in enumerate(x_ARE):
        one = Scores(x_RE=x_RE, w_E=w_E, seeds=tuple(range(R)), ids=tuple(map(str, range(E))), groups=groups)
        factors = {"placement": f"arm {i}", "rank": 8}
        arms.append(Arm(setting="s", label=f"arm {i}", factors=factors, trial={}, runs=None, scores={"score": one}))
    share_variances(arms)
    setting = Setting(name="s", model="m", dataset="d", total=1e6, base=None, arms=arms)
    return Arrangement(settings=[setting], metrics=["score"], split="test", select="", runs=None, tuned=[])


def others(x_ARE: Array, w_E: Array, each: int) -> dict[str, dict[tuple[int, int], float]]:
    """Holm-corrected p of each pair of arms by other tests."""
    A, R, E = x_ARE.shape
    rows_AR = x_ARE @ w_E / w_E.sum()
    pairs = list(combinations(range(A), 2))
    rest_AR = rows_AR - rows_AR.mean(axis=0) - rows_AR.mean(axis=1, keepdims=True) + rows_AR.mean()
    df = (A - 1) * (R - 1)
    pooled = float((rest_AR**2).sum()) / df
    sums_AG = (x_ARE.mean(axis=1) * w_E).reshape(A, E // each, each).sum(axis=2)
    found: dict[str, list[float]] = {"paired t": [], "pooled t": [], "permutation": []}
    for a, b in pairs:
        d_R = rows_AR[b] - rows_AR[a]
        se = float(np.std(d_R, ddof=1)) / R**0.5
        found["paired t"].append(float(2 * special.stdtr(R - 1, -abs(d_R.mean()) / se)) if se > 0 else 1.0)
        se = (2 * pooled / R) ** 0.5
        found["pooled t"].append(float(2 * special.stdtr(df, -abs(d_R.mean()) / se)) if se > 0 else 1.0)
        found["permutation"].append(stats.sign_flip(sums_AG[b] - sums_AG[a], draws=DRAWS))
    return {name: dict(zip(pairs, stats.holm(ps).tolist(), strict=True)) for name, ps in found.items()}


def ours(found: Arrangement, *, whole: bool = False) -> dict[tuple[int, int], float]:
    """Holm-corrected p of each pair by the analysis: `compare.tests`, or what it does to each pair without the tables,
    which take four fifths of its time on so small a study."""
    names = [arm.label for arm in found.arms]
    if whole:
        table = compare.tests(found, draws=DRAWS)
        keys = [(names.index(a), names.index(b)) for a, b in zip(table["a"], table["b"], strict=True)]
        ps = table["p_holm"].to_numpy(dtype=float)
    else:
        pairs = list(compare.pairs(found))
        keys = [(names.index(pair.a.label), names.index(pair.b.label)) for pair in pairs]
        ps = stats.holm([compared(pair).p for pair in pairs])
    return {key: 1.0 if np.isnan(p) else float(p) for key, p in zip(keys, ps, strict=True)}


def compared(pair: compare.Pair) -> stats.Paired:
    shared = aligned(pair.a.scores["score"], pair.b.scores["score"])
    assert shared is not None
    return stats.paired(shared.a_RE, shared.b_RE, shared.w_E, groups=shared.groups, seed_variance=shared.seed_variance)


def truth_of(cell: Cell, rng: np.random.Generator) -> tuple[float, float, float]:
    """The mean that intervals are to hold, the true standard deviation of an arm's mean, and of a difference."""
    many = [draw(cell, rng) for _ in range(300)]
    w_E = weights(cell, np.random.default_rng(0))
    means_NA = np.array([(x @ w_E / w_E.sum()).mean(axis=1) for x in many])
    center = 0.0 if cell.binary is None else cell.binary
    return center, float(means_NA[:, -1].std()), float((means_NA[:, -1] - means_NA[:, -2]).std())


def replicate(cell: Cell, shift: float, truth: float, seed: int, sizes: int) -> dict[str, float]:
    """Sums over `sizes` studies: hits of intervals, their widths, studies with a false positive, true ones found."""
    rng = np.random.default_rng(seed)
    out: dict[str, float] = {}

    def add(name: str, value: float) -> None:
        out[name] = out.get(name, 0.0) + value

    for number in range(sizes):
        x_ARE, w_E = draw(cell, rng), weights(cell, rng)
        null = arrangement(cell, x_ARE, w_E)
        if number == 0 and ours(null) != ours(null, whole=True):
            raise AssertionError(f"{cell.name}: the shortcut is not what compare.tests finds")
        for i, arm in enumerate(null.arms):
            one = arm.scores["score"]
            found = stats.interval(one.x_RE, one.w_E, groups=one.groups, seed_variance=one.seed_variance)
            hit = found.low <= truth <= found.high
            add("coverage", hit / cell.arms)
            add(f"arm {i}", hit)
            add("width", (found.high - found.low) / cell.arms)
        for name, ps in {"ours": ours(null), **others(x_ARE, w_E, cell.each)}.items():
            add(f"false {name}", min(ps.values()) < 0.05)
        if cell.binary is None:
            moved = x_ARE.copy()
            moved[0] -= shift
            table = {"ours": ours(arrangement(cell, moved, w_E)), **others(moved, w_E, cell.each)}
            for name, ps in table.items():
                hits = [p < 0.05 for (a, _), p in ps.items() if a == 0]
                add(f"power {name}", sum(hits) / len(hits))
    return out


def measure(cell: Cell, replicates: int, workers: Callable[..., Iterator[dict[str, float]]]) -> dict[str, float]:
    rng = np.random.default_rng(99)
    truth, sd, sd_difference = truth_of(cell, rng)
    if cell.binary is not None:
        truth = float(np.mean([draw(cell, rng).mean() for _ in range(2000)]))
    m = cell.arms * (cell.arms - 1) / 2
    critical = -special.stdtrit((cell.arms - 1) * (cell.seeds - 1), 0.025 / m)
    parts = max(1, replicates // 100)
    sums: dict[str, float] = {}
    for part in workers(partial(_part, cell, critical * sd_difference, truth, replicates // parts), range(parts)):
        for name, value in part.items():
            sums[name] = sums.get(name, 0.0) + value
    count = replicates // parts * parts
    found = {name: value / count for name, value in sums.items()}
    found["width"] /= 2 * 1.96 * sd
    return found | {"worst": min(found[f"arm {i}"] for i in range(cell.arms))}


def _part(cell: Cell, shift: float, truth: float, sizes: int, number: int) -> dict[str, float]:
    return replicate(cell, shift, truth, 1000 + number, sizes)


def main() -> None:
    known = cells()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", default=list(known), choices=list(known), metavar="CELL")
    parser.add_argument("--replicates", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    names = ("ours", "paired t", "pooled t", "permutation")
    print("| cell | coverage | worst | width | " + " | ".join(f"FWER {name}" for name in names) + " | ", end="")
    print(" | ".join(f"power {name}" for name in names) + " |")
    print("| --- | " + " | ".join("---:" for _ in range(3 + 2 * len(names))) + " |")
    with multiprocessing.Pool(args.workers) as pool:
        for name in args.cells:
            found = measure(known[name], args.replicates, pool.imap_unordered)
            texts = [f"{found['coverage']:.3f}", f"{found['worst']:.3f}", f"{found['width']:.2f}"]
            texts += [f"{found[f'false {one}']:.3f}" for one in names]
            texts += [f"{found[key]:.2f}" if (key := f"power {one}") in found else "" for one in names]
            print(f"| {name} | {' | '.join(texts)} |", flush=True)


if __name__ == "__main__":
    main()
