"""Against the exact SVD, on the flattest spectra that there are."""

import pytest
import torch
from torch import Tensor

from qpruner.adapters.low_rank import krylov_basis, truncated_svd


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def factorise(matrix: Tensor, rank: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    return truncated_svd(matrix, rank, generator=seeded(seed))


def captured(matrix: Tensor, u: Tensor, s: Tensor, vh: Tensor) -> float:
    """``|A|^2 - |A - U S V^T|^2`` in float64."""
    matrix, product = matrix.double(), (u.double() * s.double()) @ vh.double()
    return float(matrix.square().sum() - (matrix - product).square().sum())


def test_a_diagonal_matrix_gives_its_largest_entries() -> None:
    u, s, vh = factorise(torch.diag(torch.tensor([1.0, -4.0, 3.0])), 2)
    assert s.tolist() == pytest.approx([4, 3])
    assert torch.allclose((u * s) @ vh, torch.diag(torch.tensor([0.0, -4.0, 3.0])), atol=1e-6)


@pytest.fixture(scope="module")
def flat() -> tuple[Tensor, Tensor]:
    """Noise, and its singular values in float64."""
    noise = torch.randn(512, 1024, generator=seeded(1))
    return noise, torch.linalg.svdvals(noise.double())


@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize("rank", [1, 8, 16])
def test_noise_gives_up_nearly_as_much_energy_as_the_exact_svd_finds(
    flat: tuple[Tensor, Tensor], rank: int, tall: bool
) -> None:
    noise, exact = flat[0].T if tall else flat[0], float(flat[1][:rank].square().sum())
    u, s, vh = factorise(noise, rank)
    # Less than everything shows that the exact method was not used.
    assert 0.98 * exact < captured(noise, u, s, vh) < 0.9999 * exact
    assert float(s.double().square().sum()) == pytest.approx(captured(noise, u, s, vh), rel=1e-4)


def test_more_blocks_are_what_it_takes(flat: tuple[Tensor, Tensor]) -> None:
    noise, exact = flat[0], float(flat[1][:8].square().sum())
    energy = [
        float(torch.linalg.svdvals(krylov_basis(noise, 16, steps, generator=seeded()).T @ noise)[:8].square().sum())
        for steps in (1, 2, 4, 8)
    ]
    assert energy[0] < 0.65 * exact < 0.9 * exact < energy[2] < 0.995 * exact < energy[3]


def test_singular_vectors_are_orthonormal_and_values_descend() -> None:
    u, s, vh = factorise(torch.randn(600, 900, generator=seeded(2)), 12)
    assert u.shape == (600, 12) and vh.shape == (12, 900)
    assert torch.allclose(u.T @ u, torch.eye(12), atol=1e-5)
    assert torch.allclose(vh @ vh.T, torch.eye(12), atol=1e-4)
    assert (s.diff() <= 0).all()


@pytest.mark.parametrize("decay", [0.8, 0.0])
def test_the_krylov_basis_is_orthonormal_where_powers_melt_into_one_direction(decay: float) -> None:
    matrix = torch.randn(400, 500, generator=seeded(3)) * decay ** torch.arange(500)  # the second is of rank 1
    basis = krylov_basis(matrix, 16, 8, generator=seeded())
    assert torch.allclose(basis.T @ basis, torch.eye(128), atol=1e-5)


def test_a_decaying_spectrum_is_found_exactly() -> None:
    u, v = (torch.linalg.qr(torch.randn(size, 60, generator=seeded(4))).Q for size in (500, 600))
    values = 0.7 ** torch.arange(60)
    _, s, _ = factorise((u * values) @ v.T, 8)
    assert s.tolist() == pytest.approx(values[:8].tolist(), rel=1e-4)


@pytest.mark.parametrize("true_rank", [0, 3])
def test_a_matrix_of_lower_rank_than_asked_for(true_rank: int) -> None:
    matrix = torch.randn(500, true_rank, generator=seeded(5)) @ torch.randn(true_rank, 600, generator=seeded(6))
    u, s, vh = factorise(matrix, 8)
    assert torch.allclose((u * s) @ vh, matrix, atol=1e-3)  # values are up to 868
    assert (s[true_rank:] < 1e-3).all() and u.isfinite().all() and vh.isfinite().all()


def test_the_draw_depends_on_the_generator_alone() -> None:
    noise = torch.randn(512, 600, generator=seeded(7))
    first = factorise(noise, 4)
    torch.manual_seed(123)
    assert all(map(torch.equal, first, factorise(noise, 4)))
    assert not torch.equal(first[0], factorise(noise, 4, seed=1)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_factorised_in_float32(dtype: torch.dtype) -> None:
    noise = torch.randn(40, 30, generator=seeded(8)).to(dtype)
    u, s, vh = factorise(noise, 30)
    assert s.dtype == torch.float32
    assert torch.allclose((u * s) @ vh, noise.float(), atol=1e-4)
