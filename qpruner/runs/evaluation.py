"""Measures the models of a run: the dense one, the compressed one and the recovered one."""

import time
from contextlib import nullcontext
from typing import Literal

from lightning.pytorch import Trainer

from qpruner.compressed import State
from qpruner.datamodules.base import TokenDataModule
from qpruner.memory import num_parameters, peak_meaning, read_peak, reset_peak, tensor_bytes
from qpruner.records.report import Stage, Summary
from qpruner.training.module import LoRAFinetuner

Measured = Literal["validation", "test"]
"""Splits that a run is measured on."""


def measure_stages(
    trainer: Trainer,
    module: LoRAFinetuner,
    data: TokenDataModule,
    split: Measured,
    *,
    checkpoint: str | None,
    trained: bool,
    finished: bool,
) -> Summary:
    """Measures the dense model and, if a fit has produced them, the compressed and the recovered one.

    The stage of a compressed base is named after the progress of its compression: pruned, quantized or, in a phase that
    had not got further when it was interrupted, merged.

    Args:
        trainer: Trainer that evaluates.
        module: module that is not loaded yet; it continues from the compressed base of the run, if there is one.
        data: data module with the split.
        split: split to measure on.
        checkpoint: file of the trained adapters, where they are not stored beside the base.
        trained: whether trained adapters are stored beside the base.
        finished: whether the run is over.
    """
    device = trainer.strategy.root_device
    evaluation = trainer.validate if split == "validation" else trainer.test
    stages: list[Stage] = []

    def measure(name: str, *, adapted: bool = False) -> None:
        if not adapted:
            size = num_parameters(module.model), tensor_bytes(module.model)
        module.configure_model()
        reset_peak(device)
        since = time.perf_counter()
        with nullcontext() if adapted else module.adapters_disabled():
            (results, *_) = evaluation(
                module, datamodule=data, ckpt_path=checkpoint if adapted else None, verbose=False, weights_only=True
            )
        if adapted:
            size = num_parameters(module.model), tensor_bytes(module.model)
        results = {key.partition("/")[2]: value for key, value in results.items()}
        seconds = time.perf_counter() - since
        stages.append(Stage(name, *size, module.compressed.average_bits, results, seconds, None, read_peak(device)))

    module.load_dense_base()
    measure("dense")
    if module.continues_from is not None:
        module.open_base(module.continues_from)
        if module.compressed.base_state is not State.DENSE:
            measure(module.compressed.base_state.value)
    if checkpoint is not None or trained:
        measure("recovered", adapted=True)
    return Summary(finished, data.protocol, peak_meaning(device), tuple(stages))
