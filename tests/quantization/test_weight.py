"""What others read from the weight of a packed linear and write to it, PEFT above all: as with a dense one."""

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from support.families import VOCAB, logits_of, random_tokens, tiny_model
from support.linears import random_linear
from torch import Tensor, nn

from qpruner.anatomy import architecture_of
from qpruner.errors import UserError
from qpruner.memory import tensor_bytes
from qpruner.plan import DENSE, UNITS, CompressionPlan, Precision
from qpruner.quantization.apply import quantize_
from qpruner.quantization.formats import dequantize, quantize
from qpruner.quantization.packed import PackedLinear

NF4, DOUBLE, INT8 = Precision("nf4", 4), Precision("nf4-double", 4, 32), Precision("int8", 8)
UNIFORM = Precision("affine-double", 3, 32)
MIXED = {"qkv": NF4, "o": INT8, "gate_up": UNIFORM, "down": DOUBLE}
TARGETS = {"target_modules": ["q_proj", "o_proj", "up_proj", "down_proj"], "task_type": "CAUSAL_LM"}
CONFIGS: dict[str, Callable[[], peft.PeftConfig]] = {
    "lora": lambda: peft.LoraConfig(r=4, use_rslora=True, rank_pattern={"q_proj": 2}, **TARGETS),
    "all-linear": lambda: peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    "bias": lambda: peft.LoraConfig(r=4, lora_bias=True, bias="all", **TARGETS),
    "dora": lambda: peft.LoraConfig(r=4, use_dora=True, **TARGETS),
    "pissa": lambda: peft.LoraConfig(r=4, init_lora_weights="pissa", **TARGETS),
    "olora": lambda: peft.LoraConfig(r=4, init_lora_weights="olora", **TARGETS),
    "orthogonal": lambda: peft.LoraConfig(r=4, init_lora_weights="orthogonal", **TARGETS),
    "modules to save": lambda: peft.LoraConfig(r=4, modules_to_save=["norm", "lm_head"], **TARGETS),
    "IA3": lambda: peft.IA3Config(feedforward_modules=["down_proj"], **TARGETS),
    "AdaLoRA": lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, **TARGETS),
    "LoHa": lambda: peft.LoHaConfig(r=4, **TARGETS),
    "OFT": lambda: peft.OFTConfig(oft_block_size=4, r=0, **TARGETS),
    "VeRA": lambda: peft.VeraConfig(r=4, target_modules=["o_proj"], task_type="CAUSAL_LM"),
    "SHiRA": lambda: peft.ShiraConfig(r=4, **TARGETS),
    "HRA": lambda: peft.HRAConfig(r=4, **TARGETS),
}


def pair(family: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[Any, Any]:
    """A packed model and a dense one that holds the same weights."""
    packed = tiny_model(family, **changes).to(dtype)
    plan = CompressionPlan.dense(architecture_of(packed.config), None)
    quantize_(packed, plan.with_precision([MIXED] * len(plan.layers)), None, device=torch.device("cpu"))
    dense = copy.deepcopy(packed)
    for module in list(dense.modules()):
        if isinstance(module, PackedLinear):
            linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, dtype=dtype)
            linear.weight.data = dequantize(module).to(dtype)
            linear.bias = module.bias
            dense.set_submodule(next(name for name, one in dense.named_modules() if one is module), linear)
    return packed, dense.requires_grad_(False)


def wrapped(model: Any, config: peft.PeftConfig, name: str = "default") -> Any:
    """The model with adapters that do something; the same for equal arguments."""
    torch.manual_seed(0)
    if isinstance(model, peft.PeftModel):
        model.add_adapter(name, config)
        model.set_adapter(name)
    else:
        model = peft.get_peft_model(model, config, adapter_name=name)
    generator = torch.Generator().manual_seed(len(name))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def gradients(model: Any) -> list[Tensor]:
    torch.manual_seed(0)
    model.zero_grad()
    model(input_ids=random_tokens(), labels=random_tokens()).loss.backward()
    return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]


def same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", CONFIGS)
def test_peft_does_to_a_packed_model_what_it_does_to_a_dense_one(name: str) -> None:
    changes = {"attention_bias": True, "mlp_bias": True} if name == "bias" else {}
    packed, dense = (wrapped(model, CONFIGS[name]()) for model in pair(**changes))
    untouched = name not in ("pissa", "olora")  # which write what they leave of a weight
    targets = {module for module in packed.modules() if isinstance(module, PackedLinear)}
    assert len(targets) == (3 * 7 if untouched else 3 * 3)
    before = logits_of(packed)
    same(before, logits_of(dense))
    for ours, expected in zip(gradients(packed), gradients(dense), strict=True):
        same(ours, expected)
    for merging in ({}, {"safe_merge": True}):
        for model in (packed, dense):
            model.merge_adapter(**merging)
        same(logits_of(packed), logits_of(dense))
        same(logits_of(packed), before)
        with packed.disable_adapter(), dense.disable_adapter():  # takes them out again
            same(logits_of(packed), logits_of(dense))
    merged = packed.merge_and_unload()
    same(logits_of(merged), before)
    same(logits_of(merged), logits_of(dense.merge_and_unload()))
    assert type(merged.model.layers[0].self_attn.o_proj) is nn.Linear


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("combination", ["linear", "cat", "svd", "ties", "dare_linear", "magnitude_prune"])
def test_several_adapters_are_mixed_combined_deleted_and_scaled_as_on_a_dense_model(combination: str) -> None:
    def acted(model: Any) -> list[Tensor]:
        model = wrapped(model, peft.LoraConfig(r=4, **TARGETS))
        model = wrapped(model, peft.LoraConfig(r=4, lora_alpha=16, **TARGETS), "other")
        results = [logits_of(model)]
        with torch.no_grad():
            names = ["default", "other"]
            results.append(model(input_ids=random_tokens(), use_cache=False, adapter_names=names).logits)
        torch.manual_seed(0)
        model.add_weighted_adapter(["default", "other"], [0.7, 0.4], "sum", combination_type=combination, density=0.5)
        model.set_adapter("sum")
        results.append(logits_of(model))
        model.delete_adapter("sum")
        model.set_adapter("other")
        for module in model.modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                module.set_scale("other", 3.0)
        results.append(logits_of(model))
        model.merge_adapter(["default", "other"])
        results.append(logits_of(model))
        model.unmerge_adapter()
        return [*results, logits_of(model), logits_of(model.unload())]

    packed, dense = pair()
    for ours, expected in zip(acted(packed), acted(dense), strict=True):
        same(ours, expected)
    assert not isinstance(packed.model.layers[0].mlp.up_proj, PackedLinear)


def test_adapters_come_off_a_base_that_stays_packed() -> None:
    packed, _ = pair()
    expected, states = logits_of(packed), copy.deepcopy(packed.state_dict())
    again = wrapped(packed, peft.LoraConfig(**TARGETS)).unload()
    assert torch.equal(logits_of(again), expected)
    assert all(torch.equal(tensor, states[name]) for name, tensor in again.state_dict().items())


def test_a_base_in_half_precision_stays_in_it() -> None:
    packed, dense = (wrapped(model, peft.LoraConfig(**TARGETS)) for model in pair(dtype=torch.bfloat16))
    merged, expected = packed.merge_and_unload(), dense.merge_and_unload()
    for name, tensor in expected.state_dict().items():
        if "q_proj" in name:
            assert torch.equal(merged.state_dict()[name], tensor)
    assert merged.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16
    torch.testing.assert_close(logits_of(merged), logits_of(expected), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("names", [["up_proj"], ["mlp"]])
def test_packed_weights_are_not_trained(names: list[str]) -> None:
    packed, _ = pair()
    with pytest.raises(UserError, match="cannot be trained: its codes are integers"):
        peft.get_peft_model(packed, peft.LoraConfig(modules_to_save=names, target_modules=["q_proj"]))
    with pytest.raises(UserError, match="cannot be trained"):
        packed.model.layers[0].mlp.up_proj.weight.requires_grad_()
    with pytest.raises(UserError, match="cannot be trained"):
        packed.model.layers[0].requires_grad_()
    assert not any(p.requires_grad for p in packed.model.layers[0].mlp.up_proj.parameters())


@pytest.mark.parametrize("tied", [False, True])
def test_a_packed_embedding_takes_no_adapters(tied: bool) -> None:
    model = tiny_model("llama", tie_word_embeddings=tied)
    plan = CompressionPlan.dense(architecture_of(model.config), None)
    plan = plan.with_precision([MIXED] * len(plan.layers), embedding=INT8, head=INT8)
    quantize_(model, plan, None, device=torch.device("cpu"))
    expected = logits_of(model)
    for names in (["table"], ["embed_tokens"]):
        with pytest.raises(ValueError, match=r"embedding takes no adapters|Target module PackedEmbedding"):
            peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=names))
    merged = wrapped(model, peft.LoraConfig(**TARGETS)).merge_and_unload()
    assert merged.config.tie_word_embeddings == tied and not torch.equal(logits_of(merged), expected)
    model.lm_head.weight.data.zero_()  # the tied table is dense from now on
    assert logits_of(model).abs().max() == 0


# Of tensors.

CHANGES: dict[str, Callable[[nn.Linear], Any]] = {
    "weight.data += x": lambda one: exec("one.weight.data += 1", {"one": one}),
    "weight.data = x": lambda one: setattr(one.weight, "data", one.weight.data * 2),
    "weight = Parameter": lambda one: setattr(one, "weight", nn.Parameter(torch.ones(33, 64))),
    "in place": lambda one: one.weight.mul_(3),
    "in place, of a part": lambda one: one.weight.data[3:5].zero_(),
    "item": lambda one: one.weight.__setitem__((slice(None), 2), 7.0),
    "in place, of a view": lambda one: one.weight.data.view(-1).scatter_add_(0, torch.tensor([5]), torch.tensor([2.0])),
    "in place, transposed": lambda one: one.weight.data.T.copy_(torch.eye(64)[:, :33]),
    "in place, T": lambda one: one.weight.T.mul_(0),
    "in place, mT": lambda one: one.weight.mT[3].add_(1),
    "in place, H": lambda one: one.weight.H.add_(one.weight.mH),
    "in place, real": lambda one: one.weight.real.neg_(),
    "foreach": lambda one: torch._foreach_mul_([one.weight.data], 0),
    "out": lambda one: torch.add(one.weight.data, 1, out=one.weight.data),
    "init": lambda one: nn.init.constant_(one.weight, 0.5),
    "held and assigned": lambda one: _held(one),
}


def _held(linear: nn.Linear) -> None:
    weight = linear.weight.data
    weight -= 1
    weight.add_(3)
    linear.weight.data = weight


@pytest.mark.parametrize("name", CHANGES)
def test_a_write_makes_the_linear_the_dense_one_that_it_would_have_been(precision: Precision, name: str) -> None:
    module = quantize(random_linear(64, 33), precision)
    dense = nn.Linear(64, 33)
    dense.weight.data, dense.bias = dequantize(module), module.bias
    x = torch.randn(3, 64)
    with torch.no_grad():
        for one in (module, dense):
            CHANGES[name](one)
        torch.testing.assert_close(module(x), dense(x))
    assert type(module) is nn.Linear and set(module.state_dict()) == {"weight", "bias"}
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert set(vars(module)) <= set(vars(dense))


def test_a_write_that_would_be_lost_is_refused(precision: Precision) -> None:
    module = quantize(random_linear(64, 33), precision)
    expected = dequantize(module) + 1
    first, second = module.weight.data, module.weight.data
    first += 1
    with pytest.raises(UserError, match="would be lost. Read `weight.data` anew before each change.*qpruner merge"):
        second += 1
    assert torch.equal(module.weight, expected)
    first += 1  # this one is the weight by now
    assert torch.equal(module.weight, expected + 1)


def test_a_read_gives_the_unpacked_weight_and_changes_nothing(precision: Precision) -> None:
    module = quantize(random_linear(64, 33), precision)
    expected, x = dequantize(module), torch.randn(3, 64)
    weight = module.weight
    assert (weight.shape, weight.dtype, weight.device) == (expected.shape, expected.dtype, expected.device)
    assert not weight.requires_grad and isinstance(module, nn.Linear)
    reads = {
        "value": weight.clone(),
        "data": weight.data + 0,
        "cast": weight.to(torch.float32).detach(),
        "views": weight.T.T.reshape(-1).view(33, 64),
        "lists": torch.cat([weight[:3], weight[3:]]),
    }
    for name, read in reads.items():
        assert torch.equal(read, expected), name
    assert torch.equal(nn.functional.linear(x, weight), x @ expected.T)
    assert torch.equal(torch.linalg.svdvals(weight.data), torch.linalg.svdvals(expected))
    (weight.clone() + 0).add_(1)  # a copy is a copy
    weight.double().mul_(2)
    assert isinstance(module, PackedLinear) and torch.equal(dequantize(module), expected)


def test_casts_of_the_model_reach_the_weight_but_no_code_or_scale(precision: Precision) -> None:
    module = quantize(random_linear(64, 33), precision)
    packed = {name: tensor.clone() for name, tensor in module.packed().items()}
    for cast, dtype in (("half", torch.float16), ("bfloat16", torch.bfloat16), ("double", torch.float64)):
        getattr(module, cast)()
        assert module.weight.dtype == dtype == module.bias.dtype
        assert all(torch.equal(tensor, packed[name]) for name, tensor in module.packed().items())
        assert torch.equal(module.weight.clone(), module.unpack(dtype))
    assert module.float().become_dense_() is module and module.weight.dtype == torch.float32


# Of transformers.


def test_what_transformers_says_of_a_packed_model() -> None:
    packed, dense = pair()
    buffers = sum(buffer.nbytes for buffer in packed.buffers())
    assert packed.get_memory_footprint() == tensor_bytes(packed) + buffers < dense.get_memory_footprint()
    assert packed.dtype == torch.float32 and packed.bfloat16().dtype == torch.bfloat16
    torch.testing.assert_close(logits_of(packed), logits_of(dense.bfloat16()), rtol=0.05, atol=0.05)
    with pytest.raises(ValueError, match="need to first quantize"):
        packed.dequantize()


@pytest.mark.parametrize("head", [DENSE, INT8])
def test_a_vocabulary_grows_beside_packed_linears(head: Precision) -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    plan = CompressionPlan.dense(architecture_of(model.config), None)
    plan = plan.with_precision([dict.fromkeys(UNITS, NF4)] * len(plan.layers), head=head)
    quantize_(model, plan, None, device=torch.device("cpu"))
    expected = logits_of(model)
    model.resize_token_embeddings(VOCAB + 5)
    assert torch.equal(logits_of(model)[..., :VOCAB], expected)


def test_the_dtype_of_a_model_with_a_packed_embedding_is_that_of_its_layers() -> None:
    model = tiny_model("llama").bfloat16()
    plan = CompressionPlan.dense(architecture_of(model.config), None)
    plan = plan.with_precision([MIXED] * len(plan.layers), embedding=INT8, head=INT8)
    quantize_(model, plan, None, device=torch.device("cpu"))
    assert model.dtype == torch.bfloat16
    assert logits_of(model).dtype == torch.bfloat16
