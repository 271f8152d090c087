"""Prompts: texts with a question at their end, whose answers the model writes. They are scored by
what its greedy continuation contains.

    base.py     `Prompt`, its score, and `PromptTask`
    page.py     texts of an exact number of tokens, and haystacks
    needles.py  RULER: facts hidden in a haystack
    lists.py    RULER: variable tracking, common and frequent words
    stories.py  questions about a simulated world
    catalog.py  all of them by name
    answered.py prompts with their answers, as a task to train on

RULER: Hsieh et al., arXiv:2404.06654. Its tasks are built from the paper's description; sentences
are this project's own, and the haystack is the corpus instead of essays.
"""

from mc_ds.tasks.prompts.answered import AnsweredPrompts
from mc_ds.tasks.prompts.base import Prompt, PromptFamily, PromptTask, score
from mc_ds.tasks.prompts.catalog import PROMPT_GROUPS, PROMPTS
from mc_ds.tasks.prompts.page import Page, TextSource

__all__ = [
    "PROMPTS",
    "PROMPT_GROUPS",
    "AnsweredPrompts",
    "Page",
    "Prompt",
    "PromptFamily",
    "PromptTask",
    "TextSource",
    "score",
]
