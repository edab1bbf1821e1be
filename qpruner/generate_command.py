"""`qpruner generate`: prints the text that a model generates, with its speed and memory use."""

from typing import Literal

from qpruner.options.functions import run_function


def generate_command(arguments: list[str]) -> None:
    run_function("qpruner generate", generate, arguments)


def generate(
    model: str,
    *,
    prompt: str,
    chat: bool = False,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    trust_remote_code: bool = False,
) -> None:
    """Lets a model continue a prompt, and prints the text as it is generated.

    Args:
        model: folder of a run, of a compressed model or of a model of transformers, a hub name, or qpruner/stories.
        prompt: text to continue; with --chat, the message of a user.
        chat: whether the prompt is put into the chat template of the tokenizer, for models that were trained on one.
        max_new_tokens: maximum number of tokens to generate, at least 1; fewer if the model ends the text.
        temperature: divisor of the logits before a token is sampled, at least 0; with 0, the likeliest token is taken.
        seed: seed of the sampling.
        device: device that the model computes on; auto is the first CUDA device if there is one, otherwise the CPU.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        UserError: there is no such model or device, an option is out of range, the prompt has no tokens or too many, or
            the tokenizer has no chat template.
    """
    from qpruner.evaluation.streaming import stream  # takes seconds to import, and --help does without

    print(
        stream(
            model,
            prompt,
            chat=chat,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            device=device,
            trust_remote_code=trust_remote_code,
        )
    )
