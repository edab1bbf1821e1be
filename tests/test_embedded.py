"""The model that comes with the package is the one that the documents speak of, and knows how to tell a story."""

from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import Precision
from safetensors import safe_open

from qpruner.datamodules import StoriesDataModule
from qpruner.pretrained import EMBEDDED, load_model, load_tokenizer, resolve
from qpruner.training.evaluation import evaluate
from qpruner.training.module import LoRAFinetuner


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(EMBEDDED, dtype="float32", trust_remote_code=False)


def test_it_is_a_small_grouped_query_llama_in_half_precision(model: Any) -> None:
    config = model.config
    assert config.model_type == "llama"
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (128, 6, 384)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (8, 4, 16)
    assert config.vocab_size == len(load_tokenizer(EMBEDDED))
    path = f"{resolve(EMBEDDED)}/model.safetensors"
    with safe_open(path, framework="pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118  # no mapping
    assert {tensor.dtype for tensor in tensors} == {torch.float16}
    assert sum(tensor.nbytes for tensor in tensors) < 4_000_000


def test_it_predicts_stories_it_never_saw_and_prefers_their_right_endings() -> None:
    data = StoriesDataModule(tokenizer=EMBEDDED, num_train=1, num_validation=200, num_test=200, num_choices=200)
    module = LoRAFinetuner()
    module.load_base()
    results = evaluate(
        module.model,
        data.evaluation_loaders("test"),
        limit=1.0,
        device=torch.device("cpu"),
        precision=Precision(),
        title="",
        progress=False,
    )
    assert results["perplexity"] < 2.2  # a bigram model: above 15
    assert results["endings/acc"] > 0.8  # chance: 0.5, with a standard error of 0.025


def test_it_tells_a_story_to_its_end(model: Any) -> None:
    tokenizer = load_tokenizer(EMBEDDED)
    prompt = tokenizer("One day Tom", return_tensors="pt", return_token_type_ids=False)
    (story,) = model.generate(**prompt, do_sample=False, max_new_tokens=200)
    assert story[-1] == tokenizer.eos_token_id
    text = tokenizer.decode(story, skip_special_tokens=True)
    assert text.count("Tom") >= 2
    assert text.endswith((".", '."', "!", '!"'))
