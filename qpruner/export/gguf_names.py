"""The tensors of a GGUF file by their names, and which rows of which parameters of the model they hold."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qpruner.anatomy import family_of
from qpruner.export.gguf_architecture import Architecture
from qpruner.export.source import Source

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OF_GEMMA = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
"""Names that differ where norms stand around each half of a layer."""
FUSED = tuple(f"self_attn.{name}_proj" for name in "qkv")


@dataclass(frozen=True)
class Part:
    """Rows of a tensor in a file that are a parameter of the model.

    Args:
        parameter: name of the parameter in the dense model.
        order: row of the parameter that stands in each row of the part, [rows]; None for their own order.
        plus: number that the file holds more than the model in each place.
    """

    parameter: str
    order: Tensor | None = None
    plus: float = 0.0

    def to_file(self, value: Tensor) -> Tensor:
        """What the file holds of the value of the parameter."""
        value = value if self.order is None else value[self.order]
        return value + self.plus if self.plus else value

    def from_file(self, held: Tensor) -> Tensor:
        """The value of the parameter of what the file holds."""
        held = held - self.plus if self.plus else held
        return held if self.order is None else held[self.order.argsort()]


@dataclass(frozen=True)
class Entry:
    """A tensor of a file.

    Args:
        name: name of the tensor.
        parts: what it holds, from its first row on.
    """

    name: str
    parts: tuple[Part, ...]

    def shape(self, source: Source) -> tuple[int, ...]:
        shapes = [source.shape(part.parameter) for part in self.parts]
        return sum(shape[0] for shape in shapes), *shapes[0][1:]


def entries(source: Source, architecture: Architecture) -> Iterator[Entry]:
    """The tensors of the file of a model, in their order."""
    _, family = family_of(source.config)
    names = NAMES | (OF_GEMMA if architecture.name == "gemma3" else {})
    of_model = {family.embedding: "token_embd", family.last_norm: "output_norm", family.head: "output"}
    for parameter in source.names():
        module, _, kind = parameter.rpartition(".")
        plus = 1.0 if architecture.norms_from_one and "norm" in module else 0.0
        if module in of_model:
            yield Entry(f"{of_model[module]}.{kind}", (Part(parameter, plus=plus),))
            continue
        number, _, path = module.removeprefix(f"{family.layers}.").partition(".")
        if not (architecture.fused and path in FUSED):
            order = head_order(source, architecture, int(number), path)
            yield Entry(f"blk.{number}.{names[path]}.{kind}", (Part(parameter, order, plus),))
        elif path == FUSED[0]:
            parts = (Part(f"{family.layers}.{number}.{fused}.{kind}") for fused in FUSED)
            yield Entry(f"blk.{number}.attn_qkv.{kind}", tuple(parts))


def head_order(source: Source, architecture: Architecture, number: int, path: str) -> Tensor | None:
    """The order of rows for rotary positions over neighbouring channels, where a model's are half a head apart.

    Channel i and channel d/2 + i of a head of d channels, which rotate together, become channels 2 i and 2 i + 1.
    """  # [rows]
    if not architecture.interleaved or path not in FUSED[:2]:
        return None
    widths = source.plan.widths
    heads = widths.kv_groups[number] * (widths.queries_per_group if path == FUSED[0] else 1)
    rows = torch.arange(heads * widths.head_dim).view(heads, 2, widths.head_dim // 2)
    return rows.transpose(1, 2).reshape(-1)
