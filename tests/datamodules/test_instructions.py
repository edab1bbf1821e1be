import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import chat_formats as formats
from tokenizers import AddedToken, processors

from qpruner.datamodules import InstructionDataModule
from qpruner.datamodules.dialogues import Dialogue, to_dialogue
from qpruner.errors import UserError
from qpruner.pretrained import EMBEDDED, load_tokenizer

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% if m['role'] == 'assistant' %}</s>{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
RECORD = {"instruction": "Name a colour.", "input": "", "output": "It is red."}


def make(records: list[Any], tmp_path: Path, chat_template: str | None = None, **options: Any) -> InstructionDataModule:
    path = tmp_path / "records.json"
    path.write_text(json.dumps(records))
    module = InstructionDataModule(test=str(path), tokenizer=EMBEDDED, **options)
    module.tokenizer.chat_template = chat_template
    return module


def scored_text(module: InstructionDataModule, row: int) -> str:
    rows = module.examples("test").rows
    span = slice(int(rows.offsets[row]), int(rows.offsets[row + 1]))
    return str(module.tokenizer.decode(rows.tokens[span][rows.scored[span]]))


def test_the_response_and_its_end_are_scored_or_everything_is(tmp_path: Path) -> None:
    module = make([RECORD], tmp_path)
    assert scored_text(module, 0) == "It is red.</s>"
    rows = module.examples("test").rows
    assert rows.tokens[0] == module.tokenizer.bos_token_id
    everything = make([RECORD], tmp_path, response_only=False)
    assert scored_text(everything, 0).startswith("<s>Below is") and scored_text(everything, 0).endswith("red.</s>")
    assert torch.equal(everything.examples("test").rows.tokens, rows.tokens)
    assert "responses scored" in module.protocol and "prompts and responses scored" in everything.protocol


def test_every_turn_of_the_assistant_is_scored(tmp_path: Path) -> None:
    chat = [
        {"role": "user", "content": "Who left?"},
        {"role": "assistant", "content": "Tom left."},
        {"role": "user", "content": "When?"},
        {"role": "assistant", "content": "On Friday."},
    ]
    module = make([{"messages": chat}], tmp_path, CHAT)
    rows = module.examples("test").rows
    text = "<user>Who left?\n<assistant>Tom left.</s>\n<user>When?\n<assistant>On Friday.</s>\n"
    assert module.tokenizer.decode(rows.tokens) == text
    assert scored_text(module, 0) == "Tom left.</s>On Friday.</s>"


def test_records_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    user = {"role": "user", "content": "Who?"}
    records: list[Any] = [
        RECORD,
        {"instruction": "x", "output": ""},
        {"question": "x"},
        {"messages": [user]},
        {"messages": "x"},
        {"instruction": "word " * 300, "output": "y"},
        {"messages": None, **RECORD, "output": "It is blue."},
        7,
    ]
    module = make(records, tmp_path, CHAT, max_length=250)
    assert [scored_text(module, row) for row in range(2)] == ["It is red.</s>", "It is blue.</s>"]
    (note,) = [note for note in module.prepared.notes if "skipped" in note]
    for reason in (
        "1 with an empty instruction or output (first: records.json record 1)",
        "1 in no known format, without an answer to 'question' (first: records.json record 2, with 'question')",
        "1 without a response (first: records.json record 3)",
        "1 whose 'messages' are not a list of role and content (first: records.json record 4)",
        "1 with no response within 250 tokens (first: records.json record 5)",
        "1 not a record with named fields (first: records.json record 7)",
    ):
        assert reason in note


def test_a_response_is_an_output_by_another_name(tmp_path: Path) -> None:
    other = {"instruction": RECORD["instruction"], "response": RECORD["output"]}
    one, same = (make([record], tmp_path).examples("test").collate([0]) for record in (RECORD, other))
    assert one["input_ids"].tolist() == same["input_ids"].tolist()
    assert one["labels"].tolist() == same["labels"].tolist()


def test_rows_are_cut_and_padded(tmp_path: Path) -> None:
    long = {**RECORD, "output": "red " * 200}
    module = make([RECORD, long], tmp_path, max_length=200)
    batch = module.examples("test").collate([0, 1])
    assert batch["input_ids"].shape == (2, 200)
    length = int(batch["attention_mask"][0].sum())
    assert length < 200
    assert (batch["input_ids"][0, length:] == module.tokenizer.pad_token_id).all()
    assert (batch["labels"][0, length:] == -100).all()


def test_nothing_usable_and_no_template_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        make([{"title": "x", "body": "y"}, {"title": "z"}], tmp_path).examples("test")
    assert (
        "holds no usable record: 2 in no known format (first: records.json record 0, with 'title', 'body'). Known are "
        in (str(caught.value))
    )
    assert "messages, conversations" in str(caught.value) and "learn_chosen true" in str(caught.value)
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(UserError, match=r"records.json record 0 is a chat.*has no chat template"):
        make([{"messages": chat}], tmp_path).examples("test")


def test_the_same_instruction_never_stands_in_two_splits(tmp_path: Path) -> None:
    records = [{"instruction": f"Name number {n}.", "output": f"It is {n}."} for n in range(300)]
    (tmp_path / "train.json").write_text(json.dumps(records * 2))
    module = InstructionDataModule(train=str(tmp_path / "train.json"), tokenizer=EMBEDDED, held_out=0.1)
    found = []
    for split in ("train", "validation", "test"):
        rows = module.examples(split).rows  # type: ignore[arg-type]
        found.append({tuple(rows.tokens[rows.offsets[i] : rows.offsets[i + 1]].tolist()) for i in range(len(rows))})
    assert [bool(split) for split in found] == [True] * 3
    assert sum(map(len, found)) == len(set.union(*found)) == 300


TURNS = [
    {"role": "user", "content": "Who left?"},
    {"role": "assistant", "content": "Tom left."},
    {"role": "user", "content": "When?"},
    {"role": "assistant", "content": "On Friday."},
]


@pytest.mark.parametrize("template", [formats.SMOLLM2, formats.LLAMA2, formats.QWEN3, formats.PHI3, formats.SMOLLM3])
def test_tokens_of_a_chat_are_those_of_its_template(template: str, tmp_path: Path) -> None:
    module = make([{"messages": TURNS}], tmp_path, template)
    module.tokenizer.add_special_tokens({"additional_special_tokens": list(formats.TOKENS)})
    text = module.tokenizer.apply_chat_template(TURNS, tokenize=False)
    dialogue = to_dialogue({"messages": TURNS}, module.tokenizer, "")
    assert isinstance(dialogue, Dialogue) and dialogue.scored is not None
    assert module.tokenizer.decode(module.examples("test").rows.tokens) == text
    assert scored_text(module, 0) == "".join(text[first:last] for first, last in dialogue.scored)


def test_a_token_that_takes_the_white_space_after_it_is_scored(tmp_path: Path) -> None:
    module = make([{"messages": TURNS}], tmp_path, formats.PHI3)
    module.tokenizer.add_tokens([AddedToken("<|end|>", rstrip=True, special=True)])  # as Phi-3's tokenizer has it
    assert scored_text(module, 0) == "Tom left.<|end|>On Friday.<|end|>"


def test_a_system_message_is_not_scored(tmp_path: Path) -> None:
    module = make([{"messages": [{"role": "system", "content": "Be kind."}, *TURNS]}], tmp_path, CHAT)
    assert scored_text(module, 0) == "Tom left.</s>On Friday.</s>"


def test_chats_that_a_template_has_no_place_for_are_counted(tmp_path: Path) -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system, please') }}{% endif %}" + CHAT
    chats: list[Any] = [
        TURNS,
        [{"role": "system", "content": "Be kind."}, *TURNS],
        TURNS[1:2],
        [*TURNS[:1], {"role": "assistant", "content": None}],
        [*TURNS[:1], {"role": None, "content": "x"}],
        [],
        [*TURNS[:1], {"role": "assistant", "content": "half \ud83d"}],
    ]
    module = make([{"messages": chat} for chat in chats], tmp_path, strict)
    assert len(module.examples("test")) == 1
    (note,) = [note for note in module.prepared.notes if "skipped" in note]
    for reason in (
        "1 that the chat template refuses (No system, please) (first: records.json record 1)",
        "1 that begins with a response (first: records.json record 2)",
        "1 with a message of the assistant that has no content (first: records.json record 3)",
        "1 whose 'messages' are not a list of role and content (first: records.json record 4)",
        "1 without a response (first: records.json record 5)",
        "1 with half a surrogate pair, which is no Unicode text (first: records.json record 6)",
    ):
        assert reason in note
    backwards = CHAT.replace("in messages", "in messages | reverse")
    with pytest.raises(
        UserError, match="1 whose responses cannot be told from prompts.*order of the messages; put what"
    ):
        make([{"messages": TURNS}], tmp_path, backwards).examples("test")
    rows = make([{"messages": TURNS}], tmp_path, backwards, response_only=False).examples("test").rows
    assert rows.num_scored == len(rows.tokens) - 1


def test_an_end_of_text_that_the_tokenizer_adds_is_a_target_too(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(EMBEDDED)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    plain = make([RECORD], tmp_path)
    (tmp_path / "a.json").write_text(json.dumps([RECORD]))
    module = InstructionDataModule(test=str(tmp_path / "a.json"), tokenizer=str(tmp_path / "tokenizer"))
    assert scored_text(module, 0) == "It is red.</s>"
    assert torch.equal(module.examples("test").rows.tokens, plain.examples("test").rows.tokens)


def test_a_response_beyond_the_cut_is_skipped_and_one_across_it_is_cut(tmp_path: Path) -> None:
    whole = make([RECORD], tmp_path).examples("test").rows
    first = int(whole.scored.nonzero()[0])
    module = make([RECORD, {**RECORD, "input": "x" * 50}], tmp_path, max_length=first + 2)
    assert module.examples("test").rows.tokens.tolist() == whole.tokens[: first + 2].tolist()
    assert module.examples("test").rows.num_scored == 2
    (note,) = [note for note in module.prepared.notes if "skipped" in note]
    assert f"1 with no response within {first + 2} tokens (first: records.json record 1)" in note
    with pytest.raises(UserError, match=f"The test split holds no usable record: 1 with no response within {first}"):
        make([RECORD], tmp_path, max_length=first).examples("test")


def test_the_reason_is_told_before_anything_is_held_out(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"prompt": "x"}]')
    with pytest.raises(UserError, match="a.json' holds no usable record: 1 in no known format, without an answer to"):
        InstructionDataModule(train=str(tmp_path / "a.json"), tokenizer=EMBEDDED).prepare_data()


def test_one_bad_record_costs_itself_only(tmp_path: Path) -> None:
    """Arguments of calls come as text from OpenAI, and templates stumble over what is neither text nor data."""
    asked = {"role": "user", "content": "Rain?"}
    calls: list[Any] = ['{"day": 3}', {"day": 3}, "{day: 3", ["x"]]
    template = CHAT.replace(
        "{{ m['content'] }}",
        "{{ m['content'] }}{% for c in m.tool_calls %}{% for key, value in c.function.arguments.items() %}"
        "[{{ c.function.name }} {{ key }} {{ value }}]{% endfor %}{% endfor %}",
    )
    chats = [
        [asked, {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": call}}]}]
        for call in calls
    ]
    module = make([{"messages": chat} for chat in chats], tmp_path, template)
    assert [scored_text(module, row) for row in range(2)] == ["[f day 3]</s>"] * 2
    assert len(module.examples("test")) == 2
    (note,) = [note for note in module.prepared.notes if "skipped" in note]
    assert (
        "1 that the chat template refuses ('str object' has no attribute 'items') (first: records.json record 2)"
        in note
    )
    assert (
        "1 that the chat template refuses ('list object' has no attribute 'items') (first: records.json record 3)"
        in note
    )


def test_fields_that_are_not_used_are_named_with_their_count(tmp_path: Path) -> None:
    chat = [{**TURNS[0], "name": "Ann"}, TURNS[1]]
    records = [{**RECORD, "id": 1}, {**RECORD, "id": 2, "output": "It is blue.", "source": None}]
    module = make([*records, {"messages": chat, "id": 3, "tools": [{"name": "f"}]}, {"id": 4}], tmp_path, CHAT)
    (note,) = [note for note in module.prepared.notes if "not used" in note]
    assert note.endswith("test: fields of records that are not used: 'id' in 3, 'tools' in 1, 'messages.name' in 1")
    assert not [note for note in make([RECORD], tmp_path).prepared.notes if "not used" in note]


def test_instructions_as_chats(tmp_path: Path) -> None:
    record = {**RECORD, "input": "Not green.", "system": "Be kind."}
    module = make([record], tmp_path, CHAT, layout="chat")
    assert module.tokenizer.decode(module.examples("test").rows.tokens) == (
        "<system>Be kind.\n<user>Name a colour.\n\nNot green.\n<assistant>It is red.</s>\n"
    )
    assert scored_text(module, 0) == "It is red.</s>"
    with pytest.raises(UserError, match="has no chat template. Use the tokenizer of a chat model, put a chat_template"):
        make([record], tmp_path, layout="chat").examples("test")


def test_variables_of_the_chat_template(tmp_path: Path) -> None:
    records = [{"messages": TURNS[:2]}, {"messages": TURNS[2:], "chat_template_kwargs": {"mood": "sad"}}]
    template = "{{ mood }}\n" + CHAT
    module = make(records, tmp_path, template, chat_template_kwargs={"mood": "gay"})
    rows = module.examples("test").rows
    texts = module.tokenizer.batch_decode([rows.tokens[: rows.offsets[1]], rows.tokens[rows.offsets[1] :]])
    assert [text.split("\n")[0] for text in texts] == ["gay", "sad"]
    assert module.key != make(records, tmp_path, template).key


def test_chosen_answers_are_learnt_where_they_are_asked_for(tmp_path: Path) -> None:
    record = {"question": "Name a colour.", "chosen": "It is red.", "rejected": "No."}
    with pytest.raises(
        UserError, match="1 with 'chosen' alone for an answer, which --data.init_args.learn_chosen true"
    ):
        make([record], tmp_path).examples("test")
    module = make([record], tmp_path, learn_chosen=True)
    assert scored_text(module, 0) == "It is red.</s>"


@pytest.mark.parametrize("response_only", [True, False])
@pytest.mark.parametrize(("template", "told"), [(CHAT, False), (CHAT.replace("</s>", ""), True), (formats.QWEN3, True)])
def test_a_chat_template_that_ends_no_turn_is_told(
    tmp_path: Path, template: str, told: bool, response_only: bool
) -> None:
    notes = make([{"messages": TURNS}], tmp_path, template, response_only=response_only).prepared.notes
    assert any("ends no turn by a special token" in note for note in notes) is told  # Qwen's is none of this tokenizer


def test_an_empty_split_that_nobody_named_is_held_out_of_train(tmp_path: Path) -> None:
    records = [{"instruction": f"Name number {n}.", "output": f"It is {n}."} for n in range(100)]
    (tmp_path / "train.json").write_text(json.dumps(records))
    (tmp_path / "test.json").write_text('[{"title": "x"}]')
    module = InstructionDataModule(train=str(tmp_path), tokenizer=EMBEDDED, held_out=0.1)
    assert len(module.examples("test")) > 1
    assert any("test: left alone what the folder has of it. The split 'test' of" in n for n in module.prepared.notes)


def test_a_missing_end_token_is_told_where_no_template_writes_one(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    for records, told in (([RECORD, chat], True), ([chat], False)):
        module = make(records, tmp_path, CHAT)
        module.tokenizer.eos_token = None
        notes = "".join(module.prepared.notes)
        assert (
            "has no end-of-text token: no row that is laid out without a chat template ends with one" in notes
        ) is told
