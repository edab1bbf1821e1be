import gc
import weakref
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from qpruner.memory import freeing_cycles, num_parameters, peak_meaning, read_peak, reset_peak, tensor_bytes
from qpruner.pretrained import load_model


def test_bytes_equal_the_tensors_in_the_file_with_tied_weights_once(tiny_llama: Path) -> None:
    model = load_model(str(tiny_llama), dtype="float32", trust_remote_code=False)
    with safe_open(tiny_llama / "model.safetensors", framework="pt") as file:
        stored = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118  # no mapping
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tensor_bytes(model) == sum(tensor.nbytes for tensor in stored)
    assert num_parameters(model) == sum(tensor.numel() for tensor in stored)
    # 2048 x 32 embeddings; two layers of q, o (32 x 32), k, v (32 x 16), three FFN (32 x 48), two norms; a last norm
    assert num_parameters(model) == 2048 * 32 + 2 * (2 * 1024 + 2 * 512 + 3 * 1536 + 64) + 32


def test_buffers_that_are_saved_count_and_others_do_not() -> None:
    module = nn.Module()
    module.register_buffer("kept", torch.zeros(10, dtype=torch.int8))
    module.register_buffer("scratch", torch.zeros(99), persistent=False)
    assert tensor_bytes(module) == 10
    assert num_parameters(module) == 0


def test_peak_sees_what_was_freed_and_forgets_when_told() -> None:
    device = torch.device("cpu")
    reset_peak(device)
    before = read_peak(device)
    block = torch.ones(32 * 2**20, dtype=torch.float32)
    del block
    peak = read_peak(device)
    assert before is not None and peak is not None
    assert peak - before > 100 * 2**20
    reset_peak(device)
    assert (read_peak(device) or 0) < peak
    assert peak_meaning(device) == "resident set of the process"


def test_what_refers_to_itself_is_let_go_and_what_was_there_is_not_looked_at() -> None:
    class Node:
        def __init__(self) -> None:
            self.itself = self

    gc.disable()
    try:
        before = weakref.ref(Node())
        with freeing_cycles():
            inside, kept = weakref.ref(Node()), Node()
            assert gc.get_freeze_count() > 0
        assert inside() is None and before() is not None and kept.itself is kept
        assert gc.get_freeze_count() == 0  # Python looks at all again, in its own time
    finally:
        gc.enable()
    gc.collect()
    assert before() is None
