import math
from typing import Any

import pytest

from qpruner.datamodules.messages import Conversation, Unusable
from qpruner.datamodules.records import Completion, Instruction, read_record

USER, SAID = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Tom."}
OTHER = {"role": "assistant", "content": "Tim."}
CHAT = [USER, SAID]


def conversation(record: dict[str, Any], **options: Any) -> Conversation:
    meaning = read_record(record, **options)
    assert isinstance(meaning, Conversation)
    return meaning


@pytest.mark.parametrize("name", ["messages", "conversations", "conversation", "dialogue", "dialog", "chat"])
def test_a_chat_by_any_name(name: str) -> None:
    expected = Conversation((USER, SAID), ("prompt", "response"), unused=("id",))
    assert read_record({name: CHAT, "id": 7}) == expected
    sharegpt = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Tom."}]
    assert read_record({name: sharegpt, "id": 7}) == expected


@pytest.mark.parametrize("question", ["instruction", "question", "query", "problem", "input"])
@pytest.mark.parametrize("answer", ["output", "response", "answer", "completion", "solution"])
def test_a_question_and_an_answer_are_an_instruction(question: str, answer: str) -> None:
    assert read_record({question: "Who?", answer: "Tom."}) == Instruction("Who?", "", "Tom.")


@pytest.mark.parametrize("field", ["input", "context"])
def test_an_instruction_has_an_input(field: str) -> None:
    record = {"instruction": "Who?", field: "Tom left.", "output": "Tom.", "category": "qa"}
    assert read_record(record) == Instruction("Who?", "Tom left.", "Tom.", unused=("category",))


def test_an_instruction_has_a_system_prompt_and_a_history() -> None:
    fields = {
        "instruction": "When?",
        "input": "",
        "output": "Now.",
        "system": "Be kind.",
        "history": [["Who?", "Tom."]],
    }
    instruction = Instruction("When?", "", "Now.", "Be kind.", (("Who?", "Tom."),))
    assert read_record(fields) == instruction
    assert read_record({"system_prompt": "Be kind.", "question": "When?", "response": "Now."}) == Instruction(
        "When?", "", "Now.", "Be kind."
    )
    chat = instruction.as_conversation()
    assert [message["content"] for message in chat.messages] == ["Be kind.", "Who?", "Tom.", "When?", "Now."]
    assert chat.parts == ("prompt", "prompt", "response", "prompt", "response")
    with_input = Instruction("Who?", "Tom left.", "Tom.", unused=("id",)).as_conversation()
    assert with_input.messages[0]["content"] == "Who?\n\nTom left." and with_input.unused == ("id",)


def test_texts_of_json_are_texts() -> None:
    assert read_record({"instruction": "[1]", "output": '{"a": 1}'}) == Instruction("[1]", "", '{"a": 1}')


def test_a_prompt_and_its_completion_as_trl_has_them() -> None:
    assert read_record({"prompt": "The sky", "completion": " is blue."}) == Completion("The sky", " is blue.")
    expected = Conversation((USER, SAID, USER, SAID), ("prompt", "prompt", "prompt", "response"))
    assert read_record({"prompt": [USER, SAID, USER], "completion": [SAID]}) == expected
    assert read_record({"prompt": [USER, SAID, USER], "completion": "Tom."}) == expected
    assert read_record({"prompt": "Who?", "completion": [SAID]}) == Conversation((USER, SAID), ("prompt", "response"))
    assert read_record({"prompt": "Who?", "response": "Tom."}) == Instruction("Who?", "", "Tom.")


LEARNT = Conversation((USER, SAID), ("prompt", "response"))


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "The sky", "chosen": " is blue."}, Completion("The sky", " is blue.")),
        ({"question": "Who?", "chosen": "Tom."}, Instruction("Who?", "", "Tom.")),
        ({"prompt": [USER], "chosen": [SAID]}, LEARNT),
        ({"prompt": "Who?", "chosen": CHAT}, LEARNT),  # UltraFeedback
        ({"prompt": [USER], "chosen": CHAT}, LEARNT),
        ({"chosen": CHAT}, LEARNT),
        ({"messages": CHAT, "chosen": CHAT}, LEARNT),
        ({"conversations": [{"from": "human", "value": "Who?"}], "chosen": {"from": "gpt", "value": "Tom."}}, LEARNT),
    ],
)
def test_the_chosen_one_of_two_answers(record: dict[str, Any], expected: Any) -> None:
    rejected: Any = "no" if isinstance(record["chosen"], str) else [*CHAT[: len(record["chosen"]) - 1], OTHER]
    assert read_record({**record, "rejected": rejected}, learn_chosen=True) == expected


def test_a_preference_without_a_prompt_is_learnt_from_where_its_answers_part() -> None:
    chosen, rejected = [USER, SAID, USER, SAID], [USER, SAID, USER, OTHER]
    meaning = conversation({"chosen": chosen, "rejected": rejected}, learn_chosen=True)
    assert meaning.parts == ("prompt", "prompt", "prompt", "response")
    with pytest.raises(Unusable, match="^with 'chosen' alone for an answer, which --data.init_args.learn_chosen true"):
        read_record({"chosen": chosen, "rejected": rejected})
    assert conversation({"messages": CHAT, "chosen": chosen, "rejected": []}).unused == ("chosen",)


def test_what_goes_with_a_chat() -> None:
    tool, document = {"type": "function", "function": {"name": "look"}}, {"title": "a", "text": "b"}
    record = {
        "messages": CHAT,
        "system": "Be kind.",
        "tools": '[{"name": "look"}]',
        "documents": [document],
        "enable_thinking": False,
        "chat_template_kwargs": {"effort": "low", "nothing": None},
        "source": "here",
    }
    chat = conversation(record)
    assert chat.messages[0] == {"role": "system", "content": "Be kind."} and chat.parts[0] == "prompt"
    variables = {"tools": [tool], "documents": [document], "enable_thinking": False, "effort": "low"}
    assert chat.variables == variables
    assert chat.unused == ("source",)
    assert conversation({"messages": CHAT, "functions": [{"name": "look"}]}).variables == {"tools": [tool]}
    own = conversation({"messages": [{"role": "system", "content": "Mine."}, *CHAT], "system": "Be kind."})
    assert own.messages[0]["content"] == "Mine." and own.unused == ("system",)


def test_fields_of_other_formats_are_empty_in_mixed_tables() -> None:
    for nothing in (None, math.nan, "", []):
        alpaca = dict.fromkeys(("messages", "prompt", "tools", "system", "history"), nothing)
        record = {**alpaca, "instruction": "Who?", "input": nothing, "output": "Tom."}
        assert read_record(record) == Instruction("Who?", "", "Tom.")
        assert read_record({"messages": CHAT, **dict.fromkeys(("instruction", "output", "tools"), nothing)}) == LEARNT


def test_a_dialogue_that_is_a_text_is_no_chat_where_there_is_an_answer() -> None:
    record = {"dialogue": "A: Who? B: Tom.", "question": "Who?", "answer": "Tom."}
    assert read_record(record) == Instruction("Who?", "", "Tom.", unused=("dialogue",))
    with pytest.raises(Unusable, match="^whose 'dialogue' are not a list of role and content$"):
        read_record({"dialogue": "A: Who? B: Tom."})


@pytest.mark.parametrize("name", ["label", "kto_tag"])
def test_answers_that_are_labelled_as_bad_are_not_learnt(name: str) -> None:
    for record in ({"prompt": "The sky", "completion": " is blue."}, {"messages": CHAT}):
        for bad in (False, "False"):
            with pytest.raises(Unusable, match="^whose answer is labelled as a bad one$"):
                read_record({**record, name: bad})
        assert read_record({**record, name: True}) == read_record(record)
        assert read_record({**record, name: 0}).unused == (name,)  # a class


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({}, "in no known format"),
        ({"title": "x"}, "in no known format"),
        ({"question": "x"}, "in no known format, without an answer to 'question'"),
        ({"answer": "x"}, "in no known format, without a question for 'answer'"),
        ({"text": "x"}, "with 'text' alone, which TextDataModule reads"),
        ({"instruction": "x", "output": " "}, "with an empty instruction or output"),
        ({"instruction": "", "output": "x"}, "with an empty instruction or output"),
        ({"question": "x", "answer": 7}, "whose 'answer' is no text"),
        ({"instruction": "x", "input": 7, "output": "y"}, "whose input or system is no text"),
        (
            {"instruction": "x", "history": ["y"], "output": "z"},
            "whose 'history' is not a list of instruction and answer",
        ),
    ],
)
def test_records_that_cannot_be_used(record: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unusable) as caught:
        read_record(record)
    assert str(caught.value) == reason
