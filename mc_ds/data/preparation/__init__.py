"""Makes a dataset of token shards from text.

learning.py   trains a tokenizer on the training split
pool.py       encodes blocks of records in worker processes
encode.py     encodes one block, in a worker
parts.py      stores an encoded block as a file, so that preparation can resume
table.py      stores one row per document on disk
selection.py  decides by duplicates, lengths and splits which documents go where
assemble.py   writes the selected documents to the dataset's splits
prepare.py    runs all steps, and resumes them
progress.py   reports progress
show.py       prints a dataset's contents
"""

from mc_ds.data.preparation.prepare import PrepareOptions, prepare_dataset
from mc_ds.data.preparation.show import describe

__all__ = ["PrepareOptions", "describe", "prepare_dataset"]
