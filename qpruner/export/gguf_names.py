"""The tensors of a GGUF file by name, and the rows of the model's parameters that they hold."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from qpruner.anatomy import family_of
from qpruner.export.gguf_architecture import Architecture, added_channels
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
NORMS_AROUND = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
"""Names that differ where each half of a layer has a norm before and after it."""
FUSED = tuple(f"self_attn.{name}_proj" for name in "qkv")


@dataclass(frozen=True)
class Part:
    """Rows of a tensor in a file that are a parameter of the model.

    Args:
        parameter: name of the parameter in the dense model.
        shape: shape of the parameter.
        order: index of the parameter's row in each row of the part, [rows]; None for the parameter's own order.
        more_rows: number of zero rows appended to those of the parameter.
        more_columns: number of zero columns appended to those of the parameter.
        plus: number that is added to each value of the parameter in the file.
    """

    parameter: str
    shape: tuple[int, ...]
    order: Tensor | None = None
    more_rows: int = 0
    more_columns: int = 0
    plus: float = 0.0

    @property
    def num_rows(self) -> int:
        return self.shape[0] + self.more_rows

    def rows(self, value: Tensor) -> Tensor:
        """The parameter's rows in the order of the file, followed by the zero rows."""
        value = value if self.order is None else value[self.order]
        return functional.pad(value, (0, 0) * (value.dim() - 1) + (0, self.more_rows))

    def columns(self, value: Tensor) -> Tensor:
        """The parameter's columns, followed by the zero columns."""
        return functional.pad(value, (0, self.more_columns)) if self.more_columns else value

    def to_file(self, value: Tensor) -> Tensor:
        """Converts the parameter's value to the file's content."""
        return self.columns(self.rows(value)) + self.plus

    def from_file(self, held: Tensor) -> Tensor:
        """Converts the file's content back to the parameter's value."""
        value = held[tuple(slice(size) for size in self.shape)] - self.plus
        return value if self.order is None else value[self.order.argsort()]


@dataclass(frozen=True)
class Entry:
    """A tensor of a file.

    Args:
        name: name of the tensor.
        parts: what it holds, from its first row on.
    """

    name: str
    parts: tuple[Part, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        columns = (size + self.parts[0].more_columns for size in self.parts[0].shape[1:])
        return sum(part.num_rows for part in self.parts), *columns


def entries(source: Source, architecture: Architecture) -> Iterator[Entry]:
    """The tensors in the file of a model, in order."""
    _, family = family_of(source.config)
    names = NAMES | (NORMS_AROUND if "pre_feedforward_layernorm" in family.layer_norms else {})
    of_model = {family.embedding: "token_embd", family.last_norm: "output_norm", family.head: "output"}
    for parameter in source.names():
        module, _, kind = parameter.rpartition(".")
        shape = source.shape(parameter)
        plus = 1.0 if architecture.norms_from_one and "norm" in module else 0.0
        if module in of_model:
            yield Entry(f"{of_model[module]}.{kind}", (Part(parameter, shape, plus=plus),))
            continue
        number, _, path = module.removeprefix(f"{family.layers}.").partition(".")
        if not (architecture.fused and path in FUSED):
            more = added_channels(source, int(number))
            part = Part(
                parameter,
                shape,
                head_order(source, architecture, int(number), path),
                more_rows=more if path in ("mlp.gate_proj", "mlp.up_proj") else 0,
                more_columns=more if path == "mlp.down_proj" and kind == "weight" else 0,
                plus=plus,
            )
            yield Entry(f"blk.{number}.{names[path]}.{kind}", (part,))
        elif path == FUSED[0]:
            stacked = (f"{family.layers}.{number}.{fused}.{kind}" for fused in FUSED)
            yield Entry(f"blk.{number}.attn_qkv.{kind}", tuple(Part(name, source.shape(name)) for name in stacked))


def head_order(source: Source, architecture: Architecture, number: int, path: str) -> Tensor | None:
    """The row order for rotary embeddings of adjacent channels, where the model pairs channels half a head apart.

    Channel i and channel d/2 + i of a head of d channels, which rotate together, become channels 2 i and 2 i + 1.
    """  # [rows]
    if not architecture.interleaved or path not in FUSED[:2]:
        return None
    widths = source.plan.widths
    heads = widths.kv_groups[number] * (widths.queries_per_group if path == FUSED[0] else 1)
    rows = torch.arange(heads * widths.head_dim).view(heads, 2, widths.head_dim // 2)
    return rows.transpose(1, 2).reshape(-1)
