"""`DataConfig`: the corpus or datasets, the tokenizer, and the mixture of tasks made from them."""

import os
import re
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from mc_ds.config.errors import Settings
from mc_ds.config.types import UserPath

TaskName = Literal[
    "corpus",
    "recall",
    "recall_hops2",
    "recall_key3",
    "synonym",
    "gloss",
    "neighbour",
    "niah_single",
    "niah_multikey",
    "niah_multivalue",
    "niah_multiquery",
    "variable_tracking",
    "common_words",
    "ruler_single_1",
    "ruler_single_2",
    "ruler_single_3",
    "ruler_multikey_1",
    "ruler_multikey_2",
    "ruler_multikey_3",
    "ruler_multivalue",
    "ruler_multiquery",
    "ruler_vt",
    "ruler_cwe",
    "ruler_fwe",
    "stories_1",
    "stories_2",
    "stories_3",
    "stories_4",
    "stories_5",
]
"""Tasks of training mixtures and evaluation (mc_ds/tasks); from `ruler_single_1` on, prompts."""
RECALL_TASKS = frozenset({"recall", "recall_hops2", "recall_key3", "synonym", "gloss"})
"""Tasks whose number of facts depends on the curriculum's stage."""


class RecallConfig(Settings):
    """Facts (`key = value`) planted in real text, with questions about them at the end."""

    facts_by_stage: list[PositiveInt] = Field(default_factory=lambda: [48], min_length=1)
    """Different facts per sequence, for each stage of the curriculum; validation and evaluation use
    the last number.
    """
    planted: PositiveInt | None = None
    """Facts in the text at every stage, counting repetitions, which make recall much faster to
    learn. Empty: each fact once.
    """
    questions: PositiveInt = 3
    """Maximum facts asked per sequence."""
    min_questions: PositiveInt | None = None
    """Minimum facts asked: the number is drawn for each sequence. Empty: always `questions`."""
    key_tokens: PositiveInt = 1
    """Tokens of a key."""
    value_tokens: PositiveInt = 4
    """Letters of a value."""
    values: Literal["last", "all"] = "last"
    """Which facts of a two-hop chain have a value: the `last`, whose value is the answer, or `all`,
    whose values together are the answer, so that opening each fact lowers the loss.
    """


class DatasetConfig(Settings):
    """A dataset made by tools/prepare_data.py."""

    path: UserPath
    """The dataset's folder."""
    weight: PositiveFloat = 1.0
    """Share of the sequences, relative to the other datasets' weights."""
    name: str | None = Field(default=None, pattern=r"^[\w.-]+$")
    """Name in metrics (`val/loss/NAME`, `data/epoch/NAME`); empty: the folder's name."""

    @property
    def label(self) -> str:
        """The name in metrics."""
        return self.name or re.sub(r"[^\w.-]", "_", os.path.basename(os.path.abspath(self.path)))


class DataConfig(Settings):
    """Where tokens come from."""

    datasets: list[DatasetConfig] = []
    """Datasets to train on, all made with one tokenizer; empty: the run prepares `source`."""
    validation: list[DatasetConfig] = []
    """Datasets whose validation split gives the held-out losses; empty: those of `datasets`."""
    verify: Literal["size", "content"] = "size"
    """How `datasets` are verified at the start: by the size of every file, or also by its content,
    which one rank per host reads.
    """
    packing: Literal["stream", "document"] = "stream"
    """How the task `corpus` cuts sequences: `stream`, from all documents concatenated, or
    `document`, never across two documents (those shorter than a sequence are skipped).
    """
    min_document_tokens: NonNegativeInt = 0
    """With `packing: document`, skip documents shorter than this, for long-range training."""
    inline_limit_mb: PositiveFloat = 256.0
    """Maximum megabytes of text files below `root` that a run prepares itself."""
    source: Literal["stdlib", "files"] = "stdlib"
    """Corpus: `stdlib`, the source code of this machine's Python standard library, or `files`, the
    text files below `root`.
    """
    root: UserPath | None = None
    """Folder of the corpus `files`, searched with its subfolders."""
    patterns: list[str] = Field(default=["*.txt", "*.md", "*.py", "*.jsonl"], min_length=1)
    """Shell patterns of the corpus files, matched with the file name or the path below `root`. A
    document is a file, or a line of a .jsonl file (its field "text").
    """
    cache_dir: UserPath = ".cache/mc_ds"
    """Cache folder for the trained tokenizer and the token shards, which later runs reuse."""
    tokenizer: UserPath | None = None
    """Folder with a tokenizer (of a bundle or a run) to use instead of training one on the corpus;
    it then determines `vocab_size`.
    """
    vocab_size: PositiveInt = 4096
    """Vocabulary of the sentencepiece model to train, byte fallback included: 300 to 65536."""
    val_fraction: float = Field(default=0.05, gt=0, lt=0.5)
    """Share of the files held out for validation."""
    num_workers: NonNegativeInt = 1
    """Loader processes per rank, which read tokens and draw variants; 0: the training process does
    both.
    """
    tasks: dict[TaskName, PositiveFloat] = Field(default={"corpus": 1.0}, min_length=1)
    """Training mixture: relative share of sequences per task. `corpus` is plain text; `python
    launch/evaluate.py --help` lists the other tasks. Prompts are followed by their answers.
    """
    recall: RecallConfig = RecallConfig()
    """Settings of the recall tasks."""
    wordnet: UserPath | None = None
    """Folder of WordNet's database files, which the tasks `synonym` and `gloss` need
    (/usr/share/wordnet where Debian's package wordnet-base is installed).
    """

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if self.tokenizer is None and not 300 <= self.vocab_size <= 65536:
            raise ValueError(
                f"vocab_size = {self.vocab_size} is outside of 300 to 65536, the range for training"
                " a tokenizer: change it, or give data.tokenizer"
            )
        if self.validation and not self.datasets:
            raise ValueError(
                "data.validation is set but data.datasets is empty: give data.datasets too"
            )
        if self.min_document_tokens and self.packing == "stream":
            raise ValueError(
                f"min_document_tokens = {self.min_document_tokens} has no effect with data.packing"
                " = stream: use data.packing = document"
            )
        for field, datasets in (("datasets", self.datasets), ("validation", self.validation)):
            labels = [dataset.label for dataset in datasets]
            twice = sorted({label for label in labels if labels.count(label) > 1})
            if twice:
                raise ValueError(
                    f"{field}: several datasets have the name {twice[0]!r}: set a different `name`"
                    " for each"
                )
        return self
