"""Which examples a run sees when, and how the lanes of a pack become one batch."""

import hashlib
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

from sweeper.tasks import Encoded
from sweeper.training.batches import WINDOW, DataOrder, collate, supervised

LENGTHS = np.random.default_rng(0).integers(5, 200, 300).tolist()


@pytest.mark.parametrize("bucketed", [True, False])
@pytest.mark.parametrize(("examples", "batch_size"), [(300, 4), (7, 2), (64, 2), (3, 5)])
def test_every_example_comes_once_an_epoch(examples: int, batch_size: int, bucketed: bool) -> None:
    """Windows of batches straddle epochs, so over whole windows the counts differ by at most one."""
    order = DataOrder(LENGTHS[:examples], batch_size, seed=3, bucketed=bucketed)
    windows = -(-3 * examples // (WINDOW * batch_size))
    seen = Counter(i for n in range(windows * WINDOW) for i in order.batch(n))
    full, rest = divmod(windows * WINDOW * batch_size, examples)
    assert set(seen) == set(range(examples))
    assert Counter(seen.values()) == Counter({full: examples - rest, full + 1: rest} if rest else {full: examples})


def test_the_plain_order_is_a_fresh_permutation_every_epoch() -> None:
    order = DataOrder(LENGTHS[:12], 4, seed=0, bucketed=False)
    epochs = [[i for n in range(3 * e, 3 * e + 3) for i in order.batch(n)] for e in range(4)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_order_follows_from_the_seed_alone() -> None:
    one, again, other = (DataOrder(LENGTHS, 4, seed=seed) for seed in (5, 5, 6))
    for n in (70, 3, 0, 69, 31, 32):  # in any order of asking
        assert one.batch(n) == again.batch(n)
    assert [one.batch(n) for n in range(10)] != [other.batch(n) for n in range(10)]


@pytest.mark.parametrize("bucketed", [True, False])
def test_a_step_has_the_same_examples_however_it_is_cut(bucketed: bool) -> None:
    whole = DataOrder(LENGTHS, 12, seed=5, bucketed=bucketed)
    for batch_size, accumulation in ((6, 2), (4, 3), (1, 12)):
        cut = DataOrder(LENGTHS, batch_size, seed=5, accumulation=accumulation, bucketed=bucketed)
        for step in (0, 1, 31, 32, 70):  # over windows and epochs
            passes = [cut.batch(step * accumulation + micro) for micro in range(accumulation)]
            assert {len(batch) for batch in passes} == {batch_size}
            assert [i for batch in passes for i in batch] == whole.batch(step)


def test_the_order_without_accumulation_is_that_of_records_so_far() -> None:
    order = DataOrder(LENGTHS, 4, seed=7)
    assert order.batch(0) == [293, 150, 266, 239]
    seen = repr([order.batch(n) for n in range(150)])
    assert hashlib.sha256(seen.encode()).hexdigest()[:16] == "c3a991e628e8716c"


def padding(order: DataOrder, batches: int) -> float:
    """Share of a batch that is padding."""
    held = [[LENGTHS[i] for i in order.batch(n)] for n in range(batches)]
    return 1 - sum(map(sum, held)) / sum(max(lengths) * len(lengths) for lengths in held)


def test_bucketed_batches_waste_little_on_padding() -> None:
    bucketed, plain = (padding(DataOrder(LENGTHS, 4, 1, bucketed=value), 3 * WINDOW) for value in (True, False))
    assert plain > 0.3
    assert bucketed < 0.05
    assert padding(DataOrder(LENGTHS, 4, 1, accumulation=3), 9 * WINDOW) < 0.05


def test_runs_of_different_seeds_meet_batches_of_like_length_at_the_same_step() -> None:
    longest = np.array(
        [[max(LENGTHS[i] for i in DataOrder(LENGTHS, 4, seed).batch(n)) for n in range(WINDOW)] for seed in range(5)]
    )
    assert float((longest.max(0) - longest.min(0)).mean()) < 0.25 * float(longest.mean())
    # and they do not come sorted: a schedule must not go from short to long
    assert any(a > b for a, b in pairwise(longest[0]))
    assert any(a < b for a, b in pairwise(longest[0]))


ONE = Encoded("one", (10, 11, 12, 13), 2)
TWO = Encoded("two", (20, 21, 22), 1)
THREE = Encoded("three", (30, 31, 32, 33, 34, 35, 36, 37, 38), 8)
FOUR = Encoded("four", (40, 41), 1)


def test_collate_on_a_hand_made_batch() -> None:
    batch = collate([[ONE, TWO], [THREE, FOUR]], [[1 / 8] * 2, [1 / 2] * 2], fixed=False)
    assert batch.shape == (False, 2, 2, 16, 4)  # 9 tokens are rounded up to a multiple of 8, targets are not
    rows = torch.zeros(4, 16, dtype=torch.int64)
    for row, example in enumerate((ONE, TWO, THREE, FOUR)):
        rows[row, : len(example.input_ids)] = torch.tensor(example.input_ids)
    assert torch.equal(batch.ids, rows)
    assert batch.targets.tolist() == [[12, 13, 21, 22], [38, 41, 0, 0]]
    assert batch.index[0, :4].tolist() == [1, 2, 16, 17]
    assert batch.index[1, :2].tolist() == [2 * 16 + 7, 3 * 16]
    assert batch.weights.tolist() == [[1 / 8] * 4, [1 / 2] * 2 + [0] * 2]


def test_a_compact_batch_has_its_sequences_end_to_end() -> None:
    batch = collate([[ONE, TWO], [THREE, FOUR]], [[1 / 8] * 2, [1 / 2] * 2], fixed=False, count=3, compact=True)
    assert batch.shape == (True, 3, 2, 16, 4)  # 11 tokens of the longer lane are rounded up to a multiple of 8
    first = [*ONE.input_ids, *TWO.input_ids, *[0] * 9]
    assert batch.ids.tolist() == [first, [*THREE.input_ids, *FOUR.input_ids, *[0] * 5], [0] * 16]
    assert batch.starts is not None
    assert batch.stops is not None
    assert batch.starts.tolist()[:16] == [0] * 4 + [4] * 3 + list(range(7, 16))
    assert batch.stops.tolist()[16:32] == [25] * 9 + [27] * 2 + list(range(28, 33))
    padded = collate([[ONE, TWO], [THREE, FOUR]], [[1 / 8] * 2, [1 / 2] * 2], fixed=False, count=3)
    for name in ("targets", "weights", "rows", "positions", "lengths", "prompts", "facts"):
        assert torch.equal(getattr(batch, name), getattr(padded, name))
    twice = collate([[ONE, TWO]], [[1 / 8] * 2], fixed=False, compact=True).repeated(2)
    assert twice.starts is not None
    assert twice.starts.tolist() == [*[0] * 4, *[4] * 3, 7, *[8] * 4, *[12] * 3, 15]


@pytest.mark.parametrize("compact", [False, True])
def test_a_target_is_the_token_after_its_position(compact: bool) -> None:
    batch = collate([[ONE, TWO], [THREE, FOUR]], [[1 / 4] * 2, [1 / 2] * 2], fixed=True, compact=compact)
    flat = batch.ids.flatten()
    live = batch.weights > 0
    assert int(live.sum()) == supervised([ONE, TWO, THREE, FOUR]) == 6
    assert torch.equal(flat[batch.index[live] + 1], batch.targets[live])


def test_a_total_of_zero_gives_sums() -> None:
    batch = collate([[ONE], [THREE]], [[1.0], [1.0]], fixed=False)
    assert batch.weights.tolist() == [[1, 1], [1, 0]]


def test_fixed_shapes_are_few_and_at_most_a_third_of_them_is_padding() -> None:
    lengths = set()
    for length in range(33, 1025):
        padded = collate([[Encoded("x", (1,) * length, 1)]], [[1.0]], fixed=True).ids.shape[1]
        assert length <= padded < 1.5 * length
        lengths.add(padded)
    assert len(lengths) <= 10
