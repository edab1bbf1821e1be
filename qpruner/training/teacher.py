"""The dense model that serves as the teacher of a fit: how it is chosen, checked and loaded beside the student."""

from pathlib import Path
from typing import Any, Protocol

import torch
from lightning.pytorch.utilities import rank_zero_info

from qpruner.anatomy import COMPRESSED, FAMILIES, decoder_blocks
from qpruner.compressed import CompressedModel
from qpruner.datamodules.rows import Batch
from qpruner.errors import UserError
from qpruner.folder_manifest import is_compressed, read_manifest
from qpruner.likelihood import Head, Scored
from qpruner.memory import check_room, tensor_bytes
from qpruner.model_folder import read_base_config, read_plan
from qpruner.outline import outline_of
from qpruner.plan import UNITS, Precision
from qpruner.pretrained import DType, check_model, held_in, is_reachable, load_tokenizer, resolve
from qpruner.training.distillation import DistillationConfig, Lesson, forward_kl

INT8 = Precision("int8", 8)
NO_ROOM = (
    "It is the model that teaches: give --model.distillation.dtype int8, another --model.distillation.device, or "
    "--model.distillation.teacher recorded."
)


class Teacher(Protocol):
    """Provides what a fit learns from for each batch."""

    def begin(self) -> None:
        """Prepares for the first batch, once the student is on its device.

        Raises:
            UserError: the device has no room for the teacher.
        """
        ...

    def lesson(self, batch: Batch) -> Lesson:
        """The teacher's outputs at the scored positions of a batch, in the precision of the current context."""
        ...


def name_of_teacher(config: DistillationConfig, base: str) -> str:
    """Name of the teacher: the one that the options name, else the dense model that the base was made from.

    Args:
        config: options of the distillation.
        base: base of the student, a dense model or the folder of a compressed one.
    """
    if config.base is not None:
        return config.base
    folder = Path(resolve(base))
    if not is_compressed(folder):
        return base
    name: str = read_manifest(folder)["base"]["name"]
    return name


def order_of_base(config: DistillationConfig, base: str) -> tuple[int, ...] | None:
    """Order of a base's hidden channels, as indices of the teacher's; None where they are in the same order.

    A compressed folder may have the channels of the model that it was made from in another order, and that model those
    of another one. Dense models, where this ends, are taken to have them in the same order. Where hidden states are not
    taught, their order does not matter.

    Args:
        config: options of the distillation.
        base: base of the student, a dense model or the folder of a compressed one.
    """
    if config.hidden == 0:
        return None
    student, teacher = _order_of(base), _order_of(name_of_teacher(config, base))
    if student == teacher:
        return None
    if teacher is None:
        return student
    places = {channel: place for place, channel in enumerate(teacher)}
    return tuple(places[channel] for channel in student or sorted(places))


def _order_of(name: str) -> tuple[int, ...] | None:
    """Order of a model's hidden channels, as indices of those of the dense model that it was made from, or None."""
    order: tuple[int, ...] | None = None
    seen: set[Path] = set()
    while is_reachable(name) and is_compressed(folder := Path(resolve(name)).resolve()) and folder not in seen:
        seen.add(folder)
        if (hidden := read_plan(folder).hidden) is not None:
            order = hidden if order is None else tuple(hidden[channel] for channel in order)
        name = read_manifest(folder)["base"]["name"]
    return order


def check_teacher(config: DistillationConfig, base: str, student: Any, *, trust_remote_code: bool) -> Any:
    """Makes sure that a model can teach a student, without reading its weights.

    Args:
        config: options of the distillation.
        base: base of the student.
        student: configuration of the student.
        trust_remote_code: whether code that comes with a model may run.

    Returns:
        Configuration of the teacher.

    Raises:
        UserError: the teacher does not exist, or has another vocabulary or, where hidden states are taught, another
            width.
    """
    name = name_of_teacher(config, base)
    if not is_reachable(name):
        raise UserError(f"The model that teaches, {name!r}, is not there. Give one as --model.distillation.base.")
    if name != base and not is_compressed(Path(resolve(name))):
        check_model(name, trust_remote_code=trust_remote_code)
    teacher = read_base_config(name, trust_remote_code=trust_remote_code)
    sizes = [("vocab_size", "words", True), ("hidden_size", "channels", config.hidden > 0)]
    for option, unit, matters in sizes:
        theirs, ours = getattr(teacher.get_text_config(), option), getattr(student.get_text_config(), option)
        if matters and theirs != ours:
            remedy = "the model that it was made of" if unit == "words" else "one as wide, or distillation.hidden 0"
            raise UserError(
                f"The model that teaches, {name!r}, has {theirs:,} {unit} and the student {ours:,}, so that what it "
                f"says cannot be compared. Give the student as --model.distillation.base {remedy}."
            )
    if name == config.base != base:
        theirs, ours = (_words(which, trust_remote_code) for which in (name, base))
        if theirs and ours and theirs != ours:
            different = sum(theirs.get(word) != ours.get(word) for word in theirs | ours)
            raise UserError(
                f"The model that teaches, {name!r}, has another vocabulary than the student {base!r}: their tokenizers "
                f"give {different:,} words other numbers. Give as --model.distillation.base a "
                f"model with the student's tokenizer, or leave it out for the model that the student was made of."
            )
    device, number = torch.device(config.device or "cpu"), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= number:
        raise UserError(
            f"distillation.device is {config.device!r}, and there are {number} CUDA devices. Name another, or leave "
            f"it out for that of the fit."
        )
    return teacher


def _words(name: str, trust_remote_code: bool) -> dict[str, int] | None:
    """Tokens of a model's tokenizer with their ids; None where it has no tokenizer that can be loaded.

    Tokens that were added to the vocabulary are left out: a chat model gives its own names to reserved ones.
    """
    try:
        tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    except UserError:
        return None
    added = tokenizer.get_added_vocab()
    return {word: number for word, number in tokenizer.get_vocab().items() if word not in added}


def load_teacher(
    config: DistillationConfig, name: str, *, dtype: DType, trust_remote_code: bool, device: torch.device
) -> Any:
    """The teacher, frozen and in evaluation mode, in CPU memory.

    Its size is reported, and compared with the free memory of the device, before any of it is read.

    Args:
        config: options of the distillation.
        name: folder or hub name of the model.
        dtype: number format of the student's base, which is the default for the teacher.
        trust_remote_code: whether code that comes with the model may run.
        device: device that the teacher will run on; its weights are packed there, too.

    Raises:
        UserError: there is no such model, its family cannot be held in 8 bits, or the device has no room for it.
    """
    teacher = read_base_config(name, trust_remote_code=trust_remote_code)
    outline = outline_of_teacher(config, name, teacher, dtype)
    if outline is not None:
        _tell_size(outline, device)
    model = CompressedModel.load(
        name,
        dtype=config.held_in(dtype),
        trust_remote_code=trust_remote_code,
        say=lambda _: None,  # loading the base has reported it
        fingerprint=lambda _: None,
        check_hashes=False,
    )
    if config.dtype == "int8" and not model.has_packed_weights():
        plan = model.known_plan()
        model.quantize(plan.with_precision([dict.fromkeys(UNITS, INT8)] * len(plan.layers)), None, device=device)
    if outline is None:
        _tell_size(model.network, device)
    return model.network.eval()


def outline_of_teacher(config: DistillationConfig, name: str, teacher: Any, dtype: DType) -> torch.nn.Module | None:
    """The shapes of a teacher in the number formats that it will be held in, on the meta device.

    With 8 bits the codes are counted, but not the scales, which are a few thousandths of their size.

    Args:
        config: options of the distillation.
        name: folder or hub name of the model.
        teacher: configuration of the model.
        dtype: number format of the student's base.

    Returns:
        The outline; None for a family that cannot be pruned, and for a folder of packed weights.
    """
    folder = Path(resolve(name))
    if teacher.model_type.removeprefix(COMPRESSED) not in FAMILIES or (
        is_compressed(folder) and read_plan(folder).quantized
    ):
        return None
    outline = outline_of(teacher).to(held_in(teacher, config.held_in(dtype))).requires_grad_(False)
    if config.dtype == "int8":
        for block in decoder_blocks(outline):
            for linear in (module for module in block.modules() if isinstance(module, torch.nn.Linear)):
                linear.weight.data = torch.empty_like(linear.weight, dtype=torch.int8)
    return outline


def _tell_size(network: torch.nn.Module, device: torch.device) -> None:
    rank_zero_info(f"The model that teaches takes {tensor_bytes(network):,} bytes on {device}.")
    check_room(network, device, NO_ROOM)


class OnlineTeacher:
    """A dense model that is held beside the student and runs on each batch.

    It is not a submodule of the student's module, and so is neither moved, counted nor saved with it.

    Args:
        network: the transformers model, frozen.
        config: options of the distillation.
        device: device that the teacher runs on.
    """

    def __init__(self, network: Any, config: DistillationConfig, device: torch.device) -> None:
        self.network = network
        self.config = config
        self.device = device

    def begin(self) -> None:
        check_room(self.network, self.device, NO_ROOM)
        self.network.to(self.device)

    @torch.no_grad()
    def lesson(self, batch: Batch) -> Lesson:
        tokens, labels, mask = (batch[name].to(self.device) for name in ("input_ids", "labels", "attention_mask"))
        hidden = Scored.of(self.network, tokens, labels, mask).hidden
        head = Head.of(self.network)

        def kl(logits: torch.Tensor, part: slice) -> torch.Tensor:
            with torch.no_grad():
                taught = head(hidden[part]).to(logits.device)
            return forward_kl(logits, taught, self.config.temperature)

        return Lesson(kl, hidden)
