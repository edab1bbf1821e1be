import json
from typing import Any

import pytest

from qpruner.datamodules.messages import Unusable, parsed, read_messages, read_tools, with_text_arguments

USER = {"role": "user", "content": "Rain?"}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"day": 3}}}


@pytest.mark.parametrize(
    ("given", "role"),
    [
        ("human", "user"), ("prompter", "user"), ("User", "user"), ("gpt", "assistant"), ("bot", "assistant"),
        ("ai", "assistant"), ("model", "assistant"), ("CHATBOT", "assistant"), ("system", "system"),
        ("function", "tool"), ("observation", "tool"), ("ipython", "tool"), ("developer", "developer"),
        ("critic", "critic"),
    ],
)  # fmt: skip
def test_roles_have_one_name(given: str, role: str) -> None:
    messages, parts = read_messages([{"from": given, "value": "x"}], "conversations")
    assert messages == [{"role": role, "content": "x"}]
    assert parts == ["response" if role == "assistant" else "prompt"]


@pytest.mark.parametrize("flag", ["weight", "train", "loss"])
def test_a_flag_keeps_a_turn_from_being_learnt(flag: str) -> None:
    said = {"role": "assistant", "content": "x"}
    turns = [{**said, flag: 0}, {**said, flag: 1}, {**said, flag: None}, {**said, flag: False}]
    messages, parts = read_messages(turns, "messages")
    assert parts == ["never", "response", "response", "never"]
    assert messages == [said] * 4


def test_what_is_empty_is_no_response() -> None:
    turns: list[Any] = [{"content": " \n"}, {"content": None, "reasoning_content": "Hm."}, {"tool_calls": [CALL]}]
    messages, parts = read_messages([{"role": "assistant", **turn} for turn in turns], "messages")
    assert parts == ["prompt", "response", "response"]
    assert [message["content"] for message in messages] == [" \n", "", ""]


@pytest.mark.parametrize(
    "said",
    [
        {"content": None, "tool_calls": [CALL]},
        {"tool_calls": [{"function": {"name": "look", "arguments": '{"day": 3}'}}]},  # OpenAI writes them as text
        {"content": "", "tool_calls": '[{"name": "look", "arguments": {"day": 3}}]'},
        {"content": None, "function_call": {"name": "look", "arguments": '{"day": 3}'}},
        {
            "content": "",
            "tool_calls": [{**CALL, "id": None, "function": {**CALL["function"], "strict": None}}, None],
        },  # type: ignore[dict-item]
    ],
)
def test_calls_are_a_list_with_arguments_as_data(said: dict[str, Any]) -> None:
    messages, parts = read_messages([{"role": "assistant", **said}], "messages")
    assert messages == [{"role": "assistant", "content": "", "tool_calls": [CALL]}]
    assert parts == ["response"]
    (message,) = with_text_arguments(messages)
    assert message["tool_calls"][0]["function"] == {"name": "look", "arguments": '{"day": 3}'}


def test_calls_in_the_roles_of_sharegpt() -> None:
    chat = [
        {"from": "function_call", "value": '{"name": "look", "arguments": {"day": 3}}'},
        {"from": "observation", "value": "rain"},
        {"from": "function_call", "value": '[{"name": "look", "arguments": {"day": 3}}, {"name": "go"}]'},
    ]
    messages, parts = read_messages(chat, "conversations")
    go = {"type": "function", "function": {"name": "go", "arguments": {}}}
    assert messages == [
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "", "tool_calls": [CALL, go]},
    ]
    assert parts == ["response", "prompt", "response"]


def test_contents_become_text() -> None:
    parts = [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "a", "image": None}, "b"]
    chat = [{"role": "assistant", "content": parts}, {"role": "tool", "content": {"rain": True, "where": "Köln"}}]
    assert read_messages(chat, "messages")[0] == [
        {"role": "assistant", "content": "a\nb", "reasoning_content": "Hm."},
        {"role": "tool", "content": '{"rain": true, "where": "Köln"}'},
    ]
    with pytest.raises(Unusable, match="^with a part of type 'image_url' in a message, where only text can be used$"):
        read_messages([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "messages")


@pytest.mark.parametrize(
    "messages",
    ["x", 7, ["a"], [{"role": None, "content": "x"}], [{"content": "x"}], [USER, [USER]]],
)
def test_what_is_no_list_of_messages_is_told(messages: Any) -> None:
    with pytest.raises(Unusable, match="^whose 'dialog' are not a list of role and content$"):
        read_messages(messages, "dialog")


@pytest.mark.parametrize("calls", [["x"], [{"arguments": {}}], "look", [{"function": "look"}], 7])
def test_a_call_needs_a_name(calls: Any) -> None:
    with pytest.raises(Unusable, match="^with a tool call that has no name$"):
        read_messages([{"role": "assistant", "content": "", "tool_calls": calls}], "messages")


def test_messages_may_be_a_text_of_json() -> None:
    assert read_messages('[{"role": "user", "content": "Rain?"}]', "messages")[0] == [USER]


def test_tools_are_schemas_of_functions() -> None:
    schema = {"name": "look", "parameters": {}}
    wrapped = [{"type": "function", "function": schema}]
    for tools in ([schema], wrapped, '[{"name": "look", "parameters": {}}]', ['{"name": "look", "parameters": {}}']):
        assert read_tools(tools) == wrapped
    nullable = {**schema, "parameters": {"enum": ["a", None], "default": None}}
    assert read_tools([nullable, None]) == [{"type": "function", "function": nullable}]
    assert read_tools([]) == read_tools("[]") == []


@pytest.mark.parametrize("arguments", [{"days": [1, None, 3]}, {"day": None, "at": 1}, {}])
@pytest.mark.parametrize("as_text", [True, False])
def test_nulls_in_arguments_are_kept(arguments: Any, as_text: bool) -> None:
    call = {"function": {"name": "look", "arguments": json.dumps(arguments) if as_text else arguments}}
    messages, _ = read_messages(
        [{"role": "assistant", "content": None, "name": None, "tool_calls": [call]}], "messages"
    )
    assert messages[0].keys() == {"role", "content", "tool_calls"}
    assert messages[0]["tool_calls"][0]["function"]["arguments"] == arguments
    result = {"role": "tool", "content": {"rain": None}}
    assert read_messages([result], "messages")[0][0]["content"] == '{"rain": null}'


@pytest.mark.parametrize(
    ("weight", "part", "is_left"),
    [
        ("0", "never", False), ("false", "never", False), (" False ", "never", False), ("0.0", "never", False),
        (-1, "never", False), ("1", "response", False), ("true", "response", False), (1.0, "response", False),
        (0.5, "response", True), ("0.3", "response", True), (2, "response", True), ("much", "response", True),
    ],
)  # fmt: skip
def test_weights_are_read_from_text_and_others_than_0_and_1_are_left(weight: Any, part: str, is_left: bool) -> None:
    (message,), parts = read_messages([{"role": "assistant", "content": "x", "weight": weight}], "messages")
    assert parts == [part]
    assert ("weight" in message) is is_left


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "user", "content": None}, "with a message of the user that has no content"),
        ({"role": "assistant"}, "with a message of the assistant that has no content"),
        ({"from": "human", "value": 7}, "with a message of the user whose content is no text"),
    ],
)
def test_what_is_no_content_is_told(message: Any, reason: str) -> None:
    with pytest.raises(Unusable, match=f"^{reason}$"):
        read_messages([message], "messages")


def test_only_lists_and_objects_are_read_as_json() -> None:
    assert parsed(' {"a": 1}') == {"a": 1} and parsed("[1]") == [1]
    assert [parsed(text) for text in ("7", "[x]", "{", "null", "")] == ["7", "[x]", "{", "null", ""]
