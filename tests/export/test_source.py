"""A compressed model as exports read it."""

from pathlib import Path

import pytest
import torch
from support.exports import source_of
from support.families import KEPT, KEPT_EXPERTS, MIXTURES, each_of, logits_of, random_tokens
from support.quantized import INT8, NF4

from qpruner.anatomy import FAMILIES, architecture_of
from qpruner.errors import UserError
from qpruner.export.description import Description
from qpruner.export.fidelity import logits
from qpruner.export.source import Source
from qpruner.model_folder import load_compressed

AFFINE = NF4.__class__("affine", 4, 32)


@each_of(FAMILIES)
def test_its_weights_are_those_of_the_dense_model(tmp_path: Path, family: str) -> None:
    """Logits computed from them one by one are those of the packed model with its adapters."""
    kept = KEPT_EXPERTS if family in MIXTURES else KEPT
    source = source_of(tmp_path / "m", family, kept=kept, precision=AFFINE, embedding=INT8, lora={})
    expected = logits_of(load_compressed(tmp_path / "m"))
    computed = logits(source, source.weight, random_tokens())
    torch.testing.assert_close(computed, expected, rtol=1e-4, atol=1e-4)


def test_each_parameter_is_named_once_with_its_shape(tmp_path: Path) -> None:
    source = source_of(tmp_path / "m", "qwen2", kept=KEPT, precision=NF4, embedding=INT8, head=NF4)
    names = source.names()
    assert len(names) == len(set(names)) == 3 * (4 + 3 + 3 + 2) + 3  # weights, biases, norms; tables and last norm
    assert source.shape("model.layers.1.mlp.down_proj.weight") == (64, 23)
    assert all(source.shape(name) == tuple(source.weight(name).shape) for name in names)
    assert source.num_weights == sum(source.weight(name).numel() for name in names)


def test_a_tied_head_is_left_out_unless_it_has_an_adapter(tmp_path: Path) -> None:
    tied = source_of(tmp_path / "m", embedding=INT8, tie_word_embeddings=True)
    assert tied.tied and "lm_head.weight" not in tied.names()
    other = source_of(tmp_path / "n", tie_word_embeddings=True, lora={"target_modules": ["lm_head"]})
    assert not other.tied and other.names()[-1] == "lm_head.weight"
    adapter = other.adapters["lm_head"]
    torch.testing.assert_close(
        other.weight("lm_head.weight") - other.weight("model.embed_tokens.weight"),
        2 * adapter.lora_B @ adapter.lora_A,  # alpha 6 over rank 3
    )


@pytest.mark.parametrize("targets", [None, ["q_proj", "down_proj"], ["lm_head"]])
def test_its_description_needs_no_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, targets: list[str] | None
) -> None:
    lora = targets and {"target_modules": targets}
    source = source_of(tmp_path / "m", kept=KEPT, precision=NF4, tie_word_embeddings=True, lora=lora)
    for module in ("model_folder", "adapter_files"):
        monkeypatch.setattr(f"qpruner.{module}.load_tensors", lambda path: pytest.fail("weights are read"))
    described = Description.read(tmp_path / "m")
    assert (described.folder, described.plan) == (source.folder, source.plan)
    assert architecture_of(described.config) == architecture_of(source.config)
    assert {*described.adapters} == {*source.adapters}
    assert described.tied == source.tied == (targets != ["lm_head"])


def test_codes_are_there_as_they_are_held(tmp_path: Path) -> None:
    source = source_of(tmp_path / "m", precision=AFFINE, embedding=INT8, tie_word_embeddings=True)
    packed = source.packed("model.layers.0.mlp.up_proj")
    assert packed is not None and packed.precision == AFFINE
    table = source.packed("model.embed_tokens")
    assert table is not None and table.precision == INT8
    assert source.packed("model.norm") is None


def test_numbers_that_are_not_finite_are_told(tmp_path: Path) -> None:
    source = source_of(tmp_path / "m")
    with torch.no_grad():
        source.network.model.norm.weight[3] = torch.nan
    from qpruner.model_folder import save_base

    save_base(tmp_path / "broken", source.network, source.plan, base_name="tiny", tokenizer=None)
    with pytest.raises(UserError, match=r"model\.norm\.weight hold values that are not finite"):
        Source.read(tmp_path / "broken")
