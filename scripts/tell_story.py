"""Loads a compressed story teller from its folder and lets it go on with a few beginnings: ``tell_story.py FOLDER``."""

import sys

from qpruner.quiet import quieten

BEGINNINGS = ("Anna", "One day", "Mia had seven")


def main() -> None:
    quieten()
    from transformers import PreTrainedTokenizerFast

    import qpruner
    from qpruner.memory import num_parameters, tensor_bytes

    folder = sys.argv[1]
    model, tokenizer = qpruner.load_compressed(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    print(f"\n{folder}: {num_parameters(model):,} parameters in {tensor_bytes(model):,} bytes, loaded again. It tells:")
    for beginning in BEGINNINGS:
        tokens = tokenizer(beginning, return_tensors="pt")
        told = model.generate(**tokens, max_new_tokens=40, do_sample=False)
        print(f"- {tokenizer.decode(told[0], skip_special_tokens=True)} ...")


if __name__ == "__main__":
    main()
