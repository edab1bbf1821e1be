"""A model whose layers are split among devices computes, trains and is kept as a whole one."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerState
from safetensors.torch import load_file
from support.families import EXPLICIT, adapted, each_of, packed, random_tokens, tiny_model
from support.fits import finetuner
from support.ranks import on_two_ranks
from support.sharded_fits import VARIANTS, fit

from qpruner.adapters.lora import LoRAConfig
from qpruner.anatomy.layers import decoder_blocks
from qpruner.callbacks import MixedPrecisionQuantization, report
from qpruner.datamodules import StoriesDataModule
from qpruner.errors import UserError
from qpruner.likelihood import causal_model, token_nll
from qpruner.plan import Precision
from qpruner.runs.run import Run
from qpruner.training.optimization import OptimizerConfig
from qpruner.training.sharding import ShardedStrategy, is_sharded, part_of, shard_, strategy_of, whole

RANKS = 2
DOUBLE = Precision("affine-double", 4, 32)  # with parameters without dimensions


def step_of(family: str, rows: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """A model in four bits with adapters of rank 3, and its loss on some rows."""
    model = adapted(packed(tiny_model(family), DOUBLE))
    return model, token_nll(model, rows, rows).mean()


def bytes_of_layers(model: Any) -> int:
    parameters = [p for block in decoder_blocks(causal_model(model)) for p in block.parameters()]
    parts = [p.to_local() if hasattr(p, "to_local") else p for p in parameters]
    return sum(part.numel() * part.element_size() for part in parts)


@each_of(EXPLICIT)
def test_losses_and_gradients_are_those_of_a_whole_model(family: str, tmp_path: Path) -> None:
    """Of rank 3, adapters have rows that two devices cannot share alike; the loss is the mean over both."""
    rows = random_tokens(4)
    model, loss = step_of(family, rows)
    loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    def work(rank: int) -> dict[str, Any]:
        from torch.distributed.device_mesh import init_device_mesh

        model, _ = step_of(family, rows)
        before = bytes_of_layers(model)
        shard_(model, init_device_mesh("cpu", (RANKS,)))
        assert is_sharded(model) and bytes_of_layers(model) < 0.6 * before
        loss = token_nll(model, rows[rank::RANKS], rows[rank::RANKS]).mean()
        loss.backward()
        gradients = {name: whole(p.grad) for name, p in model.named_parameters() if p.requires_grad}
        return {"loss": loss.detach(), "gradients": gradients}

    one, other = on_two_ranks(work, tmp_path)
    torch.testing.assert_close((one["loss"] + other["loss"]) / 2, loss.detach(), rtol=1e-5, atol=0)
    assert one["gradients"].keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.any()
        torch.testing.assert_close(one["gradients"][name], gradient, rtol=1e-4, atol=1e-6)
        assert torch.equal(one["gradients"][name], other["gradients"][name])


def test_a_part_is_of_the_rows_that_a_device_holds(tmp_path: Path) -> None:
    def work(rank: int) -> tuple[torch.Tensor, torch.Tensor, Any]:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor

        like = distribute_tensor(torch.zeros(3, 2), init_device_mesh("cpu", (RANKS,)), [Shard(0)])
        part = part_of(torch.arange(6.0).view(3, 2), like)
        return part.to_local(), whole(part), part_of(7, like)

    (first, entire, number), (second, again, _) = on_two_ranks(work, tmp_path)
    assert first.tolist() == [[0, 1], [2, 3]] and second.tolist() == [[4, 5]]
    assert torch.equal(entire, torch.arange(6.0).view(3, 2)) and torch.equal(entire, again) and number == 7


FAST = ("quantized",)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in VARIANTS]
)
def test_two_ranks_fit_a_split_model_as_a_whole_one(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    """Losses, validation, checkpoint and what is kept are those of DDP, and each rank holds half of the layers."""

    def work(rank: int) -> dict[str, Any]:
        strategies = {"ddp": DDPStrategy(), "fsdp2": ShardedStrategy()}
        return {kind: fit(str(tiny_llama), tmp_path / kind, strategies[kind], VARIANTS[name]) for kind in strategies}

    for results in (both := on_two_ranks(work, tmp_path)):
        expected, split = results["ddp"], results["fsdp2"]
        assert len(expected["losses"]) >= 4 and split["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert split["metrics"].keys() == expected["metrics"].keys() >= {"val/loss", "val/accuracy"}
        assert split["metrics"] == pytest.approx(expected["metrics"], rel=1e-5)
        assert split["bytes"] < 0.6 * expected["bytes"]
        assert not split["inference_mode"]  # by which Lightning would evaluate on GPUs
    assert sum(results["fsdp2"]["bytes"] for results in both) == both[0]["ddp"]["bytes"]
    places = [tmp_path / strategy for strategy in ("ddp", "fsdp2")]
    for base in ("model", "polished") if name == "polished" else ("model",):
        one, other = (load_file(place / base / "model.safetensors") for place in places)
        torch.testing.assert_close(other, one, rtol=0, atol=0)
    if name == "polished":
        begun = load_file(places[0] / "model" / "model.safetensors")
        assert any(not torch.equal(tensor, begun[key]) for key, tensor in one.items())
    adapter = f"{base}/adapter/adapter_model.safetensors"
    torch.testing.assert_close(*(load_file(place / adapter) for place in places), rtol=1e-4, atol=1e-5)
    one, other = (torch.load(place / "last.ckpt", weights_only=True) for place in places)
    for key in ("state_dict", "optimizer_states"):
        torch.testing.assert_close(other[key], one[key], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_each_goes_on_from_a_checkpoint_of_the_other(tiny_llama: Path, tmp_path: Path) -> None:
    base, variant = str(tiny_llama), VARIANTS["tables"]
    longer = {**variant, "trainer": {"max_steps": 8}}

    def work(rank: int) -> list[Any]:
        kinds = {"ddp": DDPStrategy, "fsdp2": ShardedStrategy}
        for name, kind in kinds.items():
            fit(base, tmp_path / name, kind(), variant)
        return [
            fit(base, tmp_path / f"{first} {then}", kinds[then](), longer, tmp_path / first / "last.ckpt")["losses"]
            for first in kinds
            for then in kinds
        ]

    (losses, *others), _ = on_two_ranks(work, tmp_path)
    assert len(losses) == 4 and all(other == pytest.approx(losses, rel=1e-5) for other in others)


def test_a_stage_that_no_device_has_room_for_is_measured_once_it_is_split(
    tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path
) -> None:
    """Whichever device it is that has no room for the whole model."""
    stories.prepare_data()

    def refuse(*_: Any) -> None:
        raise UserError("There is no room.")

    def work(rank: int) -> list[tuple[str, bool]]:
        if rank == 1:
            report.place_ = refuse
        options = {"accelerator": "cpu", "devices": 2, "strategy": "fsdp2", "max_steps": 1, "limit_val_batches": 0,
                   "enable_progress_bar": False, "enable_model_summary": False, "logger": False}  # fmt: skip
        data = stories.for_another_trainer()
        run = Run(tmp_path / "run", finetuner(tiny_llama), data, [MixedPrecisionQuantization([8, 4])], options)
        run.fit()
        return [(stage.name, bool(stage.results)) for stage in run.summary.stages]

    stages, _ = on_two_ranks(work, tmp_path)
    assert stages == [("dense", False), ("quantized", False), ("quantized + LoftQ", True), ("recovered", True)]


@pytest.mark.slow
def test_a_rehearsal_of_polishing_leaves_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    rehearsed = {**VARIANTS["polished"], "trainer": {"fast_dev_run": 2, "max_steps": -1, "val_check_interval": None}}

    def work(rank: int) -> list[float]:
        losses: list[float] = fit(str(tiny_llama), tmp_path / "fit", ShardedStrategy(), rehearsed)["losses"]
        return losses

    losses, _ = on_two_ranks(work, tmp_path)
    assert len(losses) == 2 and not (tmp_path / "fit" / "model").exists()


@pytest.mark.parametrize("given", ["fsdp", "fsdp_cpu_offload", "deepspeed_stage_3"])
def test_strategies_that_flatten_weights_are_refused_with_the_one_that_does_not(given: str) -> None:
    with pytest.raises(UserError, match=f"strategy is {given}, which lays .* Use fsdp2 to split"):
        strategy_of(given)


def test_lightnings_own_is_completed_and_others_stay() -> None:
    gloo = ModelParallelStrategy(process_group_backend="gloo")
    made = [strategy_of(given) for given in ("fsdp2", "ModelParallelStrategy", gloo)]
    assert all(type(strategy) is ShardedStrategy for strategy in made)
    assert made[2].process_group_backend == "gloo"
    with pytest.raises(UserError, match="tensor_parallel_size of --trainer.strategy is 2"):
        strategy_of(ModelParallelStrategy(tensor_parallel_size=2))
    ddp = DDPStrategy()
    assert strategy_of(ddp) is ddp and strategy_of("auto") == "auto" and strategy_of(made[0]) is made[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lora": LoRAConfig(pooled=True)}, "pooled keeps the columns of whole adapters together"),
        ({"optimizer": OptimizerConfig("adamw_8bit")}, "optimizer.name is adamw_8bit, whose state is packed"),
    ],
)
def test_adapters_that_cannot_be_trained_in_parts_are_told(
    tiny_llama: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        finetuner(tiny_llama, **options).check_split()
    finetuner(tiny_llama).check_split()


def test_a_strategy_that_leaves_the_splitting_to_the_module_is_refused(tiny_llama: Path) -> None:
    module = finetuner(tiny_llama)
    module._trainer = SimpleNamespace(
        strategy=ModelParallelStrategy(), world_size=1, datamodule=None, state=TrainerState()
    )  # type: ignore[assignment]
    with pytest.raises(UserError, match="ModelParallelStrategy does not say how .*ShardedStrategy"):
        module.configure_model()


def test_an_adapter_outside_of_layers_is_told() -> None:
    model = adapted(tiny_model("llama", tie_word_embeddings=False), target_modules=["lm_head", "q_proj"])
    with pytest.raises(UserError, match="lm_head.lora_A.default.weight is trained and lies in no decoder layer"):
        shard_(model, None)
