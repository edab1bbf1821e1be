"""Packed embeddings and heads, tied and untied, against tables that were decoded as a whole."""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import load_file
from support.families import FAMILIES, HIDDEN, LAYERS, VOCAB, each_of, logits_of, random_tokens, tiny_config, tiny_model
from support.linears import PRECISIONS, quantize_dequantize
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qpruner.adapters.lora import LoRAConfig, attach_adapters
from qpruner.anatomy import architecture_of
from qpruner.callbacks import KeepModel, MixedPrecisionQuantization
from qpruner.callbacks.compression import Rehearsal
from qpruner.datamodules import StoriesDataModule
from qpruner.errors import UserError
from qpruner.memory import num_parameters, tensor_bytes
from qpruner.model_folder import build_skeleton, load_base, load_compressed, save_base
from qpruner.plan import DENSE, UNITS, CompressionPlan, Precision
from qpruner.plan_command import diff_plans, show_plan
from qpruner.pricing import price
from qpruner.quantization.apply import LoftQSettings, quantize_
from qpruner.quantization.embedding import PackedEmbedding, quantize_tables_
from qpruner.quantization.formats import dequantize, num_bytes, quantize
from qpruner.quantization.packed import PackedLinear
from qpruner.training.module import LoRAFinetuner

CPU = torch.device("cpu")
NF4, INT8 = Precision("nf4", 4), Precision("int8", 8)
EACH = [(family, tied) for family in FAMILIES for tied in (True, False)]


def stored_in(model: Any, dtype: torch.dtype) -> Any:
    """The model with weights in a dtype; its rotary frequencies stay in float32, as where a model is loaded."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def round_tables_(model: Any, precision: Precision) -> None:
    for weight in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
        weight.data = quantize_dequantize(weight.data, precision)


def planned(model: Any, embedding: Precision, head: Precision, units: Precision = DENSE) -> CompressionPlan:
    dense = CompressionPlan.dense(architecture_of(model.config), None)
    return dense.with_precision([dict.fromkeys(UNITS, units)] * LAYERS, embedding=embedding, head=head)


def quantized(model: Any, embedding: Precision, head: Precision, units: Precision = DENSE) -> CompressionPlan:
    plan = planned(model, embedding, head, units)
    quantize_(model, plan, None, device=CPU)
    return plan


def payload(folder: Path) -> int:
    return sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())


@pytest.mark.parametrize("hidden", [64, 96, 33])  # a block a row, blocks and bytes across the ends of rows
def test_some_rows_are_those_of_the_whole_weight(precision: Precision, hidden: int) -> None:
    packed = quantize(nn.Linear(hidden, 300, bias=False), precision)
    rows = torch.tensor([299, 0, 7, 7, 31])
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(packed.rows(rows, dtype), dequantize(packed)[rows].to(dtype))
    assert packed.rows(rows[:0], torch.float32).shape == (0, hidden)


class Largest(TorchDispatchMode):
    """Numbers of the largest tensor that is made, and is no view of one that was there before."""

    def __init__(self, before: Iterable[Tensor]) -> None:
        super().__init__()
        self.before, self.size = {tensor.untyped_storage().data_ptr() for tensor in before}, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [one for one in tree_leaves(result) if isinstance(one, Tensor)]
        new = [one.numel() for one in made if one.untyped_storage().data_ptr() not in self.before]
        self.size = max([self.size, *new])
        return result


def test_whole_rows_are_read_without_the_rest_of_the_table(precision: Precision) -> None:
    columns = 1024 + (0 if precision.leading is None else precision.leading.columns)
    packed = quantize(nn.Linear(columns, 50, bias=False), precision)
    with Largest(packed.parameters()) as largest:
        packed.rows(torch.tensor([3, 4]), torch.float32)
    assert largest.size == 2 * columns


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_of(FAMILIES)
def test_the_embedding_is_the_dense_one_of_the_rounded_table(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family).to(dtype)
    reference = copy.deepcopy(model.get_input_embeddings())
    reference.weight.data = quantize_dequantize(reference.weight.data, NF4).to(dtype)
    quantized(model, NF4, NF4 if model.config.tie_word_embeddings else DENSE)
    given, expected = model.get_input_embeddings()(random_tokens()), reference(random_tokens())
    assert isinstance(model.get_input_embeddings(), PackedEmbedding) and given.dtype == dtype
    assert torch.equal(given, expected)
    assert ("gemma" in family) == (float(model.get_input_embeddings().scale) == HIDDEN**0.5)


def test_the_embedding_follows_a_cast_of_the_model() -> None:
    model = tiny_model("gemma2")
    quantized(model, INT8, INT8)
    before = model.get_input_embeddings()(random_tokens())
    after = model.to(torch.bfloat16).get_input_embeddings()(random_tokens())
    assert after.dtype == torch.bfloat16
    torch.testing.assert_close(after.float(), before, rtol=2**-7, atol=0)


@pytest.mark.parametrize(
    ("family", "tied", "precision"),
    [(*each, INT8) for each in EACH] + [("llama", tied, one) for tied in (True, False) for one in PRECISIONS],
    ids=str,
)
def test_the_model_computes_with_the_rounded_tables(family: str, tied: bool, precision: Precision) -> None:
    model, reference = (tiny_model(family, tie_word_embeddings=tied) for _ in range(2))
    round_tables_(reference, precision)
    quantized(model, precision, precision)
    torch.testing.assert_close(logits_of(model), logits_of(reference), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits_of(model), logits_of(tiny_model(family, tie_word_embeddings=tied)), atol=1e-3)


def test_head_logits_are_those_of_the_dequantized_weight(precision: Precision) -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    quantized(model, DENSE, precision)
    assert isinstance(model.lm_head, PackedLinear) and type(model.model.embed_tokens) is nn.Embedding
    hidden = torch.randn(5, HIDDEN)
    torch.testing.assert_close(model.lm_head(hidden), hidden @ dequantize(model.lm_head).T)


@pytest.mark.parametrize(
    ("family", "tied", "dtype"),
    [(*each, torch.bfloat16) for each in EACH] + [("gemma2", tied, torch.float32) for tied in (True, False)],
)
def test_a_folder_gives_the_same_logits_and_costs_its_price(
    tmp_path: Path, family: str, tied: bool, dtype: torch.dtype
) -> None:
    model = stored_in(tiny_model(family, tie_word_embeddings=tied), dtype)
    embedding = Precision("nf4-double", 4)
    parameters = num_parameters(model)
    plan = planned(model, embedding, embedding if tied else INT8, units=NF4)
    priced = price(copy.deepcopy(model), plan)
    quantize_(model, plan, None, device=CPU)
    expected = logits_of(model)
    save_base(tmp_path / "model", model, plan, base_name="dense", tokenizer=None)
    loaded = load_base(tmp_path / "model")
    assert loaded.plan == plan and torch.equal(logits_of(loaded.network), expected)
    assert loaded.network.get_input_embeddings()(random_tokens()).dtype == dtype
    assert priced.total == payload(tmp_path / "model") == tensor_bytes(model) == tensor_bytes(loaded.network)
    assert num_parameters(model) == num_parameters(loaded.network) == parameters
    dense = price(
        stored_in(tiny_model(family, tie_word_embeddings=tied), dtype), planned(model, DENSE, DENSE, units=NF4)
    )
    assert priced.units == dense.units and priced.average_bits == dense.average_bits
    shape, size = (VOCAB, HIDDEN), VOCAB * HIDDEN * dtype.itemsize
    saved = size - num_bytes(*shape, embedding) + (0 if tied else size - num_bytes(*shape, INT8))
    assert dense.rest - priced.rest == saved
    # And once more from what was loaded.
    save_base(tmp_path / "again", loaded.network, plan, base_name="dense", tokenizer=None)
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "model/model.safetensors").read_bytes()


@pytest.mark.parametrize("precisions", [(INT8, DENSE), (DENSE, NF4)], ids=["embedding", "head"])
def test_one_table_alone(tmp_path: Path, precisions: tuple[Precision, Precision]) -> None:
    model = tiny_model("qwen3", tie_word_embeddings=False)
    priced = price(tiny_model("qwen3", tie_word_embeddings=False), planned(model, *precisions))
    plan = quantized(model, *precisions)
    assert plan.quantized
    save_base(tmp_path / "model", model, plan, base_name="dense", tokenizer=None)
    assert priced.total == payload(tmp_path / "model")
    assert torch.equal(logits_of(load_base(tmp_path / "model").network), logits_of(model))


def test_tied_tables_are_one_through_everything_that_transformers_does(tmp_path: Path, precision: Precision) -> None:
    model = tiny_model("gemma")
    quantized(model, precision, precision)
    expected = logits_of(model)

    def is_one(model: Any) -> bool:
        return model.lm_head is model.model.embed_tokens.table and torch.equal(logits_of(model), expected)

    assert model.config.tie_word_embeddings and is_one(model)
    model.tie_weights()
    model.tie_weights(recompute_mapping=False)
    assert is_one(model) and is_one(copy.deepcopy(model)) and is_one(model.float())
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert is_one(model) and not any(name.startswith("lm_head") for name in stored)
    assert {f"model.embed_tokens.table.{name}" for name in model.lm_head.packed()} <= stored.keys()


@pytest.mark.parametrize("tied", [True, False])
def test_generation_uses_the_packed_tables(tied: bool) -> None:
    model, reference = (tiny_model("llama", tie_word_embeddings=tied) for _ in range(2))
    round_tables_(reference, INT8)
    quantized(model, INT8, INT8)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(random_tokens(), **options), reference.generate(random_tokens(), **options))


@pytest.mark.parametrize(("tied", "checkpointing"), [(True, False), (False, True)])
def test_adapters_train_between_packed_tables_and_evaluation_changes_nothing(
    precision: Precision, tied: bool, checkpointing: bool
) -> None:
    model = tiny_model("gemma2", tie_word_embeddings=tied)
    quantized(model, precision, precision, units=precision)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model = attach_adapters(model, LoRAConfig(r=2, dropout=0.0), seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)

    def gradients(model: nn.Module) -> list[Tensor]:
        model.train().zero_grad()
        model(random_tokens(), labels=random_tokens()).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]

    first = gradients(model)
    assert len(first) == 2 * 7 * LAYERS and all(gradient.abs().max() > 0 for gradient in first)
    logits_of(model.eval())
    assert all(torch.equal(a, b) for a, b in zip(first, gradients(model), strict=True))


def test_loftq_leaves_the_tables_alone() -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    plan = planned(model, NF4, NF4, units=NF4)
    settings = LoftQSettings(rank=2, scale=1.0, targets=("q_proj", "lm_head"), num_iterations=1, seed=0)
    factors = quantize_(model, plan, settings, device=CPU)
    assert {name.rpartition(".")[2] for name in factors} == {"q_proj"}
    plain = tiny_model("llama", tie_word_embeddings=False)
    quantize_tables_(plain, NF4, NF4, device=CPU)
    assert torch.equal(dequantize(plain.lm_head), dequantize(model.lm_head))


def test_tied_tables_of_two_precisions_are_refused_before_anything_changes() -> None:
    model = tiny_model("gemma")
    message = r"the embedding in nf4 4 and the head in dense 16\. Give both the same precision"
    plan = planned(model, NF4, DENSE, units=NF4)
    with pytest.raises(UserError, match=message):
        quantize_(model, plan, None, device=CPU)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    with pytest.raises(UserError, match=message):
        price(model, plan)


def test_a_folder_of_another_precision_is_refused(tmp_path: Path) -> None:
    model = tiny_model("gemma")
    plan = quantized(model, INT8, INT8)
    save_base(tmp_path / "model", model, plan, base_name="dense", tokenizer=None)
    load_base(tmp_path / "model")
    save_base(tmp_path / "model", model, planned(model, NF4, NF4), base_name="dense", tokenizer=None)
    with pytest.raises(UserError, match=r"model\.embed_tokens\.table: The tensor 'codes' .* but must be torch\.uint8"):
        load_base(tmp_path / "model")


def test_the_callback_offers_bits_of_the_tables() -> None:
    assert MixedPrecisionQuantization().tables == {"embedding": DENSE, "head": DENSE}
    callback = MixedPrecisionQuantization(bits=4, formats={4: "fp4"}, group=32, embedding=4, head=8)
    assert callback.tables == {"embedding": Precision("fp4", 4, 32), "head": INT8}
    assert "embedding=4, head=8" in str(callback)
    untied, tied = (
        Rehearsal(build_skeleton(tiny_config("llama", tie_word_embeddings=tied)), LoRAConfig())
        for tied in (False, True)
    )
    callback.check(untied)
    with pytest.raises(UserError, match=r"embedding in fp4 4/32 and the head in int8 8\. Give both the same"):
        callback.check(tied)
    for option in ("embedding", "head"):
        with pytest.raises(UserError, match=f"^{option} asks for 7; choose from 1, 2, 3, 4, 5, 6, 8, 16"):
            MixedPrecisionQuantization(**{option: 7})
    plan = planned(tiny_model("llama"), NF4, INT8)
    assert MixedPrecisionQuantization.of_plan(plan, None).tables == {"embedding": NF4, "head": INT8}


@pytest.mark.parametrize("bits", [4, 8])
def test_a_run_keeps_packed_tables_and_trains_on_what_it_kept(
    tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path, bits: int
) -> None:
    def fit() -> LoRAFinetuner:
        module = LoRAFinetuner(base=str(tiny_llama), lora=LoRAConfig(r=2), seed=3)
        module.kept_in = tmp_path / "model"
        callback = MixedPrecisionQuantization(
            bits={"qkv": 4, "o": 8, "gate_up": 16, "down": 4}, embedding=bits, head=bits
        )
        trainer = Trainer(
            accelerator="cpu",
            max_steps=2,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            callbacks=[callback, KeepModel(tmp_path / "model", tmp_path / "model")],
        )
        trainer.fit(module, datamodule=stories)
        return module

    first, second = fit(), fit()
    for module in (first, second):
        model = module.model.get_base_model()
        assert model.lm_head is model.model.embed_tokens.table and model.lm_head.precision.bits == bits
        assert module.plan is not None and module.plan.embedding == module.plan.head == model.lm_head.precision
    assert second.compressed.kept == first.compressed.kept
    tokens = random_tokens()
    with first.adapters_disabled(), second.adapters_disabled():
        assert torch.equal(logits_of(first.model.eval(), tokens), logits_of(second.model.eval(), tokens))
    assert torch.equal(logits_of(load_compressed(tmp_path / "model"), tokens), logits_of(second.model, tokens))


def test_plans_are_shown_and_compared_with_their_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = (planned(tiny_model("llama"), NF4, head) for head in (DENSE, INT8))
    show_plan(after)
    assert "\nEmbedding nf4 4, head int8 8.\n" in capsys.readouterr().out
    before.write(tmp_path / "before.json")
    after.write(tmp_path / "after.json")
    with pytest.raises(SystemExit):
        diff_plans(tmp_path / "before.json", tmp_path / "after.json")
    assert capsys.readouterr().out == "head dense 16 becomes int8 8\n"
    assert CompressionPlan.from_json(after.to_json()) == after
    assert not planned(tiny_model("llama"), DENSE, DENSE).quantized
