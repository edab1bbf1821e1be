"""A step through a packed linear against one through a dense linear: forward, and backward to its input.

    python benchmarks/packed_speed.py                  2048 x 2048, 256 tokens, bfloat16, two threads
    python benchmarks/packed_speed.py --device cuda --tokens 4096

Every repeat takes all linears in turns, so that whatever else a machine does meets them alike; a row is the least of
its repeats. The base is frozen, as below adapters: no gradient of the weight is computed.
"""

import argparse
import time

import torch
from torch import Tensor, nn

from qpruner.plan import Precision
from qpruner.quantization.formats import FORMATS, num_bytes, quantize
from qpruner.records.tables import markdown_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--formats", nargs="+", default=["nf4", "int8", "affine", "affine-double", "symmetric"])
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    device, dtype = torch.device(given.device), getattr(torch, given.dtype)
    torch.manual_seed(0)
    dense = nn.Linear(given.size, given.size, bias=False, dtype=dtype, device=device).requires_grad_(False)
    chosen = [number_format for number_format in FORMATS if number_format.name in given.formats]
    precisions = [Precision(number_format.name, bits) for number_format in chosen for bits in number_format.bits]
    linears = {"dense": dense, **{str(precision): quantize(dense, precision) for precision in precisions}}
    x = torch.randn(given.tokens, given.size, dtype=dtype, device=device, requires_grad=True)
    gradient = torch.randn(given.tokens, given.size, dtype=dtype, device=device)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in linears}
    for _ in range(given.repeats):
        for name, linear in linears.items():
            seconds[name].append(step(linear, x, gradient))
    least = {name: [min(column) for column in zip(*times, strict=True)] for name, times in seconds.items()}
    rows = []
    for name, (forward, both) in least.items():
        bits = 8 * dtype.itemsize
        if name != "dense":
            bits = 8 * num_bytes(given.size, given.size, linears[name].precision) / given.size**2
        ratios = [f"{one / base:.2f}" for one, base in zip((forward, both), least["dense"], strict=True)]
        rows.append([name, f"{bits:.2f}", f"{1000 * forward:.2f}", f"{1000 * both:.2f}", *ratios])
    header = ["linear", "bits per weight", "forward, ms", "forward + backward, ms", "forward / dense", "both / dense"]
    print(markdown_table(header, rows))


def step(linear: nn.Linear, x: Tensor, gradient: Tensor) -> tuple[float, float]:
    """Seconds of a forward pass, and of it with the backward pass."""
    start = now(x.device)
    output = linear(x)
    forward = now(x.device) - start
    torch.autograd.grad(output, x, gradient)
    return forward, now(x.device) - start


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    main()
