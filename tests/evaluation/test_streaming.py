"""What `qpruner generate` writes, against transformers' own greedy text, and what it refuses."""

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from qpruner.commands import run
from qpruner.errors import UserError
from qpruner.evaluation.streaming import generation_config, prompt_tokens
from qpruner.evaluation.subject import Subject

PROMPT = "Once upon a time"


def written(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[str, str]:
    run(["generate", "qpruner/stories", "--prompt", PROMPT, "--max-new-tokens", "8", "--device", "cpu", *options])
    text, _, last = capsys.readouterr().out.rstrip().rpartition("\n")
    return text.strip(), last


def test_the_likeliest_text_is_printed_with_its_speed(capsys: pytest.CaptureFixture[str]) -> None:
    text, last = written(capsys)
    subject = Subject.load("qpruner/stories")
    tokens = torch.tensor([subject.tokenizer(PROMPT)["input_ids"]])
    with torch.inference_mode():
        for _ in range(8):
            likeliest = subject.network(input_ids=tokens, use_cache=False).logits[:, -1].argmax(1, keepdim=True)
            tokens = torch.cat([tokens, likeliest], 1)
    assert text == subject.tokenizer.decode(tokens[0], skip_special_tokens=True).strip()
    number, seconds, speed = map(float, re.findall(r"([\d.]+) tokens in ([\d.]+) s, ([\d.]+) a second", last)[0])
    assert number == 8
    assert 0 <= seconds < 60
    assert speed > 0
    weights = sum(part.numel() * part.element_size() for part in subject.network.parameters())
    assert f"weights of {weights:,} bytes" in last


def test_draws_repeat_by_their_seed(capsys: pytest.CaptureFixture[str]) -> None:
    texts = [written(capsys, "--temperature", "3", "--seed", seed)[0] for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("adapters", [False, True])
def test_the_generation_config_of_a_model_chooses_no_token(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], adapters: bool
) -> None:
    """Penalties would change the likeliest text, and beams cannot be printed token by token."""
    drawn = ("--temperature", "3")
    expected = [written(capsys)[0], written(capsys, *drawn)[0]]
    load = Subject.load

    def penalizing(*arguments: Any, **options: Any) -> Subject:
        subject = load(*arguments, **options)
        if adapters:
            lora = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
            subject = replace(subject, network=get_peft_model(subject.network, lora))
        own = subject.network.generation_config
        own.update(repetition_penalty=9.0, no_repeat_ngram_size=1, min_new_tokens=8, num_beams=4, top_k=1)
        return subject

    monkeypatch.setattr(Subject, "load", penalizing)
    assert [written(capsys)[0], written(capsys, *drawn)[0]] == expected


def test_a_text_ends_with_the_token_of_the_models_generation_config() -> None:
    subject = Subject.load("qpruner/stories")
    subject.network.generation_config.eos_token_id = [3, 5]
    config = generation_config(subject, 0.5, 7)
    assert (config.eos_token_id, config.max_new_tokens, config.temperature, config.top_k) == ([3, 5], 7, 0.5, 0)
    assert config.pad_token_id == subject.tokenizer.pad_token_id
    assert not generation_config(subject, 0.0, 7).do_sample


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-new-tokens", "0"], "max_new_tokens is 0; give at least 1"),
        (["--max-new-tokens", "100000"], "more than the .* positions that the model knows"),
        (["--temperature", "-1"], "temperature is -1; give 0"),
        (["--chat", "true"], "no chat template"),
    ],
)
def test_what_cannot_be_is_refused(options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(["generate", "qpruner/stories", "--prompt", PROMPT, "--device", "cpu", *options])


class Tokenizer:
    eos_token_id = 9
    chat_template = "yes"

    def apply_chat_template(self, turns: list[dict[str, str]], **options: bool) -> dict[str, list[int]]:
        assert turns == [{"role": "user", "content": "Hi"}]
        assert options["add_generation_prompt"]
        return {"input_ids": [1, 2]}

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [3, 9, 4, 9]}


def test_chats_take_the_template_and_texts_are_open_at_their_end() -> None:
    subject: Any = SimpleNamespace(tokenizer=Tokenizer(), network=SimpleNamespace(generation_config=None))
    assert prompt_tokens(subject, "Hi", chat=True).tolist() == [[1, 2]]
    assert prompt_tokens(subject, "Hi", chat=False).tolist() == [[3, 9, 4]]
