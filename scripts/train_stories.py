"""Makes the story teller that comes with the package: its tokenizer, its weights, and the figures that it is known by.

    python scripts/train_stories.py qpruner/stories/checkpoint

trains a tokenizer and a small Llama on the embedded stories (most of an hour on two cores) and prints the perplexity
on test stories beside that of a bigram model, the accuracy on story endings, and samples. A killed run goes on when the
same command is given again; its state lies in ``runs/train-stories/``.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qpruner.callbacks import RunCheckpoint, Throughput
from qpruner.datamodules import StoriesDataModule
from qpruner.datamodules.base import LoaderConfig
from qpruner.datamodules.rows import IGNORED, Batch, TokenRows
from qpruner.stories import generate_stories
from qpruner.training.metrics import token_nll
from qpruner.training.module import LoRAFinetuner
from qpruner.training.optimization import OptimizerConfig, make_optimizer, make_scheduler

SEED = 0
VOCABULARY = 2048  # room for every word of the stories, so that to repeat a name is to copy one token
CONTEXT = 256
OPTIMIZER = OptimizerConfig(lr=2e-3, weight_decay=0.1, beta2=0.95, warmup_steps=200, final_lr=0.02)


class StoryTeller(LightningModule):
    """Trains every weight of a small Llama from a random start."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.model = LlamaForCausalLM(config)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val/loss", self.loss(batch), prog_bar=True)

    def loss(self, batch: Batch) -> Tensor:
        logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return token_nll(logits, batch["labels"]).sum() / (batch["labels"][:, 1:] != IGNORED).sum()

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(OPTIMIZER, self.parameters())
        scheduler = make_scheduler(OPTIMIZER, optimizer, lambda: int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def train_tokenizer(folder: Path, num_stories: int) -> None:
    """A byte-level BPE that begins every text with ``<s>``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    stories = generate_stories("train", num_stories=num_stories, seed=SEED)
    tokenizer.train_from_iterator((story.text for story in stories), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def model_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )


def bigram_perplexity(train: TokenRows, test: TokenRows) -> float:
    """Of a bigram model with add-0.01 smoothing, scored as the Llama is: the first token of a row is not."""
    counts = torch.full((VOCABULARY, VOCABULARY), 0.01, dtype=torch.float64)
    before, after = _pairs(train)
    counts.index_put_((before, after), torch.ones(len(before), dtype=torch.float64), accumulate=True)
    log_probability = (counts / counts.sum(1, keepdim=True)).log()
    before, after = _pairs(test)
    return math.exp(-log_probability[before, after].mean())


def _pairs(rows: TokenRows) -> tuple[Tensor, Tensor]:
    tokens = rows.tokens.long()
    inside = torch.ones(len(tokens), dtype=torch.bool)
    inside[rows.offsets[:-1]] = False
    return tokens[:-1][inside[1:]], tokens[1:][inside[1:]]


def describe(folder: Path) -> None:
    """Prints what the model can do, measured on test stories that it never saw."""
    data = StoriesDataModule(tokenizer=str(folder), num_train=20_000, num_test=1000, num_choices=200)
    (results, *_) = Trainer(logger=False, enable_checkpointing=False).test(
        LoRAFinetuner(base=str(folder)), datamodule=data, verbose=False
    )
    bigram = bigram_perplexity(data.examples("train").rows, data.examples("test").rows)
    print(f"test perplexity per token: {results['test/perplexity']:.3f} (bigram model: {bigram:.3f})")
    print(f"bits per byte: {results['test/bits_per_byte']:.4f}")
    print(f"right endings: {results['test/accuracy']:.1%} of 200 (chance: 50 %)")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for seed, prompt in enumerate(["", "", "Mia had", "One day Tom", "It was raining"]):
        torch.manual_seed(seed)
        tokens = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        output = model.generate(**tokens, do_sample=True, temperature=0.7, max_new_tokens=200)
        print(f"\n{tokenizer.decode(output[0], skip_special_tokens=True)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for the checkpoint")
    parser.add_argument("--stories", type=int, default=64_000, help="training stories")
    parser.add_argument("--steps", type=int, default=4600, help="optimizer steps of 32 stories")
    parser.add_argument("--describe", action="store_true", help="only measure the checkpoint that is there")
    options = parser.parse_args()
    if not options.describe:
        seed_everything(SEED)
        if not (options.output / "tokenizer.json").exists():
            train_tokenizer(options.output, num_stories=20_000)
        data = StoriesDataModule(
            tokenizer=str(options.output),
            max_length=CONTEXT,
            num_train=options.stories,
            num_choices=0,
            end_token=True,
            loader=LoaderConfig(batch_size=32),
        )
        state = Path("runs/train-stories/last.ckpt")
        trainer = Trainer(
            max_steps=options.steps,
            val_check_interval=250,
            check_val_every_n_epoch=None,
            gradient_clip_val=1.0,
            logger=False,
            use_distributed_sampler=False,
            callbacks=[RunCheckpoint(state, every_n_steps=250), Throughput()],
        )
        module = StoryTeller(model_config())
        trainer.fit(module, datamodule=data, ckpt_path=state if state.exists() else None, weights_only=True)
        module.model.half().save_pretrained(options.output)
    describe(options.output)


if __name__ == "__main__":
    main()
