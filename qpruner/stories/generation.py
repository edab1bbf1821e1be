"""Stories by seed: one story, the split it belongs to, and as many different stories of a split as wanted."""

from collections.abc import Iterator
from hashlib import sha256
from random import Random
from typing import Literal, get_args

from qpruner.stories.grammar import Story, Tale
from qpruner.stories.plots import PLOTS

Split = Literal["train", "validation", "test"]


def generate_story(random: Random) -> Story:
    """Generate a story.

    Args:
        random: source of all choices; the same state gives the same story.

    Returns:
        A story of a random plot.
    """
    plot = random.choice(PLOTS)
    return plot(Tale(plot.__name__, random))


def split_of(story: Story) -> Split:
    """Tell which split a story belongs to: 90 % train, 5 % validation, 5 % test.

    The facts alone decide, so all paraphrases of a story are in one split, whatever seed generated them.

    Args:
        story: story whose split is asked for.

    Returns:
        The split that the story belongs to.
    """
    digest = sha256("|".join(story.facts).encode()).digest()
    percentile = int.from_bytes(digest[:8], "big") % 100
    if percentile < 90:
        return "train"
    return "validation" if percentile < 95 else "test"


def generate_stories(split: Split, *, num_stories: int, seed: int) -> Iterator[Story]:
    """Generate the stories of a split, no text twice.

    Args:
        split: name of the split: "train", "validation" or "test".
        num_stories: number of stories, 0 or more; a smaller one gives the first of the same stories.
        seed: seed of the draws; another gives other stories of the same split.

    Returns:
        The stories, generated one by one.

    Raises:
        ValueError: If the split is unknown or the number of stories is negative.
    """
    if split not in get_args(Split):
        raise ValueError(f"split is {split!r}: pass one of {', '.join(get_args(Split))}.")
    if num_stories < 0:
        raise ValueError(f"num_stories is {num_stories}: pass how many stories to generate, 0 or more.")
    return _different_stories(split, num_stories, seed)


def _different_stories(split: Split, num_stories: int, seed: int) -> Iterator[Story]:
    # A string seed is hashed by Random itself with SHA-512, so it is the same in every process.
    random = Random(f"{split} {seed}")
    seen: set[bytes] = set()
    while len(seen) < num_stories:
        story = generate_story(random)
        text = sha256(story.text.encode()).digest()
        if split_of(story) == split and text not in seen:
            seen.add(text)
            yield story
