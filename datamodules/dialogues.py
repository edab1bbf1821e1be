"""Records as whole texts, with the spans of them that the model is to learn to say."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from qpruner.datamodules.chat_templates import lay_out
from qpruner.datamodules.documents import NOT_UNICODE, Record, is_unicode
from qpruner.datamodules.messages import Conversation, Unusable
from qpruner.datamodules.records import Completion, Instruction, read_record
from qpruner.datamodules.traces import Span
from qpruner.errors import UserError

Layout = Literal["alpaca", "chat"]

# The prompts of Stanford Alpaca; models tuned on Alpaca data expect them verbatim.
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)


@dataclass(frozen=True)
class Dialogue:
    """A whole text and the character spans of it that the model is to learn to say.

    Args:
        text: prompt and responses.
        scored: character spans that are targets; None for all of the text.
        complete: whether the text itself contains its special tokens, as written by a chat template; otherwise the
            tokenizer's own are put before it and the end-of-text token after it.
        where: place of the record, for messages.
        unused: fields of the record that left no trace.
    """

    text: str
    scored: tuple[Span, ...] | None
    complete: bool
    where: str
    unused: tuple[str, ...] = ()

    def ends_in(self, tokens: tuple[str, ...]) -> bool:
        """Whether any scored span ends in one of the tokens, ignoring white space."""
        spans = [(0, len(self.text))] if self.scored is None else self.scored
        return any(self.text[first:last].rstrip().endswith(tokens) for first, last in spans)


def to_dialogue(
    record: Record,
    tokenizer: Any,
    where: str,
    *,
    response_only: bool = True,
    layout: Layout = "alpaca",
    learn_chosen: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Dialogue | str:
    """The record as one text, or the reason why it cannot be used, phrased so as to follow "a record".

    Args:
        record: fields by name, in a format that `InstructionDataModule` lists.
        tokenizer: tokenizer whose chat template lays out chats.
        where: place of the record, for messages.
        response_only: whether only responses are scored, and prompts are not.
        layout: how instructions are laid out, ``alpaca`` or ``chat``; see `InstructionDataModule`.
        learn_chosen: whether ``chosen`` is the answer if a record has it.
        chat_template_kwargs: variables for the chat template; those of the record take precedence.

    Raises:
        UserError: the record is a chat, and the tokenizer has no chat template.
    """
    try:
        meaning = read_record(record, learn_chosen=learn_chosen)
        if isinstance(meaning, Instruction) and layout == "chat":
            meaning = meaning.as_conversation()
        match meaning:
            case Conversation():
                variables = {**(chat_template_kwargs or {}), **meaning.variables}
                dialogue = _of_chat(replace(meaning, variables=variables), tokenizer, where, response_only)
            case Instruction():
                dialogue = _of_instruction(meaning, tokenizer, where)
            case Completion(prompt, completion, unused):
                span = (len(prompt), len(prompt + completion))
                dialogue = Dialogue(prompt + completion, (span,), complete=False, where=where, unused=unused)
    except Unusable as reason:
        return str(reason)
    if not is_unicode(dialogue.text):
        return NOT_UNICODE
    return dialogue if response_only or dialogue.complete else replace(dialogue, scored=None)


def _of_instruction(instruction: Instruction, tokenizer: Any, where: str) -> Dialogue:
    """Uses the prompt of Alpaca; a system prompt replaces its first sentences, earlier turns precede the last."""
    end_of_text = tokenizer.eos_token or ""
    text = (instruction.system or (WITH_INPUT if instruction.input else WITHOUT_INPUT)) + "\n\n"
    scored = []
    for question, answer in instruction.history:
        text += f"### Instruction:\n{question}\n\n### Response:\n"
        scored.append((len(text), len(text + answer + end_of_text)))
        text += f"{answer}{end_of_text}\n\n"
    text += f"### Instruction:\n{instruction.instruction}\n\n"
    if instruction.input:
        text += f"### Input:\n{instruction.input}\n\n"
    text += "### Response:\n"
    scored.append((len(text), len(text + instruction.output)))
    return Dialogue(text + instruction.output, tuple(scored), complete=False, where=where, unused=instruction.unused)


def _of_chat(conversation: Conversation, tokenizer: Any, where: str, response_only: bool) -> Dialogue:
    speakers = [message["role"] for message in conversation.messages]
    if "assistant" not in speakers:
        raise Unusable("without a response")
    if conversation.parts[0] == "response":  # a greeting: nothing says when to give it
        conversation = replace(conversation, parts=("prompt", *conversation.parts[1:]))
    if "response" not in conversation.parts:
        if speakers[0] == "assistant":
            raise Unusable("that begins with a response")
        raise Unusable("without a response that is to be learnt: all are empty, of weight 0 or not to be trained")
    if tokenizer.chat_template is None:
        raise UserError(
            f"{where} is a chat, and the tokenizer {tokenizer.name_or_path!r} has no chat template. Use the tokenizer "
            f"of a chat model, put a chat_template.jinja into the tokenizer's folder, or use records with "
            f"'instruction' and 'output' and --data.init_args.layout alpaca."
        )
    text, scored, ignored = lay_out(tokenizer, conversation, response_only=response_only)
    return Dialogue(text, scored, complete=True, where=where, unused=conversation.unused + ignored)
