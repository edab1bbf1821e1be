"""Export to a file for llama.cpp: codes unchanged where GGUF has a type for them, adapters separate or merged."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from qpruner.errors import UserError, nearest
from qpruner.export.description import Description
from qpruner.export.gguf_adapter import alpha_of, factors_of
from qpruner.export.gguf_architecture import architecture_for, metadata, rope_factors
from qpruner.export.gguf_choices import Choice, choose, told
from qpruner.export.gguf_io import Reader, rounded, write_adapters, write_model
from qpruner.export.gguf_names import Entry, entries
from qpruner.export.gguf_tokenizer import TokenizerFile, describe_tokenizer
from qpruner.export.gguf_types import ROUNDED_TYPES, carried, num_bytes
from qpruner.export.source import Source
from qpruner.export.written import Written
from qpruner.pretrained import load_tokenizer

MODEL, ADAPTER = Path("model.gguf"), Path("adapter.gguf")
TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
FREQUENCIES = "rope_freqs.weight"


@dataclass(frozen=True)
class Gguf:
    """A GGUF file, and a second one for adapters where these were trained.

    Args:
        adapters: ``beside`` writes the adapters of layers unchanged to a separate file; ``merged`` adds them to the
            weights, which are then rounded anew.
        round_to: GGUF type for packed weights whose codes fit no type. Rounding them a second time to about as few bits
            costs as much again as the first rounding: for a SmolLM2-135M in NF4, the mean error of the logits was 0.16
            with Q8_0, 1.2 with Q5_1 and 2.2 with Q4_1.
        tokenizer: whether the tokenizer is written; without it prompts are token ids.
    """

    adapters: Literal["beside", "merged"] = "beside"
    round_to: str = "Q8_0"
    tokenizer: bool = True

    name = "gguf"
    extra = "gguf"
    module = "gguf"

    def check(self, model: Description) -> None:
        if self.round_to not in ROUNDED_TYPES:
            raise UserError(
                f"--round_to is {self.round_to!r}; it must be one of {', '.join(ROUNDED_TYPES)}."
                f"{nearest(self.round_to, ROUNDED_TYPES)}"
            )
        architecture_for(model)
        self._tokenizer(model)

    def write(self, source: Source, folder: Path, dtype: torch.dtype) -> Written:
        folder.mkdir()
        architecture = architecture_for(source)
        values, changes = metadata(source, architecture)
        tensors = list(entries(source, architecture))
        choices = {
            entry.name: choose(
                entry, source, dense=TYPES[dtype], round_to=self.round_to, within=self._holds_adapter(entry)
            )
            for entry in tensors
        }
        stated = {entry.name: (entry.shape, choices[entry.name].type) for entry in tensors}
        frequencies = rope_factors(source.config, source.plan.widths.head_dim)
        if frequencies is not None:
            stated = {FREQUENCIES: (tuple(frequencies.shape), "F32"), **stated}
        alpha = alpha_of(source.adapters) if source.adapters else 1.0
        apart = (entry for entry in tensors if not self._holds_adapter(entry))
        beside = [factors for entry in apart if (factors := factors_of(entry, source, alpha)) is not None]
        predicted = sum(num_bytes(*tensor) for tensor in stated.values())
        predicted += sum(each.lora_A.nbytes + each.lora_B.nbytes for each in beside)
        named = {f"{architecture.name}.{key}": value for key, value in values.items()}
        described: Mapping[str, Any] = {"general.name": name_of(source.folder.absolute()), **named}
        contents = self._contents(source, tensors, choices, frequencies)
        write_model(folder / MODEL, architecture.name, described, self._tokenizer(source), stated, contents)
        if beside:
            write_adapters(folder / ADAPTER, architecture.name, beside, alpha)
            changes.append(f"the adapters of {len(beside)} tensors lie in {ADAPTER}; llama.cpp adds them with --lora")
        changes += told(choices)
        if not self.tokenizer:
            changes.append("there is no tokenizer; prompts are token ids")
        reader = Reader(folder / MODEL, folder / ADAPTER if beside else None, tensors)
        return Written((MODEL, ADAPTER) if beside else (MODEL,), predicted, tuple(changes), reader)

    def _holds_adapter(self, entry: Entry) -> bool:
        """Whether an adapter on a tensor is merged into it: llama.cpp accepts no separate adapter on a tied head."""
        return self.adapters == "merged" or not entry.name.startswith("blk.")

    def _tokenizer(self, model: Description) -> TokenizerFile | None:
        if not self.tokenizer:
            return None
        try:
            tokenizer = load_tokenizer(str(model.folder))
        except UserError as error:
            raise UserError(f"{error} Or export with --tokenizer false, for prompts of token ids.") from error
        return describe_tokenizer(tokenizer, model.config.vocab_size)

    def _contents(
        self, source: Source, tensors: list[Entry], choices: Mapping[str, Choice], frequencies: Tensor | None
    ) -> Iterator[Tensor]:
        """The file's content for each tensor, computed on demand."""
        if frequencies is not None:
            yield frequencies
        for entry in tensors:
            choice, rows = choices[entry.name], []
            for part in entry.parts:
                packed = source.packed(part.parameter.rpartition(".")[0]) if choice.carried else None
                if packed is not None:
                    rows.append(part.rows(carried(packed).to_bytes()))
                else:
                    value = source.weight if self._holds_adapter(entry) else source.base
                    rows.append(part.to_file(value(part.parameter)))
            content = torch.cat(rows)
            yield content if choice.carried else rounded(content, choice.type, entry.name)


def name_of(folder: Path) -> str:
    """The name of a model: that of its run if it belongs to one."""
    return folder.parent.name if folder.name == "model" else folder.name
