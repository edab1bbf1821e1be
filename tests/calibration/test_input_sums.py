"""Sums of products of a linear's inputs."""

import torch

from qpruner.calibration.input_sums import InputSums
from qpruner.processes import Processes


def test_they_are_weighted_products_for_each_group_of_rows() -> None:
    x, z = torch.randn(2, 50, 6, generator=torch.Generator().manual_seed(0)).double()
    weights = torch.rand(50, 2, generator=torch.Generator().manual_seed(1)).double()
    sums = InputSums.none(2, 6, torch.device("cpu"), cross=True, dense=True)
    sums.add_(x[:20], z[:20], weights[:20])
    sums.add_(x[20:], z[20:], weights[20:])
    assert sums.cross is not None and sums.dense is not None
    for group in range(2):
        weighted = torch.diag(weights[:, group])
        torch.testing.assert_close(sums.hessian[group], x.T @ weighted @ x, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sums.cross[group], z.T @ weighted @ x, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sums.dense[group], z.T @ weighted @ z, rtol=1e-5, atol=1e-5)
    assert sums.hessian.dtype == torch.float64
    assert torch.equal(sums.over(Processes.alone()).cross, sums.cross)


def test_without_the_dense_model_only_the_inputs_count() -> None:
    sums = InputSums.none(1, 3, torch.device("cpu"), cross=False, dense=False)
    sums.add_(torch.eye(3), None, torch.tensor([[1.0], [2.0], [0.0]]))
    assert sums.cross is None and sums.dense is None and sums.over(Processes.alone()).dense is None
    torch.testing.assert_close(sums.hessian[0], torch.diag(torch.tensor([1.0, 2.0, 0.0])).double())
