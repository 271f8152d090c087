"""`prepare_dataset`: from inputs to a dataset, resumable.

Parts are kept in `DATASET.parts/` until the dataset is there: a preparation that was killed reads
its inputs again, finds the parts of the blocks it knows, and encodes only the others.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mc_ds.config.errors import ConfigError
from mc_ds.data.dataset import DatasetWriter, open_dataset
from mc_ds.data.preparation.assemble import assemble, assemble_by_position
from mc_ds.data.preparation.learning import learn_tokenizer
from mc_ds.data.preparation.parts import Part, read_part
from mc_ds.data.preparation.pool import encoded
from mc_ds.data.preparation.progress import Progress
from mc_ds.data.preparation.selection import select
from mc_ds.data.preparation.table import read_table, write_table
from mc_ds.data.text.faults import BY_RULE, Fault, Faults, in_words
from mc_ds.data.text.plan import Plan, make_plan
from mc_ds.data.text.readers import Segment, TooLarge, in_blocks, segments
from mc_ds.data.tokenizer import Tokenizer, load_tokenizer
from mc_ds.storage import LockHeldError, StagedFolder

BLOCK_BYTES = 1 << 21
"""Text of a block, at least."""


@dataclass(frozen=True)
class PrepareOptions:
    """How a dataset is made."""

    inputs: Sequence[str]
    out: Path
    tokenizer: Path | None = None
    """Of what `load_tokenizer` opens; None: one of `vocab_size` pieces is trained."""
    vocab_size: int = 32768
    text_field: str = "text"
    """Field of JSON, or column of Parquet, that holds the text; dotted where it is nested."""
    stdin: str = ".txt"
    """Suffix of a file that would hold what standard input does."""
    workers: int = 1
    on_error: Literal["fail", "skip"] = "fail"
    min_document_tokens: int = 2
    max_document_tokens: int | None = None
    max_document_mb: int = 64
    """Lines of JSON and rows of Parquet above are left out; plain text may be of any size."""
    val_fraction: float = 0.01
    """Share of the documents, by their text, or of a single document's end."""
    licence: str = ""
    overwrite: bool = False

    @property
    def max_bytes(self) -> int:
        """Largest record of JSON or Parquet."""
        return self.max_document_mb * 1_000_000


def prepare_dataset(options: PrepareOptions, report: Callable[[str], None] = print) -> Path:
    """Make the dataset and return its folder; `report` gets lines of progress.

    Raises ConfigError, in one line, for what cannot work, a fault of an input included unless
    `on_error` is "skip"; OSError where something cannot be written. What was encoded is kept, for
    the same call to go on from.
    """
    _check(options)
    target = Path(os.path.realpath(options.out))
    parts = target.with_name(f"{target.name}.parts")
    if target.exists() and not options.overwrite:
        _discard(parts, target)
        raise ConfigError(f"{options.out} exists: give another name, or --overwrite")
    plan = make_plan(options.inputs, stdin_suffix=options.stdin)
    report(f"data: {len(plan.files):,} files, {plan.size / 1e6:,.1f} MB")
    with StagedFolder(target) as staged:
        parts.mkdir(exist_ok=True)
        run = _Run(options, plan, parts, report)
        tokenizer = run.tokenizer()
        paths = run.encode(tokenizer)
        run.write(paths, tokenizer, staged.path)
        staged.publish(replaces=_replaceable if options.overwrite else None, files_are_synced=True)
    _discard(parts, target)
    return options.out


def _check(options: PrepareOptions) -> None:
    if not 0 < options.val_fraction < 0.5:
        raise ConfigError(f"--val_fraction {options.val_fraction}: use 0 < share < 0.5")
    if options.tokenizer is None and "-" in options.inputs:
        raise ConfigError(
            "--train_tokenizer reads its inputs twice, standard input can be read once: give"
            " files, or --tokenizer"
        )


def _discard(parts: Path, target: Path) -> None:
    """Remove the parts of a finished preparation, which may have been killed before it did; leave
    them to another one into the same folder that is under way.
    """
    if parts.exists():
        with suppress(LockHeldError), StagedFolder(target):
            shutil.rmtree(parts)


def _replaceable(folder: Path) -> None:
    """Raise ConfigError for a folder that is no dataset."""
    open_dataset(folder)


class _Run:
    """One preparation on its way."""

    def __init__(
        self, options: PrepareOptions, plan: Plan, parts: Path, report: Callable[[str], None]
    ) -> None:
        self.options, self.plan, self.parts, self.report = options, plan, parts, report
        self.faults = Faults(plan.skipped)
        self.failed: set[int] = set()
        """Files of which nothing is used."""

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer that was asked for."""
        if self.options.tokenizer is not None:
            return load_tokenizer(self.options.tokenizer)
        size = self.options.vocab_size
        self.report(f"data: training a tokenizer of {size:,} pieces")
        return learn_tokenizer(
            self.plan,
            vocab_size=size,
            text_field=self.options.text_field,
            max_bytes=self.options.max_bytes,
            val_fraction=self.options.val_fraction,
        )

    def encode(self, tokenizer: Tokenizer) -> list[Path]:
        """Make the parts of all blocks; return their paths in order."""
        before = np.cumsum([0, *(file.size for file in self.plan.files)])
        progress = Progress(self.plan.size, self.report)
        blocks = in_blocks(self._segments(), BLOCK_BYTES)
        options, paths = self.options, []
        made = encoded(blocks, self.parts, tokenizer, options.text_field, options.workers)
        try:
            for path, last in made:
                self._hear(read_part(path, with_tokens=False))
                paths.append(path)
                progress.update(int(before[last.source]) + last.position)
        finally:
            made.close()
            progress.close()
        if self._stopped_by is not None:
            raise ConfigError(str(self._stopped_by))
        return paths

    _stopped_by: Fault | None = None
    """Fault of a reader: told after those of the blocks before it."""

    def _segments(self) -> Iterator[Segment]:
        for source, file in enumerate(self.plan.files):
            try:
                for found in segments(
                    source,
                    file,
                    text_field=self.options.text_field,
                    max_bytes=self.options.max_bytes,
                ):
                    if isinstance(found, TooLarge):
                        size = f"above --max_document_mb {self.options.max_document_mb}"
                        self.faults.add(Fault("too large", f"{found.where}: {size}"))
                    else:
                        yield found
            except Fault as fault:
                self.failed.add(source)
                if self.options.on_error == "fail" and fault.reason not in BY_RULE:
                    self._stopped_by = fault
                    return
                self.faults.add(fault)

    def _hear(self, part: Part) -> None:
        """Take note of the faults of a part. Raises ConfigError for the first one, unless faults
        are skipped.
        """
        if self.options.on_error == "fail" and part.faults.examples:
            raise ConfigError(f"{part.faults.examples[0][1]} (or --on_error skip)")
        self.faults.merge(part.faults.counts, part.faults.examples)
        self.failed.update(part.failed)

    def write(self, paths: Sequence[Path], tokenizer: Tokenizer, folder: Path) -> None:
        """Select among the documents of all parts, and write the dataset."""
        options, table = self.options, self.parts / "table"
        count = write_table(table, self._read(paths, with_tokens=False))
        codes, left_out = select(
            table,
            count,
            min_tokens=options.min_document_tokens,
            max_tokens=options.max_document_tokens,
            val_fraction=options.val_fraction,
        )
        self.faults.counts.update(left_out)
        with DatasetWriter(folder, tokenizer) as writer:
            parts = self._read(paths, with_tokens=True)
            if np.count_nonzero(codes) == 1:
                assemble_by_position(
                    parts,
                    codes,
                    writer,
                    train_tokens=_train_tokens(table, codes, options.val_fraction),
                    separator_id=tokenizer.separator_id,
                )
            else:
                assemble(parts, codes, writer)
            writer.finish(
                sources=self.plan.sources,
                skipped={reason: n for reason, n in sorted(self.faults.counts.items()) if n},
                settings=self._settings(),
                licence=options.licence,
            )
        self._tell(int(np.count_nonzero(codes)))

    def _read(self, paths: Iterable[Path], *, with_tokens: bool) -> Iterator[Part]:
        for path in paths:
            yield read_part(path, with_tokens=with_tokens).without(self.failed)

    def _settings(self) -> dict[str, Any]:
        names = "text_field min_document_tokens max_document_tokens max_document_mb val_fraction"
        return {name: getattr(self.options, name) for name in names.split()}

    def _tell(self, documents: int) -> None:
        files = len(self.plan.files) - len(self.failed)
        skipped = in_words(self.faults.counts)
        self.report(
            f"data: {files:,} files, {documents:,} documents, {self.plan.size / 1e6:,.1f} MB"
            + (f"; skipped: {skipped}" if skipped else "")
        )
        for reason, message in self.faults.examples:
            self.report(f"data: skipped, {reason}: {message}")


def _train_tokens(table: Path, codes: NDArray[np.uint8], val_fraction: float) -> int:
    """Return how many tokens of the one kept document are for training, at least one."""
    number, start = int(np.flatnonzero(codes)[0]), 0
    for rows in read_table(table):
        if number < start + len(rows):
            return max(1, int(rows["tokens"][number - start] * (1 - val_fraction)))
        start += len(rows)
    raise AssertionError("the table has a row for every document")
