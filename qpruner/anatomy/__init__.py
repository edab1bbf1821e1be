"""What a decoder layer is made of, for each model family: the only code that knows a family's module names."""

from qpruner.anatomy.coupled import Coupled, WideNorm, by_linear
from qpruner.anatomy.families import (
    COMPRESSED,
    FAMILIES,
    Family,
    family_of,
    is_compressible,
    learned_positions,
    refuse_experts,
)
from qpruner.anatomy.layers import (
    DecoderLayer,
    architecture_of,
    decoder_blocks,
    decoder_layers,
    expert_parameters,
    head_shape,
    num_linear_parameters,
    unit_linears,
    unit_parameters,
    unit_paths,
    unit_shapes,
    unit_weights,
)

__all__ = [
    "COMPRESSED",
    "FAMILIES",
    "Coupled",
    "DecoderLayer",
    "Family",
    "WideNorm",
    "architecture_of",
    "by_linear",
    "decoder_blocks",
    "decoder_layers",
    "expert_parameters",
    "family_of",
    "head_shape",
    "is_compressible",
    "learned_positions",
    "num_linear_parameters",
    "refuse_experts",
    "unit_linears",
    "unit_parameters",
    "unit_paths",
    "unit_shapes",
    "unit_weights",
]
