"""Singular values and vectors with known answers."""

import math

import pytest
import torch

from sweeper.placement import spectrum
from sweeper.placement.spectrum import Singular


def orthonormal(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))[0].float()


def planted(rows: int, columns: int, values: list[float], seed: int = 0) -> torch.Tensor:
    """A matrix of chosen singular values."""
    s = torch.tensor(values)
    return (orthonormal(rows, len(values), seed) * s) @ orthonormal(columns, len(values), seed + 1).t()


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (20, 20)])
def test_planted_values_are_found(shape: tuple[int, int]) -> None:
    wanted = [5.0, 2.0, 1.0, 1e-3]
    matrix = planted(*shape, wanted)
    assert spectrum.singular_values(matrix)[:4].tolist() == pytest.approx(wanted, rel=1e-4)
    found = spectrum.decompose(matrix)
    assert found.values.tolist() == pytest.approx(wanted, rel=1e-4)
    assert found.left.shape == (shape[0], 4)
    assert found.right.shape == (shape[1], 4)
    torch.testing.assert_close((found.left * found.values) @ found.right.t(), matrix, rtol=0, atol=1e-5)
    for vectors in (found.left, found.right):
        torch.testing.assert_close(vectors.t() @ vectors, torch.eye(4), rtol=0, atol=1e-3)


def test_a_product_is_never_made_and_has_the_same_spectrum() -> None:
    generator = torch.Generator().manual_seed(0)
    b, a = torch.randn(40, 3, generator=generator), torch.randn(3, 25, generator=generator)
    found = spectrum.decompose_product(b, a)
    whole = torch.linalg.svdvals(b.double() @ a.double())[:3].float()
    torch.testing.assert_close(found.values, whole)
    torch.testing.assert_close((found.left * found.values) @ found.right.t(), b @ a, rtol=0, atol=1e-4)
    repeated = spectrum.decompose_product(torch.cat([b, b], 1), torch.cat([a, a]))
    assert len(repeated.values) == 3
    torch.testing.assert_close(repeated.values, 2 * whole)


def test_ranks_of_known_spectra() -> None:
    flat, steep = torch.full((6,), 3.0), torch.tensor([4.0, 0.0, 0.0])
    assert spectrum.effective_rank(flat) == pytest.approx(6)
    assert spectrum.stable_rank(flat) == pytest.approx(6)
    assert spectrum.effective_rank(steep) == spectrum.stable_rank(steep) == pytest.approx(1)
    two = torch.tensor([3.0, 1.0])
    assert spectrum.effective_rank(two) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    assert spectrum.stable_rank(two) == pytest.approx(10 / 9)
    assert spectrum.frobenius(two) == pytest.approx(math.sqrt(10))


def test_of_a_zero_matrix_everything_is_zero() -> None:
    found = spectrum.decompose(torch.zeros(4, 6))
    assert len(found.values) == 0
    assert spectrum.effective_rank(found.values) == spectrum.stable_rank(found.values) == 0
    assert spectrum.frobenius(found.values) == 0
    assert spectrum.amplification(found, torch.ones(4, 6)) == 0
    assert spectrum.overlap(found.left, orthonormal(4, 2, 0)) == 0
    assert spectrum.decompose_product(torch.zeros(4, 2), torch.ones(2, 6)).values.tolist() == []


def test_overlap_of_subspaces() -> None:
    basis = orthonormal(20, 8, 0)
    assert spectrum.overlap(basis[:, :4], basis[:, :4]) == pytest.approx(1, abs=1e-5)
    assert spectrum.overlap(basis[:, :4], basis[:, 4:]) == pytest.approx(0, abs=1e-5)
    assert spectrum.overlap(basis[:, :4], basis[:, 2:6]) == pytest.approx(0.5, abs=1e-5)
    assert spectrum.overlap(basis[:, :2], basis) == pytest.approx(1, abs=1e-5)


def test_amplification_of_a_direction_the_weight_has() -> None:
    u, v = orthonormal(10, 3, 0), orthonormal(12, 3, 1)
    weight = (u * torch.tensor([8.0, 4.0, 0.0])) @ v.t()

    def along(place: int, size: float) -> Singular:
        return Singular(u[:, place : place + 1], torch.tensor([size]), v[:, place : place + 1])

    assert spectrum.amplification(along(0, 2.0), weight) == pytest.approx(2 / 8, rel=1e-5)
    assert spectrum.amplification(along(1, 2.0), weight) == pytest.approx(2 / 4, rel=1e-5)
    assert spectrum.amplification(along(2, 2.0), weight) > 1e5


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_a_planted_intruder_is_the_only_one(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(shape, generator=generator)
    own = spectrum.decompose(weight)

    def count(update: torch.Tensor, top: int = 5) -> int:
        tuned = spectrum.decompose(weight + update)
        return spectrum.intruders(tuned.left[:, :top], own.left, epsilon=0.6)

    assert count(torch.zeros(shape)) == 0
    assert count(0.5 * weight) == 0
    # twice what the base has in one of its own directions is no intruder
    assert count(torch.outer(own.left[:, 2], own.right[:, 2]) * own.values[2]) == 0
    new = own.left.mean(1) / own.left.mean(1).norm()  # as far from every vector of the base as can be
    assert count(3 * own.values[0] * torch.outer(new, own.right[:, 0])) == 1
    assert count(1e-3 * own.values[0] * torch.outer(new, own.right[:, 0])) == 0


def test_a_direction_outside_the_base_is_an_intruder() -> None:
    basis, right = orthonormal(20, 5, 0), orthonormal(9, 5, 1)
    weight = (basis[:, :4] * torch.tensor([5.0, 4.0, 3.0, 2.0])) @ right[:, :4].t()
    tuned = spectrum.decompose(weight + 7 * torch.outer(basis[:, 4], right[:, 4]))
    own = spectrum.decompose(weight)
    assert spectrum.intruders(tuned.left, own.left, epsilon=0.5) == 1
    assert spectrum.intruders(tuned.left[:, 1:], own.left, epsilon=0.5) == 0


def test_layouts_that_are_not_known_are_refused() -> None:
    with pytest.raises(TypeError, match="LayerNorm has no matrix of known layout"):
        spectrum.as_matrix(torch.nn.LayerNorm(3), torch.ones(3))
