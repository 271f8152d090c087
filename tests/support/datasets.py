"""Small datasets for the tests."""

from collections.abc import Sequence
from pathlib import Path

from mc_ds.data import DatasetWriter, Tokenizer

WORDS = [f"value_{i} = compute(item, {i})\n" * (i % 7 + 3) for i in range(60)]


def write_dataset(folder: Path, tokenizer: Tokenizer, texts: Sequence[str] = WORDS) -> Path:
    """Write a dataset of one document per text, every fourth for validation."""
    folder.mkdir(parents=True)
    with DatasetWriter(folder, tokenizer) as writer:
        for number, text in enumerate(texts):
            split = "validation" if number % 4 == 3 else "train"
            writer.append(split, tokenizer.encode_document(text))
        writer.finish()
    return folder
