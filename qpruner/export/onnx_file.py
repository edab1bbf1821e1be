"""Export to ONNX for onnxruntime: any widths, and the codes of every format unchanged."""

import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qpruner.adapters.lora import Adapter
from qpruner.anatomy import architecture_of, family_of, refuse_experts
from qpruner.dense_copy import TokenizerFiles
from qpruner.errors import UserError
from qpruner.export.description import Description
from qpruner.export.groups import rounded
from qpruner.export.source import Source
from qpruner.export.written import Written
from qpruner.folder_manifest import CONFIG, entries_of
from qpruner.model_folder import build_skeleton
from qpruner.quantization.blockwise4 import Blockwise4
from qpruner.quantization.formats import dequantize, format_for
from qpruner.quantization.int8 import Int8
from qpruner.quantization.packed import PackedLinear
from qpruner.quantization.uniform import Uniform

FILE, DATA = "model.onnx", "model.onnx.data"
ONE_FILE = 2**30
"""Bytes of tensors up to which one file is written; protobuf is limited to twice as many."""
OPSET = 21
"""The first opset with grouped codes and 4-bit codes."""
BATCH, LENGTH, PAST, ALL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"


class Onnx:
    """A graph that processes tokens after those in a KV cache; it computes in float32, with the model's own codes.

    Inputs, B sequences of T tokens after P others:

    - ``input_ids``, ``position_ids``: int64 [B, T];
    - ``attention_mask``: int64 [B, P + T], 1 for tokens and 0 for padding;
    - ``past_key_values.N.key`` and ``.value`` of each layer N: float32 [B, KV heads of the layer, P, head_dim], of
      P = 0 at first.

    Outputs are ``logits``, float32 [B, T, vocabulary], and ``present.N.key`` and ``.value``, the cache of the next
    call.

    Codes on a uniform grid are multiplied by onnxruntime's own ``MatMulNBits``, and minima enter as a product with the
    sums of the inputs of each group. Codes of a code book are looked up when the file is loaded, and are dense from
    then on. Adapters stay separate from their linears.

    Source: names as optimum gives them; operators of ONNX 1.23, opset 21, and of onnxruntime 1.32.
    """

    name = "onnx"
    extra = "onnx"
    module = "onnxscript"

    def check(self, model: Description) -> None:
        """Accepts every compressed model, except mixtures of experts, where the text decides which experts run."""
        refuse_experts(model.config, "--format onnx", "--format dense")
        for precision in model.plan.packed_precisions:
            if not isinstance(format_for(precision), Uniform | Int8 | Blockwise4):
                raise UserError(
                    f"ONNX has no operator for weights in {precision.format}, which has neither a uniform grid nor a "
                    f"code book. Use --format dense."
                )

    def write(self, source: Source, folder: Path, dtype: torch.dtype) -> Written:
        import onnx_ir

        from qpruner.export.onnx_graph import DOMAIN

        program = traced(source)
        predicted = sum(_predicted_bytes(source, name, dtype) for name in source.names())
        _Weights(source, program.model.graph, dtype).put()
        program.model.opset_imports[DOMAIN] = 1
        folder.mkdir(parents=True)
        onnx_ir.save(program.model, folder / FILE, external_data=DATA if predicted > ONE_FILE else None)
        source.dense_config.to_json_file(folder / CONFIG)
        if source.network.can_generate():
            source.network.generation_config.save_pretrained(folder)
        TokenizerFiles(source.folder).save_pretrained(folder)

        def read(name: str) -> Tensor:
            linear = name.removesuffix(".weight")
            packed = _packed(source, name)
            if packed is None:
                return _stored(name, source.weight(name), dtype).float()
            adapter = source.adapters.get(linear)
            weight = dequantize(packed)
            if adapter is None:
                return weight
            up, down = (_stored(name, factor, dtype).float() for factor in _factors(adapter))
            return weight + up @ down

        return Written(tuple(Path(path) for path in entries_of(folder)), predicted, _changes(source, dtype), read)


class _Step(nn.Module):
    """The module that is traced: the model with its weights as inputs, so that no weight is folded into another."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._network = (network,)  # in a tuple, so that it is not a submodule

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: list[tuple[Tensor, Tensor]],
        weights: dict[str, Tensor],
    ) -> tuple[Tensor, ...]:
        from transformers import DynamicCache

        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": DynamicCache(ddp_cache_data=past),
            "use_cache": True,
        }
        output = torch.func.functional_call(self._network[0], weights, (), inputs)
        return output.logits, *(part for layer in output.past_key_values.layers for part in (layer.keys, layer.values))


def traced(source: Source) -> Any:
    """The program of a model, whose graph has the weights as inputs, by the names that `Source.names` gives."""
    config, widths = source.dense_config, architecture_of(source.config)
    network = build_skeleton(config).eval()
    weights = {name: torch.empty(source.shape(name)) for name in source.names()}
    past = [tuple(torch.zeros(2, groups, 3, widths.head_dim) for _ in range(2)) for groups in widths.kv_groups]
    inputs = {
        "input_ids": torch.ones(2, 5, dtype=torch.int64),
        "attention_mask": torch.ones(2, 8, dtype=torch.int64),
        "position_ids": torch.arange(3, 8).repeat(2, 1),
        "past": past,
        "weights": weights,
    }
    tokens, cached = {0: BATCH, 1: LENGTH}, {0: BATCH, 2: PAST}
    shapes = {
        "input_ids": tokens,
        "attention_mask": {0: BATCH, 1: ALL},
        "position_ids": tokens,
        "past": [(cached, cached)] * len(past),
        "weights": {name: {} for name in weights},
    }
    layers = [f"{number}.{part}" for number in range(len(past)) for part in ("key", "value")]
    with _quietly(), torch.no_grad():
        program: Any = torch.onnx.export(
            _Step(network).eval(),
            kwargs=inputs,
            dynamic_shapes=shapes,
            input_names=[
                "input_ids",
                "attention_mask",
                "position_ids",
                *(f"past_key_values.{layer}" for layer in layers),
                *weights,
            ],
            output_names=["logits", *(f"present.{layer}" for layer in layers)],
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    for node in program.model.graph:
        node.metadata_props.clear()  # where in which file each was traced, longer than the weights of a small model
    return program


@contextmanager
def _quietly() -> Iterator[None]:
    """Suppresses the exporter's messages on packages that models of this kind do not need."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


class _Weights:
    """Puts the weights of a model into a graph whose inputs they are.

    Args:
        source: model that the graph was traced from.
        graph: graph that is changed in place.
        dtype: dtype of dense matrices and of adapters, which are cast to float32 as they are read.
    """

    def __init__(self, source: Source, graph: Any, dtype: torch.dtype) -> None:
        self.source, self.graph, self.dtype = source, graph, dtype
        self.constants: dict[str, Any] = {}

    def put(self) -> None:
        """Puts all weights into the graph, one after the other."""
        inputs = {value.name: value for value in self.graph.inputs}
        for name in self.source.names():
            value = inputs[name]
            self.graph.inputs.remove(value)
            value.name = None  # which the constant gets
            for node in [node for node, _ in value.uses()]:
                self._put(name, value, node)

    def _put(self, name: str, value: Any, node: Any) -> None:
        """Puts a weight where a node reads it."""
        from qpruner.export.onnx_graph import Builder, product, rows

        packed, builder = _packed(self.source, name), Builder(self.graph, node, self.constants)
        adapter = self.source.adapters.get(name.removesuffix(".weight"))
        if packed is None:
            held = builder.floats(name, _stored(name, self.source.weight(name), self.dtype))
            for index, read in enumerate(node.inputs):
                if read is value:
                    node.replace_input_with(index, held)
        elif node.op_type == "Gather":
            self._replace(node, rows(builder, name, packed, node.inputs[1]))
        else:
            assert node.op_type == "Transpose", f"{name} is read by {node.op_type}"
            for multiply in [user for user, _ in node.outputs[0].uses()]:
                assert multiply.op_type == "MatMul", f"{name} is read by {multiply.op_type}"
                builder, x = Builder(self.graph, multiply, self.constants), multiply.inputs[0]
                out = product(builder, name, packed, x, chosen=_is_table(self.source, name))
                if adapter is not None:
                    out = builder.node("Add", out, self._adapted(builder, name, adapter, x))
                self._replace(multiply, out)
            self.graph.remove(node, safe=True)

    def _adapted(self, builder: Any, name: str, adapter: Adapter, x: Any) -> Any:
        up, down = (_stored(name, factor, self.dtype) for factor in _factors(adapter))
        inner = builder.node("MatMul", x, builder.floats(f"{name}.lora_A", down.T))
        return builder.node("MatMul", inner, builder.floats(f"{name}.lora_B", up.T))

    def _replace(self, node: Any, value: Any) -> None:
        """Replaces the output of a node by a value for all its readers, and removes the node."""
        output = node.outputs[0]
        value.shape, value.type = output.shape, output.type
        output.replace_all_uses_with(value, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)


def _is_table(source: Source, name: str) -> bool:
    return name == f"{family_of(source.config)[1].embedding}.weight"


def _packed(source: Source, name: str) -> PackedLinear | None:
    """The linear or table whose codes stand for a parameter; None where it is dense in the file."""
    linear, _, kind = name.rpartition(".")
    packed = source.packed(linear) if kind == "weight" else None
    if packed is not None and packed.precision.leading is not None and _is_table(source, name):
        return None  # of two segments no rows are chosen
    return packed


def _factors(adapter: Adapter) -> tuple[Tensor, Tensor]:
    """The factors B [O, r], multiplied by the adapter's scale, and A [r, I]."""
    return adapter.scale * adapter.lora_B.float(), adapter.lora_A.float()


def _stored(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """A dense parameter as the file holds it: a matrix in the dtype, anything else in float32."""
    return rounded(name, value, dtype) if value.ndim > 1 else value


def _predicted_bytes(source: Source, name: str, dtype: torch.dtype) -> int:
    from qpruner.export.onnx_graph import num_bytes

    packed, shape = _packed(source, name), torch.Size(source.shape(name))
    if packed is None:
        return shape.numel() * (dtype.itemsize if len(shape) > 1 else 4)
    adapter = source.adapters.get(name.removesuffix(".weight"))
    factors = 0 if adapter is None else adapter.lora_A.numel() + adapter.lora_B.numel()
    return num_bytes(packed, chosen=_is_table(source, name)) + factors * dtype.itemsize


def _changes(source: Source, dtype: torch.dtype) -> tuple[str, ...]:
    from qpruner.export.onnx_graph import held_bits

    widths: Counter[str] = Counter()
    for name in source.names():
        packed = _packed(source, name)
        if packed is not None and packed.precision.leading is None:
            held = held_bits(packed, chosen=_is_table(source, name))
            if held != packed.precision.bits:
                widths[f"of {packed.precision} hold each code in {held} bits"] += 1
    changes = [f"{number} weight{'s' * (number > 1)} {kind}" for kind, number in widths.items()]
    changes.append(f"what is dense is in {str(dtype).removeprefix('torch.')}, and computed with in float32")
    return tuple(changes)
