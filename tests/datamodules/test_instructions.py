import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors

from qpruner.datamodules import InstructionDataModule
from qpruner.datamodules.instructions import to_dialogue
from qpruner.errors import UserError
from qpruner.pretrained import EMBEDDED, load_tokenizer

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% if m['role'] == 'assistant' %}</s>{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
RECORD = {"instruction": "Name a colour.", "input": "", "output": "It is red."}


@pytest.fixture
def tokenizer() -> Any:
    tokenizer = load_tokenizer(EMBEDDED)
    tokenizer.chat_template = CHAT
    return tokenizer


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


def test_alpaca_prompts_to_the_letter(tokenizer: Any) -> None:
    dialogue = to_dialogue(RECORD, tokenizer, "")
    assert not isinstance(dialogue, str)
    assert dialogue.text == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nName a colour.\n\n### Response:\nIt is red."
    )
    assert [dialogue.text[first:last] for first, last in dialogue.responses] == ["It is red."]
    dialogue = to_dialogue({**RECORD, "input": "{not} green"}, tokenizer, "")
    assert not isinstance(dialogue, str)
    assert dialogue.text == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request."
        "\n\n### Instruction:\nName a colour.\n\n### Input:\n{not} green\n\n### Response:\nIt is red."
    )


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
    assert scored_text(module, 0) == "Tom left.</s>\nOn Friday.</s>\n"


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
        "1 with neither 'messages' nor 'instruction' and 'output' or 'response' (first: records.json record 2)",
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
    with pytest.raises(UserError, match="holds no usable record: 1 with neither"):
        make([{"question": "x"}], tmp_path).examples("test")
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
# What matters here of the templates of well-known models, with what is to be scored of the four turns.
TEMPLATES = {
    "chatml": (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe good.<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "Tom left.<|im_end|>\nOn Friday.<|im_end|>\n",
    ),
    "llama 2": (
        "{% for m in messages %}{% if m['role'] == 'user' %}<s>[INST] {{ m['content'] }} [/INST]"
        "{% else %} {{ m['content'] | trim }} </s>{% endif %}{% endfor %}",
        " Tom left. </s> On Friday. </s>",
    ),
    "qwen 3": (  # a thought before the last answer
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "Tom left.<|im_end|>\n<think>\n\n</think>\n\nOn Friday.<|im_end|>\n",
    ),
    "phi 3": (  # the end of text after the last turn
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}</s>{% endif %}",
        "Tom left.<|end|>\nOn Friday.<|end|>\n</s>",
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_of_well_known_models(name: str, tokenizer: Any, tmp_path: Path) -> None:
    template, scored = TEMPLATES[name]
    special = ["<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|end|>", "[INST]", "[/INST]"]
    module = make([{"messages": TURNS}], tmp_path, template)
    for each in (tokenizer, module.tokenizer):
        each.add_special_tokens({"additional_special_tokens": special})
        each.chat_template = template
    assert scored_text(module, 0) == scored
    assert module.tokenizer.decode(module.examples("test").rows.tokens) == tokenizer.apply_chat_template(
        TURNS, tokenize=False
    )


def test_a_system_message_is_not_scored(tmp_path: Path) -> None:
    module = make([{"messages": [{"role": "system", "content": "Be kind."}, *TURNS]}], tmp_path, CHAT)
    assert scored_text(module, 0) == "Tom left.</s>\nOn Friday.</s>\n"


def test_chats_that_a_template_has_no_place_for_are_counted(tmp_path: Path) -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system, please') }}{% endif %}" + CHAT
    upper = CHAT.replace("{{ m['content'] }}", "{{ m['content'] if loop.last else m['content'] | upper }}")
    chats: list[Any] = [
        TURNS,
        [{"role": "system", "content": "Be kind."}, *TURNS],
        TURNS[1:],
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
        "2 whose 'messages' are not a list of role and content (first: records.json record 3)",
        "1 without a response (first: records.json record 5)",
        "1 with half a surrogate pair, which is no Unicode text (first: records.json record 6)",
    ):
        assert reason in note
    with pytest.raises(UserError, match="1 whose responses the chat template puts at no fixed place"):
        make([{"messages": TURNS}], tmp_path, upper).examples("test")


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
    with pytest.raises(UserError, match="a.json' holds no usable record: 1 with neither 'messages' nor"):
        InstructionDataModule(train=str(tmp_path / "a.json"), tokenizer=EMBEDDED).prepare_data()


def test_a_missing_end_token_is_told_where_no_template_writes_one(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    for records, told in (([RECORD, chat], True), ([chat], False)):
        module = make(records, tmp_path, CHAT)
        module.tokenizer.eos_token = None
        notes = "".join(module.prepared.notes)
        assert ("has no end-of-text token: no row of 'instruction' and 'output' ends with one" in notes) is told
