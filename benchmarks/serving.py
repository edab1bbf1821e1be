"""Tokens per second, seconds to load and resident memory of a model in each engine, beside what its bytes promise.

    python benchmarks/serving.py --base MODEL --folder runs/x/model
    python benchmarks/serving.py --base MODEL --folder runs/x/model --engines torch llama.cpp --threads 2 --repeats 5

Of the dense base in 16 bits, of the pruned model with its weights dense, and of the pruned and packed model: torch is
transformers' ``generate``, llama.cpp the library of llama-cpp-python (with the files of `qpruner export --format
gguf`). Every repeat takes all of them in turns, each in a process of its own that loads, reads a prompt and writes one
token after the other, greedily; a row is the best of its repeats. ``promised`` is what a token would gain over the
dense model in the same engine if it cost nothing but to read the weights once; ``reached`` the share of that.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from qpruner.compressed import CompressedModel
from qpruner.export.exporting import export_model
from qpruner.model_folder import load_base
from qpruner.pretrained import load_tokenizer
from qpruner.records.tables import markdown_table

ENGINES = ("torch", "llama.cpp")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="dense model")
    parser.add_argument("--folder", type=Path, help="folder of a run's model, pruned and packed")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to write")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, help="folder for what is exported; by default one that goes afterwards")
    parser.add_argument("--measure", nargs=2, metavar=("ENGINE", "MODEL"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        engine, model = given.measure
        run = torch_run if engine == "torch" else llama_cpp_run
        print(json.dumps(run(model, given)))
        return
    with TemporaryDirectory() as temporary:
        print(table(given, given.work or Path(temporary)))


def table(given: argparse.Namespace, work: Path) -> str:
    models = prepared(given, work)
    best: dict[tuple[str, str], dict[str, float]] = {}
    for _ in range(given.repeats):
        for engine, name, path, _ in models:
            row = measured(given, engine, path)
            before = best.get((engine, name), row)
            better = {key: min(row[key], before[key]) for key in ("load", "resident")}
            best[engine, name] = better | {key: max(row[key], before[key]) for key in ("prompt", "written")}
    lines = []
    for engine, name, _, size in models:
        row, dense = best[engine, name], best[engine, "dense"]
        promised = next(other for of, kind, _, other in models if (of, kind) == (engine, "dense")) / size
        gain = row["written"] / dense["written"]
        lines.append(
            [
                engine, name, f"{size / 1e6:.1f}", f"{row['load']:.2f}", f"{row['resident'] / 1e6:.0f}",
                f"{row['prompt']:.0f}", f"{row['written']:.1f}", f"{promised:.2f}", f"{gain:.2f}",
                f"{gain / promised:.2f}",
            ]
        )  # fmt: skip
    header = ["engine", "model", "MB read for a token", "seconds to load", "MB resident", "prompt tokens/s", "tokens/s"]
    return markdown_table([*header, "promised", "gain", "reached"], lines)


def prepared(given: argparse.Namespace, work: Path) -> list[tuple[str, str, str, int]]:
    """Engine, name, path and bytes read for a token of each model, exported where that is needed."""
    dense = work / "base"
    if not dense.exists():
        model = CompressedModel.load(given.base, dtype="bfloat16")
        model.keep(dense, tokenizer=load_tokenizer(given.base))
    folders = {"dense": dense, "packed": given.folder}
    pruned = work / "pruned"
    if not pruned.exists():
        export_model(given.folder, "dense", pruned, "bfloat16", {}, overwrite=False)
    models = []
    if "torch" in given.engines:
        for name, folder in {"dense": dense, "pruned": pruned, "packed": given.folder}.items():
            models.append(("torch", name, str(folder), bytes_of_a_token(folder)))
    if "llama.cpp" in given.engines:
        for name, folder in folders.items() | {("pruned", pruned)}:
            output = work / f"gguf-{name}"
            if not output.exists():
                export_model(folder, "gguf", output, "float16", {}, overwrite=False)
            file = next(path for path in sorted(output.glob("*.gguf")) if "adapter" not in path.name)
            models.append(("llama.cpp", name, str(file), bytes_of_a_token_of_gguf(file)))
    return sorted(models, key=lambda model: (ENGINES.index(model[0]), ("dense", "pruned", "packed").index(model[1])))


def bytes_of_a_token(folder: Path) -> int:
    """Bytes of all weights that a token is multiplied by; of the embedding it reads one row."""
    network = load_base(folder, check_hashes=False).network
    embedding, head = network.get_input_embeddings(), network.get_output_embeddings()
    shared = {id(parameter) for parameter in head.parameters()}
    rows = {id(parameter) for parameter in embedding.parameters()} - shared
    return sum(part.numel() * part.element_size() for part in network.parameters() if id(part) not in rows)


def bytes_of_a_token_of_gguf(file: Path) -> int:
    """As `bytes_of_a_token`."""
    import gguf

    tensors = {tensor.name: tensor.n_bytes for tensor in gguf.GGUFReader(file).tensors}
    if "output.weight" in tensors:
        tensors.pop("token_embd.weight")
    return int(sum(tensors.values()))


def measured(given: argparse.Namespace, engine: str, path: str) -> dict[str, float]:
    sizes = [f"--{name}={getattr(given, name)}" for name in ("prompt", "tokens", "threads")]
    command = [sys.executable, "-W", "ignore", __file__, "--measure", engine, path, *sizes]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def prompt_of(given: argparse.Namespace) -> list[int]:
    return [10 + number % 50 for number in range(given.prompt)]


def resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


@torch.inference_mode()
def torch_run(path: str, given: argparse.Namespace) -> dict[str, float]:
    """Loads a folder and generates; memory is above that of the process with its libraries."""
    from time import perf_counter

    import transformers

    torch.set_num_threads(given.threads)
    torch.nn.functional.linear(torch.ones(1, 64), torch.ones(64, 64))
    assert transformers.AutoModelForCausalLM
    base, since = resident(), perf_counter()
    network = load_base(path, check_hashes=False).network
    loaded = perf_counter()
    tokens = torch.tensor([prompt_of(given)])
    state = network(input_ids=tokens, use_cache=True)
    read = perf_counter()
    token = state.logits[:, -1:].argmax(2)
    for _ in range(given.tokens):
        state = network(input_ids=token, use_cache=True, past_key_values=state.past_key_values)
        token = state.logits[:, -1:].argmax(2)
    written = perf_counter()
    return speeds(given, since, loaded, read, written, resident() - base)


def speeds(
    given: argparse.Namespace, since: float, loaded: float, read: float, written: float, memory: int
) -> dict[str, float]:
    return {
        "load": loaded - since,
        "prompt": given.prompt / (read - loaded),
        "written": given.tokens / (written - read),
        "resident": memory,
    }


def llama_cpp_run(path: str, given: argparse.Namespace) -> dict[str, float]:
    """Loads a GGUF file and generates by llama.cpp's own calls."""
    import ctypes
    from time import perf_counter

    import llama_cpp as cpp

    silent: Any = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
    cpp.llama_log_set(silent, None)
    cpp.llama_backend_init()
    base, since = resident(), perf_counter()
    options = cpp.llama_model_default_params()
    options.use_extra_bufts = False  # its kernels for AMX crash in some virtual machines
    model = cpp.llama_model_load_from_file(path.encode(), options)
    settings = cpp.llama_context_default_params()
    settings.n_ctx = given.prompt + given.tokens + 8
    settings.n_threads = settings.n_threads_batch = given.threads
    context = cpp.llama_init_from_model(model, settings)
    assert model and context
    loaded = perf_counter()
    vocabulary = cpp.llama_vocab_n_tokens(cpp.llama_model_get_vocab(model))

    def step(tokens: list[int]) -> int:
        held = (cpp.llama_token * len(tokens))(*tokens)  # the batch points to it
        assert cpp.llama_decode(context, cpp.llama_batch_get_one(held, len(tokens))) == 0
        logits = cpp.llama_get_logits_ith(context, -1)
        return max(range(0, vocabulary, 97), key=lambda place: logits[place])  # any token; the search costs nothing so

    token = step(prompt_of(given))
    read = perf_counter()
    for _ in range(given.tokens):
        token = step([token])
    return speeds(given, since, loaded, read, perf_counter(), resident() - base)


if __name__ == "__main__":
    main()
