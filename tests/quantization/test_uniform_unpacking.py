"""Triton's kernel against torch, by Triton's interpreter where it is installed, and what is done where it is not."""

import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.linears import random_linear
from torch import Tensor

from qpruner.modeling_compressed import uniform_scales_and_minima, uniform_values
from qpruner.plan import ROW, Leading, Precision
from qpruner.quantization.formats import quantize
from qpruner.quantization.uniform_unpacking import kernel, unpack_uniform

KERNELS = "qpruner.quantization.uniform_triton"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """What was found about a device holds for one test."""
    kernel.cache_clear()
    yield
    kernel.cache_clear()


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delitem(sys.modules, KERNELS, raising=False)


def packed(bits: int, group: int, columns: int) -> tuple[Any, ...]:
    """Codes, scales and minima of a random weight, and what tells how they lie."""
    held = quantize(random_linear(columns, 5), Precision("affine-double", bits, group))
    state = held.packed()
    return state["codes"], *uniform_scales_and_minima(state, bits, False), columns, bits, group


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter cuts bfloat16 off, as no GPU does
@pytest.mark.parametrize(("group", "columns"), [(32, 96), (32, 77), (64, 1100), (ROW, 50)])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_the_kernel_gives_what_torch_gives(bits: int, group: int, columns: int, dtype: torch.dtype) -> None:
    unpack = kernel(CPU, bits, dtype)
    assert unpack is not uniform_values
    arguments = packed(bits, group, columns)
    assert torch.equal(unpack(*arguments, dtype), uniform_values(*arguments, dtype))


def test_cpus_take_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, KERNELS, None)
    arguments = packed(3, 32, 77)
    assert torch.equal(unpack_uniform(*arguments, torch.float32), uniform_values(*arguments, torch.float32))
    assert kernel.cache_info().currsize == 0


def test_without_triton_torch_unpacks(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    monkeypatch.setitem(sys.modules, KERNELS, None)
    assert kernel(CPU, 2, torch.float16) is uniform_values
    assert not recwarn.list


def failing(*_: Any) -> Tensor:
    raise RuntimeError("Failed to find C compiler")


def wrong(*arguments: Any) -> Tensor:
    return uniform_values(*arguments) + 1


@pytest.mark.parametrize(
    ("unpack", "told"),
    [
        (failing, "weights of 2 bits fails: RuntimeError: Failed to find C compiler. Torch unpacks them on cpu"),
        (wrong, "weights of 2 bits gives other numbers than torch. Torch unpacks them on cpu"),
    ],
)
def test_a_kernel_that_does_not_work_is_told_once_and_left(
    unpack: Any, told: str, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setitem(sys.modules, KERNELS, SimpleNamespace(unpack=unpack))
    assert [kernel(CPU, 2, torch.float16) for _ in range(2)] == [uniform_values] * 2
    (warning,) = recwarn.list
    assert told in str(warning.message)


def test_a_kernel_that_works_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def right(*arguments: Any) -> Tensor:
        return uniform_values(*arguments)

    monkeypatch.setitem(sys.modules, KERNELS, SimpleNamespace(unpack=right))
    assert [kernel(CPU, bits, torch.bfloat16) for bits in (1, 3, 8)] == [right] * 3


def test_packed_linears_and_tables_are_read_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole weight, some rows, and both segments of one with leading columns."""
    seen: list[tuple[int, ...]] = []

    def recording(codes: Tensor, *arguments: Any) -> Tensor:
        weight = uniform_values(codes, *arguments)
        seen.append(tuple(weight.shape))
        return weight

    monkeypatch.setattr("qpruner.quantization.packed.unpack_uniform", recording)
    linear = quantize(random_linear(96, 5), Precision("affine", 4, 32))
    linear(torch.ones(1, 96))
    linear.rows(torch.tensor([4, 0]), torch.float32)
    led = Precision("affine", 3, 32, Leading(20, Precision("symmetric", 6)))
    quantize(random_linear(96, 5), led).unpack(torch.float32)
    assert seen == [(5, 96), (2, 96), (5, 20), (5, 76)]
