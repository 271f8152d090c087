"""`prepare_dataset`: makes a dataset from text inputs, and resumes after an interruption.

Part files stay in `DATASET.parts/` until the dataset is complete. When resumed, a preparation reads
its inputs again, but encodes only the blocks that have no part yet.
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
"""Minimum bytes of text in a block."""


@dataclass(frozen=True)
class PrepareOptions:
    """Options of a preparation."""

    inputs: Sequence[str]
    out: Path
    tokenizer: Path | None = None
    """Path for `load_tokenizer`; None: train a tokenizer of `vocab_size`."""
    vocab_size: int = 32768
    text_field: str = "text"
    """JSON field or Parquet column with the text; a dotted path if nested."""
    stdin: str = ".txt"
    """Suffix of a file that is in the format of standard input."""
    workers: int = 1
    on_error: Literal["fail", "skip"] = "fail"
    min_document_tokens: int = 2
    max_document_tokens: int | None = None
    max_document_mb: int = 64
    """Maximum size of JSON lines and Parquet rows, in megabytes; larger ones are skipped. Plain
    text may be of any size.
    """
    val_fraction: float = 0.01
    """Share of the documents, chosen by a hash of their text, that go to validation; of a single
    document, the share at its end.
    """
    licence: str = ""
    overwrite: bool = False

    @property
    def max_bytes(self) -> int:
        """Maximum bytes of a JSON or Parquet record."""
        return self.max_document_mb * 1_000_000


def prepare_dataset(options: PrepareOptions, report: Callable[[str], None] = print) -> Path:
    """Make the dataset and return its folder. `report` receives progress lines.

    Raises ConfigError for invalid options or inputs (faults in the text only if `on_error` is
    "fail"), and OSError if writing fails. After an error the same call resumes.
    """
    _check(options)
    target = Path(os.path.realpath(options.out))
    parts = target.with_name(f"{target.name}.parts")
    if target.exists() and not options.overwrite:
        _discard(parts, target)
        raise ConfigError(f"{options.out} exists: give another path, or --overwrite")
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
        raise ConfigError(f"--val_fraction {options.val_fraction}: should be above 0 and below 0.5")
    if options.tokenizer is None and "-" in options.inputs:
        raise ConfigError(
            "--train_tokenizer reads the inputs twice, which standard input does not allow: give"
            " files, or --tokenizer"
        )


def _discard(parts: Path, target: Path) -> None:
    """Remove the parts of a finished preparation, unless one of the same dataset is running."""
    if parts.exists():
        with suppress(LockHeldError), StagedFolder(target):
            shutil.rmtree(parts)


def _replaceable(folder: Path) -> None:
    """Raise ConfigError if `folder` is not a dataset, so that --overwrite deletes nothing else."""
    open_dataset(folder)


class _Run:
    """The state of one preparation."""

    def __init__(
        self, options: PrepareOptions, plan: Plan, parts: Path, report: Callable[[str], None]
    ) -> None:
        self.options, self.plan, self.parts, self.report = options, plan, parts, report
        self.faults = Faults(plan.skipped)
        self.failed: set[int] = set()
        """Indices of files with a fault, all of whose documents are dropped."""

    def tokenizer(self) -> Tokenizer:
        """Load or train the tokenizer, as the options say."""
        if self.options.tokenizer is not None:
            return load_tokenizer(self.options.tokenizer)
        size = self.options.vocab_size
        self.report(f"data: training a tokenizer with a vocabulary of {size:,}")
        return learn_tokenizer(
            self.plan,
            vocab_size=size,
            text_field=self.options.text_field,
            max_bytes=self.options.max_bytes,
            val_fraction=self.options.val_fraction,
        )

    def encode(self, tokenizer: Tokenizer) -> list[Path]:
        """Encode all blocks and return the paths of their parts, in order."""
        before = np.cumsum([0, *(file.size for file in self.plan.files)])
        progress = Progress(self.plan.size, self.report)
        blocks = in_blocks(self._segments(), BLOCK_BYTES)
        options, paths = self.options, []
        made = encoded(blocks, self.parts, tokenizer, options.text_field, options.workers)
        try:
            for path, last in made:
                self._note_faults(read_part(path, with_tokens=False))
                paths.append(path)
                progress.update(int(before[last.source]) + last.position)
        finally:
            made.close()
            progress.close()
        if self._stopped_by is not None:
            raise ConfigError(str(self._stopped_by))
        return paths

    _stopped_by: Fault | None = None
    """Fault that ended reading; raised after the blocks read before it are encoded and checked."""

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
                        size = f"larger than --max_document_mb {self.options.max_document_mb}"
                        self.faults.add(Fault("too large", f"{found.where}: {size}"))
                    else:
                        yield found
            except Fault as fault:
                self.failed.add(source)
                if self.options.on_error == "fail" and fault.reason not in BY_RULE:
                    self._stopped_by = fault
                    return
                self.faults.add(fault)

    def _note_faults(self, part: Part) -> None:
        """Add a part's faults to the totals. If `on_error` is "fail", raise ConfigError for the
        first one instead.
        """
        if self.options.on_error == "fail" and part.faults.examples:
            raise ConfigError(f"{part.faults.examples[0][1]} (or skip it with --on_error skip)")
        self.faults.merge(part.faults.counts, part.faults.examples)
        self.failed.update(part.failed)

    def write(self, paths: Sequence[Path], tokenizer: Tokenizer, folder: Path) -> None:
        """Select the documents to keep from all parts, and write the dataset to `folder`."""
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
        self._report_totals(int(np.count_nonzero(codes)))

    def _read(self, paths: Iterable[Path], *, with_tokens: bool) -> Iterator[Part]:
        for path in paths:
            yield read_part(path, with_tokens=with_tokens).without(self.failed)

    def _settings(self) -> dict[str, Any]:
        names = "text_field min_document_tokens max_document_tokens max_document_mb val_fraction"
        return {name: getattr(self.options, name) for name in names.split()}

    def _report_totals(self, documents: int) -> None:
        files = len(self.plan.files) - len(self.failed)
        skipped = in_words(self.faults.counts)
        self.report(
            f"data: {files:,} files, {documents:,} documents, {self.plan.size / 1e6:,.1f} MB"
            + (f"; skipped: {skipped}" if skipped else "")
        )
        for reason, message in self.faults.examples:
            self.report(f"data: skipped, {reason}: {message}")


def _train_tokens(table: Path, codes: NDArray[np.uint8], val_fraction: float) -> int:
    """Return how many tokens of the only kept document go to the training split (at least one)."""
    number, start = int(np.flatnonzero(codes)[0]), 0
    for rows in read_table(table):
        if number < start + len(rows):
            return max(1, int(rows["tokens"][number - start] * (1 - val_fraction)))
        start += len(rows)
    raise AssertionError("the table has a row for every document")
