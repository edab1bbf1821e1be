from typing import Any

import pytest

from qpruner.datamodules.messages import Unusable, parsed, read_messages, read_tools, with_text_arguments, without_nulls

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
            "tool_calls": [{**CALL, "function": {**CALL["function"], "arguments": {"day": 3, "at": None}}}],
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
    ["x", 7, ["a"], [{"role": "user"}], [{"role": None, "content": "x"}], [{"content": "x"}], [USER, [USER]]]
    + [[{"role": "assistant", "content": None}], [{"role": "user", "content": 7}]],
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
    assert read_tools([{**schema, "strict": None}]) == wrapped
    assert read_tools([]) == read_tools("[]") == []


def test_nulls_are_left_out_at_every_depth() -> None:
    assert without_nulls({"a": None, "b": [None, {"c": None, "d": 0}]}) == {"b": [{"d": 0}]}


def test_only_lists_and_objects_are_read_as_json() -> None:
    assert parsed(' {"a": 1}') == {"a": 1} and parsed("[1]") == [1]
    assert [parsed(text) for text in ("7", "[x]", "{", "null", "")] == ["7", "[x]", "{", "null", ""]
