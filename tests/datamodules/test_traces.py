"""What of a chat a template writes, and where: with templates that are a line of Python."""

from collections.abc import Callable
from typing import Any

import pytest

from qpruner.datamodules.traces import FIRST_MARK, Piece, Traces, find_traces, is_same, with_mark

Messages = list[dict[str, Any]]


def said(content: str | None, role: str = "assistant", **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


def call(name: str) -> dict[str, Any]:
    return {"function": {"name": name, "arguments": {"x": 1}}}


def plain(messages: Messages) -> str:
    return "".join(f"[{message['role']}]{message['content']}\n" for message in messages)


def everything(messages: Messages) -> str:
    def of(message: dict[str, Any]) -> str:
        calls = "".join(f"<{call['function']['name']}>" for call in message.get("tool_calls", ()))
        return f"({message.get('reasoning_content', '')}){message['content'] or ''}{calls}"

    return "".join(f"[{of(message)}]\n" for message in messages)


def traces(render: Callable[[Messages], str], messages: Messages) -> Traces:
    return find_traces(render, messages, render(messages))


def test_pieces_end_where_they_stand_in_the_render() -> None:
    chat = [said("Who was it?", "user"), said("It was Tom.")]
    found = traces(plain, chat)
    assert found.pieces == (Piece(0, "content"), Piece(1, "content")) and found.lost == (False, False)
    text = plain(chat)
    assert text == "[user]Who was it?\n[assistant]It was Tom.\n"
    assert found.places == ((text.index("\n"),), (len(text) - 1,))


def test_every_kind_of_text_is_a_piece_of_its_own() -> None:
    chat = [
        said("Rain?", "user"),
        said("<think>Hm.</think>I look.", reasoning_content="So.", tool_calls=[call("look"), call("go")]),
        said(None, tool_calls=[call("stay")]),
        said("  \n"),
    ]
    found = traces(everything, chat)
    assert found.pieces == (
        Piece(0, "content"),
        Piece(1, "reasoning_content"), Piece(1, "content (<think>)"), Piece(1, "content"),
        Piece(1, "tool_calls"), Piece(1, "tool_calls"),
        Piece(2, "tool_calls"),
    )  # fmt: skip
    assert [piece.is_thought for piece in found.pieces] == [False, True, True, False, False, False, False]
    assert not any(found.lost) and found.kept_pieces() == list(found.pieces) and found.lost_pieces() == []
    text = everything(chat)
    assert found.places is not None
    for piece, written in zip(found.places, ("Rain?", "So.", "Hm.", "I look.", "look", "go", "stay"), strict=True):
        assert [text[place - len(written) : place] for place in piece] == [written]


def test_a_thought_may_lack_its_beginning() -> None:
    found = traces(plain, [said("Hm.</think>Yes. <think>Or</think> no.")])
    assert [piece.field for piece in found.pieces] == [
        "content (<think>)", "content", "content (<think>)", "content"
    ]  # fmt: skip


def test_what_leaves_no_trace_is_lost() -> None:
    def forgetful(messages: Messages) -> str:
        """Leaves out all but the answer to the last question, and thoughts."""
        return "".join(f"[{message['content'].rpartition('</think>')[2]}]" for message in messages[-2:])

    found = traces(forgetful, [said("Hi.", "user"), said("Hello."), said("Who?", "user"), said("<think>H</think>Tom.")])
    assert found.lost == (True, True, False, True, False)
    assert found.lost_pieces() == [Piece(0, "content"), Piece(1, "content"), Piece(3, "content (<think>)")]
    assert found.kept_pieces() == [Piece(2, "content"), Piece(3, "content")]


def test_a_text_that_a_template_rewrites_is_not_lost_and_has_no_place() -> None:
    def spelt(messages: Messages) -> str:
        """Writes the length of what is said."""
        return "".join(f"[{len(message['content'])}]" for message in messages)

    found = traces(spelt, [said("Hi, you.", "user")])
    assert found.lost == (False,) and found.places is None  # a mark changes what stands around it


def test_a_text_that_is_written_twice_has_two_places() -> None:
    def twice(messages: Messages) -> str:
        return plain(messages) + plain(messages)

    chat = [said("Yes.")]
    found = traces(twice, chat)
    assert found.places == ((15, 31),) and twice(chat)[11:15] == twice(chat)[27:31] == "Yes."


def test_a_template_that_fails_over_marks_leaves_what_it_can_be_asked() -> None:
    def strict(messages: Messages) -> str:
        if any(message["content"] not in ("Hi.", "Yes.") for message in messages):
            raise ValueError("what is this?")
        return plain(messages)

    found = traces(strict, [said("Hi.", "user"), said("Yes.")])
    assert found.lost == (False, False) and found.places is None


def test_marks_are_no_sign_of_the_text() -> None:
    icon = chr(FIRST_MARK + 7)
    chat = [said(f"{icon} is an icon.", "user"), said(icon)]
    found = traces(plain, chat)
    assert found.places is not None and not any(found.lost)
    assert [plain(chat)[place - 1] for (place,) in found.places] == [".", icon]


def test_a_mark_stands_before_white_space_at_the_end() -> None:
    assert with_mark("Yes. \n", "#") == "Yes.# \n" and with_mark("", "#") == "#"
    found = traces(lambda messages: "".join(message["content"].strip() for message in messages), [said(" Yes. \n")])
    assert found.places == ((4,),)


def test_renders_are_the_same_but_for_white_space() -> None:
    assert is_same(plain, [said("Yes.  No.\n")], plain([said("Yes. No.")]))
    assert not is_same(plain, [said("Yes.")], plain([said("No.")]))

    def failing(messages: Messages) -> str:
        raise KeyError("content")

    assert not is_same(failing, [said("Yes.")], "")


PIECES = (Piece(0, "content"), Piece(1, "reasoning_content"), Piece(1, "content"), Piece(1, "tool_calls"))


@pytest.mark.parametrize(
    ("lost", "places", "blocks", "within"),
    [
        ((False,) * 4, ((5,), (10,), (20,), (30,)), [(15, 30)], True),  # a thought may be left to them
        ((False,) * 4, ((5,), (10,), (20,), (30,)), [(15, 29)], False),
        ((False,) * 4, ((5,), (10,), (20,), (30,)), [(15, 20), (29, 30)], True),  # each in one of them
        ((False,) * 4, ((5,), (10,), (20,), (30,)), [(20, 30)], False),  # a block begins before what is in it
        ((False,) * 4, ((5,), (10,), (2, 20), (30,)), [(15, 30)], True),  # one of its places is enough
        ((False, False, True, False), ((5,), (10,), (), (30,)), [(25, 30)], True),  # what is lost is nowhere
        ((False, False, True, True), ((5,), (10,), (), ()), [(8, 30)], True),  # a turn of thoughts
        ((False, False, True, True), ((5,), (10,), (), ()), [(11, 30)], False),
        ((False,) * 4, None, [(0, 1)], True),  # nobody knows
    ],
)
def test_all_that_is_said_stands_in_blocks_or_does_not(lost: Any, places: Any, blocks: Any, within: bool) -> None:
    assert Traces(PIECES, lost, places).are_within(1, blocks) is within


def test_a_block_touches_a_message_where_any_of_it_stands_there() -> None:
    found = Traces(PIECES, (False,) * 4, ((5,), (10,), (2, 20), (30,)))
    assert found.touch(1, (9, 10)) and found.touch(1, (1, 2)) and found.touch(0, (4, 8))
    assert not found.touch(1, (10, 19)) and not found.touch(0, (5, 30)) and not found.touch(2, (0, 99))
    assert not Traces(PIECES, (False,) * 4, None).touch(1, (0, 99))
