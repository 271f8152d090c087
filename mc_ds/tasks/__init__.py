"""Tasks: sequences whose horizon can only be predicted from facts in the history. They serve to
evaluate policies and to train models.

A family (`recall`, `meaning`, `neighbours`, `ruler`) decides what is planted and asked, in the
token ids of `vocabulary`; `planting` places it in real text; `registry` creates tasks by name;
`sources` turns tasks into training data. A new task needs only a new `Family`. `prompts` are texts
to which the model writes the answers; a new one needs only a new `PromptFamily`.
"""

from mc_ds.tasks.base import FINAL_STAGE, Task, TaskSample
from mc_ds.tasks.corpus import CorpusTask
from mc_ds.tasks.domains import DomainsTask
from mc_ds.tasks.planting import Family, PlantedTask, Query, Story
from mc_ds.tasks.recall import Chains
from mc_ds.tasks.registry import (
    FAMILIES,
    TASK_NAMES,
    facts_for,
    make_family,
    make_task,
    open_blocks,
    too_few_facts,
)
from mc_ds.tasks.ruler import CommonWords, MultiValue
from mc_ds.tasks.sources import MixedSource, TaskSource
from mc_ds.tasks.vocabulary import NUM_KEYS, TaskVocabulary

__all__ = [
    "FAMILIES",
    "FINAL_STAGE",
    "NUM_KEYS",
    "TASK_NAMES",
    "Chains",
    "CommonWords",
    "CorpusTask",
    "DomainsTask",
    "Family",
    "MixedSource",
    "MultiValue",
    "PlantedTask",
    "Query",
    "Story",
    "Task",
    "TaskSample",
    "TaskSource",
    "TaskVocabulary",
    "facts_for",
    "make_family",
    "make_task",
    "open_blocks",
    "too_few_facts",
]
