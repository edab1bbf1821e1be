"""Generates text after one prompt, printed as it is generated."""

from time import perf_counter
from typing import Any

import torch

from qpruner.errors import UserError
from qpruner.evaluation.generation import check_positions, unended
from qpruner.evaluation.subject import Subject
from qpruner.likelihood import causal_model
from qpruner.memory import peak_meaning, read_peak, reset_peak, tensor_bytes


def stream(
    name: str,
    prompt: str,
    *,
    chat: bool,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    device: str,
    trust_remote_code: bool,
) -> str:
    """Prints the text that a model generates, and reports its speed and memory use.

    Args:
        name: folder or hub name of the model.
        prompt: text to continue.
        chat: whether the prompt is put into the chat template of the tokenizer.
        max_new_tokens: maximum number of tokens to generate, at least 1.
        temperature: divisor of the logits before a token is sampled; 0 for the most likely token.
        seed: seed for sampling.
        device: ``cpu``, ``cuda``, or ``auto`` for the first CUDA device where there is one.
        trust_remote_code: whether code that comes with the model may run.

    Returns:
        One line with tokens per second, bytes of weights and peak memory.

    Raises:
        UserError: there is no such model or device, the prompt has no tokens, there are more tokens than the model has
            positions, the tokenizer has no chat template, or the temperature is below 0.
    """
    from transformers import TextStreamer

    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; give at least 1.")
    if temperature < 0:
        raise UserError(f"The temperature is {temperature:g}; give 0 for the likeliest token, or more.")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("There is no CUDA device here. Give --device cpu.")
    on = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    reset_peak(on)
    subject = Subject.load(name, trust_remote_code=trust_remote_code)
    network, tokens = subject.network.to(on), prompt_tokens(subject, prompt, chat=chat).to(on)
    check_positions(network, prompt, tokens.shape[1], max_new_tokens)
    torch.manual_seed(seed)
    since = perf_counter()
    # What a given generation config leaves out is taken from that of the model, so the model gets this one as its own.
    config = generation_config(subject, temperature, max_new_tokens)
    causal_model(network).generation_config = config
    with torch.inference_mode():
        written = network.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            generation_config=config,
            streamer=TextStreamer(subject.tokenizer, skip_prompt=chat, skip_special_tokens=True),
        )
    seconds, number = perf_counter() - since, written.shape[1] - tokens.shape[1]
    peak = read_peak(on)
    return (
        f"\n{number} tokens in {seconds:.1f} s, {number / seconds:.1f} a second on {on}; weights of "
        f"{tensor_bytes(network):,} bytes" + (f", peak of {peak:,} bytes ({peak_meaning(on)})." if peak else ".")
    )


def generation_config(subject: Subject, temperature: float, max_new_tokens: int) -> Any:
    """How tokens are chosen: by likelihood alone, without the penalties, beams and cuts of the model's own config."""
    from transformers import GenerationConfig

    own, tokenizer = subject.network.generation_config, subject.tokenizer
    # transformers otherwise samples from 50 tokens only.
    choice = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        bos_token_id=own.bos_token_id,
        eos_token_id=own.eos_token_id,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
        **choice,
    )


def prompt_tokens(subject: Subject, prompt: str, *, chat: bool) -> torch.Tensor:
    """The tokens of a prompt; int64 [1, tokens].

    Raises:
        UserError: the prompt has no tokens, or the tokenizer has no chat template.
    """
    tokenizer = subject.tokenizer
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise UserError("The tokenizer of this model has no chat template. Leave --chat out.")
        turns = [{"role": "user", "content": prompt}]
        tokens = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    else:
        tokens = unended(tokenizer(prompt)["input_ids"], subject.network, tokenizer)
    if not tokens:
        raise UserError("The prompt has no tokens. Give a few words.")
    return torch.tensor([tokens])
