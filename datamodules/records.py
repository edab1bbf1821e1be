"""Interprets records of instruction data sets in any of the common formats."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from qpruner.datamodules.documents import Record
from qpruner.datamodules.messages import Conversation, Message, Unusable, parsed, read_flag, read_messages, read_tools

CHATS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat")
QUESTIONS = ("instruction", "question", "query", "problem", "prompt")
INPUTS = ("input", "context")
ANSWERS = ("output", "response", "answer", "completion", "solution")
SYSTEMS = ("system", "system_prompt")
KNOWN = (
    f"Known are chats ({', '.join(CHATS)}), and a question ({', '.join(QUESTIONS)}; or input) with an answer "
    f"({', '.join(ANSWERS)}; or chosen, with --data.init_args.learn_chosen true)."
)
LABELS = ("label", "kto_tag")  # whether the answer is a good one
UNKNOWN = "in no known format"
EMPTY: tuple[Any, ...] = ("", [], {})


@dataclass(frozen=True)
class Instruction:
    """A task and its answer, as Alpaca has them.

    Args:
        instruction: text that says what is to be done.
        input: text that the instruction is to be applied to; may be empty.
        output: text of the answer.
        system: text that replaces the usual first sentence of the prompt; may be empty.
        history: instructions before this one, with their answers.
        unused: fields of the record that have no known meaning.
    """

    instruction: str
    input: str
    output: str
    system: str = ""
    history: tuple[tuple[str, str], ...] = ()
    unused: tuple[str, ...] = ()

    def as_conversation(self) -> Conversation:
        """The same as a chat, with the input as a paragraph below the instruction."""
        turns = [*self.history, ("\n\n".join(filter(None, (self.instruction, self.input))), self.output)]
        messages = [*_system(self.system), *(message for turn in turns for message in _exchange(*turn))]
        messages, parts = read_messages(messages, "messages")
        return Conversation(tuple(messages), tuple(parts), unused=self.unused)


@dataclass(frozen=True)
class Completion:
    """A text and its continuation, both verbatim.

    Args:
        prompt: beginning of the text.
        completion: text that the model is to learn to write after the prompt.
        unused: fields of the record that have no known meaning.
    """

    prompt: str
    completion: str
    unused: tuple[str, ...] = ()


class _Fields:
    """The fields of a record that hold something, taken by name; it keeps track of those that were never taken."""

    def __init__(self, record: Record) -> None:
        # If a table mixes kinds of records, each has the fields of all, those of other kinds as null or NaN.
        self._values = {str(name): value for name, value in record.items() if value is not None and value == value}
        self._values |= {name: parsed(self._values[name]) for name in CHATS if name in self._values}
        self._taken: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._values

    @property
    def chats(self) -> list[str]:
        return [name for name in CHATS if isinstance(self._values.get(name), list)]

    def first(self, names: Sequence[str]) -> str | None:
        """The first of the names whose field is not empty, or else the first whose field exists."""
        there = [name for name in names if name in self._values]
        return next((name for name in there if self._values[name] not in EMPTY), there[0] if there else None)

    def take(self, *names: str) -> Any:
        name = self.first(names)
        if name is None:
            return None
        self._taken.add(name)
        return self._values[name]

    def take_flag(self, names: Sequence[str]) -> bool | None:
        """The value of the first of the fields that is true or false; fields that hold anything else are not taken."""
        for name in names:
            if (flag := read_flag(self._values.get(name))) is not None:
                self._taken.add(name)
                return flag
        return None

    @property
    def left(self) -> tuple[str, ...]:
        return tuple(name for name, value in self._values.items() if name not in self._taken and value not in EMPTY)


def read_record(record: Record, *, learn_chosen: bool = False) -> Conversation | Instruction | Completion:
    """Interprets a record; `InstructionDataModule` lists the formats.

    Args:
        record: fields of the record by name.
        learn_chosen: whether ``chosen`` is the answer if a record has it.

    Raises:
        Unusable: the record is in no known format, or violates its format.
    """
    fields = _Fields(record)
    if learn_chosen and "chosen" in fields:
        chosen = fields.take("chosen")
        return _pair(fields, "chosen", [chosen] if isinstance(chosen, dict) else chosen, fields.take("rejected"))
    name = fields.first((*fields.chats, *ANSWERS)) or fields.first(CHATS)
    if name is not None and fields.take_flag(LABELS) is False:
        raise Unusable("whose answer is labelled as a bad one")
    if name in CHATS:
        return _conversation(fields, name, [], fields.take(name))
    if name is not None:
        return _pair(fields, name, fields.take(name))
    if "chosen" in fields:
        raise Unusable("with 'chosen' alone for an answer, which --data.init_args.learn_chosen true would take")
    if (question := fields.first((*QUESTIONS, "input"))) is not None:
        raise Unusable(f"{UNKNOWN}, without an answer to {question!r}")
    if fields.left == ("text",):
        raise Unusable("with 'text' alone, which TextDataModule reads")
    raise Unusable(UNKNOWN)


def _pair(
    fields: _Fields, answer_name: str, answer: Any, rejected: Any = None
) -> Conversation | Instruction | Completion:
    """A question and its answer, each a text or a list of messages."""
    question_name = fields.first((*QUESTIONS, "input", *fields.chats))
    if question_name is None and not isinstance(answer, list):
        raise Unusable(f"{UNKNOWN}, without a question for {answer_name!r}")
    question = [] if question_name is None else fields.take(question_name)
    if question_name is None or isinstance(question, list) or isinstance(answer, list):
        before = question if isinstance(question, list) else [{"role": "user", "content": question}]
        after = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
        first, _ = read_messages(after[:1], answer_name)
        if first and first[0]["role"] in ("user", "system"):  # it repeats the prompt, as UltraFeedback does
            before = _shared(after, rejected)
        return _conversation(fields, answer_name, before, after)
    texts = {question_name: question, answer_name: answer}
    if bad := [name for name, text in texts.items() if not isinstance(text, str)]:
        raise Unusable(f"whose {bad[0]!r} is no text")
    if not question.strip() or not answer.strip():
        raise Unusable("with an empty instruction or output")
    if question_name == "prompt" and answer_name in ("completion", "chosen"):
        return Completion(question, answer, fields.left)
    given = fields.take(*INPUTS) if question_name != "input" else fields.take("context")
    system, history = fields.take(*SYSTEMS), parsed(fields.take("history"))
    if not isinstance(given or "", str) or not isinstance(system or "", str):
        raise Unusable("whose input or system is no text")
    if history and not (isinstance(history, list) and all(_is_exchange(turn) for turn in history)):
        raise Unusable("whose 'history' is not a list of instruction and answer")
    turns = tuple((turn[0], turn[1]) for turn in history or ())
    return Instruction(question, given or "", answer, system or "", turns, fields.left)


def _conversation(fields: _Fields, name: str, context: list[Any], said: Any) -> Conversation:
    """The chat made of ``context`` and of what was ``said`` after it, which may repeat the context."""
    before, context_parts = read_messages(context, name)
    messages, parts = read_messages(said, name)
    if messages[: len(before)] != before:
        messages, parts = before + messages, context_parts + parts
    for number in range(len(before)):  # only what was said after the context is the answer
        parts[number] = "never" if parts[number] == "never" else "prompt"
    if all(message["role"] != "system" for message in messages):
        system = fields.take(*SYSTEMS)
        if isinstance(system, str) and system.strip():
            messages, parts = [*_system(system), *messages], ["prompt", *parts]
    variables: dict[str, Any] = {}
    if tools := read_tools(fields.take("tools", "functions") or []):
        variables["tools"] = tools
    if documents := parsed(fields.take("documents")):
        variables["documents"] = documents
    if (thinking := fields.take("enable_thinking")) is not None:
        variables["enable_thinking"] = thinking
    options = parsed(fields.take("chat_template_kwargs"))
    if isinstance(options, dict):
        variables |= {key: value for key, value in options.items() if value is not None}
    return Conversation(tuple(messages), tuple(parts), variables, fields.left)


def _shared(chat: list[Any], other: Any) -> list[Any]:
    """The common beginning of two chats: the prompt, if a preference has none of its own."""
    pairs = zip(chat, other if isinstance(other, list) else [], strict=False)
    return [message for message, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]


def _system(text: str) -> list[Message]:
    return [{"role": "system", "content": text}] if text.strip() else []


def _exchange(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _is_exchange(turn: Any) -> bool:
    return isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(text, str) for text in turn)
