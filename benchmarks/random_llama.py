"""A random Llama to time and measure, of a size that the command line gives."""

import argparse
import json
import os
import subprocess
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def add_arguments(parser: argparse.ArgumentParser, *, dtype: str) -> None:
    """By default 110 M parameters."""
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--ffn", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=16384)
    parser.add_argument("--dtype", default=dtype, choices=("bfloat16", "float32"), help="of the weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def random_llama(given: argparse.Namespace) -> LlamaForCausalLM:
    """With heads of 64 and a tied head, frozen, on the device."""
    config = LlamaConfig(
        vocab_size=given.vocabulary,
        hidden_size=given.hidden,
        intermediate_size=given.ffn,
        num_hidden_layers=given.layers,
        num_attention_heads=given.hidden // 64,
        num_key_value_heads=given.hidden // 64,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.device(given.device), getattr(torch, given.dtype))
    return model.requires_grad_(False)


def run_alone(*options: str) -> dict[str, int]:
    """What this script prints last, as JSON, when a process of its own runs it with further options."""
    # With its default settings glibc keeps freed blocks for later, and the resident set shows them as if in use.
    returning = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, *sys.argv, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | returning)
    result: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return result
