"""Loads compressed folders by transformers alone, in a process in which qpruner cannot be imported, and tries them.

    python without_qpruner.py ROOT

Every folder of ROOT holds a model; its ``inputs.safetensors`` the tokens and logits that are expected. What holds is
written to ``results.json`` there, by the name of the folder.
"""

import copy
import json
import sys
from pathlib import Path
from typing import Any

sys.modules["qpruner"] = None  # type: ignore[assignment]

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModel, AutoModelForCausalLM  # noqa: E402


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)


@torch.no_grad()
def logits_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens, use_cache=False).logits


def same(logits: torch.Tensor, expected: torch.Tensor, model: Any) -> bool:
    """Whether logits are equal; with experts nearly, as products of few rows depend on where tensors lie in memory."""
    if hasattr(model.config, "num_experts_per_tok"):
        return torch.allclose(logits, expected, rtol=1e-5, atol=1e-5)
    return torch.equal(logits, expected)


def try_folder(folder: Path) -> dict[str, Any]:
    inputs = load_file(folder / "inputs.safetensors")
    tokens, expected = inputs["tokens"], inputs["logits"]
    model, told = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    padded = torch.ones_like(tokens)
    padded[0, :4] = 0

    def generated(**options: Any) -> list[list[int]]:
        common = {"attention_mask": padded, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        return model.generate(tokens, **common, **options).tolist()

    model.save_pretrained(folder.with_suffix(".again"))
    again = load(folder.with_suffix(".again"))
    body = AutoModel.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        states = model(input_ids=tokens, use_cache=False, output_hidden_states=True).hidden_states[-1]
        of_body = body(input_ids=tokens, use_cache=False).last_hidden_state
    eager = logits_of(load(folder, attn_implementation="eager"), tokens)
    halves = load(folder, dtype=torch.bfloat16)
    return {
        "class": type(model).__name__,
        "told": {name: sorted(map(str, names)) for name, names in told.items() if names},
        "identical": same(logits_of(model, tokens), expected, model),
        "copied": same(logits_of(copy.deepcopy(model), tokens), expected, model),
        "saved again": same(logits_of(again, tokens), expected, model),
        "body": same(states, of_body, model),
        "eager": (eager - expected).abs().max().item(),
        "dtype": [str(model.dtype), str(halves.dtype), str(logits_of(halves, tokens).dtype)],
        "codes": sorted({str(part.dtype) for part in halves.parameters()}),
        "greedy": generated() == generated(use_cache=False),
        "beams": generated(num_beams=3) == generated(num_beams=3, use_cache=False),
        "static": generated() == generated(cache_implementation="static", disable_compile=True),
    }


if __name__ == "__main__":
    root = Path(sys.argv[1])
    results = {folder.name: try_folder(folder) for folder in sorted(root.iterdir()) if folder.is_dir()}
    (root / "results.json").write_text(json.dumps(results))
