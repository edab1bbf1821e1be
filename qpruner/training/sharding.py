"""A model that is sharded across devices by FSDP2, on top of Lightning's `ModelParallelStrategy`.

Each device holds a shard of every decoder layer. Codes, scales and adapters are parameters of one group, gathered as
bytes before the layer computes and freed after it. Embedding, head and final norm stay whole on each device: the head
runs once for each chunk of positions, whose number differs between devices, so that devices which gathered it each time
would wait for one another forever.

Source: `torch.distributed.fsdp.fully_shard`; parameters are split by rows, of which a device may get none.
"""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Self

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    ParallelStrategy,
    Strategy,
)
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.optim import Optimizer

from qpruner.anatomy.layers import decoder_blocks
from qpruner.errors import UserError
from qpruner.likelihood import causal_model

FSDP2 = "fsdp2"
"""Name of the strategy for ``--trainer.strategy``."""


class ShardedStrategy(ModelParallelStrategy):
    """Shards the decoder layers across all devices, and distributes rows of data as DDP does.

    Callbacks compress the whole base, on all processes as with DDP; the result is written to disk, then sharded. A
    checkpoint is one file with the whole adapters and their optimizer state, as other strategies write and read it.
    Evaluation runs without gradients but never in inference mode, whatever the Trainer was given.

    Args:
        process_group_backend: backend of torch.distributed; by default the one for the devices.
        timeout: maximum time that processes wait for one another.
    """

    def __init__(
        self, process_group_backend: str | None = None, timeout: timedelta | None = default_pg_timeout
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    @classmethod
    def of(cls, given: ModelParallelStrategy) -> Self:
        """The strategy that does the sharding which Lightning's own leaves to the module.

        Raises:
            UserError: the given strategy splits the linears themselves (tensor parallelism).
        """
        if given._tensor_parallel_size not in ("auto", 1):
            raise UserError(
                f"tensor_parallel_size of --trainer.strategy is {given._tensor_parallel_size}, and packed linears "
                f"cannot be split by tensor parallelism. Give 1, or --trainer.strategy {FSDP2}."
            )
        return cls(given._process_group_backend, given._timeout)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        # Layers gathered in inference mode, such as for a first validation, could not be trained afterwards.
        loops = trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop, trainer.predict_loop
        for loop in loops:
            loop.inference_mode = False
        super().setup(trainer)

    def shard_(self, network: nn.Module) -> None:
        """Shards a model unless it is sharded already; see the function `shard_`."""
        if not is_sharded(network):
            shard_(network, self.device_mesh["data_parallel"])

    # Checkpoints: whole tensors in one file. Lightning's strategy restores them after the optimizer was created, which
    # is too late for a module to load the base of a checkpoint.

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The trained parameters, whole, on the first process; empty on the others, which take part in gathering."""
        assert self.lightning_module is not None
        trained = [(name, p.detach()) for name, p in self.lightning_module.named_parameters() if p.requires_grad]
        return self._gathered(dict(trained))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        with torch.no_grad():
            for name, parameter in self.lightning_module.named_parameters():
                if name in checkpoint["state_dict"]:
                    parameter.copy_(part_of(checkpoint["state_dict"][name], parameter))

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state of an optimizer, whole on the first process, without its values on the others."""
        state = getattr(optimizer, "_optimizer", optimizer).state_dict()
        return {**state, "state": {number: self._gathered(values) for number, values in state["state"].items()}}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            parts = {
                number: {name: part_of(value, parameters[number]) for name, value in values.items()}
                for number, values in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": parts})

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        ParallelStrategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return ParallelStrategy.load_checkpoint(self, checkpoint_path, weights_only)

    def _gathered(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values with whole tensors on the first process; empty on the others."""
        gathered = {}
        for name, value in values.items():
            entire = whole(value)  # a collective call, for one value after the other
            if self.is_global_zero:
                gathered[name] = entire
        return gathered


def strategy_of(given: Any) -> Any:
    """A `ShardedStrategy` where a Trainer's strategy shards the model; any other strategy as it was given.

    Args:
        given: name or object, as ``Trainer(strategy=...)`` takes it.

    Raises:
        UserError: the strategy would shard the model in a way that packed weights do not allow.
    """
    if given in (FSDP2, ModelParallelStrategy.__name__):
        return ShardedStrategy()
    if isinstance(given, ModelParallelStrategy) and not isinstance(given, ShardedStrategy):
        return ShardedStrategy.of(given)
    name = given if isinstance(given, str) else type(given).__name__
    if name.startswith(("fsdp", "deepspeed")) or isinstance(given, FSDPStrategy | DeepSpeedStrategy):
        raise UserError(
            f"--trainer.strategy is {name}, which lays the weights of a layer into one flat tensor of one dtype, and "
            f"packed weights are codes, scales and adapters. Use {FSDP2} to split the model among devices, or ddp "
            f"where one device holds it."
        )
    return given


def splits(strategy: Strategy) -> bool:
    """Whether a strategy shards the model across devices."""
    return isinstance(strategy, ShardedStrategy)


def is_sharded(network: nn.Module) -> bool:
    """Whether a model is sharded across devices."""
    return any(is_part(parameter) for parameter in network.parameters())


def shard_(network: nn.Module, mesh: Any) -> None:
    """Shards the decoder layers of a causal language model, so that each device holds a part of every layer.

    Args:
        network: causal language model, perhaps with adapters; its layers are moved to the devices one by one.
        mesh: one-dimensional device mesh.

    Raises:
        UserError: the family is not supported, or there are adapters outside the decoder layers.
    """
    from torch.distributed.fsdp import fully_shard

    causal = causal_model(network)
    blocks = decoder_blocks(causal)
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    outside = {name: parameter for name, parameter in network.named_parameters() if id(parameter) not in inside}
    if trained := [name for name, parameter in outside.items() if parameter.requires_grad]:
        raise UserError(
            f"{trained[0]} is trained and lies in no decoder layer, and what is not in layers stays whole and as it is "
            f"on each device. Name linears of layers in --model.lora.target_modules, or use --trainer.strategy ddp."
        )
    for block in blocks:
        scalars = {parameter for parameter in block.parameters() if parameter.ndim == 0}  # such as those of scales
        for scalar in scalars:
            scalar.data = scalar.data.to(mesh.device_type)  # FSDP leaves alone what it cannot split
        fully_shard(block, mesh=mesh, ignored_params=scalars)
    fully_shard(causal.base_model, mesh=mesh, ignored_params={*outside.values()})  # lets FSDP prefetch layers


# Shards are recognized by their method, since importing the class takes longer than most commands.


def is_part(value: Any) -> bool:
    """Whether a value is a tensor that is sharded across devices."""
    return isinstance(value, Tensor) and hasattr(value, "full_tensor")


def whole(value: Any) -> Any:
    """The value, where it is a tensor on the CPU and gathered if it is sharded; a collective call of all processes."""
    entire: Any = value.full_tensor() if is_part(value) else value
    return entire.cpu() if isinstance(entire, Tensor) else entire


def part_of(value: Any, like: Tensor) -> Any:
    """This device's shard of a tensor, split like another tensor of its shape; any other value as it is.

    Args:
        value: tensor that all processes hold whole, or any other value.
        like: tensor that may be sharded.
    """
    if not (is_part(like) and isinstance(value, Tensor) and value.shape == like.shape):
        return value
    from torch.distributed.tensor import distribute_tensor

    split: Any = like
    # All ranks hold the whole tensor, so that none needs to send it.
    return distribute_tensor(value.to(like.device), split.device_mesh, split.placements, src_data_rank=None)
