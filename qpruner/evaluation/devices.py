"""The devices that share an evaluation, each with the whole model."""

from lightning.fabric import Fabric
from torch import Tensor

from qpruner.errors import UserError, cut
from qpruner.processes import Processes, accelerator_for, check_device


def launch(accelerator: str, devices: int) -> Processes:
    """Starts the other processes with the command line of this one, where there is more than one device.

    Args:
        accelerator: kind of device, as Lightning names them: ``auto``, ``cpu``, ``gpu``.
        devices: number of devices, each of which gets a process.

    Returns:
        The processes, as this one sees them.

    Raises:
        UserError: there are no such devices, or fewer than requested.
    """
    try:
        fabric = Fabric(
            accelerator=accelerator_for(accelerator), devices=devices, strategy="ddp" if devices > 1 else "auto"
        )
    except (RuntimeError, TypeError, ValueError) as error:  # Lightning raises each of them for another kind of mistake
        raise UserError(f"Cannot use --accelerator {accelerator} with --devices {devices}: {cut(error)}") from error
    check_device(fabric.device)
    fabric.launch()

    def reduce(tensor: Tensor) -> Tensor:
        total: Tensor = fabric.all_reduce(tensor, reduce_op="sum")  # type: ignore[assignment]
        return total

    return Processes(
        device=fabric.device,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
        forward_context=fabric.autocast,
        reduce=reduce,
        broadcast=fabric.broadcast,
    )
