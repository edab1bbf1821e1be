"""Runs a GGUF file in llama.cpp's own library: logits of tokens, tokens of texts, and texts of tokens.

A script for a process of its own, which the library may take down: ``python run_llama_cpp.py REQUEST ANSWER``. The
request is JSON: ``model``, and any of ``adapter``, ``tokens`` (rows), ``texts``. The answer is a file of numpy:
``logits`` [rows, length, vocabulary] and, as JSON, ``tokenized`` and ``detokenized``.
"""

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import numpy


def main(request: dict[str, Any]) -> dict[str, Any]:
    import llama_cpp as cpp

    silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(
        lambda level, text, _: sys.stderr.write(text.decode(errors="replace")) if level >= 3 else None
    )
    cpp.llama_log_set(silent, None)
    cpp.llama_backend_init()
    options = cpp.llama_model_default_params()
    options.use_extra_bufts = False  # its kernels for AMX crash in some virtual machines
    options.n_gpu_layers = 0
    model = cpp.llama_model_load_from_file(request["model"].encode(), options)
    assert model, "the file was not loaded"
    vocabulary = cpp.llama_model_get_vocab(model)
    answer: dict[str, Any] = {}
    if "tokens" in request:
        answer["logits"] = logits(cpp, model, vocabulary, request)
    if "texts" in request:
        tokenized = [tokenize(cpp, vocabulary, text) for text in request["texts"]]
        answer["tokenized"] = json.dumps(tokenized)
        answer["detokenized"] = json.dumps([pieces(cpp, vocabulary, tokens) for tokens in tokenized])
    return answer


def logits(cpp: Any, model: Any, vocabulary: Any, request: dict[str, Any]) -> numpy.ndarray:
    rows, size = request["tokens"], cpp.llama_vocab_n_tokens(vocabulary)
    length = len(rows[0])
    options = cpp.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = max(length, 64)
    options.n_threads = options.n_threads_batch = 1
    options.type_k = options.type_v = 0  # float32
    options.flash_attn_type = 0
    context = cpp.llama_init_from_model(model, options)
    assert context
    if "adapter" in request:
        adapter = cpp.llama_adapter_lora_init(model, request["adapter"].encode())
        assert adapter, "the adapters were not loaded"
        adapters, scales = (cpp.llama_adapter_lora_p_ctypes * 1)(adapter), (ctypes.c_float * 1)(1.0)
        assert cpp.llama_set_adapters_lora(context, adapters, 1, scales) == 0
    result = numpy.empty((len(rows), length, size), dtype=numpy.float32)
    for number, row in enumerate(rows):
        cpp.llama_memory_clear(cpp.llama_get_memory(context), True)
        batch = cpp.llama_batch_init(length, 0, 1)
        batch.n_tokens = length
        for place, token in enumerate(row):
            batch.token[place], batch.pos[place] = token, place
            batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, 0, 1
        assert cpp.llama_decode(context, batch) == 0
        for place in range(length):
            result[number, place] = numpy.ctypeslib.as_array(cpp.llama_get_logits_ith(context, place), shape=(size,))
        cpp.llama_batch_free(batch)
    return result


def tokenize(cpp: Any, vocabulary: Any, text: str) -> list[int]:
    data = text.encode()
    tokens = (cpp.llama_token * (len(data) + 8))()
    number = cpp.llama_tokenize(vocabulary, data, len(data), tokens, len(tokens), True, True)
    assert number >= 0
    return list(tokens[:number])


def pieces(cpp: Any, vocabulary: Any, tokens: list[int]) -> str:
    """The text of some tokens, without special ones, as programs write it piece by piece."""
    text = b""
    for token in tokens:
        buffer = ctypes.create_string_buffer(256)
        length = cpp.llama_token_to_piece(vocabulary, token, buffer, 256, 0, False)
        text += buffer.raw[:length]
    return text.decode(errors="replace")


if __name__ == "__main__":
    answer = main(json.loads(Path(sys.argv[1]).read_text()))
    numpy.savez(sys.argv[2], **answer)
