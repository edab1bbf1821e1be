"""Messages of chats under one set of names, whatever names their data set uses."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Message = dict[str, Any]  # role, content, and anything else that a chat template may read, such as tool_calls
Part = Literal["response", "prompt", "never"]  # learnt; scored only where everything is scored; never scored

ROLES = {
    "user": ("human", "prompter"),
    "assistant": ("gpt", "bot", "ai", "model", "chatbot", "chatgpt"),
    "system": (),
    "tool": ("function", "observation", "ipython", "function_response", "tool_response"),
}
"""Roles of chat templates, and the names that data sets have for them; other roles are left as they are."""
CALLS = ("function_call", "tool_call")  # roles of an assistant whose content is a call, as in ShareGPT with tools
TRAINED = ("weight", "train", "loss")  # OpenAI, Axolotl, SWIFT: whether a turn is learnt
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # transformers passes all of them to a template
TEXT_PARTS = ("text", "input_text", "output_text")


class Unusable(ValueError):
    """A record that cannot be used; the text says why, phrased so as to follow "a record"."""


@dataclass(frozen=True)
class Conversation:
    """A chat in the terms of chat templates.

    Args:
        messages: messages of the chat, each with ``role`` and ``content``.
        parts: part that each message plays: a response that the model is to learn, a prompt, or never scored.
        variables: further variables of the template, such as ``tools``.
        unused: fields of the record that have no known meaning.
    """

    messages: tuple[Message, ...]
    parts: tuple[Part, ...]
    variables: dict[str, Any] = field(default_factory=dict)
    unused: tuple[str, ...] = ()


def read_messages(value: Any, name: str) -> tuple[list[Message], list[Part]]:
    """The messages in the field ``name``, and the part that each plays for the model.

    Names of roles and fields become those of chat templates, contents become text, and tool calls become a list with
    their arguments as data. A field of a message that is null counts as missing.

    Raises:
        Unusable: the field does not hold messages with role and content.
    """
    value = parsed(value)
    if not isinstance(value, list):
        raise _no_messages(name)
    messages: list[Message] = []
    parts: list[Part] = []
    for entry in value:
        if entry is None:
            continue
        message = _message(entry, name)
        weights = {flag: _weight(message[flag]) for flag in TRAINED if flag in message}
        # A turn is learnt or not: any other weight stays in the message, to be reported as a field that is not used.
        messages.append(
            {key: entry for key, entry in message.items() if key not in weights or weights[key] not in (0, 1)}
        )
        is_said = message["role"] == "assistant" and says_something(message)
        parts.append("prompt" if not is_said else "never" if 0 in weights.values() else "response")
    return messages, parts


def says_something(message: Message) -> bool:
    return bool(message["content"].strip() or any(message.get(key) for key in ("tool_calls", *THOUGHTS)))


def read_tools(tools: Any) -> list[Any]:
    """Schemas of tools, each as ``{"type": "function", "function": {"name", ...}}``."""
    tools = parsed(tools)
    tools = [parsed(tool) for tool in (tools if isinstance(tools, list) else [tools])]
    return [
        {"type": "function", "function": tool} if isinstance(tool, dict) and "name" in tool else tool
        for tool in tools
        if tool is not None
    ]


def parsed(value: Any) -> Any:
    """The value of a JSON text if it is a list or an object; anything else is returned as it is."""
    if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            pass
    return value


def read_flag(value: Any) -> bool | None:
    """A truth value, which tables without types hold as text; None if the value is no such thing."""
    if isinstance(value, str):
        return {"true": True, "false": False}.get(value.strip().lower())
    return value if isinstance(value, bool) else None


def _weight(value: Any) -> float | None:
    """How much a turn counts, 0 if it is not to be learnt; None if that cannot be read."""
    if (flag := read_flag(value)) is not None:
        return float(flag)
    try:
        return max(float(value), 0.0)
    except (TypeError, ValueError):
        return None


def _message(entry: Any, name: str) -> Message:
    if not isinstance(entry, dict):
        raise _no_messages(name)
    extra = {key: value for key, value in entry.items() if value is not None}
    role = next((extra.pop(key) for key in ("role", "from") if key in extra), None)
    content = next((extra.pop(key) for key in ("content", "value") if key in extra), None)
    if not isinstance(role, str):
        raise _no_messages(name)
    role = role.strip().lower()
    role = next((ours for ours, theirs in ROLES.items() if role in theirs), role)
    calls = [extra.pop(key) for key in ("tool_calls", "function_call") if key in extra]
    if role in CALLS:
        role, content, calls = "assistant", "", [content]
    if role == "tool" and not isinstance(content, str) and not _is_parts(content):
        content = json.dumps(content, ensure_ascii=False)  # a result that is given as data
    message = {"role": role, **extra, **_contents(content, role)}
    if tool_calls := [call for given in calls if given for call in _calls(given)]:
        message["tool_calls"] = tool_calls
    if "content" not in message:
        if not tool_calls and not any(message.get(key) for key in THOUGHTS):
            raise Unusable(f"with a message of the {role} that has no content")
        message["content"] = ""  # null is legal next to a call
    return message


def _contents(content: Any, role: str) -> Message:
    """The text of a message, and its thoughts if they are a part of its content."""
    if content is None:
        return {}
    if isinstance(content, str):
        return {"content": content}
    if not _is_parts(content):
        raise Unusable(f"with a message of the {role} whose content is no text")
    texts: list[str] = []
    thoughts: list[str] = []
    for part in content:
        kind = "text" if isinstance(part, str) else part["type"]
        text = (
            part
            if isinstance(part, str)
            else next((part[key] for key in (kind, "text") if part.get(key) is not None), None)
        )
        if kind not in (*TEXT_PARTS, *THOUGHTS) or not isinstance(text, str):
            raise Unusable(f"with a part of type {kind!r} in a message, where only text can be used")
        (thoughts if kind in THOUGHTS else texts).append(text)
    return {"content": "\n".join(texts)} | ({"reasoning_content": "\n".join(thoughts)} if thoughts else {})


def _is_parts(content: Any) -> bool:
    return isinstance(content, list) and all(
        isinstance(part, str) or (isinstance(part, dict) and isinstance(part.get("type"), str)) for part in content
    )


def _calls(given: Any) -> Iterator[Message]:
    """Calls as ``{"type": "function", "function": {"name", "arguments"}}``; they may be given unwrapped, or as text."""
    given = parsed(given)
    for call in filter(None, given) if isinstance(given, list) else [given]:
        call = parsed(call)
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Unusable("with a tool call that has no name")
        around = {key: call[key] for key in call if key not in ("function", "name", "arguments")}
        function = {**function, "arguments": parsed(function.get("arguments"))}
        if function["arguments"] is None:
            function["arguments"] = {}
        yield {
            "type": "function",
            **{key: value for key, value in around.items() if value is not None},
            "function": {key: value for key, value in function.items() if value is not None},
        }


def with_text_arguments(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages with the arguments of their calls as JSON text, which some templates write out as it is."""

    def as_text(call: Message) -> Message:
        arguments = call["function"]["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return {**call, "function": {**call["function"], "arguments": text}}

    return tuple(
        {**message, "tool_calls": [as_text(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    )


def _no_messages(name: str) -> Unusable:
    return Unusable(f"whose {name!r} are not a list of role and content")
