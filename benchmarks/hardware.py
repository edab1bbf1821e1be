"""What fits where: bytes of compressing, recovering and running models of 7, 13 and 70 billion parameters.

    python benchmarks/hardware.py
    python benchmarks/hardware.py --ratio 0.2 --bits 3 --tokens 4096

Arithmetic on shapes alone; no weight is made. What is counted:

    whole       compression of a model as a whole: twice its 16-bit weights (`qpruner.offload`)
    by block    compression block by block: 16-bit embedding and head, the largest block before and after pruning,
                activations of 4096 tokens, and a chunk of logits with its gradient
    + compensation    the same, with float64 matrices of the widest linear, by inputs and by outputs: inputs by inputs
                two (sums that decide beside those held out, or beside the factor), inputs by outputs four
    + by text   the same, with rounding by text and adapters that start by it: inputs by inputs eight (sums that decide,
                and what their factors take), inputs by outputs two
    recovery    packed weights, adapters with gradients and two moments of Adam in float32, hidden states of
                ``--tokens`` tokens for each layer (gradient checkpointing), activations of one block, a chunk of logits
    running     packed weights, adapters, and keys and values of 4096 tokens

A device also needs what its driver and the allocator take, about 1 GB, which is left free in what is said to fit.
"""

import argparse
from dataclasses import dataclass
from typing import Any

from transformers import LlamaConfig

from qpruner.adapters.lora import ALL_LINEAR
from qpruner.anatomy import architecture_of, decoder_blocks, decoder_layers
from qpruner.likelihood import LOGITS_AT_ONCE
from qpruner.memory import num_parameters, tensor_bytes
from qpruner.offload import WHOLE
from qpruner.outline import outline_of
from qpruner.plan import UNITS, CompressionPlan
from qpruner.pricing import price
from qpruner.pruning.selection import SelectionConfig, local_widths
from qpruner.pruning.supplies import round_to, supplies
from qpruner.quantization.formats import precision_of
from qpruner.records.tables import markdown_table

GB = 10**9
DEVICES = (16, 24, 80)
"""GB of the devices that something is said to fit on."""
RESERVED = GB
"""Bytes of a device for its driver and what the allocator cannot give."""
MODELS = {  # hidden, ffn, layers, heads, key-value heads, vocabulary
    "7B": (4096, 11008, 32, 32, 32, 32000),
    "13B": (5120, 13824, 40, 40, 40, 32000),
    "70B": (8192, 28672, 80, 64, 8, 32000),
}
"""Shapes of Llama 2."""


@dataclass(frozen=True)
class Needs:
    """Bytes of the dense weights, and of each stage on the device."""

    dense: int
    whole: int
    by_block: int
    compensation: int
    by_text: int
    recovery: int
    running: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratio", type=float, default=0.2, help="of all parameters, pruned")
    parser.add_argument("--bits", type=int, default=4, help="of all decoder linears")
    parser.add_argument("--rank", type=int, default=8, help="r of the adapters, on all linears")
    parser.add_argument("--tokens", type=int, default=1024, help="of a micro-batch of the recovery")
    given = parser.parse_args()
    rows, fits = [], []
    for name, shape in MODELS.items():
        needs = needs_of(shape, given)
        needed = needs.whole, needs.by_block, needs.compensation, needs.by_text, needs.recovery, needs.running
        rows.append([name, f"{needs.dense / GB:.1f}", *(f"{num / GB:.1f}" for num in needed)])
        fits.append([name, *map(smallest, needed)])
    print(f"{given.ratio:.0%} pruned, {given.bits} bits, rank {given.rank}, {given.tokens} tokens; GB of 10^9 bytes")
    stages = ["whole", "by block", "+ compensation", "+ by text", "recovery", "running"]
    print(markdown_table(["model", "16-bit weights", *stages], rows))
    print("\nSmallest device, in GB:")
    print(markdown_table(["model", *stages], fits))


def needs_of(shape: tuple[int, int, int, int, int, int], given: argparse.Namespace) -> Needs:
    hidden, ffn, layers, heads, groups, vocabulary = shape
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=vocabulary,
        dtype="bfloat16",
    )
    dense: Any = outline_of(config).bfloat16()
    parameters, dense_bytes = num_parameters(dense), tensor_bytes(dense)
    block = tensor_bytes(decoder_blocks(dense)[0])
    outside = dense_bytes - layers * block
    selection = SelectionConfig(scope="local", leave_alone=())
    offers = supplies(dense, selection, architecture_of(config))
    widths = local_widths(offers, round(parameters * given.ratio), round_to(dense, selection))
    plan = CompressionPlan.dense(architecture_of(config), None).keeping([(range(g), range(c)) for g, c in widths])
    precision = precision_of(given.bits, 64, {})
    plan = plan.with_precision([dict.fromkeys(UNITS, precision)] * layers)
    priced = price(dense, plan, rank=given.rank, targets=ALL_LINEAR)  # narrows the model
    narrow = tensor_bytes(decoder_blocks(dense)[0])
    down = decoder_layers(dense)[0].down
    square, rectangle = 8 * down.in_features**2, 8 * down.in_features * hidden
    logits = 16 * LOGITS_AT_ONCE
    by_block = outside + block + narrow + activations(4096, hidden, ffn) + logits
    head_dim = hidden // heads
    return Needs(
        dense_bytes,
        WHOLE * dense_bytes,
        by_block,
        by_block + 2 * square + 4 * rectangle,
        by_block + 8 * square + 2 * rectangle,
        priced.units
        + priced.rest
        + 4 * priced.adapters  # weights, gradients, two moments
        + layers * given.tokens * hidden * 4
        + activations(given.tokens, hidden, ffn)
        + logits,
        priced.total + 2 * 2 * 4096 * head_dim * sum(plan.widths.kv_groups),
    )


def activations(tokens: int, hidden: int, ffn: int) -> int:
    """Bytes that one block keeps for its backward pass, in float32: about eight hidden states and four of its FFN."""
    return tokens * (8 * hidden + 4 * ffn) * 4


def smallest(needed: int) -> str:
    """The smallest device with room."""
    return next((str(size) for size in DEVICES if needed + RESERVED <= size * GB), f"more than {DEVICES[-1]}")


if __name__ == "__main__":
    main()
