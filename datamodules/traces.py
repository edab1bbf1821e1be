"""Which parts of a chat leave a trace in the text that a chat template makes of it.

Templates are programs: some leave out what is said next to a call, thoughts of earlier turns, every call but the first,
or roles that they do not know. Each text of each message gets a mark of its own, a character that occurs in no text. A
text whose mark does not appear in the render is lost if the render stays the same whatever replaces the text.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qpruner.datamodules.messages import THOUGHTS, Message

Span = tuple[int, int]  # of characters: the first, and the one after the last
Render = Callable[..., str]  # render(messages, add_generation_prompt=False)

FIRST_MARK = 0xF0000  # where Unicode's planes for private use begin
MARK = LAST_MARK = "\U0010fffd"
# A thought may lack its beginning, which is part of the generation prompt of some models.
THOUGHT = re.compile(r"(<think>.*?</think>|\A(?:(?!<think>).)*?</think>)", re.DOTALL)
THOUGHT_IN_CONTENT = "content (<think>)"


@dataclass(frozen=True)
class Piece:
    """A text in a message: what is said, a thought, or the name of a call.

    Args:
        message: number of the message, from 0.
        field: field of the message, under a readable name.
    """

    message: int
    field: str

    @property
    def is_thought(self) -> bool:
        return self.field in (THOUGHT_IN_CONTENT, *THOUGHTS)


@dataclass(frozen=True)
class Traces:
    """Where the pieces of a chat are in its render.

    Args:
        pieces: all pieces that are not blank, in order.
        lost: for each piece, whether it leaves no trace.
        places: for each piece, the characters at which it ends; None if marks disturb the template.
    """

    pieces: tuple[Piece, ...]
    lost: tuple[bool, ...]
    places: tuple[tuple[int, ...], ...] | None

    def lost_pieces(self) -> list[Piece]:
        return [piece for piece, is_lost in zip(self.pieces, self.lost, strict=True) if is_lost]

    def kept_pieces(self) -> list[Piece]:
        return [piece for piece, is_lost in zip(self.pieces, self.lost, strict=True) if not is_lost]

    def are_within(self, message: int, blocks: Sequence[Span]) -> bool:
        """Whether all that is said in a message is in the blocks; thoughts count only if nothing else is said."""
        if self.places is None:
            return True
        kept = [
            (piece, places)
            for piece, places, is_lost in zip(self.pieces, self.places, self.lost, strict=True)
            if piece.message == message and not is_lost
        ]
        said = [places for piece, places in kept if not piece.is_thought] or [places for _, places in kept]
        return all(any(self._is_within(place, blocks) for place in places) for places in said if places)

    def touch(self, message: int, block: Span) -> bool:
        """Whether any part of a message is in the block."""
        pairs = zip(self.pieces, self.places or (), strict=False)
        return any(
            self._is_within(place, [block]) for piece, places in pairs if piece.message == message for place in places
        )

    @staticmethod
    def _is_within(place: int, blocks: Sequence[Span]) -> bool:
        return any(first < place <= last for first, last in blocks)


def find_traces(render: Render, messages: Sequence[Message], text: str) -> Traces:
    """Which pieces of the messages appear in ``text``, their render, and where."""
    pieces: list[Piece] = []
    # Icon fonts use characters in this range, which may occur in a text: marks come after those.
    first_mark = max([FIRST_MARK, *(ord(sign) + 1 for sign in set(text) if sign < LAST_MARK)])
    marks = re.compile(f"[{chr(first_mark)}-{LAST_MARK}]")

    def mark(piece: Piece, said: str) -> str:
        pieces.append(piece)
        return with_mark(said, chr(first_mark + len(pieces) - 1))

    marked = _changed(messages, mark)
    try:
        rendered = render(marked)
    except Exception:  # a template may fail in any way on what it does not expect
        rendered = ""
    places: list[list[int]] = [[] for _ in pieces]
    for count, match in enumerate(marks.finditer(rendered)):
        places[ord(match[0]) - first_mark].append(match.start() - count)
    lost = tuple(not ends and _is_lost(render, messages, number, text) for number, ends in enumerate(places))
    is_undisturbed = marks.sub("", rendered) == text
    return Traces(tuple(pieces), lost, tuple(map(tuple, places)) if is_undisturbed else None)


def is_same(render: Render, changed: Sequence[Message], text: str) -> bool:
    """Whether changed messages are rendered to the same text, except for white space."""
    try:
        return render(changed).split() == text.split()
    except Exception:  # as above: the template needs what was changed
        return False


def with_mark(text: str, mark: str) -> str:
    """The text with a mark at its end, before its last white space, which some templates strip."""
    said = text.rstrip()
    return said + mark + text[len(said) :]


def _is_lost(render: Render, messages: Sequence[Message], number: int, text: str) -> bool:
    seen = 0

    def replace(piece: Piece, said: str) -> str:
        nonlocal seen
        seen += 1
        return MARK if seen - 1 == number else said

    return is_same(render, _changed(messages, replace), text)


def _changed(messages: Sequence[Message], change: Callable[[Piece, str], str]) -> list[Message]:
    """The messages with each of their pieces changed, always in the same order."""

    def change_one(number: int, message: Message) -> Message:
        def to(field: str, said: str) -> str:
            return change(Piece(number, field), said) if said.strip() else said

        changed = {**message}
        for key in THOUGHTS:
            if isinstance(message.get(key), str):
                changed[key] = to(key, message[key])
        if message["content"]:
            parts = THOUGHT.split(message["content"])  # every other one is a thought
            for place, part in enumerate(parts):
                if place % 2:
                    opening = "<think>" if part.startswith("<think>") else ""
                    thought = part.removeprefix(opening).removesuffix("</think>")
                    parts[place] = opening + to(THOUGHT_IN_CONTENT, thought) + "</think>"
                else:
                    parts[place] = to("content", part)
            changed["content"] = "".join(parts)
        if calls := message.get("tool_calls"):
            changed["tool_calls"] = [
                {**call, "function": {**call["function"], "name": to("tool_calls", call["function"]["name"])}}
                for call in calls
            ]
        return changed

    return [change_one(number, message) for number, message in enumerate(messages)]
