"""Seconds per token in the decoder linears of a plan, from forward passes that were measured once.

A table holds the seconds of a linear of each shape and precision that occur in plans, on the device at hand; those of a
plan are their sum. All other costs of a token are left out: attention, norms, embedding, head and adapters. Timings
vary from one measurement to the next, so a table is kept, and is used for nothing but a report.
"""

import math
import platform
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from qpruner.anatomy import unit_shapes
from qpruner.errors import UserError
from qpruner.plan import DENSE, CompressionPlan, Precision
from qpruner.quantization.formats import quantize
from qpruner.schema import Record

TOKENS = (1, 256)
"""Tokens that pass through a linear at once: as when text is generated, and as when it is read."""
REPEATS = 7

Linear = tuple[int, int, Precision]
"""Rows and columns of a weight, and the precision that it is stored in."""
Timer = Callable[[Linear, torch.device, torch.dtype], tuple[float, ...]]


@dataclass(frozen=True)
class Speeds(Record):
    """Seconds of forward passes on a device.

    Args:
        where: device, its number of threads and the dtype of activations, in words.
        seconds: for each linear, such as ``576 x 1536 nf4 4/64``, seconds of a pass with each number of `TOKENS`.

    Raises:
        UserError: seconds that are not above 0, or not one value for each number of `TOKENS`.
    """

    remedy = "Delete the file: speeds are measured anew."

    where: str
    seconds: dict[str, tuple[float, ...]]

    def __post_init__(self) -> None:
        for linear, passes in self.seconds.items():
            if len(passes) != len(TOKENS) or not all(0 < seconds < math.inf for seconds in passes):
                raise UserError(
                    f"The seconds of {linear!r} are {list(passes)}; they are {len(TOKENS)} numbers above 0."
                )

    def per_token(self, plan: CompressionPlan) -> dict[str, float]:
        """Seconds per token in all decoder linears of a plan, by how many tokens pass at once."""
        linears = linears_of(plan)
        return {
            str(tokens): sum(count * self.seconds[name_of(linear)][place] for linear, count in linears.items()) / tokens
            for place, tokens in enumerate(TOKENS)
        }


def linears_of(plan: CompressionPlan) -> Counter[Linear]:
    """How many linears of each shape and precision a plan has."""
    widths = plan.widths
    return Counter(
        (rows, columns, layer.precision[unit])
        for number, layer in enumerate(plan.layers)
        for unit, shapes in unit_shapes(widths, number).items()
        for rows, columns in shapes
    )


def name_of(linear: Linear) -> str:
    """The name of a linear in a table."""
    rows, columns, precision = linear
    return f"{rows} x {columns} {precision}"


def seconds_of(linear: Linear, device: torch.device, dtype: torch.dtype) -> tuple[float, ...]:
    """The minimum over several forward passes, in seconds, for each number of `TOKENS`; weight values do not matter."""
    rows, columns, precision = linear
    module = nn.Linear(columns, rows, bias=False, dtype=dtype, device=device).requires_grad_(False)
    packed = module if precision == DENSE else quantize(module, precision)

    def seconds(x: torch.Tensor) -> float:
        since = _now(device)
        packed(x)
        return _now(device) - since

    with torch.no_grad():
        inputs = [torch.ones(tokens, columns, dtype=dtype, device=device) for tokens in TOKENS]
        for x in inputs:  # warm-up: compiles kernels and fills caches
            packed(x)
        return tuple(min(seconds(x) for _ in range(REPEATS)) for x in inputs)


def measured(
    path: Path,
    plans: Sequence[CompressionPlan],
    device: torch.device,
    dtype: torch.dtype,
    timer: Timer = seconds_of,
) -> Speeds:
    """The table of all linears of given plans; entries of the file that were measured on such a device are reused.

    Args:
        path: file of the table, written if anything was measured.
        plans: plans whose linears are needed.
        device: device that computes.
        dtype: dtype of activations.
        timer: function that measures a linear.
    """
    where = f"{_name_of(device)}, {torch.get_num_threads()} threads, {str(dtype).removeprefix('torch.')}"
    known = Speeds(where, {})
    if path.exists():
        with suppress(UserError):  # a damaged table counts as missing
            known = Speeds.read(path)
    seconds = dict(known.seconds) if known.where == where else {}
    wanted = {name_of(linear): linear for plan in plans for linear in linears_of(plan)}
    if missing := wanted.keys() - seconds.keys():
        seconds |= {name: timer(wanted[name], device, dtype) for name in sorted(missing)}
        path.parent.mkdir(parents=True, exist_ok=True)
        Speeds(where, seconds).write(path)
    return Speeds(where, seconds)


def _name_of(device: torch.device) -> str:
    """The name of the specific device, so that timings from another machine are not reused on this one."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:  # only Linux tells the model
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
