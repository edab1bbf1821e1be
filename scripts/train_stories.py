"""Makes the story teller that comes with the package: its tokenizer, its weights, and the figures that it is known by.

    python scripts/train_stories.py qpruner/stories/checkpoint

trains a tokenizer and a small Llama on the embedded stories and prints the perplexity on test stories beside that of a
bigram model, the accuracy on story endings, and samples. A killed run goes on when the same command is given again; its
state lies in ``runs/train-stories/``.

The first stage (most of an hour on two cores) reads stories as they are. Of a story's tokens only one or two depend on
what was told sentences before, and a model learns to look them up last. The second stage (as long again) therefore ends
each story in all ways that its plot knows, each a branch behind the same prompt, and weighs the tokens that the facts
decide more than the others; plots whose facts are easy to look up come half as often. The checkpoint in the package was
made so, but that the first 1,000 steps of its second stage weighed all tokens of endings threefold, and no plot less.
"""

import argparse
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qpruner.callbacks import RunCheckpoint, Throughput
from qpruner.datamodules import StoriesDataModule
from qpruner.datamodules.base import LoaderConfig
from qpruner.datamodules.choice_tasks import TaskQuestions
from qpruner.datamodules.choices import NOTHING, ChoiceExamples
from qpruner.datamodules.questions import Question
from qpruner.datamodules.rows import IGNORED, Batch, TokenRows
from qpruner.datamodules.stories import ending_questions
from qpruner.evaluation.evaluator import Evaluator
from qpruner.evaluation.subject import Subject
from qpruner.likelihood import token_nll
from qpruner.processes import Processes
from qpruner.records.statistics import standard_error
from qpruner.stories import Story, generate_stories, generate_story, split_of
from qpruner.training.answers import tree_states
from qpruner.training.module import LoRAFinetuner
from qpruner.training.optimization import OptimizerConfig, make_optimizer, make_scheduler

SEED = 0
VOCABULARY = 2048  # room for every word of the stories, so that to repeat a name is to copy one token
CONTEXT = 256
HARD_PLOTS = ("trip", "promise", "repair", "hidden_things", "gathering", "party")
DECIDED = 15.0  # weight of tokens that the facts decide, in the second stage; that of others in endings is 1
TOLD = 0.7  # weight of the tokens of prompts there
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
        nll = token_nll(self.model, batch["input_ids"], batch["labels"], batch["attention_mask"])
        return nll.sum() / (batch["labels"][:, 1:] != IGNORED).sum()

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(OPTIMIZER, self.parameters())
        scheduler = make_scheduler(OPTIMIZER, optimizer, lambda: int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class EndingTrees(Dataset[dict[str, Tensor]]):
    """Batches of training stories, each with all its endings; the number of a batch decides what is in it.

    Args:
        tokenizer: tokenizer of the model.
        batches: number of batches.
    """

    def __init__(self, tokenizer: Any, batches: int) -> None:
        self.tokenizer = tokenizer
        self.batches = batches

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        stories = list(islice(self._stories(Random(f"endings {number}")), 32))
        questions = tuple(
            Question((story.prompt,) * len(rights), tuple(f" {right}</s>" for right in rights), (1,) * len(rights), 0)
            for story in stories
            for rights in ([story.ending, *(right for right, _ in story.alternatives)],)
        )
        given = TaskQuestions(questions, tuple(range(len(questions))), "")
        examples = ChoiceExamples.of("endings", "acc", given, self.tokenizer, max_length=CONTEXT, pad_token=2)
        batch = examples.collate(range(len(examples)))
        weights = torch.zeros(batch["targets"].shape)
        for row, story in enumerate(stories):
            pairs = [(story.ending, story.wrong_ending), *story.alternatives]
            of_row = [weight for right, wrong in pairs for weight in self._weights(story.prompt, right, wrong)]
            weights[row, : len(of_row)] = torch.tensor(of_row)
        names = ("input_ids", "positions", "branch", "targets", "sources")
        real = (batch["branch"] != NOTHING).long()
        return {"weights": weights, "attention_mask": real, **{name: batch[name] for name in names}}  # type: ignore[literal-required]

    def _stories(self, random: Random) -> Iterator[Story]:
        while True:
            story = generate_story(random)
            if split_of(story) == "train" and (story.facts[0] in HARD_PLOTS or random.random() < 0.5):
                yield story

    def _weights(self, prompt: str, right: str, wrong: str) -> list[float]:
        """The weight of each token of a right ending: more where the wrong one has others."""
        begin = len(self.tokenizer(prompt)["input_ids"])
        tokens, others = (self.tokenizer(f"{prompt} {end}</s>")["input_ids"][begin:] for end in (right, wrong))
        shorter = min(len(tokens), len(others))
        same = next((place for place in range(shorter) if tokens[place] != others[place]), shorter)
        behind = next((place for place in range(shorter - same) if tokens[-1 - place] != others[-1 - place]), 0)
        decided = range(same, max(len(tokens) - behind, same + 1))
        return [DECIDED if place in decided else 1.0 for place in range(len(tokens))]


class StoryEnder(StoryTeller):
    """Goes on training with all the endings of each story."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        LightningModule.__init__(self)
        self.model = model

    def loss(self, batch: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        branch, tokens = batch["branch"], batch["input_ids"]
        hidden = tree_states(self.model, tokens, batch["positions"], branch)
        rows, places = (branch[:, 1:] == 0).nonzero(as_tuple=True)
        scored = batch["weights"] > 0
        states = [hidden[rows, places], hidden[scored.nonzero(as_tuple=True)[0], batch["sources"][scored]]]
        targets = torch.cat([tokens[rows, places + 1], batch["targets"][scored]])
        weights = torch.cat([torch.full((len(rows),), TOLD), batch["weights"][scored]])
        losses = F.cross_entropy(self.model.lm_head(torch.cat(states)), targets, reduction="none")
        return (losses * weights).sum() / weights.sum()


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
    data = StoriesDataModule(tokenizer=str(folder), num_train=20_000, num_test=1000, num_choices=0)
    (results, *_) = Trainer(logger=False, enable_checkpointing=False).test(
        LoRAFinetuner(base=str(folder)), datamodule=data, verbose=False
    )
    bigram = bigram_perplexity(data.examples("train").rows, data.examples("test").rows)
    print(f"test perplexity per token: {results['test/perplexity']:.3f} (bigram model: {bigram:.3f})")
    print(f"bits per byte: {results['test/bits_per_byte']:.4f}")
    stories = list(generate_stories("test", num_stories=1000, seed=0))
    with TemporaryDirectory() as place:
        evaluator = Evaluator(Subject.load(str(folder)), Processes.alone(), Path(place), batch_tokens=4096)
        for name in ("untold", "told"):
            questions = ending_questions(stories, 0, other=name)
            evaluator.task(evaluator.tokenize(name, "acc", questions), questions.source, "test")
            accuracy = evaluator.evaluation.tasks[name].acc
            error = standard_error(accuracy, len(stories))
            print(f"right of 1,000 endings, against one that is {name}: {accuracy:.1%} ± {error:.1%} (chance: 50 %)")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for seed, prompt in enumerate(["", "", "Mia had", "One day Tom", "It was raining"]):
        torch.manual_seed(seed)
        tokens = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        output = model.generate(**tokens, do_sample=True, temperature=0.7, max_new_tokens=200)
        print(f"\n{tokenizer.decode(output[0], skip_special_tokens=True)}")


def train(module: StoryTeller, stage: str, steps: int, **data: Any) -> StoryTeller:
    """Trains a stage to its end, or goes on with it where it was cut off."""
    state = Path("runs/train-stories", f"{stage}.ckpt")
    trainer = Trainer(
        max_steps=steps,
        val_check_interval=250 if "datamodule" in data else None,
        check_val_every_n_epoch=None,
        gradient_clip_val=1.0,
        logger=False,
        use_distributed_sampler=False,
        callbacks=[RunCheckpoint(state, every_n_steps=250), Throughput()],
    )
    trainer.fit(module, **data, ckpt_path=state if state.exists() else None, weights_only=True)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for the checkpoint")
    parser.add_argument("--stories", type=int, default=64_000, help="training stories")
    parser.add_argument("--steps", type=int, default=4600, help="optimizer steps of 32 stories as they are")
    parser.add_argument("--ending-steps", type=int, default=2850, help="optimizer steps of 32 stories with all endings")
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
        module = train(StoryTeller(model_config()), "stories", options.steps, datamodule=data)
        batches = DataLoader(EndingTrees(data.tokenizer, options.ending_steps), batch_size=None)
        module = train(StoryEnder(module.model), "endings", options.ending_steps, train_dataloaders=batches)
        module.model.half().save_pretrained(options.output)
    describe(options.output)


if __name__ == "__main__":
    main()
