"""From text to a dataset.

learning.py   a tokenizer trained on the training split
pool.py       blocks of records through worker processes, in order
encode.py     what a worker does with a block
parts.py      the file that it makes of it, the unit of resuming
table.py      one row per document, on disk
selection.py  duplicates, lengths, splits: which documents are kept, and where
assemble.py   parts and selection to the shards of a dataset
prepare.py    all of it, resumable
progress.py   how far it is
show.py       what a dataset holds, for people
"""

from mc_ds.data.preparation.prepare import PrepareOptions, prepare_dataset
from mc_ds.data.preparation.show import describe

__all__ = ["PrepareOptions", "describe", "prepare_dataset"]
