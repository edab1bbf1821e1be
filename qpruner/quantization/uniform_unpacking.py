"""Decides how uniform weights are unpacked: by a Triton kernel on CUDA if it works there, otherwise by plain torch."""

import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from qpruner.modeling_compressed import bytes_of_row, uniform_values

Unpack = Callable[[Tensor, Tensor, Tensor, int, int, int, torch.dtype], Tensor]
"""Function with the arguments and the result of `qpruner.modeling_compressed.uniform_values`."""


def unpack_uniform(
    codes: Tensor, scales: Tensor, minima: Tensor, columns: int, bits: int, group: int, dtype: torch.dtype
) -> Tensor:
    """Computes `uniform_values`, bit for bit; on CUDA by a Triton kernel, if it works there."""
    unpack = kernel(codes.device, bits, dtype) if codes.is_cuda else uniform_values
    return unpack(codes, scales, minima, columns, bits, group, dtype)


@cache
def kernel(device: torch.device, bits: int, dtype: torch.dtype) -> Unpack:
    """The Triton kernel, after a trial on a small weight; `uniform_values` if Triton is missing, fails or differs.

    Triton comes with PyTorch for Linux, and compiles a kernel on first use, for which it needs a C compiler and support
    for the GPU. An optimization must not end a run, so a kernel that fails or differs only causes a warning.
    """
    try:
        unpack: Unpack = import_module("qpruner.quantization.uniform_triton").unpack
    except ImportError:
        return uniform_values
    rows, columns, group = 3, 72, 32
    codes = torch.arange(rows * bytes_of_row(columns, bits), device=device).mul_(37).to(torch.uint8).view(rows, -1)
    scales, minima = torch.linspace(-0.1, 0.3, 2 * rows * 3, device=device).half().float().view(2, rows, 3)
    arguments = (codes, scales, minima, columns, bits, group, dtype)
    try:
        same = torch.equal(unpack(*arguments), uniform_values(*arguments))
        reason = "gives other numbers than torch"
    except Exception as error:  # compilers and drivers may raise anything
        same, reason = False, f"fails: {type(error).__name__}: {error}"
    if same:
        return unpack
    warnings.warn(
        f"Triton's kernel for weights of {bits} bits {reason}. Torch unpacks them on {device}, more slowly.",
        stacklevel=2,
    )
    return uniform_values
