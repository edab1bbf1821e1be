"""Instructions and chats, with the loss on what the assistant says or on everything."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from qpruner.datamodules.base import TokenDataModule
from qpruner.datamodules.cache import Prepared
from qpruner.datamodules.dialogues import Dialogue, Layout, to_dialogue
from qpruner.datamodules.documents import Skipped
from qpruner.datamodules.records import KNOWN, UNKNOWN
from qpruner.datamodules.rows import Row, TokenRows
from qpruner.datamodules.sources import Source
from qpruner.datamodules.splits import SPLITS, Split, at_fault, hold_out, make_disjoint
from qpruner.datamodules.text import ended, missing_end, named_sources, notes, without_useless_splits
from qpruner.datamodules.tokens import tokenize
from qpruner.errors import UserError


class InstructionDataModule(TokenDataModule):
    """One instruction or conversation per row, truncated to ``max_length`` tokens and padded within a batch.

    Formats of records, by the fields that hold something (several names: whichever exists):

    - Chat, laid out by the tokenizer's chat template: ``messages``, ``conversations``, ``conversation``, ``dialogue``,
      ``dialog`` or ``chat``, a list of ``{"role", "content"}`` (OpenAI, Hugging Face) or ``{"from", "value"}``
      (ShareGPT).
    - Instruction, laid out by the prompt of Alpaca or as a chat, see ``layout``: ``instruction``, ``question``,
      ``query``, ``problem`` or ``prompt`` (or ``input`` alone) with ``output``, ``response``, ``answer``,
      ``completion`` or ``solution``, and perhaps ``input`` or ``context``, ``system`` or ``system_prompt``,
      ``history`` (Alpaca, Dolly, LaMini, MetaMath, OpenOrca, GSM8K).
    - Completion: ``prompt`` and ``completion`` (TRL); two texts are concatenated as they are, and a text or a list of
      messages with a list of messages is a chat of which only the completion is learnt.
    - Any of these with ``label`` or ``kto_tag``: skipped if it is false (KTO).
    - Preference, with ``learn_chosen``: ``chosen`` in place of an answer or completion, and perhaps without a prompt;
      ``rejected`` is ignored (TRL, UltraFeedback, ShareGPT's).

    The following parts of a chat are used, too: ``system``, ``tools`` or ``functions``, ``documents``,
    ``enable_thinking`` and ``chat_template_kwargs`` of a record; ``tool_calls``, ``reasoning_content`` and anything
    else in a message that the template reads; and ``weight``, ``train`` or ``loss`` of a message: if this is 0 or
    false, the turn is not scored. Roles may have the names of chat templates, of ShareGPT or of others (``human``,
    ``gpt``, ``bot``, ``model``, ``function_call``, ``observation``, ...). Empty turns are not learnt. Records that
    cannot be used are skipped and counted, such as those with a response of which the chat template leaves out a text
    or a call. Fields that are not used, and whatever else the template leaves out (thoughts of earlier turns, roles
    that it does not know), are listed. Both are reported in the notes on the data at the start of a run.

    What is scored of a response is what the model has to write: from the end of the generation prompt up to and
    including the end-of-turn token (see `chat_templates`), or with the prompt of Alpaca the answer and the end-of-text
    token. Splits are named as in `TextDataModule`.

    Args:
        train: records for fitting and calibration: chats (``messages``, ``conversations``), instructions
            (``instruction`` or ``question`` with ``output``, ``response`` or ``answer``), ``prompt`` with
            ``completion`` or ``chosen``.
        validation: records for making choices.
        test: records for reported results.
        response_only: whether only what the assistant says is scored; otherwise the prompt is, too.
        layout: how instructions are laid out: ``alpaca``, with the prompts of Stanford Alpaca, which need no chat
            template; ``chat``, with the tokenizer's chat template.
        learn_chosen: whether the ``chosen`` one of two answers is learnt if records have preferences.
        chat_template_kwargs: variables for the chat template, such as ``{"enable_thinking": false}``; those of a
            record take precedence.
        held_out: share of the training records for each split that is not given, in [0, 0.5); at 0 there is no such
            split.
        **kwargs: options of every data module; see `TokenDataModule`.

    Raises:
        UserError: no split given, a split without a usable record, or chats without a chat template.
    """

    def __init__(
        self,
        train: str | None = None,
        validation: str | None = None,
        test: str | None = None,
        response_only: bool = True,
        layout: Layout = "alpaca",
        learn_chosen: bool = False,
        chat_template_kwargs: dict[str, Any] | None = None,
        held_out: float = 0.05,
        **kwargs: Any,
    ) -> None:
        sources = named_sources(train=train, validation=validation, test=test, held_out=held_out)
        super().__init__(**kwargs)  # loads the tokenizer
        self.sources = sources
        self.response_only = response_only
        self.layout: Layout = layout
        self.learn_chosen = learn_chosen
        self.chat_template_kwargs = chat_template_kwargs or {}
        self.held_out = held_out

    @property
    def protocol(self) -> str:
        scored = "responses" if self.response_only else "prompts and responses"
        return f"one record a row, cut at {self.max_length} tokens, {scored} scored"

    def options(self) -> dict[str, Any]:
        return {
            "sources": {split: source.fingerprint() for split, source in self.sources.items()},
            "named": [split for split, source in self.sources.items() if source.is_named],
            "response_only": self.response_only,
            "layout": self.layout,
            "learn_chosen": self.learn_chosen,
            "chat_template_kwargs": self.chat_template_kwargs,
            "held_out": self.held_out,
        }

    def build(self) -> Prepared:
        return without_useless_splits(type(self).__name__, self.sources, self._build)

    def _build(self, sources: Mapping[Split, Source]) -> Prepared:
        skipped = {split: Skipped() for split in sources}
        given: dict[Split, list[Dialogue]] = {}
        for split in sources:
            with at_fault(split):
                given[split] = list(self._dialogues(split, skipped[split]))
                if not given[split]:
                    known = f" {KNOWN}" if any(map(_is_unknown, skipped[split].counts)) else ""
                    raise UserError(f"{sources[split]} holds no usable record: {skipped[split]}.{known}")
        disjoint, repeated = make_disjoint(given, _content)
        dialogues = hold_out(disjoint, _content, self.held_out)
        rows: dict[Split, TokenRows] = {}
        for split in dialogues:
            counter = skipped.setdefault(split, Skipped())
            with at_fault(split):
                rows[split] = TokenRows.of(self._rows(dialogues[split], counter))
                if not len(rows[split]):
                    raise UserError(f"The {split} split holds no usable record: {counter}.")
        name = type(self).__name__
        said = (*notes(name, skipped, repeated, rows, sources), *_notes_on_fields(name, dialogues))
        return Prepared(rows, said + self._notes_on_ends([d for split in dialogues for d in dialogues[split]]))

    def _notes_on_ends(self, dialogues: list[Dialogue]) -> tuple[str, ...]:
        without_template = any(not dialogue.complete for dialogue in dialogues)
        unended = "no row that is laid out without a chat template ends with one" if without_template else None
        said = missing_end(self.tokenizer, unended)
        added = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        ends = tuple(filter(None, (*added, self.tokenizer.eos_token)))
        chats = [dialogue for dialogue in dialogues if dialogue.complete]
        if not chats or any(chat.ends_in(ends) for chat in chats):
            return said
        return (
            *said,
            f"The chat template of the tokenizer {self.tokenizer.name_or_path!r} ends no turn by a special token, and "
            f"the model is not taught where a turn ends.",
        )

    def _dialogues(self, split: Split, skipped: Skipped) -> Iterator[Dialogue]:
        for where, record in self.sources[split].records(skipped):
            dialogue = to_dialogue(
                record,
                self.tokenizer,
                where,
                response_only=self.response_only,
                layout=self.layout,
                learn_chosen=self.learn_chosen,
                chat_template_kwargs=self.chat_template_kwargs,
            )
            if isinstance(dialogue, Dialogue):
                yield dialogue
            else:
                fields = ", ".join(map(repr, record)) or "no field"
                skipped.add(dialogue, f"{where}, with {fields}" if _is_unknown(dialogue) else where)

    def _rows(self, dialogues: list[Dialogue], skipped: Skipped) -> Iterator[Row]:
        for complete in (False, True):
            chosen = [dialogue for dialogue in dialogues if dialogue.complete is complete]
            rows = tokenize(
                self.tokenizer,
                [dialogue.text for dialogue in chosen],
                special_tokens=not complete,
                scored_from=[dialogue.scored for dialogue in chosen],
            )
            for dialogue, row in zip(chosen, rows, strict=True):
                whole = row if complete else ended(row, self.tokenizer.eos_token_id)
                cut = whole[: self.max_length]
                if cut.scored[1:].any():
                    yield cut
                else:
                    skipped.add(f"with no response within {self.max_length} tokens", dialogue.where)


def _notes_on_fields(name: str, dialogues: dict[Split, list[Dialogue]]) -> Iterator[str]:
    for split in SPLITS:
        counts = Counter(field for dialogue in dialogues.get(split, ()) for field in dialogue.unused)
        if counts:
            fields = ", ".join(f"{field!r} in {count:,}" for field, count in counts.most_common())
            yield f"{name}: {split}: fields of records that are not used: {fields}"


def _is_unknown(reason: str) -> bool:
    return reason.startswith(UNKNOWN)


def _content(dialogue: Dialogue) -> str:
    return dialogue.text
