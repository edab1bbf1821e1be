"""Seeded small English stories whose last sentence follows from facts told at the beginning."""

from qpruner.stories.generation import Split, generate_stories, generate_story, split_of
from qpruner.stories.grammar import Story

__all__ = ["Split", "Story", "generate_stories", "generate_story", "split_of"]
