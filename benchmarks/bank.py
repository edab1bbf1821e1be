"""Assembling a plan from a bank against quantizing it afresh, and the bytes of the bank.

python benchmarks/bank.py                     a random Llama of 8 blocks, hidden size 1024, bfloat16
python benchmarks/bank.py --folder /tmp/bank  the same from safetensors that are mapped into memory
"""

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qpruner.adapters.lora import LoRAConfig
from qpruner.anatomy import architecture_of
from qpruner.plan import UNITS, CompressionPlan, Precision
from qpruner.processes import Processes
from qpruner.quantization.apply import LoftQSettings, quantize_
from qpruner.quantization.bank import fill, fill_folder

NARROW, WIDE = Precision("nf4", 4, 64), Precision("int8", 8)
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    model = random_model(given.layers, given.hidden)
    dense = CompressionPlan.dense(architecture_of(model.config), "random")
    settings = LoftQSettings(8, 2.0, LoRAConfig().target_modules, 1, 0)  # type: ignore[arg-type]
    linears = sum(
        linear.weight.numel() for linear in model.model.layers.modules() if isinstance(linear, torch.nn.Linear)
    )

    since = time.perf_counter()
    if given.folder is None:
        bank = fill(model, [NARROW, WIDE], settings, device=CPU)
    else:
        bank = fill_folder(given.folder, model, [NARROW, WIDE], settings, base="random", processes=Processes.alone(CPU))
    filling = time.perf_counter() - since
    # Every linear changes from one of these plans to the next.
    plans = [
        dense.with_precision(
            [dict.fromkeys(UNITS, (NARROW, WIDE)[(layer + turn) % 2]) for layer in range(given.layers)]
        )
        for turn in range(2)
    ]
    fresh = median(
        timed(lambda plan=plan: quantize_(copy.deepcopy(model), plan, settings, device=CPU)) for plan in plans
    )
    copying = median(timed(lambda: copy.deepcopy(model)) for _ in plans)
    assembling = median(timed(lambda plan=plan: bank.assemble_(model, plan)) for plan in plans * 5)
    print(f"filled in {filling:.2f} s; {bank.num_bytes:,} bytes beside the model's own linears of 16 bits:")
    print(f"  bank / linears of 16 bits          {bank.num_bytes / (2 * linears):.3f}")
    print(f"quantizing afresh                    {1000 * (fresh - copying):.1f} ms")
    print(f"assembling                           {1000 * assembling:.2f} ms")
    print(f"  afresh / assembling                {(fresh - copying) / assembling:.0f}")


def random_model(layers: int, hidden: int) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=11 * hidden // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).requires_grad_(False)


def timed(work: Callable[[], Any]) -> float:
    since = time.perf_counter()
    work()
    return time.perf_counter() - since


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
