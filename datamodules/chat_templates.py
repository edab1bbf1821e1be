"""Chats as text, laid out by a tokenizer's chat template, and where in this text the assistant speaks.

A response is what the model has to write: everything from the end of the generation prompt, which is what the template
puts after the preceding messages when it is asked for a response, up to and including the end-of-turn token. So tool
calls and the thoughts that the template writes out belong to it, and the header of the turn does not. If the template
writes a finished turn differently from how the generation prompt begins it (DeepSeek-R1 opens a thought there, which no
finished turn has), the response begins where the two diverge. White space between the end-of-turn token and the next
turn belongs to neither, nor does what follows only the last turn (Phi-3 puts the end of text there), unless it is what
ends the turn. If a template has ``{% generation %}`` blocks and they contain all that is said, they are the responses.

Templates are programs; nothing is known about them except what they render. What they leave out is found first, see
`traces`: a chat is not learnt if a call or a text of a response is left out. Positions are found with marks, characters
that occur in no text: one at the end of a message shows where its text ends up, whatever else the template does
(thoughts left out of earlier turns, tools put before the last of them, a date).
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from os.path import commonprefix
from typing import Any

from qpruner.datamodules.messages import Conversation, Message, Part, Unusable, with_text_arguments
from qpruner.datamodules.traces import MARK, Render, Span, Traces, find_traces, is_same, with_mark

GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
CALLS_LEFT_OUT = "with tool calls, which the chat template leaves out"


def lay_out(
    tokenizer: Any, conversation: Conversation, *, response_only: bool
) -> tuple[str, tuple[Span, ...] | None, tuple[str, ...]]:
    """The text of a chat, the spans to be scored (None: all of it), and the fields that leave no trace in the text.

    If only responses are scored, what comes after the last of them is left out.

    Args:
        tokenizer: tokenizer with a chat template.
        conversation: conversation with a response.
        response_only: whether only responses are scored, and prompts are not.

    Raises:
        Unusable: the template refuses the chat, leaves out a call or other text of a response, or the responses cannot
            be located.
    """
    messages: Sequence[Message] = conversation.messages
    parts = conversation.parts
    if response_only:
        end = len(parts) - parts[::-1].index("response")
        messages, parts = messages[:end], parts[:end]

    def render(messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        options = {**conversation.variables, "add_generation_prompt": add_generation_prompt}
        if any(message["content"] is None for message in messages):  # which apply_chat_template would leave out
            return _render_as_it_is(tokenizer, messages, options)[0]
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **options))

    try:
        template = tokenizer.get_chat_template(tools=conversation.variables.get("tools"))
        if "developer" not in template:  # OpenAI's name for the role that others call system
            messages = [
                {**message, "role": "system"} if message["role"] == "developer" else message for message in messages
            ]
        messages, text, traces = _render(render, messages)
        _refuse_lost_responses(traces, parts)
        said_by = {piece.message for piece in traces.kept_pieces()}
        silent = [number for number, part in enumerate(parts) if part == "response" and number not in said_by]
        if not silent:
            places = _Places(tokenizer, render, messages, text)
            scored = _scored(tokenizer, conversation, parts, places, traces, response_only)
            return text, scored, _ignored(template, render, messages, conversation.variables, text, traces)
    except Unusable:
        raise
    except Exception as error:  # a template is a foreign program, which may fail on a record in any way
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise Unusable(f"that the chat template refuses ({said})") from error
    # A turn of which the template writes nothing is an empty one, such as thoughts alone if it leaves out thoughts.
    spoken = tuple("prompt" if number in silent else part for number, part in enumerate(conversation.parts))
    if "response" not in spoken:
        raise Unusable("without a response of which the chat template writes anything out")
    return lay_out(tokenizer, replace(conversation, parts=spoken), response_only=response_only)


def _render(render: Render, messages: Sequence[Message]) -> tuple[Sequence[Message], str, Traces]:
    """The messages in the form that the template accepts, their text, and which parts of them appear in it."""
    first_error: Exception | None = None
    for variant in _variants(messages):
        try:
            text = render(variant)
        except Exception as error:  # as above
            first_error = first_error or error
            continue
        traces = find_traces(render, variant, text)
        if all(piece.field != "tool_calls" for piece in traces.lost_pieces()):
            return variant, text, traces
        first_error = first_error or Unusable(CALLS_LEFT_OUT)
    assert first_error is not None
    raise first_error


def _variants(messages: Sequence[Message]) -> Iterator[Sequence[Message]]:
    """The forms in which templates want calls: arguments as data or as text, content next to them empty or null."""
    yield messages
    if any("tool_calls" in message for message in messages):
        yield with_text_arguments(messages)
        null = [
            {**message, "content": None} if "tool_calls" in message and not message["content"].strip() else message
            for message in messages
        ]
        if null != [*messages]:
            yield null
            yield with_text_arguments(null)


def _refuse_lost_responses(traces: Traces, parts: Sequence[Part]) -> None:
    for piece in traces.lost_pieces():
        if piece.field == "content" and parts[piece.message] == "response":
            raise Unusable("with text in a response that the chat template leaves out")


def _scored(
    tokenizer: Any,
    conversation: Conversation,
    parts: Sequence[Part],
    places: "_Places",
    traces: Traces,
    response_only: bool,
) -> tuple[Span, ...] | None:
    """The spans to be scored, or None if all of the text is."""
    if not response_only:
        never = [places.of(number) for number, part in enumerate(parts) if part == "never"]
        return _without([(0, len(places.text))], never) if never else None
    responses = [number for number, part in enumerate(parts) if part == "response"]
    blocks = _generation_blocks(tokenizer, places.messages, conversation.variables)
    if not all(traces.are_within(number, blocks) for number in responses) or not blocks:
        return tuple(places.of(number) for number in responses)
    others = [
        places.of(number)
        for number, (message, part) in enumerate(zip(places.messages, parts, strict=True))
        if message["role"] == "assistant" and part != "response"
    ]
    # The block of another turn is dropped with all that is in it, such as its header, unless it also has a response.
    kept = [
        (first, last)
        for first, last in blocks
        if not any(first < end and start < last for start, end in others)
        or any(traces.touch(number, (first, last)) for number in responses)
    ]
    return _without(kept, others)


def _generation_blocks(tokenizer: Any, messages: Sequence[Message], variables: dict[str, Any]) -> list[Span]:
    """The spans of the ``{% generation %}`` blocks."""
    template = tokenizer.get_chat_template(tools=variables.get("tools"))
    if not GENERATION.search(COMMENT.sub("", template)):
        return []
    return _render_as_it_is(tokenizer, messages, {**variables, "return_assistant_tokens_mask": True})[1]


def _render_as_it_is(tokenizer: Any, messages: Sequence[Message], options: dict[str, Any]) -> tuple[str, list[Span]]:
    """The render of exactly these messages, and the spans of its ``{% generation %}`` blocks if options ask for it."""
    from transformers.utils.chat_template_utils import render_jinja_template

    (text,), spans = render_jinja_template(
        conversations=[list(messages)],
        chat_template=tokenizer.get_chat_template(tools=options.get("tools")),
        **{**tokenizer.special_tokens_map, **options},
    )
    return str(text), list(spans[0]) if spans else []


def _ignored(
    template: str,
    render: Render,
    messages: Sequence[Message],
    variables: dict[str, Any],
    text: str,
    traces: Traces,
) -> tuple[str, ...]:
    """Fields that the template does not read, or whose text it leaves out."""
    ignored = [name for name in variables if not re.search(rf"\b{re.escape(name)}\b", template)]
    kept = {piece.field for piece in traces.kept_pieces()}
    for piece in traces.lost_pieces():
        if piece.field == "content":
            ignored.append(f"messages.content of {messages[piece.message]['role']}")
        else:
            ignored.append(f"messages.{piece.field}" + (" of some turns" if piece.field in kept else ""))
    in_pieces = {"role", "content", *(piece.field for piece in traces.pieces)}
    keys = dict.fromkeys(key for message in messages for key in message if message[key])
    for key in [key for key in keys if key not in in_pieces]:
        without = [{name: value for name, value in message.items() if name != key} for message in messages]
        if is_same(render, without, text):
            ignored.append(f"messages.{key}")
    return tuple(dict.fromkeys(ignored))


def _without(spans: Sequence[Span], others: Sequence[Span]) -> tuple[Span, ...]:
    """What is left of spans once others are taken out of them."""
    left = list(spans)
    for first, last in others:
        left = [
            part
            for start, end in left
            for part in ((start, min(end, first)), (max(start, last), end))
            if part[0] < part[1]
        ]
    return tuple(left)


def _mark(message: Message) -> Message:
    """The message with a mark at the end of what it says: after the name of its last call, or else its content."""
    if calls := message.get("tool_calls"):
        function = calls[-1]["function"]
        return {
            **message,
            "tool_calls": [*calls[:-1], {**calls[-1], "function": {**function, "name": function["name"] + MARK}}],
        }
    return {**message, "content": with_mark(message["content"], MARK)}


def _no_place(trait: str) -> Unusable:
    return Unusable(
        f"whose responses cannot be told from prompts, because the chat template {trait}; put what the assistant says "
        f"into {{% generation %}} blocks of the template, or score everything: --data.init_args.response_only false"
    )


class _Places:
    """Where the messages of a chat are in its ``text``."""

    def __init__(self, tokenizer: Any, render: Render, messages: Sequence[Message], text: str) -> None:
        self.render = render
        self.messages = messages
        self.text = text
        added = tokenizer.added_tokens_decoder.values()
        # Tokens that absorb the white space after them end where it ends.
        self.closing = tuple(token.content for token in added if not token.rstrip)
        longest_first = sorted((re.escape(token.content) for token in added), key=len, reverse=True)
        self.token = re.compile("|".join(longest_first) or "(?!)")
        self.unit = re.compile("|".join([*longest_first, "."]), re.DOTALL)

    def of(self, number: int) -> Span:
        """The span of the response that is message ``number``, including its end-of-turn token.

        Raises:
            Unusable: it cannot be located.
        """
        first, last = self._first(number), self._last(number)
        said = self.text[first:last]
        return first, first + len(said.rstrip() if said.rstrip().endswith(self.closing) else said)

    def _first(self, number: int) -> int:
        """Where the generation prompt before message ``number`` ends."""
        if number == 0:
            return 0
        prompt = self.render(self.messages[:number], add_generation_prompt=True)
        if self.text.startswith(prompt):
            return len(prompt)
        # The preceding chat is written differently when more follows it: only look from the end of its last message.
        place = self._end_of_content(self.messages, number - 1, self.text)
        prompt_place = self._end_of_content(self.messages[:number], number - 1, prompt, add_generation_prompt=True)
        tail = prompt[prompt_place:]
        shared = self._beginning(self.text[place:], tail)
        said = self._end_of_content(self.messages, number, self.text)
        if shared != tail:  # what a template puts after all messages, such as tools, comes between
            header = prompt.removeprefix(self.render(self.messages[:number]))
            header_place = self.text.find(header, place, said)
            if header not in ("", prompt) and header_place >= 0:
                return header_place + len(header)
        if said < place + len(shared):
            raise _no_place("does not keep the order of the messages")
        return place + len(shared)

    def _last(self, number: int) -> int:
        """Where the turn of message ``number`` ends: from there on, the text depends on what follows."""
        if number + 1 < len(self.messages):
            messages = self.messages[: number + 1]
            other = self.render(messages)
            if self.text.startswith(other):
                return len(other)
        else:
            messages = [*self.messages, {"role": "user", "content": "?"}]
            try:
                other = self.render(messages)
            except Exception:  # as above: some templates allow nothing but its result after a call
                return len(self.text)
            if other.startswith(self.text):
                return len(self.text)
        # Some templates treat the last turn specially: Qwen3 puts thoughts before it, Phi-3 the end of text after it.
        place = self._end_of_content(self.messages, number, self.text)
        other_place = self._end_of_content(messages, number, other)
        ending = self._beginning(self.text[place:], other[other_place:])
        place, other_place = place + len(ending), other_place + len(ending)
        token = self.token.match(self.text, place)
        is_open = other_place < len(other) and not self.token.search(ending)
        return token.end() if token and is_open else place  # gpt-oss ends the last turn with a token of its own

    def _end_of_content(self, messages: Sequence[Message], number: int, text: str, **options: Any) -> int:
        """Where in ``text``, the render of the messages, the content of one, or the name of its last call, ends."""
        marked = [*messages]
        marked[number] = _mark(messages[number])
        rendered = self.render(marked, **options)
        if rendered.count(MARK) == 0 or rendered.replace(MARK, "") != text:
            raise _no_place(f"rewrites what the {messages[number]['role']} says")
        count = rendered.count(MARK)
        if count > 1 and number + 1 < len(messages):  # later turns repeat it, as results of a call do its name
            count = min(count, self.render(marked[: number + 1], **options).count(MARK) or count)
        return rendered.replace(MARK, "", count - 1).index(MARK)

    def _beginning(self, text: str, other: str) -> str:
        """The common beginning of the two texts, without cutting a token in two."""
        units = self.unit.findall(text[: len(other) + 100])  # no token is longer than that
        return "".join(commonprefix([units, self.unit.findall(other)]))
