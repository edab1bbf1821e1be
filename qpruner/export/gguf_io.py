"""GGUF files, written tensor by tensor and read back; the only module that uses the package gguf."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qpruner.errors import UserError
from qpruner.export.gguf_adapter import Factors, tensors_of
from qpruner.export.gguf_names import Entry
from qpruner.export.gguf_tokenizer import TokenizerFile
from qpruner.export.gguf_types import num_bytes

QUANTIZATION_VERSION = 2


@contextmanager
def writing(path: Path, architecture: str, kind: str) -> Iterator[Any]:
    """A writer of the package gguf, closed at the end of the context.

    Args:
        path: path of the file.
        architecture: name of the architecture of llama.cpp.
        kind: ``model`` or ``adapter``.
    """
    from gguf import GGUFWriter

    writer = GGUFWriter(path, architecture)
    try:
        writer.add_type(kind)
        yield writer
    finally:
        writer.close()


def write_model(
    path: Path,
    architecture: str,
    values: Mapping[str, Any],
    tokenizer: TokenizerFile | None,
    tensors: Mapping[str, tuple[tuple[int, ...], str]],
    contents: Iterator[Tensor],
) -> None:
    """Writes the file of a model.

    Args:
        path: path of the file.
        architecture: name of the architecture of llama.cpp.
        values: metadata by key; keys of the architecture begin with its name.
        tokenizer: tokenizer; None for prompts of token ids.
        tensors: shape and type of each tensor, by its name.
        contents: contents of the tensors as `rounded` gives them, in their order.
    """
    with writing(path, architecture, "model") as writer:
        writer.add_quantization_version(QUANTIZATION_VERSION)
        for key, value in values.items():
            _add_value(writer, key, value)
        _add_tokenizer(writer, tokenizer)
        _write_tensors(writer, tensors, contents)


def write_adapters(path: Path, architecture: str, factors: Sequence[Factors], alpha: float) -> None:
    """Writes a file of adapters, in float32."""
    with writing(path, architecture, "adapter") as writer:
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        shapes = {name: (tuple(tensor.shape), "F32") for name, tensor in tensors_of(factors)}
        _write_tensors(writer, shapes, (tensor for _, tensor in tensors_of(factors)))


def rounded(value: Tensor, type_name: str, name: str) -> Tensor:
    """A tensor converted to a GGUF type, as a file holds it.

    Args:
        value: value, float32.
        type_name: name of the type.
        name: name of the tensor.

    Raises:
        UserError: a value is too large for float16.
    """
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    if type_name == "F16" and not value.half().isfinite().all():
        raise UserError(f"{name} has values that float16 cannot hold. Export with --dtype bfloat16.")
    return torch.from_numpy(quantize(value.numpy(), GGMLQuantizationType[type_name]))


class Reader:
    """Gives the parameters of a model as llama.cpp reads them.

    Args:
        model: path of the model's file.
        adapters: path of the file of adapters; None where there is none.
        tensors: tensors of the model's file.
    """

    def __init__(self, model: Path, adapters: Path | None, tensors: Sequence[Entry]) -> None:
        from gguf import GGUFReader

        self.held = {tensor.name: tensor for tensor in GGUFReader(model).tensors}
        self.places = {part.parameter: (entry, place) for entry in tensors for place, part in enumerate(entry.parts)}
        self.factors: dict[str, Any] = {}
        if adapters is not None:
            file = GGUFReader(adapters)
            self.factors = {tensor.name: tensor for tensor in file.tensors}
            self.alpha = float(file.fields["adapter.lora.alpha"].contents())

    def __call__(self, name: str) -> Tensor:
        entry, place = self.places[name]
        value = _values(self.held[entry.name])
        if f"{entry.name}.lora_a" in self.factors:
            lora_A, lora_B = (_values(self.factors[f"{entry.name}.lora_{factor}"]) for factor in "ab")
            value = value + self.alpha / len(lora_A) * (lora_B @ lora_A)
        rows = value.split([part.num_rows for part in entry.parts])  # type: ignore[no-untyped-call]
        return entry.parts[place].from_file(rows[place])


def _values(tensor: Any) -> Tensor:
    """The values of a tensor of a file, float32."""
    from gguf.quants import dequantize

    return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).astype("float32"))


def _write_tensors(writer: Any, tensors: Mapping[str, tuple[tuple[int, ...], str]], contents: Iterator[Tensor]) -> None:
    """Declares all tensors, then writes them one by one, with only one in memory at a time."""
    import numpy
    from gguf import GGMLQuantizationType

    for name, (shape, type_name) in tensors.items():
        size = num_bytes(shape, type_name)
        writer.add_tensor_info(name, shape, numpy.dtype("float32"), size, raw_dtype=GGMLQuantizationType[type_name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for content in contents:
        writer.write_tensor_data(content.contiguous().numpy())


def _add_tokenizer(writer: Any, tokenizer: TokenizerFile | None) -> None:
    if tokenizer is None:
        writer.add_tokenizer_model("none")
        return
    writer.add_tokenizer_model(tokenizer.model)
    if tokenizer.split is not None:
        writer.add_tokenizer_pre(tokenizer.split)
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types(tokenizer.types)
    if tokenizer.scores:
        writer.add_token_scores(tokenizer.scores)
    if tokenizer.merges:
        writer.add_token_merges(tokenizer.merges)
    for name, value in {**tokenizer.special, **tokenizer.flags}.items():
        _add_value(writer, f"tokenizer.ggml.{name}", value)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        writer.add_chat_template([{"name": name, "template": text} for name, text in template.items()])
    elif template:
        writer.add_chat_template(template)


def _add_value(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)
