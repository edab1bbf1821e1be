"""What is scored of chats under the templates of well-known models, to the letter."""

from typing import Any

import pytest
from support import chat_formats as formats

from qpruner.datamodules.chat_templates import lay_out
from qpruner.datamodules.messages import Conversation, Part, Unusable
from qpruner.datamodules.records import read_record
from qpruner.pretrained import EMBEDDED, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizer = load_tokenizer(EMBEDDED)
    tokenizer.add_special_tokens({"additional_special_tokens": list(formats.TOKENS)})
    return tokenizer


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def said(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def scored(tokenizer: Any, template: str, chat: list[Any], *, response_only: bool = True, **fields: Any) -> list[str]:
    tokenizer.chat_template = template
    conversation = read_record({"messages": chat, **fields})
    assert isinstance(conversation, Conversation)
    text, spans, _ = lay_out(tokenizer, conversation, response_only=response_only)
    return [text] if spans is None else [text[first:last] for first, last in spans]


SYSTEM = {"role": "system", "content": "Be kind."}
PLAIN = [user("Who?"), said("Tom."), user("When?"), said("On Friday.")]
THOUGHTS = [user("Who?"), said("<think>\nHm.\n</think>\n\nTom."), user("When?"), said("<think>\nSo.\n</think>\n\nNow.")]
REASONING = [user("Who?"), said("Tom.", reasoning_content="Hm."), user("When?"), said("Now.", reasoning_content="So.")]
CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "look", "arguments": {"day": 3}}}
RESULT = {"role": "tool", "content": "rain", "tool_call_id": "abcdefghi"}
CALLS = [user("Who?"), said("Tom."), user("Rain?"), said("", tool_calls=[CALL]), RESULT, said("Yes.")]
TWO_CALLS = [user("Rain?"), said("", tool_calls=[CALL, CALL]), RESULT, RESULT, said("Yes.")]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (formats.CHATML, "<|im_end|>"),
        (formats.SMOLLM2, "<|im_end|>"),
        (formats.SMOLLM3, "<|im_end|>"),
        (formats.QWEN25, "<|im_end|>"),
        (formats.LLAMA3, "<|eot_id|>"),
        (formats.GEMMA, "<end_of_turn>"),
        (formats.DEEPSEEK_R1, "</s>"),
        (formats.ZEPHYR, "</s>"),
        (formats.COMMAND_R, "<|END_OF_TURN_TOKEN|>"),
    ],
)
@pytest.mark.parametrize("before", [[], [SYSTEM]])
def test_responses_are_scored_with_their_end_of_turn(
    tokenizer: Any, template: str, end: str, before: list[Any]
) -> None:
    assert scored(tokenizer, template, before + PLAIN) == ["Tom." + end, "On Friday." + end]
    assert scored(tokenizer, template, before + PLAIN[:2]) == ["Tom." + end]


@pytest.mark.parametrize(
    ("template", "first", "last"),
    [
        (formats.LLAMA2, " Tom. </s>", " On Friday. </s>"),
        (formats.MISTRAL, " Tom.</s>", " On Friday.</s>"),
        (formats.PHI3, "Tom.<|end|>", "On Friday.<|end|>"),
        (formats.QWEN3, "Tom.<|im_end|>", "<think>\n\n</think>\n\nOn Friday.<|im_end|>"),
        (
            formats.GPT_OSS,
            "<|channel|>final<|message|>Tom.<|end|>",
            "<|channel|>final<|message|>On Friday.<|return|>",
        ),
    ],
)
def test_what_a_template_writes_around_a_response_is_the_model_s_to_write(
    tokenizer: Any, template: str, first: str, last: str
) -> None:
    assert scored(tokenizer, template, PLAIN) == [first, last]
    assert scored(tokenizer, template, [SYSTEM, *PLAIN]) == [first, last]


def test_thoughts_are_scored_where_the_template_writes_them(tokenizer: Any) -> None:
    for chat in (THOUGHTS, REASONING):
        assert scored(tokenizer, formats.QWEN3, chat) == ["Tom.<|im_end|>", "<think>\nSo.\n</think>\n\nNow.<|im_end|>"]
    assert scored(tokenizer, formats.CHATML, THOUGHTS)[0] == "<think>\nHm.\n</think>\n\nTom.<|im_end|>"
    assert scored(tokenizer, formats.DEEPSEEK_R1, THOUGHTS) == ["\n\nTom.</s>", "\n\nNow.</s>"]
    assert scored(tokenizer, formats.GPT_OSS, REASONING) == [
        "<|channel|>final<|message|>Tom.<|end|>",
        "<|channel|>analysis<|message|>So.<|end|><|start|>assistant<|channel|>final<|message|>Now.<|return|>",
    ]


def test_a_tail_without_a_response_is_left_out(tokenizer: Any) -> None:
    chat = [*THOUGHTS[:2], user("Thanks.")]
    assert scored(tokenizer, formats.QWEN3, chat) == ["<think>\nHm.\n</think>\n\nTom.<|im_end|>"]
    (text,) = scored(tokenizer, formats.QWEN3, chat, response_only=False)
    assert text == tokenizer.apply_chat_template(chat, tokenize=False)


def test_the_generation_prompt_is_never_scored(tokenizer: Any) -> None:
    empty = [user("Who?"), said("Tom.")]
    assert scored(tokenizer, formats.QWEN3, empty) == ["<think>\n\n</think>\n\nTom.<|im_end|>"]
    assert scored(tokenizer, formats.QWEN3, empty, enable_thinking=False) == ["Tom.<|im_end|>"]
    kwargs = {"chat_template_kwargs": {"enable_thinking": False}}
    assert scored(tokenizer, formats.QWEN3, empty, **kwargs) == ["Tom.<|im_end|>"]
    # Where the two part in the middle of a word of the template, the response begins before that word.
    bold = [user("Who?"), said("<b>Tom</b>.")]
    assert scored(tokenizer, formats.DEEPSEEK_R1, bold) == ["<b>Tom</b>.</s>"]


WRITTEN = '{"name": "look", "arguments": {"day": 3}}'


@pytest.mark.parametrize(
    ("template", "call", "two_calls"),
    [
        (
            formats.QWEN25,
            f"<tool_call>\n{WRITTEN}\n</tool_call><|im_end|>",
            f"<tool_call>\n{WRITTEN}\n</tool_call>\n<tool_call>\n{WRITTEN}\n</tool_call><|im_end|>",
        ),
        (
            formats.MISTRAL,
            f'[TOOL_CALLS] [{WRITTEN[:-1]}, "id": "abcdefghi"}}]</s>',
            f'[TOOL_CALLS] [{WRITTEN[:-1]}, "id": "abcdefghi"}}, {WRITTEN[:-1]}, "id": "abcdefghi"}}]</s>',
        ),
        (
            formats.DEEPSEEK_R1,
            '<|calls|><|call|>function<|sep|>look\n```json\n{"day": 3}\n```<|/call|><|/calls|></s>',
            "<|calls|>" + '<|call|>function<|sep|>look\n```json\n{"day": 3}\n```<|/call|>' * 2 + "<|/calls|></s>",
        ),
        (formats.LLAMA3, '{"name": "look", "parameters": {"day": 3}}<|eot_id|>', None),
    ],
)
@pytest.mark.parametrize("fields", [{}, {"tools": TOOLS}])
def test_tool_calls_are_scored(
    tokenizer: Any, template: str, call: str, two_calls: str | None, fields: dict[str, Any]
) -> None:
    assert scored(tokenizer, template, CALLS, **fields)[1].strip() == call
    if two_calls is not None:
        assert scored(tokenizer, template, TWO_CALLS, **fields)[0] == two_calls
    else:
        with pytest.raises(Unusable, match="that the chat template refuses .This model only supports single tool-call"):
            scored(tokenizer, template, TWO_CALLS, **fields)


def test_tool_calls_under_qwen_3(tokenizer: Any) -> None:
    assert scored(tokenizer, formats.QWEN3, CALLS, tools=TOOLS) == [
        "Tom.<|im_end|>",
        f"<tool_call>\n{WRITTEN}\n</tool_call><|im_end|>",
        "<think>\n\n</think>\n\nYes.<|im_end|>",
    ]


@pytest.mark.parametrize("template", [formats.PHI3, formats.ZEPHYR, formats.COMMAND_R, formats.CHATML])
@pytest.mark.parametrize("response_only", [True, False])
def test_an_answer_is_not_learnt_without_the_call_it_consists_of(
    tokenizer: Any, template: str, response_only: bool
) -> None:
    chat = [user("Rain?"), said("", tool_calls=[CALL])]
    with pytest.raises(Unusable, match="^with tool calls, which the chat template leaves out$"):
        scored(tokenizer, template, chat, response_only=response_only)


def test_turns_of_weight_0_are_never_scored(tokenizer: Any) -> None:
    chat = [user("Who?"), said("Tim.", weight=0), user("Really?"), said("Tom.", weight=1)]
    for template in (formats.CHATML, formats.SMOLLM3):
        assert scored(tokenizer, template, chat) == ["Tom.<|im_end|>"]
    first, last = scored(tokenizer, formats.CHATML, chat, response_only=False)
    assert first == "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    assert last == "\n<|im_start|>user\nReally?<|im_end|>\n<|im_start|>assistant\nTom.<|im_end|>\n"


def test_a_greeting_is_no_response(tokenizer: Any) -> None:
    for template in (formats.CHATML, formats.SMOLLM3):
        conversation = Conversation((said("Hello."), *PLAIN[:2]), ("prompt", "prompt", "response"))
        tokenizer.chat_template = template
        text, spans, _ = lay_out(tokenizer, conversation, response_only=True)
        assert spans is not None and [text[first:last] for first, last in spans] == ["Tom.<|im_end|>"]
        assert "Hello." in text


def test_two_turns_of_the_assistant_in_a_row_are_both_responses(tokenizer: Any) -> None:
    chat = [user("Who?"), said("Tom."), said("And Ann."), user("When?"), said("Now.")]
    expected = ["Tom.<|im_end|>", "And Ann.<|im_end|>", "Now.<|im_end|>"]
    assert scored(tokenizer, formats.QWEN25, chat) == expected
    with pytest.raises(Unusable, match="refuses .Roles must alternate user/assistant/user/assistant"):
        scored(tokenizer, formats.GEMMA, chat)


def test_a_developer_is_the_system_of_templates_that_know_none(tokenizer: Any) -> None:
    chat = [{"role": "developer", "content": "Be kind."}, *PLAIN[:2]]
    (text,) = scored(tokenizer, formats.QWEN25, chat, response_only=False)
    assert text.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user")
    (text,) = scored(tokenizer, formats.GPT_OSS, chat, response_only=False)
    assert text.startswith("<|start|>developer<|message|># Instructions\nBe kind.<|end|>")


def ignored(tokenizer: Any, template: str, chat: list[Any], **fields: Any) -> tuple[str, ...]:
    tokenizer.chat_template = template
    conversation = read_record({"messages": chat, **fields})
    assert isinstance(conversation, Conversation)
    return lay_out(tokenizer, conversation, response_only=True)[2]


def test_what_the_template_leaves_out_is_named(tokenizer: Any) -> None:
    assert ignored(tokenizer, formats.CHATML, REASONING, tools=TOOLS, documents=[{"title": "a", "text": "b"}]) == (
        "tools",
        "documents",
        "messages.reasoning_content",
    )
    last = REASONING[2:]
    assert ignored(tokenizer, formats.QWEN3, last, tools=TOOLS, enable_thinking=True) == ()
    assert ignored(tokenizer, formats.DEEPSEEK_R1, THOUGHTS) == ("messages.content (<think>)",)
    assert ignored(tokenizer, formats.QWEN3, THOUGHTS) == ("messages.content (<think>) of some turns",)
    assert ignored(tokenizer, formats.QWEN3, REASONING) == ("messages.reasoning_content of some turns",)
    assert ignored(tokenizer, formats.QWEN25, [{**user("Who?"), "name": "Ann"}, said("Tom.")]) == ("messages.name",)


@pytest.mark.parametrize(
    ("template", "message", "name"),
    [
        (formats.QWEN25, {"role": "critic", "content": "Who?"}, "messages.content of critic"),
        (formats.SMOLLM3, SYSTEM, "messages.content of system"),
        (
            formats.PHI3.replace("{{ m['content'] }}", "{{ m['content'] if m['role'] != 'tool' }}"),
            RESULT,
            "messages.content of tool",
        ),
    ],
)
def test_what_nobody_but_the_assistant_says_may_be_left_out_and_is_named(
    tokenizer: Any, template: str, message: dict[str, Any], name: str
) -> None:
    assert name in ignored(tokenizer, template, [message, *PLAIN])


@pytest.mark.parametrize("template", [formats.LLAMA3, formats.MISTRAL, formats.DEEPSEEK_R1])
@pytest.mark.parametrize("response_only", [True, False])
def test_a_response_is_not_learnt_without_its_text(tokenizer: Any, template: str, response_only: bool) -> None:
    chat = [user("Rain?"), said("I look.", tool_calls=[CALL]), RESULT, said("Yes.")]
    with pytest.raises(
        Unusable, match="^with (text in a response|tool calls)(,| that) .*the chat template leaves out$"
    ):
        scored(tokenizer, template, chat, response_only=response_only)
    assert scored(tokenizer, formats.QWEN25, chat)[0].startswith("I look.\n<tool_call>")


def test_a_response_is_not_learnt_without_one_of_its_calls(tokenizer: Any) -> None:
    first_only = formats.QWEN25.replace("in m.tool_calls or []", "in (m.tool_calls or [])[:1]")
    other = {**CALL, "function": {"name": "go", "arguments": {}}}
    with pytest.raises(Unusable, match="^with tool calls, which the chat template leaves out$"):
        scored(tokenizer, first_only, [user("Rain?"), said("", tool_calls=[CALL, other])])


def test_a_turn_of_thoughts_that_are_left_out_is_empty(tokenizer: Any) -> None:
    silent = [said("", reasoning_content="Hm."), said("<think>Hm.</think>", reasoning_content="Hm.")]
    assert scored(tokenizer, formats.QWEN25, [user("Who?"), silent[0], *PLAIN[:2]]) == ["Tom.<|im_end|>"]
    assert scored(tokenizer, formats.DEEPSEEK_R1, [*PLAIN[:2], user("Who?"), silent[1]]) == ["Tom.</s>"]
    with pytest.raises(Unusable, match="^without a response of which the chat template writes anything out$"):
        scored(tokenizer, formats.QWEN25, [user("Who?"), silent[0]])


def test_a_call_outside_of_generation_blocks_is_learnt(tokenizer: Any) -> None:
    block = "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    partly = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m.tool_calls %}"
        "[{{ m.tool_calls[0].function.name }}]<|im_end|>{% elif m['role'] == 'assistant' %}"
        + block
        + "{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
        + formats.GENERATE
        + "<|im_start|>assistant\n{% endif %}"
    )
    assert scored(tokenizer, partly, CALLS) == ["Tom.<|im_end|>", "[look]<|im_end|>", "Yes.<|im_end|>"]


def test_generation_blocks_in_a_comment_are_none(tokenizer: Any) -> None:
    commented = formats.CHATML + "{# {% generation %} would stand here #}"
    assert scored(tokenizer, commented, PLAIN) == ["Tom.<|im_end|>", "On Friday.<|im_end|>"]


def test_calls_that_a_template_writes_where_the_content_is_null(tokenizer: Any) -> None:
    null = formats.DEEPSEEK_R1.replace("and m.tool_calls", "and m['content'] is none")
    assert scored(tokenizer, null, CALLS)[1] == (
        '<|calls|><|call|>function<|sep|>look\n```json\n{"day": 3}\n```<|/call|><|/calls|></s>'
    )


def test_the_block_of_a_turn_of_weight_0_goes_with_its_header(tokenizer: Any) -> None:
    whole = formats.SMOLLM3.replace(
        "<|im_start|>assistant\n{% generation %}", "{% generation %}<|im_start|>assistant\n"
    )
    chat = [user("Who?"), said("Tim.", weight=0), user("Really?"), said("Tom.")]
    assert scored(tokenizer, whole, chat) == ["<|im_start|>assistant\nTom.<|im_end|>"]


def test_a_name_that_the_result_of_the_call_repeats_is_not_scored(tokenizer: Any) -> None:
    assert scored(tokenizer, formats.GPT_OSS_TOOLS, [*CALLS[2:5], said("Yes.", thinking="So.")]) == [
        ' to=functions.look<|message|>{"day": 3}<|call|>',
        "<|channel|>analysis<|message|>So.<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>",
    ]


def test_signs_for_private_use_are_text_as_any_other(tokenizer: Any) -> None:
    chat = [user("\U000f0000?"), said("\U000f0001\U000f0002."), user("?"), said("\U000f0000")]
    assert scored(tokenizer, formats.QWEN3, chat) == [
        "\U000f0001\U000f0002.<|im_end|>",
        "<think>\n\n</think>\n\n\U000f0000<|im_end|>",
    ]
    assert ignored(tokenizer, formats.QWEN25, [{"role": "critic", "content": "\U000f0000"}, *chat]) == (
        "messages.content of critic",
    )


TOOLS_LAST = formats.CHATML.replace(
    formats.GENERATE, "{% if tools %}TOOLS{{ tools | tojson }}{% endif %}" + formats.GENERATE
)
ENDED_ONCE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ '\n' }}{% endfor %}" + (
    "{% if add_generation_prompt %}assistant: {% else %}</s>{% endif %}"
)
DATED = "Now: {{ messages | length }}{{ '\n' }}" + formats.CHATML


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (TOOLS_LAST, ["Tom.<|im_end|>", "On Friday.<|im_end|>"]),
        (ENDED_ONCE, ["Tom.\n", "On Friday.\n</s>"]),
        (DATED, ["Tom.<|im_end|>", "On Friday.<|im_end|>"]),  # no render begins as another one does
    ],
)
def test_what_stands_around_all_turns_is_not_scored(tokenizer: Any, template: str, expected: list[str]) -> None:
    assert scored(tokenizer, template, PLAIN, tools=TOOLS) == expected


def test_a_chat_may_end_in_a_call_that_only_its_result_may_follow(tokenizer: Any) -> None:
    strict = (
        "{% for m in messages %}{% if m['role'] == 'user' and loop.index0 and messages[loop.index0 - 1].tool_calls %}"
        "{{ raise_exception('Where is the result?') }}{% endif %}{% endfor %}" + formats.QWEN25
    )
    assert scored(tokenizer, strict, CALLS[2:4])[0].startswith("<tool_call>")


def test_an_empty_turn_is_not_scored_whatever_marks_it(tokenizer: Any) -> None:
    chat = [user("Who?"), said(""), user("Who?"), said("Tom.")]
    for template in (formats.CHATML, formats.SMOLLM3, formats.QWEN3):
        assert scored(tokenizer, template, chat)[-1].endswith("Tom.<|im_end|>")
        assert len(scored(tokenizer, template, chat)) == 1


FIRST_LAST = (  # the answer before the question
    "{% for m in messages | reverse %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
COUNTED = (  # what was said is not what stands there
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | length }}{{ '' if loop.last else '...' }}{% endfor %}"
    "{% if add_generation_prompt %}!{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "trait"),
    [(FIRST_LAST, "does not keep the order of the messages"), (COUNTED, "rewrites what the user says")],
)
def test_responses_without_a_place_need_generation_blocks_or_no_place_at_all(
    tokenizer: Any, template: str, trait: str
) -> None:
    remedy = "put what the assistant says into {% generation %} blocks of the template, or score everything: --data"
    with pytest.raises(Unusable) as caught:
        scored(tokenizer, template, PLAIN)
    assert str(caught.value).startswith(
        f"whose responses cannot be told from prompts, because the chat template {trait};"
    )
    assert remedy in str(caught.value)
    (text,) = scored(tokenizer, template, PLAIN, response_only=False)
    assert text == tokenizer.apply_chat_template(PLAIN, tokenize=False)
    said_here = "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endif %}"
    marked = template.replace("{{ m['content'] }}", said_here).replace("{{ m['content'] | length }}", said_here)
    assert sorted(scored(tokenizer, marked, PLAIN)) == ["On Friday.", "Tom."]


def test_content_rewritten_alike_in_every_render_has_a_place(tokenizer: Any) -> None:
    upper = formats.PHI3.replace("{{ m['content'] }}", "{{ m['content'] if loop.last else m['content'] | upper }}")
    assert scored(tokenizer, upper, PLAIN) == ["TOM.<|end|>", "On Friday.<|end|>"]


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0]['content'] + 3 }}",  # TypeError
        "{{ 1 / (messages | length - 2) }}",  # ZeroDivisionError
        "{{ raise_exception('') }}",
        "{% for m in %}",  # TemplateSyntaxError
        {"a": formats.CHATML},  # none by default
    ],
)
def test_whatever_a_template_raises_skips_the_record(tokenizer: Any, template: Any) -> None:
    with pytest.raises(Unusable, match=r"that the chat template refuses \(.+\)$"):
        scored(tokenizer, template, PLAIN[:2])


def test_named_templates(tokenizer: Any) -> None:
    both: Any = {"default": formats.CHATML, "tool_use": formats.QWEN25}
    assert scored(tokenizer, both, PLAIN[:2]) == ["Tom.<|im_end|>"]
    assert WRITTEN in scored(tokenizer, both, CALLS, tools=TOOLS)[1]


def test_parts_are_kept_apart(tokenizer: Any) -> None:
    """A chat whose prompt holds a response of its own, as in records of prompt and completion."""
    parts: tuple[Part, ...] = ("prompt", "prompt", "prompt", "response")
    for template in (formats.CHATML, formats.SMOLLM3):
        tokenizer.chat_template = template
        text, spans, _ = lay_out(tokenizer, Conversation(tuple(PLAIN), parts), response_only=True)
        assert spans is not None and [text[first:last] for first, last in spans] == ["On Friday.<|im_end|>"]
