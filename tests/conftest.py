"""Small real things to test with: a random Llama that takes milliseconds, and stories to feed it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from qpruner.datamodules import StoriesDataModule
from qpruner.datamodules.base import LoaderConfig
from qpruner.pretrained import EMBEDDED, load_tokenizer

transformers.logging.disable_progress_bar()
torch.set_num_threads(1)  # in models as small as these a second thread only waits


@pytest.fixture(autouse=True)
def _own_cache_and_seed(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test reads what another or the user left behind; all of them share the tokens of this session."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    # A fit without a folder of its own keeps its base under the working directory.
    monkeypatch.setattr("qpruner.training.compressible.BASES", str(tmp_path_factory.mktemp("bases")))
    torch.manual_seed(0)
    yield
    assert not torch.distributed.is_initialized()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama (2 layers, width 32, 4 heads on 2 key-value heads) and the embedded tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny_llama"
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    load_tokenizer(EMBEDDED).save_pretrained(folder)
    return folder


@pytest.fixture
def stories(tiny_llama: Path) -> StoriesDataModule:
    """Five training batches an epoch, and a little to validate and test on."""
    return StoriesDataModule(
        tokenizer=str(tiny_llama),
        max_length=24,
        num_train=22,
        num_validation=6,
        num_test=6,
        num_choices=4,
        loader=LoaderConfig(batch_size=4, eval_batch_size=4),
    )
