from typing import Any

import pytest
from support import chat_formats as formats

from qpruner.datamodules.dialogues import Dialogue, to_dialogue
from qpruner.errors import UserError
from qpruner.pretrained import EMBEDDED, load_tokenizer

RECORD = {"instruction": "Name a colour.", "input": "", "output": "It is red."}
BELOW = "Below is an instruction that describes a task"
WRITE = "Write a response that appropriately completes the request.\n\n"


@pytest.fixture
def tokenizer() -> Any:
    return load_tokenizer(EMBEDDED)


def dialogue(record: dict[str, Any], tokenizer: Any, **options: Any) -> Dialogue:
    result = to_dialogue(record, tokenizer, "a.json record 0", **options)
    assert isinstance(result, Dialogue)
    return result


def scored(dialogue: Dialogue) -> list[str]:
    assert dialogue.scored is not None
    return [dialogue.text[first:last] for first, last in dialogue.scored]


def test_alpaca_prompts_to_the_letter(tokenizer: Any) -> None:
    plain = dialogue(RECORD, tokenizer)
    assert plain.text == f"{BELOW}. {WRITE}### Instruction:\nName a colour.\n\n### Response:\nIt is red."
    assert scored(plain) == ["It is red."] and not plain.complete
    with_input = dialogue({**RECORD, "input": "{not} green"}, tokenizer)
    assert with_input.text == (
        f"{BELOW}, paired with an input that provides further context. {WRITE}"
        "### Instruction:\nName a colour.\n\n### Input:\n{not} green\n\n### Response:\nIt is red."
    )
    assert scored(with_input) == ["It is red."]


def test_a_system_prompt_and_a_history_stand_in_the_prompt_of_alpaca(tokenizer: Any) -> None:
    record = {**RECORD, "system": "Be kind.", "history": [["Who?", "Tom."]]}
    both = dialogue(record, tokenizer)
    assert both.text == (
        "Be kind.\n\n### Instruction:\nWho?\n\n### Response:\nTom.</s>\n\n"
        "### Instruction:\nName a colour.\n\n### Response:\nIt is red."
    )
    assert scored(both) == ["Tom.</s>", "It is red."]
    assert both.unused == ()


def test_a_prompt_and_its_completion_are_joined_to_the_letter(tokenizer: Any) -> None:
    joined = dialogue({"prompt": "The sky", "completion": " is blue."}, tokenizer)
    assert joined.text == "The sky is blue." and scored(joined) == [" is blue."] and not joined.complete
    assert dialogue({"prompt": "The sky", "completion": " is blue."}, tokenizer, layout="chat") == joined


def test_everything_is_scored_on_demand(tokenizer: Any) -> None:
    tokenizer.chat_template = formats.CHATML
    chat = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Tom."}]}
    for record in (RECORD, chat, {"prompt": "The sky", "completion": " is blue."}):
        assert dialogue(record, tokenizer, response_only=False).scored is None


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "without a response"),
        ([{"role": "system", "content": "Be kind."}], "without a response"),
        ([{"role": "user", "content": "Who?"}], "without a response"),
        ([{"role": "assistant", "content": "Tom."}], "that begins with a response"),
        (
            [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": ""}],
            "without a response that is to be learnt: all are empty, of weight 0 or not to be trained",
        ),
        (
            [{"role": "user", "content": "\ud83d"}, {"role": "assistant", "content": "Tom."}],
            "with half a surrogate pair, which is no Unicode text",
        ),
    ],
)
@pytest.mark.parametrize("response_only", [True, False])
def test_chats_without_a_response(tokenizer: Any, messages: list[Any], reason: str, response_only: bool) -> None:
    tokenizer.chat_template = formats.CHATML
    assert to_dialogue({"messages": messages}, tokenizer, "", response_only=response_only) == reason


def test_a_chat_may_begin_with_a_greeting(tokenizer: Any) -> None:
    tokenizer.chat_template = formats.CHATML
    messages = [
        {"from": "gpt", "value": "Hello."},
        {"from": "human", "value": "Who?"},
        {"from": "gpt", "value": "Tom."},
    ]
    greeting = dialogue({"conversations": messages}, tokenizer)
    assert "Hello." in greeting.text and scored(greeting) == ["Tom.<|im_end|>\n"]  # no token of this tokenizer


def test_a_chat_needs_a_chat_template(tokenizer: Any) -> None:
    chat = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Tom."}]}
    with pytest.raises(UserError, match=r"^a.json record 0 is a chat.*put a chat_template.jinja into the tokenizer's"):
        to_dialogue(chat, tokenizer, "a.json record 0")
