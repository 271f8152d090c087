"""Where a run's tokens come from, and what is made of them."""

import os
import re
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from mc_ds.config.errors import Settings

UserPath = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path that may begin with `~`, expanded where it is read; a run stores it absolute."""
TaskName = Literal[
    "corpus",
    "recall",
    "recall_hops2",
    "recall_key3",
    "niah_single",
    "niah_multikey",
    "niah_multivalue",
    "niah_multiquery",
    "variable_tracking",
    "common_words",
]
"""Tasks of training mixtures and evaluation (mc_ds/tasks)."""
RECALL_TASKS = frozenset({"recall", "recall_hops2", "recall_key3"})
"""Tasks whose number of facts follows the curriculum."""


class RecallConfig(Settings):
    """Key-value facts planted in real text: `key = value`, asked at the end."""

    facts_by_stage: list[PositiveInt] = Field(default_factory=lambda: [48], min_length=1)
    """Facts per sequence at each stage of the curriculum; validation and evaluation use the last
    stage's.
    """
    planted: PositiveInt | None = None
    """Facts in the text at every stage, repetitions included: with repeated facts recall is learnt
    much sooner. Empty: each fact once.
    """
    questions: PositiveInt = 3
    """Most facts asked per sequence."""
    min_questions: PositiveInt | None = None
    """Fewest facts asked: each sequence asks a random number of them. Empty: always `questions`."""
    key_tokens: PositiveInt = 1
    """Tokens of a key."""
    value_tokens: PositiveInt = 4
    """Letters of a value."""
    values: Literal["last", "all"] = "last"
    """Two hops: `last`, only the last fact of a chain has a value, which is the answer; `all`,
    every fact has one and the answer is all of them, so that opening each fact lowers the loss.
    """


class DatasetConfig(Settings):
    """A dataset that tools/prepare_data.py made."""

    path: UserPath
    """Its folder."""
    weight: PositiveFloat = 1.0
    """Its share of the sequences, relative to the others'."""
    name: str | None = Field(default=None, pattern=r"^[\w.-]+$")
    """Name in metrics (`val/loss/NAME`, `data/epoch/NAME`); empty: that of the folder."""

    @property
    def label(self) -> str:
        """The name in metrics."""
        return self.name or re.sub(r"[^\w.-]", "_", os.path.basename(os.path.abspath(self.path)))


class DataConfig(Settings):
    """Where tokens come from."""

    datasets: list[DatasetConfig] = []
    """Datasets to train on, all of one tokenizer; empty: `source` is prepared by the run itself."""
    validation: list[DatasetConfig] = []
    """Datasets whose validation split is read for held-out losses; empty: those of `datasets`."""
    verify: Literal["size", "content"] = "size"
    """What the start checks of `datasets`: the size of every file, or also its content, which one
    rank per host reads.
    """
    packing: Literal["stream", "document"] = "stream"
    """Sequences of the task `corpus`: windows of all documents end to end, or windows that never
    span two documents (those shorter than a sequence are left out).
    """
    min_document_tokens: NonNegativeInt = 0
    """With `packing: document`, shorter documents are left out too: for long-range training."""
    inline_limit_mb: PositiveFloat = 256.0
    """Megabytes of text, as files below `root`, up to which a run prepares them itself."""
    source: Literal["stdlib", "files"] = "stdlib"
    """Corpus: `stdlib`, the source code of this machine's Python standard library, or `files`, the
    text files below `root`.
    """
    root: UserPath | None = None
    """Folder of the corpus `files`, searched with its subfolders."""
    patterns: list[str] = Field(default=["*.txt", "*.md", "*.py", "*.jsonl"], min_length=1)
    """Shell patterns of the corpus files, by name or by path below `root`. A document is a file, or
    a line of a .jsonl file (field "text").
    """
    cache_dir: UserPath = ".cache/mc_ds"
    """Folder for the trained tokenizer and the token shards, which are made once and reused."""
    tokenizer: UserPath | None = None
    """Folder with a tokenizer (of a bundle or a run) to use instead of training one on the corpus;
    `vocab_size` is then its size.
    """
    vocab_size: PositiveInt = 4096
    """Pieces of the sentencepiece model that is trained (byte fallback included), 300 to 65536."""
    val_fraction: float = Field(default=0.05, gt=0, lt=0.5)
    """Share of the files held out for validation."""
    num_workers: NonNegativeInt = 1
    """Loader processes per rank, which read tokens and make variant plans; 0: the training process
    does both.
    """
    tasks: dict[TaskName, PositiveFloat] = Field(default={"corpus": 1.0}, min_length=1)
    """Training mixture: relative share of sequences per task; `corpus` is plain text, for others
    see `launch/evaluate.py --help`.
    """
    recall: RecallConfig = RecallConfig()
    """Facts of the recall tasks."""

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if self.tokenizer is None and not 300 <= self.vocab_size <= 65536:
            raise ValueError(
                f"vocab_size = {self.vocab_size} pieces cannot be trained: use 300 to 65536, or"
                " give data.tokenizer"
            )
        if self.validation and not self.datasets:
            raise ValueError("validation needs datasets: give data.datasets too")
        if self.min_document_tokens and self.packing == "stream":
            raise ValueError(
                f"min_document_tokens = {self.min_document_tokens} chooses among documents: use"
                " data.packing = document"
            )
        for field, datasets in (("datasets", self.datasets), ("validation", self.validation)):
            labels = [dataset.label for dataset in datasets]
            twice = sorted({label for label in labels if labels.count(label) > 1})
            if twice:
                raise ValueError(
                    f"{field}: {twice[0]!r} is the name of several: give each a `name` of its own"
                )
        return self


def absolute(path: str | None) -> str | None:
    """Return the path from the root of the file system; None stays None."""
    return None if path is None else os.path.abspath(path)
