"""Export to a file for llama.cpp: codes as they are where GGUF has a type for them, adapters beside or within."""

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from qpruner.errors import UserError, listed
from qpruner.export.gguf_adapter import Factors, alpha_of, factors_of, tensors_of
from qpruner.export.gguf_architecture import Architecture, architecture_for, metadata, rope_factors
from qpruner.export.gguf_names import Entry, entries
from qpruner.export.gguf_tokenizer import TokenizerFile, describe_tokenizer
from qpruner.export.gguf_types import BLOCK, BYTES_OF_WEIGHT, carried, carried_type, num_bytes, rounding_type
from qpruner.export.source import Source
from qpruner.export.written import Written
from qpruner.plan import DENSE
from qpruner.pretrained import load_tokenizer

MODEL, ADAPTER = Path("model.gguf"), Path("adapter.gguf")
TYPES_OF_DTYPE = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
VERSION_OF_TYPES = 2
ROUNDED_TYPES = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "F16", "BF16", "F32")


@dataclass(frozen=True)
class Choice:
    """How a tensor is written.

    Args:
        type: name of the type.
        exact: whether it holds the codes of the model as they are.
        reason: what is otherwise than the plan asks for, in words; None where nothing is.
    """

    type: str
    exact: bool
    reason: str | None = None


@dataclass(frozen=True)
class Gguf:
    """A file for llama.cpp, and one for adapters.

    Args:
        adapters: ``beside`` writes trained adapters of linears to a file of their own, exactly; ``merged`` adds them to
            the weights, which are then rounded anew.
        round_to: type of GGUF of what was packed and cannot be carried over; None for that nearest to its bits.
        tokenizer: whether the tokenizer is written.
    """

    adapters: Literal["beside", "merged"] = "beside"
    round_to: str | None = None
    tokenizer: bool = True

    name = "gguf"
    extra = "gguf"
    module = "gguf"

    def check(self, source: Source) -> None:
        if self.round_to is not None and self.round_to not in ROUNDED_TYPES:
            raise UserError(f"--round_to is {self.round_to!r}; it must be one of {', '.join(ROUNDED_TYPES)}.")
        architecture_for(source)
        self._tokenizer(source)

    def write(self, source: Source, folder: Path, dtype: torch.dtype) -> Written:
        folder.mkdir()
        architecture = architecture_for(source)
        values, changes = metadata(source, architecture)
        tokenizer = self._tokenizer(source)
        tensors = list(entries(source, architecture))
        choices = {entry.name: self._choose(entry, source, TYPES_OF_DTYPE[dtype]) for entry in tensors}
        predicted = sum(num_bytes(entry.shape(source), choices[entry.name].type) for entry in tensors)
        factors = rope_factors(source.config, source.plan.widths.head_dim)
        predicted += 0 if factors is None else factors.nbytes
        with writing(folder / MODEL, architecture.name) as writer:
            writer.add_type("model")
            writer.add_name(source.folder.absolute().parent.name)
            writer.add_quantization_version(VERSION_OF_TYPES)
            for key, value in values.items():
                add_value(writer, f"{architecture.name}.{key}", value)
            add_tokenizer(writer, tokenizer)
            if factors is not None:
                announce(writer, "rope_freqs.weight", tuple(factors.shape), "F32")
            for entry in tensors:
                announce(writer, entry.name, entry.shape(source), choices[entry.name].type)
            start(writer)
            if factors is not None:
                writer.write_tensor_data(factors.numpy())
            for entry in tensors:
                writer.write_tensor_data(self._content(entry, choices[entry.name], source).numpy())
        beside = self._beside(tensors, source)
        files = [MODEL]
        if beside:
            write_adapters(folder / ADAPTER, architecture, beside, alpha_of(source.adapters))
            files.append(ADAPTER)
            predicted += sum(each.lora_A.nbytes + each.lora_B.nbytes for each in beside)
            changes.append(f"the adapters of {len(beside)} tensors lie in {ADAPTER}: llama.cpp adds them with --lora")
        changes += told(choices, tokenizer, self.tokenizer)
        return Written(tuple(files), predicted, tuple(changes), Reader(folder, tensors, source, beside))

    def _tokenizer(self, source: Source) -> TokenizerFile | None:
        if not self.tokenizer:
            return None
        try:
            tokenizer = load_tokenizer(str(source.folder))
        except UserError as error:
            raise UserError(f"{error} Or export with --tokenizer false, for prompts of token ids.") from error
        return describe_tokenizer(tokenizer, source.config.vocab_size)

    def _beside(self, tensors: Sequence[Entry], source: Source) -> list[Factors]:
        """The adapters that go to a file of their own: llama.cpp takes none on an embedding or head."""
        if self.adapters == "merged" or not source.adapters:
            return []
        alpha = alpha_of(source.adapters)
        of_layers = [entry for entry in tensors if entry.name.startswith("blk.")]
        return [factors for entry in of_layers if (factors := factors_of(entry, source, alpha)) is not None]

    def _choose(self, entry: Entry, source: Source, dense: str) -> Choice:
        shape = entry.shape(source)
        if len(shape) == 1:
            return Choice("F32", True)
        packed = [source.packed(part.parameter.rpartition(".")[0]) for part in entry.parts]
        within = self._is_within(entry) and any(source.adapter(part.parameter) for part in entry.parts)
        types = {None if linear is None or within else carried_type(linear) for linear in packed}
        (carried_in,) = types if len(types) == 1 else (None,)
        precisions = {DENSE if linear is None else linear.precision for linear in packed}
        precision = max(precisions, key=lambda each: each.bits)
        if carried_in is not None:
            return Choice(carried_in, True)
        wanted = rounding_type(precision, dense, self.round_to)
        if precision == DENSE:
            return Choice(dense, False)
        why = f"{precision} with the adapter in it" if within else str(precision)
        if shape[-1] % BLOCK and wanted not in BYTES_OF_WEIGHT:
            return Choice(dense, False, f"{why} in {dense}, as rows of {shape[-1]} are no blocks of {BLOCK}")
        return Choice(wanted, False, f"{why} in {wanted}")

    def _is_within(self, entry: Entry) -> bool:
        """Whether an adapter on a tensor is added to its weights."""
        return self.adapters == "merged" or not entry.name.startswith("blk.")

    def _content(self, entry: Entry, choice: Choice, source: Source) -> Tensor:
        """The tensor as the file holds it: bytes of a quantized type, numbers of others."""
        blocks = choice.exact and choice.type != "F32"
        rows = []
        for part in entry.parts:
            if blocks:
                packed = source.packed(part.parameter.rpartition(".")[0])
                assert packed is not None
                rows.append(part.to_file(carried(packed).to_bytes()))
            else:
                value = source.weight(part.parameter) if self._is_within(entry) else source.base(part.parameter)
                rows.append(part.to_file(value))
        joined = torch.cat(rows).contiguous()
        return joined if blocks else rounded(joined, choice.type, entry.name)


class Reader:
    """Gives the parameters of a model as llama.cpp reads them.

    Args:
        folder: folder of the files.
        tensors: tensors of the model's file.
        source: model that was exported.
        beside: adapters that lie in a file of their own.
    """

    def __init__(self, folder: Path, tensors: Sequence[Entry], source: Source, beside: Sequence[Factors]) -> None:
        from gguf import GGUFReader

        self.held = {tensor.name: tensor for tensor in GGUFReader(folder / MODEL).tensors}
        self.places = {part.parameter: (entry, place) for entry in tensors for place, part in enumerate(entry.parts)}
        self.source = source
        self.added: dict[str, Tensor] = {}
        if beside:
            file = GGUFReader(folder / ADAPTER)
            alpha = float(file.fields["adapter.lora.alpha"].contents())
            held = {tensor.name: torch.tensor(tensor.data) for tensor in file.tensors}
            for each in beside:
                lora_A, lora_B = held[f"{each.name}.lora_a"], held[f"{each.name}.lora_b"]
                self.added[each.name] = alpha / len(lora_A) * (lora_B @ lora_A)

    def __call__(self, name: str) -> Tensor:
        from gguf.quants import dequantize

        entry, place = self.places[name]
        tensor = self.held[entry.name]
        value = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).astype("float32"))
        value = value + self.added.get(entry.name, 0.0)
        rows = [self.source.shape(part.parameter)[0] for part in entry.parts]
        return entry.parts[place].from_file(value.split(rows)[place])


def rounded(value: Tensor, type_name: str, name: str) -> Tensor:
    """A value in a type, as the file holds it.

    Args:
        value: value, float32.
        type_name: name of the type.
        name: name of the tensor.

    Raises:
        UserError: the type cannot hold a value.
    """
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    if type_name == "F16" and not value.half().isfinite().all():
        raise UserError(f"{name} has values that float16 cannot hold. Export with --dtype bfloat16.")
    return torch.from_numpy(quantize(value.numpy(), GGMLQuantizationType[type_name]))


def told(choices: dict[str, Choice], tokenizer: TokenizerFile | None, wanted: bool) -> list[str]:
    """What is otherwise than in the model, as sentences."""
    exact = Counter(choice.type for choice in choices.values() if choice.exact and choice.type != "F32")
    kinds: dict[str, list[str]] = {}
    for name, choice in choices.items():
        if choice.reason is not None:
            kinds.setdefault(choice.reason, []).append(name)
    changes = [f"{number} tensors hold the model's own codes, in {type_name}" for type_name, number in exact.items()]
    changes += [f"{reason}: {listed(names)}" for reason, names in kinds.items()]
    if not wanted:
        changes.append("there is no tokenizer: prompts are token ids")
    return changes


@contextlib.contextmanager
def writing(path: Path, architecture: str) -> Iterator[Any]:
    """A writer of gguf, closed behind."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, architecture)
    try:
        yield writer
    finally:
        writer.close()


def add_value(writer: Any, key: str, value: Any) -> None:
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


def add_tokenizer(writer: Any, tokenizer: TokenizerFile | None) -> None:
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
        add_value(writer, f"tokenizer.ggml.{name}", value)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)


def announce(writer: Any, name: str, shape: tuple[int, ...], type_name: str) -> None:
    """States a tensor, whose content comes once all are stated."""
    import numpy
    from gguf import GGMLQuantizationType

    writer.add_tensor_info(
        name, shape, numpy.dtype("float32"), num_bytes(shape, type_name), raw_dtype=GGMLQuantizationType[type_name]
    )


def start(writer: Any) -> None:
    """Writes all that stands before the content of tensors."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def write_adapters(path: Path, architecture: Architecture, factors: list[Factors], alpha: float) -> None:
    """Writes a file of adapters."""
    with writing(path, architecture.name) as writer:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        for name, tensor in tensors_of(factors):
            announce(writer, name, tuple(tensor.shape), "F32")
        start(writer)
        for _, tensor in tensors_of(factors):
            writer.write_tensor_data(tensor.contiguous().numpy())
