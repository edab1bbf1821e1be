"""Products that are added a few channels at a time, against the whole of them."""

import pytest
import torch

from qpruner.calibration import products

LEFT, RIGHT, ROOTS = torch.randn(11, 7), torch.randn(11, 5), torch.rand(11, 1)


@pytest.fixture(autouse=True)
def few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "CHANNELS_AT_ONCE", 3)


def test_products_are_those_of_all_channels() -> None:
    total = torch.ones(7, 5, dtype=torch.float64)
    products.add_products_(total, LEFT, RIGHT)
    products.add_products_(total, LEFT, RIGHT, ROOTS)
    expected = 1 + LEFT.double().T @ ((1 + ROOTS.double().square()) * RIGHT.double())
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)


def test_a_gram_is_that_of_all_channels_and_symmetric() -> None:
    total = torch.zeros(7, 7, dtype=torch.float64)
    products.add_gram_(total, LEFT.bfloat16())
    products.add_gram_(total, LEFT.bfloat16(), ROOTS)
    values = LEFT.bfloat16().double()
    torch.testing.assert_close(total, values.T @ ((1 + ROOTS.double().square()) * values), rtol=1e-5, atol=1e-5)
    assert torch.equal(total, total.T)


def test_outputs_of_which_there_are_none_add_nothing() -> None:
    total = torch.zeros(7, 0, dtype=torch.float64)
    products.add_products_(total, LEFT, RIGHT[:, :0], ROOTS)
    assert total.numel() == 0
