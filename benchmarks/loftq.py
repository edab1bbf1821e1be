"""What the randomized factorisation of LoftQ captures and costs, against the exact SVD, and a whole 7B model's cost.

    python benchmarks/loftq.py

takes some minutes on two cores, nearly all of them in the exact SVD. Energy is ``|R|^2 - |R - BA|^2`` of the NF4
residual R, in percent of what the exact SVD of the same rank captures. Weights are Gaussian, heavy-tailed (Student's t
with 4 degrees of freedom) or Gaussian with a part of rank 32. Ours is timed three times before the one exact SVD and
twice after it, and the median counts. Of ``svd_lowrank`` it prints the energy at its defaults (two power iterations).
"""

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any, TypeVar

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from torch import Tensor

from qpruner.adapters.loftq import loftq
from qpruner.adapters.low_rank import truncated_svd

T = TypeVar("T")
LLAMA_2_7B = {(4096, 4096): 4 * 32, (11008, 4096): 2 * 32, (4096, 11008): 32}
"""Linears of each shape [out, in]."""


def quantize(weight: Tensor) -> tuple[Tensor, QuantState]:
    return quantize_4bit(weight, blocksize=64, quant_type="nf4")


def dequantize(packed: tuple[Tensor, QuantState]) -> Tensor:
    return dequantize_4bit(*packed)


def gaussian(m: int, n: int) -> Tensor:
    return torch.randn(m, n)


def heavy_tailed(m: int, n: int) -> Tensor:
    return torch.randn(m, n) / torch.randn(4, m, n).square().mean(0).sqrt()


def low_rank_part(m: int, n: int) -> Tensor:
    return torch.randn(m, n) + 0.3 * torch.randn(m, 32) @ torch.randn(32, n)


def timed(function: Callable[..., T], matrix: Tensor, **options: Any) -> tuple[T, float]:
    """The function of the matrix, and the seconds that it took."""
    start = time.perf_counter()
    result = function(matrix, **options)
    if matrix.is_cuda:
        torch.cuda.synchronize(matrix.device)
    return result, time.perf_counter() - start


def ours(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    return truncated_svd(matrix, rank, generator=torch.Generator().manual_seed(0))


def energy(matrix: Tensor, u: Tensor, s: Tensor, vh: Tensor) -> float:
    """``|A|^2 - |A - U S V^T|^2``; in float64, for the two terms nearly cancel."""
    return float(matrix.double().square().sum() - (matrix - (u * s) @ vh).double().square().sum())


def compare(shapes: list[tuple[int, int]], ranks: list[int], device: str) -> dict[tuple[int, ...], float]:
    """Prints the table; returns seconds of the exact SVD by sorted shape."""
    seconds: dict[tuple[int, ...], float] = {}
    print("       shape         weight rank   energy svd_lowrank     ours    exact ratio")
    for m, n in shapes:
        for kind in (gaussian, heavy_tailed, low_rank_part):
            torch.manual_seed(0)
            weight = kind(m, n).to(device)
            residual = weight - dequantize(quantize(weight))
            before = {rank: [timed(ours, residual, rank=rank)[1] for _ in range(3)] for rank in ranks}
            (u, s, vh), slow = timed(torch.linalg.svd, residual, full_matrices=False)
            seconds[tuple(sorted((m, n)))] = slow
            for rank in ranks:
                (factors, fourth), (_, fifth) = (timed(ours, residual, rank=rank) for _ in range(2))
                exact = energy(residual, u[:, :rank], s[:rank], vh[:rank])
                default_u, default_s, default_v = torch.svd_lowrank(residual, q=rank)
                share, default = (
                    energy(residual, *decomposition) / exact
                    for decomposition in (factors, (default_u, default_s, default_v.T))
                )
                fast = median([*before[rank], fourth, fifth])
                print(
                    f"{m:>6}x{n:<5} {kind.__name__:>14} {rank:4} {share:8.1%} {default:11.1%} "
                    f"{fast:6.2f} s {slow:6.2f} s {slow / fast:5.0f}",
                    flush=True,
                )
    return seconds


def extrapolate(exact: dict[tuple[int, ...], float], device: str) -> None:
    """Prints what LoftQ costs on every linear of Llama-2-7B."""
    options: dict[str, Any] = {"name": "layer", "rank": 8, "scale": 2.0, "num_iterations": 1, "seed": 0}
    whole = svds = 0.0
    for (m, n), count in LLAMA_2_7B.items():
        weight = gaussian(m, n).to(device)
        runs = [timed(loftq, weight, quantize=quantize, dequantize=dequantize, **options)[1] for _ in range(3)]
        whole += count * median(runs)
        svds += count * exact.get(tuple(sorted((m, n))), float("nan"))
    print(f"Llama-2-7B, NF4, rank 8, T = 1: {whole / 60:.1f} minutes, quantization included.")
    if svds == svds:  # both shapes were timed above
        print(f"Exact SVDs alone would take {svds / 60:.0f} minutes.")


def shape(text: str) -> tuple[int, int]:
    m, n = map(int, text.split("x"))
    return m, n


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 64])
    parser.add_argument("--shapes", type=shape, nargs="+", default=[(4096, 4096), (4096, 11008)], metavar="OUTxIN")
    options = parser.parse_args()
    device = options.device
    name = torch.cuda.get_device_name(device) if device != "cpu" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}; torch {torch.__version__}")
    extrapolate(compare(options.shapes, options.ranks, device), device)


if __name__ == "__main__":
    main()
