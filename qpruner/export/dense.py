"""Export to a dense model of 16 bits in the layout of Hugging Face, with the adapters in its weights."""

import copy
from pathlib import Path

import torch

from qpruner.dense_copy import TokenizerFiles, check_finite
from qpruner.export.description import Description
from qpruner.export.source import Source
from qpruner.export.written import Written
from qpruner.folder_manifest import Step, entries_of, read_manifest
from qpruner.model_folder import save_base
from qpruner.quantization.merging import make_dense_


class Dense:
    """A folder that loads anywhere if all layers have equal widths, and always by ``qpruner.load_compressed``."""

    name = "dense"
    extra = None
    module = None

    def check(self, model: Description) -> None:
        """Accepts every compressed model: each can be made dense."""

    def write(self, source: Source, folder: Path, dtype: torch.dtype) -> Written:
        network = make_dense_(copy.deepcopy(source.network), source.adapters, dtype)
        name = str(dtype).removeprefix("torch.")
        check_finite(network, f"the dense model in {name}", "Export with --dtype bfloat16.")
        manifest = read_manifest(source.folder)
        save_base(
            folder,
            network,
            source.plan.merged(),
            base_name=manifest["base"]["name"],
            state="merged",
            recipe=[*manifest["recipe"], Step(name="export", options={"format": self.name, "dtype": name})],
            tokenizer=TokenizerFiles(source.folder),
        )
        predicted = source.num_weights * dtype.itemsize
        packed = sum(source.packed(name.rpartition(".")[0]) is not None for name in source.names())
        changes = [f"{packed} packed weights are dense, in {name}"] if packed else []
        changes += [f"{len(source.adapters)} adapters are in their weights"] if source.adapters else []
        return Written(
            tuple(Path(path) for path in entries_of(folder)),
            predicted,
            tuple(changes),
            lambda name: network.get_parameter(name).detach().float(),
        )
