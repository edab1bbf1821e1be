"""`qpruner generate`: what a model writes, as it writes it, with tokens per second and memory."""

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
    """Lets a model go on with a prompt, and prints what it writes token by token.

    Args:
        model: folder of a run, of a compressed model or of a model of transformers, a hub name, or qpruner/stories.
        prompt: text to go on with; with chat what a person says.
        chat: whether the prompt is put into the chat template of the tokenizer, for models that were trained on one.
        max_new_tokens: most tokens to write, at least 1; the token that ends a text ends it sooner.
        temperature: what logits are divided by before a token is drawn; with 0 the likeliest token is taken.
        seed: seed of the draws.
        device: device that the model computes on; auto takes the first CUDA device where there is one.
        trust_remote_code: whether code that comes with the model may run.
    """
    from qpruner.evaluation.streaming import stream  # what loads models takes seconds to import, and help needs it not

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
