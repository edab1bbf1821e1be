"""Which code unpacks uniform weights: torch's passes everywhere, one kernel of Triton where that gives the same."""

import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from qpruner.modeling_compressed import bytes_of_row, uniform_values

Unpack = Callable[[Tensor, Tensor, Tensor, int, int, int, torch.dtype], Tensor]
"""Of codes, scales, minima, columns, bits, group and dtype; see `qpruner.modeling_compressed.uniform_values`."""


def unpack_uniform(
    codes: Tensor, scales: Tensor, minima: Tensor, columns: int, bits: int, group: int, dtype: torch.dtype
) -> Tensor:
    """What `uniform_values` gives, bit for bit; on CUDA by a kernel of Triton, where there is one that works."""
    unpack = kernel(codes.device, bits, dtype) if codes.is_cuda else uniform_values
    return unpack(codes, scales, minima, columns, bits, group, dtype)


@cache
def kernel(device: torch.device, bits: int, dtype: torch.dtype) -> Unpack:
    """Triton's kernel, tried on a small weight first; `uniform_values` where Triton is missing, fails or differs.

    Triton comes with PyTorch for Linux, and compiles a kernel when it is first used, for which it needs a C compiler
    and knowledge of the GPU: what is no more than faster must not end a run.
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
    except Exception as error:  # whatever a compiler or a driver has to say
        same, reason = False, f"fails: {type(error).__name__}: {error}"
    if same:
        return unpack
    warnings.warn(
        f"Triton's kernel for weights of {bits} bits {reason}. Torch unpacks them on {device}, more slowly.",
        stacklevel=2,
    )
    return uniform_values
