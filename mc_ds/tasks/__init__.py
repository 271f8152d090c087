"""Tasks: sequences whose horizon can only be predicted from what the history holds. They
evaluate policies and train models alike.

Data flows `vocabulary` -> a family (`recall`, `ruler`: what is planted and asked) -> `planting`
(where, in real text) -> `registry`, which makes tasks by name; `sources` turns them into
training data. A new task is one `Family`.
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
