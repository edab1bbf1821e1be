"""Peak memory and time of compressing a model whole and block by block from files, and whether both give the same.

    python benchmarks/offload.py --folder /tmp/random --layers 24 --hidden 2048 --ffn 5632 --vocabulary 32000

Makes a random Llama in that folder unless it is there, prunes 20 %, compensates (``--compensation``), quantizes to 4
bits with the start of adapters by LoftQ, and writes the result; each way in a process of its own. The peak is the
resident set of the process above what it was before the model was loaded, as a share of the bytes of the dense weights.
"""

import argparse
import hashlib
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import torch
from random_llama import add_arguments, random_llama, run_alone

from qpruner.adapters.lora import LoRAConfig
from qpruner.calibration.text import CalibrationConfig
from qpruner.callbacks import MixedPrecisionQuantization, StructuredPruning
from qpruner.callbacks.compression import CompressionJob
from qpruner.compressed import CompressedModel
from qpruner.datamodules import StoriesDataModule
from qpruner.memory import read_peak, reset_peak, tensor_bytes
from qpruner.offload import Offload
from qpruner.pretrained import EMBEDDED
from qpruner.processes import Processes
from qpruner.records.tables import markdown_table
from qpruner.tensor_files import load_tensors

WAYS = ("whole", "block by block")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, dtype="bfloat16")
    parser.add_argument("--folder", type=Path, required=True, help="of the random model")
    parser.add_argument("--scored", type=int, nargs=2, default=[16, 128], metavar=("SEQUENCES", "LENGTH"))
    parser.add_argument("--compensated", type=int, nargs=2, default=[64, 128], metavar=("SEQUENCES", "LENGTH"))
    parser.add_argument("--compensation", default="sequential", choices=("none", "local", "sequential"))
    parser.add_argument("--only", choices=(*WAYS, "make"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only == "make":
        random_llama(given).save_pretrained(given.folder)
        print("{}")
    elif given.only:
        print(json.dumps(compress(given)))
    else:
        if not given.folder.exists():
            run_alone("--only", "make")
        results = {way: run_alone("--only", way) for way in WAYS}
        print(table(results))
        same = results[WAYS[0]]["result"] == results[WAYS[1]]["result"]
        print(f"\nResults are {'equal, bit for bit' if same else 'NOT equal'}; {torch.get_num_threads()} threads.")


def compress(given: argparse.Namespace) -> dict[str, int]:
    """Seconds, bytes and peaks of one way, and a number that stands for all bytes of the result."""
    device = torch.device(given.device)
    scored, compensated = (CalibrationConfig(*text) for text in (given.scored, given.compensated))
    data = StoriesDataModule(tokenizer=EMBEDDED)
    data.prepare_data()
    with TemporaryDirectory(dir=given.folder.parent) as temporary:
        folder = Path(temporary)
        reset_peak(device)
        before, since = read_peak(device) or 0, perf_counter()
        offload = Offload(folder) if given.only == "block by block" else None
        model = CompressedModel.load(str(given.folder), dtype="auto", offload=offload)
        dense = tensor_bytes(model.network)
        job = CompressionJob(model, data, Processes.alone(device), LoRAConfig(), seed=0)
        StructuredPruning(
            0.2, calibration=scored, compensation=given.compensation, compensation_text=compensated
        ).compress(job)
        after_pruning = read_peak(device) or 0
        MixedPrecisionQuantization(4).compress(job)
        model.attach(LoRAConfig(), seed=0)
        model.keep(folder / "model", tokenizer=None)
        seconds, peak = perf_counter() - since, read_peak(device) or 0
        digest = hashlib.sha256()
        for file in sorted((folder / "model").rglob("*.safetensors")):
            for name, tensor in sorted(load_tensors(file).items()):
                digest.update(name.encode())
                digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return {
        "dense": dense,
        "pruned": after_pruning - before,
        "peak": peak - before,
        "milliseconds": round(1000 * seconds),
        "result": int(digest.hexdigest()[:12], 16),
    }


def table(results: dict[str, dict[str, int]]) -> str:
    whole = results[WAYS[0]]
    rows = [
        [
            way,
            f"{result['dense'] / 2**20:,.0f}",
            f"{result['pruned'] / result['dense']:.2f}",
            f"{result['peak'] / result['dense']:.2f}",
            f"{result['milliseconds'] / 1000:.0f}",
            f"{result['milliseconds'] / whole['milliseconds']:.2f}",
        ]
        for way, result in results.items()
    ]
    header = ["compressed", "dense MiB", "peak until pruned / dense", "peak / dense", "seconds", "of whole"]
    return markdown_table(header, rows)


if __name__ == "__main__":
    main()
