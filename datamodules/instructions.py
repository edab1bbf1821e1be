"""Instructions: Alpaca records and chats, with the loss on the response alone or on everything."""

from collections.abc import Iterator
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

from jinja2 import TemplateError

from qpruner.datamodules.base import TokenDataModule
from qpruner.datamodules.cache import Prepared
from qpruner.datamodules.documents import NOT_UNICODE, Record, Skipped, is_unicode
from qpruner.datamodules.rows import Row, TokenRows
from qpruner.datamodules.splits import Split, hold_out, make_disjoint
from qpruner.datamodules.text import ended, missing_end, named_sources, notes
from qpruner.datamodules.tokens import tokenize
from qpruner.errors import UserError

# The prompts of Stanford Alpaca; models tuned on Alpaca data expect them to the letter.
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Dialogue:
    """A whole text and the character spans of it that the model is to learn to say.

    Args:
        text: prompt and responses.
        responses: spans of the responses.
        complete: whether the text holds its special tokens itself, as a chat template writes them; otherwise the
            tokenizer's own go before it and the end-of-text token after it.
        where: place of the record, for messages.
    """

    text: str
    responses: tuple[tuple[int, int], ...]
    complete: bool
    where: str


class InstructionDataModule(TokenDataModule):
    """One instruction or conversation a row, cut at ``max_length`` and padded within a batch.

    A record with ``messages`` (a list of ``{"role", "content"}``) is laid out by the tokenizer's chat template; one
    with ``instruction`` and ``output`` or ``response`` (and perhaps ``input``) by the prompt of Alpaca, ended by the
    end-of-text token. Splits are named as in `TextDataModule`.

    Args:
        train: records that fit and calibrate.
        validation: records that choose.
        test: records that are reported.
        response_only: whether only what the assistant says is scored; otherwise the prompt is, too.
        held_out: share of the training records for each split that is not given, in [0, 0.5); at 0 there is no such
            split.
        **kwargs: see `TokenDataModule`.

    Raises:
        UserError: no split given, or a split without a usable record.
    """

    def __init__(
        self,
        train: str | None = None,
        validation: str | None = None,
        test: str | None = None,
        response_only: bool = True,
        held_out: float = 0.05,
        **kwargs: Any,
    ) -> None:
        sources = named_sources(train=train, validation=validation, test=test, held_out=held_out)
        super().__init__(**kwargs)  # loads the tokenizer
        self.sources = sources
        self.response_only = response_only
        self.held_out = held_out

    @property
    def protocol(self) -> str:
        scored = "responses" if self.response_only else "prompts and responses"
        return f"one record a row, cut at {self.max_length} tokens, {scored} scored"

    def options(self) -> dict[str, Any]:
        return {
            "sources": {split: source.fingerprint() for split, source in self.sources.items()},
            "response_only": self.response_only,
            "held_out": self.held_out,
        }

    def build(self) -> Prepared:
        skipped = {split: Skipped() for split in self.sources}
        given = {split: list(self._dialogues(split, skipped[split])) for split in self.sources}
        for split, found in given.items():
            if not found:
                raise UserError(f"{self.sources[split].spec!r} holds no usable record: {skipped[split]}.")
        dialogues, repeated = make_disjoint(hold_out(given, _content, self.held_out), _content)
        rows: dict[Split, TokenRows] = {}
        for split in dialogues:
            counter = skipped.setdefault(split, Skipped())
            rows[split] = TokenRows.of(self._rows(dialogues[split], counter))
            if not len(rows[split]):
                raise UserError(f"The {split} split holds no usable record: {counter}.")
        said = notes(type(self).__name__, skipped, repeated, rows)
        alpaca = any(not dialogue.complete for split in dialogues for dialogue in dialogues[split])
        unended = "no row of 'instruction' and 'output' ends with one" if alpaca else None
        return Prepared(rows, said + missing_end(self.tokenizer, unended))

    def _dialogues(self, split: Split, skipped: Skipped) -> Iterator[Dialogue]:
        for where, record in self.sources[split].records(skipped):
            dialogue = to_dialogue(record, self.tokenizer, where)
            if isinstance(dialogue, Dialogue):
                yield dialogue
            else:
                skipped.add(dialogue, where)

    def _rows(self, dialogues: list[Dialogue], skipped: Skipped) -> Iterator[Row]:
        for complete in (False, True):
            chosen = [dialogue for dialogue in dialogues if dialogue.complete is complete]
            rows = tokenize(
                self.tokenizer,
                [dialogue.text for dialogue in chosen],
                special_tokens=not complete,
                scored_from=[dialogue.responses for dialogue in chosen] if self.response_only else (),
            )
            for dialogue, row in zip(chosen, rows, strict=True):
                whole = row if complete else ended(row, self.tokenizer.eos_token_id)
                cut = whole[: self.max_length]
                if cut.scored[1:].any():
                    yield cut
                else:
                    skipped.add(f"with no response within {self.max_length} tokens", dialogue.where)


def to_dialogue(record: Record, tokenizer: Any, where: str) -> Dialogue | str:
    """The record as one text, or the reason why it cannot be used."""
    # Where records of both kinds are mixed, a table has all the fields in every record.
    of_chat = record.get("messages") is not None
    dialogue = _from_messages(record["messages"], tokenizer, where) if of_chat else _from_alpaca(record, where)
    return dialogue if isinstance(dialogue, str) or is_unicode(dialogue.text) else NOT_UNICODE


def _from_alpaca(record: Record, where: str) -> Dialogue | str:
    instruction, output = record.get("instruction"), record.get("output")
    output = record.get("response") if output is None else output  # as LaMini calls it
    if not isinstance(instruction, str) or not isinstance(output, str):
        return "with neither 'messages' nor 'instruction' and 'output' or 'response'"
    if not instruction.strip() or not output.strip():
        return "with an empty instruction or output"
    prompt = (WITH_INPUT if record.get("input") else WITHOUT_INPUT).format(
        instruction=instruction, input=record.get("input")
    )
    return Dialogue(prompt + output, ((len(prompt), len(prompt + output)),), complete=False, where=where)


def _from_messages(messages: Any, tokenizer: Any, where: str) -> Dialogue | str:
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and isinstance(message.get("content"), str) and isinstance(message.get("role"), str)
        for message in messages
    ):
        return "whose 'messages' are not a list of role and content"
    speakers = [message["role"] for message in messages]
    if "assistant" not in speakers:
        return "without a response"
    if speakers[0] == "assistant":
        return "that begins with a response"
    if tokenizer.chat_template is None:
        raise UserError(
            f"{where} is a chat, and the tokenizer {tokenizer.name_or_path!r} has no chat template. Use the tokenizer "
            f"of a chat model, or records with 'instruction' and 'output'."
        )
    responses = []
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                before = tokenizer.apply_chat_template(messages[:number], tokenize=False, add_generation_prompt=True)
                after = tokenizer.apply_chat_template(messages[: number + 1], tokenize=False)
                responses.append((len(before), _end_of_turn(text, before, after, message["content"].strip())))
    except TemplateError as error:  # many demand that roles alternate, or know no system
        return f"that the chat template refuses ({error})"
    except ValueError:
        return "whose responses the chat template puts at no fixed place"
    return Dialogue(text, tuple(responses), complete=True, where=where)


def _end_of_turn(text: str, before: str, after: str, content: str) -> int:
    """Where in ``text`` the turn ends that comes after ``before`` and is the last of ``after``.

    Raises:
        ValueError: the turn does not come after ``before`` in ``text``.
    """
    if text.startswith(before) and text.startswith(after):
        return len(after)
    # Some templates dress the last turn of a chat: Qwen3 puts a thought before it, Phi-3 the end of text after it.
    if not text.startswith(before + content):
        raise ValueError
    end = len(before + content)
    return end + len(commonprefix([text[end:], after[after.rindex(content) + len(content) :]]))


def _content(dialogue: Dialogue) -> str:
    return dialogue.text
