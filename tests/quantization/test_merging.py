"""What was packed and adapted, made dense again."""

from typing import Any

import pytest
import torch
from support.families import FAMILIES, LAYERS, adapted, each_of, logits_of, tiny_model
from torch import nn

from qpruner.anatomy import architecture_of
from qpruner.plan import DENSE, UNITS, CompressionPlan, Precision
from qpruner.quantization.apply import quantize_
from qpruner.quantization.embedding import PackedEmbedding
from qpruner.quantization.merging import merge_
from qpruner.quantization.packed import PackedLinear

NF4, INT8 = Precision("nf4", 4), Precision("int8", 8)


def quantized(model: Any, *, units: Precision = NF4, embedding: Precision = DENSE, head: Precision = DENSE) -> Any:
    dense = CompressionPlan.dense(architecture_of(model.config), None)
    plan = dense.with_precision([dict.fromkeys(UNITS, units)] * LAYERS, embedding=embedding, head=head)
    quantize_(model, plan, None, device=torch.device("cpu"))
    return model


@pytest.mark.parametrize("tied", [True, False])
@each_of(FAMILIES)
def test_packed_tables_and_linears_become_dense_ones_of_the_same_function(family: str, tied: bool) -> None:
    model = tiny_model(family, tie_word_embeddings=tied)
    kinds = type(model.get_input_embeddings()), type(model.get_output_embeddings())
    names, ties = set(model.state_dict()), model.all_tied_weights_keys
    model = adapted(quantized(model, embedding=INT8, head=INT8))
    expected = logits_of(model)
    merged = merge_(model, torch.float32)
    torch.testing.assert_close(logits_of(merged), expected, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(part, (PackedLinear, PackedEmbedding)) for part in merged.modules())
    assert (type(merged.get_input_embeddings()), type(merged.get_output_embeddings())) == kinds
    assert set(merged.state_dict()) == names and merged.all_tied_weights_keys == ties
    assert (merged.get_input_embeddings().weight is merged.get_output_embeddings().weight) == tied


@pytest.mark.parametrize(("embedding", "head"), [(NF4, DENSE), (DENSE, INT8)])
def test_one_packed_table_beside_a_dense_one(embedding: Precision, head: Precision) -> None:
    model = quantized(tiny_model("llama", tie_word_embeddings=False), embedding=embedding, head=head)
    expected = logits_of(model)
    merged = merge_(model, torch.float32)  # without adapters
    torch.testing.assert_close(logits_of(merged), expected, rtol=1e-4, atol=1e-4)
    assert type(merged.get_input_embeddings()) is nn.Embedding and type(merged.get_output_embeddings()) is nn.Linear


def test_what_was_merged_can_be_packed_again_and_saved(tmp_path: Any) -> None:
    merged = merge_(adapted(quantized(tiny_model("gemma2"), embedding=NF4, head=NF4)), torch.bfloat16)
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(logits_of(again), logits_of(merged))
    before = logits_of(merged)
    quantized(merged, embedding=INT8, head=INT8)
    assert isinstance(merged.get_input_embeddings(), PackedEmbedding)
    assert 0 < (logits_of(merged) - before).norm() / before.norm() < 0.3


def test_the_sum_is_that_of_peft() -> None:
    models = [adapted(tiny_model("llama").requires_grad_(False)) for _ in range(2)]
    ours, expected = merge_(models[0], torch.float32).state_dict(), models[1].merge_and_unload().state_dict()
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-6, atol=1e-7)
    up, before = "model.layers.1.mlp.up_proj.weight", tiny_model("llama").state_dict()
    assert (ours[up] - before[up]).abs().mean() > 0.01


def test_one_linear_at_a_time_becomes_dense_and_is_rounded() -> None:
    model = adapted(quantized(tiny_model("llama")), target_modules=["q_proj", "down_proj"])
    blocks = model.get_base_model().model.layers
    waiting = {part for block in blocks for part in block.modules() if isinstance(part, PackedLinear)}
    assert len(waiting) == 7 * LAYERS

    def done(linear: nn.Module) -> None:
        waiting.remove(linear)
        assert type(linear) is nn.Linear and linear.weight.dtype is torch.bfloat16
        assert all(isinstance(other, PackedLinear) for other in waiting)

    merge_(model, torch.bfloat16, done)
    assert not waiting
