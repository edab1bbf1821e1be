"""Checks, from transformers' loading report, that the weights of a model match its configuration."""

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from qpruner.errors import UserError

OTHER_HEADS = re.compile(r"For(Sequence|Token)Classification|ForQuestionAnswering|ForMultipleChoice|ForMaskedLM|Reward")
"""In the name of a class whose head says something else than the next token."""
INTEGERS = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64", "BOOL")
"""Number formats, as safetensors calls them, that weights are never in."""
NAMED = 3  # tensors of each kind in a message


def check_architecture(name: str, config: Any) -> None:
    """Makes sure that a model is a causal language model, and was saved as one.

    Raises:
        UserError: it is not, or was not.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    brings_its_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not brings_its_code:
        raise UserError(
            f"{name!r} is of type {config.model_type!r}, and transformers has no causal language model of that type. "
            f"Give a causal language model; of a model that also sees or hears, the part that reads text."
        )
    for architecture in config.architectures or ():
        if OTHER_HEADS.search(architecture):
            raise UserError(
                f"{name!r} is a {architecture} by its config.json, whose head predicts no next token. Give the causal "
                f"language model that it was made from."
            )


def check_loaded(name: str, model: Any, info: Mapping[str, Collection[Any]]) -> tuple[str, ...]:
    """Makes sure that every tensor of a model was loaded, and that none of the file was meant to be a part of it.

    Heads beside that of the language model, as value heads are, belong to no part of it and may be left out.

    Args:
        name: folder or hub name, for messages.
        model: model that was loaded.
        info: ``missing_keys``, ``unexpected_keys`` and ``mismatched_keys`` (name, shape in the file, shape in the
            model), as ``output_loading_info`` gives them.

    Returns:
        The names of the tensors that were left out.

    Raises:
        UserError: tensors are missing, have another shape, or belong to parts of the model that has no place for them.
    """
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    shapes = {tensor: (list(stored), list(expected)) for tensor, stored, expected in sorted(info["mismatched_keys"])}
    parts = {part for module in (model, model.base_model) for part, _ in module.named_children()}
    misplaced = [tensor for tensor in unexpected if missing or tensor.partition(".")[0] in parts]
    if missing or misplaced or shapes:
        said = []
        if missing:
            said.append(f"{_tensors(missing)} missing")
        if misplaced:
            said.append(f"{_tensors(misplaced)} in the file and not in the model")
        if shapes:
            of_shape = [f"{tensor} {stored} instead of {expected}" for tensor, (stored, expected) in shapes.items()]
            said.append(f"{_tensors(of_shape)} of another shape than config.json says")
        raise UserError(
            f"The weights of {name!r} are not those of the {type(model).__name__} that its config.json describes: "
            f"{'; '.join(said)}. {_remedy(missing, misplaced)}"
        )
    return tuple(unexpected)


def check_number_formats(name: str, model: Any, files: Iterable[Path]) -> None:
    """Makes sure that no weight is stored in integers, which transformers would take as they are.

    Raises:
        UserError: some are.
    """
    prefix = f"{model.base_model_prefix}."
    weights = {parameter.removeprefix(prefix) for parameter, _ in model.named_parameters()}
    integers = []
    for file in files:
        with safe_open(file, framework="pt") as opened:
            integers += [
                f"{tensor} in {number_format}"
                for tensor in opened.keys()  # noqa: SIM118  # not a dictionary
                if tensor.removeprefix(prefix) in weights
                and (number_format := opened.get_slice(tensor).get_dtype()) in INTEGERS
            ]
    if integers:
        raise UserError(
            f"The weights of {name!r} are codes of quantized ones: {_tensors(integers)}, and its config.json has no "
            f"quantization_config that says what they stand for. Give the model that it was quantized from."
        )


def check_tied(name: str, model: Any) -> None:
    """Makes sure that embedding and head are one where the configuration says so.

    Raises:
        UserError: the file has a head of its own.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if model.config.get_text_config().tie_word_embeddings and head is not None and head.weight is not embedding.weight:
        raise UserError(_not_tied(name))


def check_tied_in_files(name: str, model: Any, files: Iterable[Path]) -> None:
    """Makes sure of the same before the weights are loaded, from the values of these two.

    Args:
        name: folder or hub name, for messages.
        model: model with or without its values.
        files: safetensors files of the model.

    Raises:
        UserError: the files have a head of its own.
    """
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    if not model.config.get_text_config().tie_word_embeddings or tables[1] is None:
        return
    prefix = f"{model.base_model_prefix}."
    wanted = {f"{path}.weight".removeprefix(prefix) for path, part in model.named_modules() if part in tables}
    stored = []
    for file in files:
        with safe_open(file, framework="pt") as opened:
            names = [tensor for tensor in opened.keys() if tensor.removeprefix(prefix) in wanted]  # noqa: SIM118
            stored += [opened.get_tensor(tensor) for tensor in names]
    if len(stored) == len(tables) and not torch.equal(*stored):
        raise UserError(_not_tied(name))


def _not_tied(name: str) -> str:
    return (
        f"The config.json of {name!r} says that head and embedding are tied (tie_word_embeddings), and the file has a "
        f"head with other values. Set tie_word_embeddings to false there, or take the head out of the file."
    )


def mend_padding_(config: Any) -> int | None:
    """Takes a padding token out of a configuration whose embedding has no row for it; padding is masked in any case.

    Returns:
        The padding token, if it was taken out.
    """
    text = config.get_text_config()
    token: int | None = getattr(text, "pad_token_id", None)
    if token is None or 0 <= token < text.vocab_size:
        return None
    text.pad_token_id = None
    return token


def _tensors(names: Collection[str]) -> str:
    listed = ", ".join(list(names)[:NAMED]) + (", ..." if len(names) > NAMED else "")
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({listed})"


def _remedy(missing: list[str], misplaced: list[str]) -> str:
    wrappers = {tensor[: -len(name)] for name in missing for tensor in misplaced if tensor.endswith(f".{name}")}
    if len(wrappers) == 1 and len(misplaced) > 1:
        return (
            f"It was saved inside of a wrapper, which put {wrappers.pop()!r} before every name: save the model itself, "
            f"such as `model._orig_mod` of torch.compile or `model.module` of DistributedDataParallel."
        )
    if missing == ["lm_head.weight"]:
        return "Save it with its head, or set tie_word_embeddings to true in config.json if that is the embedding."
    return "Give it the config.json that belongs to its weights, or fetch or save both again."
