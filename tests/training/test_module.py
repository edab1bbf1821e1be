from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer

from qpruner.adapters.lora import LoRAConfig
from qpruner.callbacks import RunCheckpoint
from qpruner.datamodules import StoriesDataModule
from qpruner.errors import UserError
from qpruner.pretrained import load_model
from qpruner.training.module import LoRAFinetuner
from qpruner.training.optimization import OptimizerConfig


def make(base: Path, **options: Any) -> LoRAFinetuner:
    module = LoRAFinetuner(base=str(base), **{"lora": LoRAConfig(r=2, alpha=3.0, dropout=0.5), **options})
    module.configure_model()
    return module


def disturb(module: LoRAFinetuner) -> None:
    """Gives every adapter an effect, which zero B matrices have not."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.1)


@pytest.fixture
def batch(stories: StoriesDataModule) -> Any:
    return stories.examples("train").collate([0, 1, 2])


def test_adapters_start_without_effect_and_add_b_a_scaled_by_alpha_over_r(tiny_llama: Path, batch: Any) -> None:
    base = load_model(str(tiny_llama), dtype="float32", trust_remote_code=False)
    expected = base(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    module = make(tiny_llama).eval()
    assert torch.equal(module(batch), expected)
    disturb(module)
    assert not torch.allclose(module(batch), expected)
    with module.adapters_disabled():
        assert torch.equal(module(batch), expected)
    # Merged by hand into the base, the adapters give the same logits.
    weights = dict(base.named_parameters())
    for name, layer in module.model.base_model.model.named_modules():
        if hasattr(layer, "lora_A"):
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            weights[f"{name}.weight"].data += 3.0 / 2 * b @ a
    merged = base(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert torch.allclose(module(batch), merged, atol=1e-5)


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
def test_pooled_adapters_are_not_trained_with_a_state_of_eight_bits(tiny_llama: Path, name: Any) -> None:
    with pytest.raises(UserError, match=f"optimizer.name is {name}, .* Use adamw or paged_adamw"):
        LoRAFinetuner(str(tiny_llama), lora=LoRAConfig(pooled=True), optimizer=OptimizerConfig(name))
    LoRAFinetuner(str(tiny_llama), lora=LoRAConfig(pooled=True), optimizer=OptimizerConfig("paged_adamw"))


def test_only_adapters_of_all_seven_projections_train(tiny_llama: Path) -> None:
    trained = {name for name, parameter in make(tiny_llama).named_parameters() if parameter.requires_grad}
    projections = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    for layer in (0, 1):
        for projection in projections:
            for side in ("A", "B"):
                found = [n for n in trained if f"layers.{layer}." in n and f".{projection}.lora_{side}." in n]
                assert len(found) == 1
                trained -= set(found)
    assert not trained


def test_adapters_depend_on_the_seed_and_on_nothing_drawn_before(tiny_llama: Path) -> None:
    def a_matrices(seed: int) -> list[torch.Tensor]:
        return [p for n, p in make(tiny_llama, seed=seed).named_parameters() if "lora_A" in n]

    first = a_matrices(5)
    torch.rand(17)
    again, other = a_matrices(5), a_matrices(6)
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))


def test_training_loss_is_the_mean_over_scored_tokens_of_the_batch(tiny_llama: Path, batch: Any) -> None:
    module = make(tiny_llama).eval()
    batch["labels"][0, 4:] = -100
    loss = module.loss(batch)
    expected = F.cross_entropy(module(batch)[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    batch["labels"][:] = -100
    assert float(module.loss(batch).detach()) == 0.0


def test_gradient_checkpointing_changes_no_gradient(tiny_llama: Path, batch: Any) -> None:
    gradients = []
    for checkpointing in (False, True):
        module = make(tiny_llama, gradient_checkpointing=checkpointing, lora=LoRAConfig(r=2, dropout=0.0))
        torch.manual_seed(0)
        disturb(module)
        assert module.model.is_gradient_checkpointing is checkpointing
        module.loss(batch).backward()
        gradients.append({n: p.grad for n, p in module.named_parameters() if p.requires_grad})
    assert all(gradient.abs().max() > 0 for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-7)


def train(module: LoRAFinetuner, stories: StoriesDataModule, checkpoint: Path) -> None:
    Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[RunCheckpoint(checkpoint, every_n_steps=100)],
    ).fit(module, datamodule=stories)


@pytest.fixture
def trained(tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path) -> tuple[LoRAFinetuner, Path]:
    module = LoRAFinetuner(base=str(tiny_llama), lora=LoRAConfig(r=2), optimizer=OptimizerConfig(lr=0.01))
    train(module, stories, tmp_path / "last.ckpt")
    return module, tmp_path / "last.ckpt"


def test_a_checkpoint_holds_the_adapters_alone_and_loads_in_one_call(
    trained: tuple[LoRAFinetuner, Path], tiny_llama: Path, batch: Any
) -> None:
    module, path = trained
    content = torch.load(path, weights_only=True)
    assert content["state_dict"] and all("lora_" in name for name in content["state_dict"])
    loaded = LoRAFinetuner.load_from_checkpoint(path, weights_only=True).eval()
    assert loaded.lora == module.lora and loaded.optimizer_config == module.optimizer_config
    assert torch.equal(loaded(batch), module.eval()(batch))
    # The base is as it was on disk.
    fresh = load_model(str(tiny_llama), dtype="float32", trust_remote_code=False)
    with module.adapters_disabled():
        assert torch.equal(module(batch), fresh(batch["input_ids"], attention_mask=batch["attention_mask"]).logits)


def test_an_evaluation_knows_nothing_of_one_that_was_broken_off(
    trained: tuple[LoRAFinetuner, Path], stories: StoriesDataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _ = trained

    def validate() -> Any:
        return Trainer(accelerator="cpu", logger=False, enable_progress_bar=False).validate(
            module, datamodule=stories, verbose=False
        )

    expected = validate()
    with monkeypatch.context() as patch:
        patch.setattr(module, "on_validation_epoch_end", lambda: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            validate()
    assert validate() == expected


def test_a_checkpoint_of_another_base_or_other_adapters_is_refused(
    trained: tuple[LoRAFinetuner, Path], tiny_llama: Path, tmp_path: Path
) -> None:
    _, path = trained
    other = tmp_path / "other"
    model = load_model(str(tiny_llama), dtype="float32", trust_remote_code=False)
    model.model.norm.weight.data[0] += 1
    model.save_pretrained(other)
    with pytest.raises(UserError, match=r"another base model.*--model.base"):
        LoRAFinetuner.load_from_checkpoint(path, base=str(other), weights_only=True)
    with pytest.raises(UserError, match=r"r 2 there, 4 here"):
        LoRAFinetuner.load_from_checkpoint(path, lora=LoRAConfig(r=4), weights_only=True)
    with pytest.raises(UserError, match=r"alpha 16.0 there, 8.0 here"):
        LoRAFinetuner.load_from_checkpoint(path, lora=LoRAConfig(r=2, alpha=8.0), weights_only=True)


def test_training_lowers_the_loss(trained: tuple[LoRAFinetuner, Path], stories: StoriesDataModule) -> None:
    module, _ = trained
    everything = stories.examples("train").collate(range(20))
    module.eval()
    after = float(module.loss(everything).detach())
    with module.adapters_disabled():
        before = float(module.loss(everything).detach())
    assert after < before - 0.01


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"r": 0}, "^lora.r is 0; it must be at least 1.$"),
        ({"alpha": 0.0}, "^lora.alpha is 0.0; it must be above 0 and finite.$"),
        ({"alpha": float("nan")}, "^lora.alpha is nan; "),
        ({"dropout": 1.0}, "^lora.dropout is 1.0; it must be at least 0 and below 1.$"),
    ],
)
def test_impossible_adapters_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        LoRAConfig(**wrong)


def test_a_target_that_matches_nothing_is_named_with_what_there_is(tiny_llama: Path) -> None:
    with pytest.raises(UserError, match=r"query_key_value match no linear of LlamaForCausalLM.*down_proj.*v_proj"):
        make(tiny_llama, lora=LoRAConfig(target_modules=["q_proj", "query_key_value"]))


def test_a_base_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no folder"):
        make(tmp_path / "nothing")
    with pytest.raises(UserError, match="Cannot load a model from"):
        make(tmp_path)


def test_a_full_disk_is_found_before_the_first_step(
    tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make(tiny_llama)
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    needed = 2 * 3 * 4 * trained
    for free in (needed - 1, needed):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: type("Usage", (), {"free": free}))
        if free < needed:
            with pytest.raises(UserError, match=rf"need {needed:,} bytes and the disk has {free:,} left.*--run.dir"):
                train(module, stories, tmp_path / "new" / "last.ckpt")
        else:
            train(module, stories, tmp_path / "new" / "last.ckpt")
