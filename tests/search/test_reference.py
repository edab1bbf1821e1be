"""The reference: the dense model's predictions, and how far others are from them."""

from pathlib import Path

import pytest
import torch
from support.searches import predictions, stories_of

from qpruner.pretrained import load_model
from qpruner.processes import Processes
from qpruner.search import reference as references
from qpruner.search.reference import Reference

ALONE = Processes.alone()


def model_of(base: Path, spread: float = 0.0) -> torch.nn.Module:
    """The dense model, with noise on its weights."""
    model = load_model(str(base), dtype="float32", trust_remote_code=False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += spread * torch.randn(parameter.shape, generator=generator)
    return model


@torch.no_grad()
def test_kl_is_the_mean_over_tokens_and_zero_for_the_model_itself(tiny_llama: Path) -> None:
    data = stories_of(tiny_llama)
    dense, noisy = predictions(model_of(tiny_llama), data), predictions(model_of(tiny_llama, 0.05), data)
    reference = Reference.of(model_of(tiny_llama), data, ALONE, base="abc")
    assert reference.base == "abc"
    assert torch.equal(reference.log_probabilities, dense.half())
    expected = float((dense.exp() * (dense - noisy)).sum(-1).mean())
    assert reference.kl(model_of(tiny_llama, 0.05), ALONE) == pytest.approx(expected, rel=0.05) and expected > 1e-3
    assert abs(reference.kl(model_of(tiny_llama), ALONE)) < 1e-4


def test_it_computes_in_the_context_of_the_processes(tiny_llama: Path) -> None:
    data = stories_of(tiny_llama)
    rough = Processes.alone("cpu", lambda: torch.autocast("cpu", torch.bfloat16))
    plain, autocast = (
        Reference.of(model_of(tiny_llama), data, processes, base=None).log_probabilities for processes in (ALONE, rough)
    )
    assert not torch.equal(plain, autocast)
    assert torch.allclose(plain, autocast, atol=0.2)


def test_it_comes_back_and_keeps_no_more_than_it_may(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = model_of(tiny_llama), stories_of(tiny_llama)
    whole = Reference.of(model, data, ALONE, base="abc")
    assert len(whole.batches) == 2 and whole.log_probabilities.shape[1] == 2048
    monkeypatch.setattr(references, "TOKENS", 50)  # in the first batch of 4 rows of 23 scored tokens
    few = Reference.of(model, data, ALONE, base=None)
    assert len(few.batches) == 1 and torch.equal(few.log_probabilities, whole.log_probabilities[:50])
    assert abs(few.kl(model, ALONE)) < 1e-4
    for written in (whole, few):
        written.write(tmp_path / "reference.safetensors")
        read = Reference.read(tmp_path / "reference.safetensors")
        assert read.base == written.base
        assert torch.equal(read.log_probabilities, written.log_probabilities)
        for batch, expected in zip(read.batches, written.batches, strict=True):
            assert batch.keys() == expected.keys()
            assert all(torch.equal(tensor, expected[name]) for name, tensor in batch.items())  # type: ignore[literal-required]
