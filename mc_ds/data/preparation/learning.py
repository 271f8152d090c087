"""Trains a tokenizer on the training split of the inputs."""

from collections.abc import Iterator

from mc_ds.data.preparation.selection import is_train
from mc_ds.data.text.cutting import key_of, pieces
from mc_ds.data.text.documents import document
from mc_ds.data.text.faults import Fault
from mc_ds.data.text.plan import Plan
from mc_ds.data.text.readers import Segment, TooLarge, segments
from mc_ds.data.tokenizer import Tokenizer, train_tokenizer


def learn_tokenizer(
    plan: Plan, *, vocab_size: int, text_field: str, max_bytes: int, val_fraction: float
) -> Tokenizer:
    """Train a tokenizer on the future training split, or a sample of it.

    Skips faulty input silently, because encoding reports it later. Raises ConfigError if the text
    is too little for `vocab_size`.
    """
    texts = _texts(plan, text_field, max_bytes, val_fraction)
    return train_tokenizer(texts, vocab_size, setting="--vocab_size")


def _texts(plan: Plan, text_field: str, max_bytes: int, val_fraction: float) -> Iterator[str]:
    """Yield the text of training documents. A single plain text file is split by position: yield
    its beginning.
    """
    alone = len(plan.files) == 1 and plan.files[0].form == "text"
    for source, file in enumerate(plan.files):
        found = segments(source, file, text_field=text_field, max_bytes=max_bytes)
        limit = (1 - val_fraction) * file.size
        try:
            yield from (
                _beginning(found, limit) if alone else _train_texts(found, text_field, val_fraction)
            )
        except Fault:
            continue


def _beginning(found: Iterator[Segment | TooLarge], limit: float) -> Iterator[str]:
    """Yield the text of a plain text file up to about byte `limit` of the stored file."""
    before = 0
    for segment in found:
        assert isinstance(segment, Segment)
        text = (document(segment, 0, "") or b"").decode()
        size = segment.position - before
        share = (limit - before) / size if size else float(segment.position <= limit)
        yield text[: int(len(text) * min(1.0, max(0.0, share)))]
        before = segment.position


def _train_texts(
    found: Iterator[Segment | TooLarge], text_field: str, val_fraction: float
) -> Iterator[str]:
    train = True
    for segment in found:
        if isinstance(segment, TooLarge):
            continue
        for number in range(len(segment.records)):
            try:
                content = document(segment, number, text_field)
            except Fault:
                if segment.form == "text":
                    raise
                continue
            if content is None:
                continue
            if not segment.continues:
                train = is_train(key_of(next(pieces(content))), val_fraction)
            if train:
                yield content.decode()
