"""Training data: from text to micro-batches with the plans of their working contexts.

Data flows `corpus` -> `tokenizer` -> `shards` (all three prepared once by `prepare`) ->
`sampling` -> `source` -> `loader`, which adds the plans of the training allocator. To add a corpus,
implement `Corpus`; to add a kind of sample, implement `SampleSource`.
"""

from mc_ds.data.batch import Batch, MicroStep, Sample, SampleSource, TrainingSource
from mc_ds.data.corpus import Corpus, Split, StdlibCorpus
from mc_ds.data.dataset import Dataset, DatasetWriter, open_dataset
from mc_ds.data.loader import MicroBatchDataset
from mc_ds.data.prepare import PreparedCorpus, prepare_corpus
from mc_ds.data.run_data import Domain, OtherText, RunData, open_data
from mc_ds.data.sampling.windows import WindowSampler
from mc_ds.data.shards import ShardWriter, TokenShards
from mc_ds.data.source import LanguageModelSource
from mc_ds.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from mc_ds.data.workers import (
    LoadedBatches,
    check_shared_memory,
    make_loader,
    prefetched_micro_steps,
)

__all__ = [
    "Batch",
    "Corpus",
    "Dataset",
    "DatasetWriter",
    "Domain",
    "LanguageModelSource",
    "LoadedBatches",
    "MicroBatchDataset",
    "MicroStep",
    "OtherText",
    "PreparedCorpus",
    "RunData",
    "Sample",
    "SampleSource",
    "ShardWriter",
    "Split",
    "StdlibCorpus",
    "TokenShards",
    "Tokenizer",
    "TrainingSource",
    "WindowSampler",
    "check_shared_memory",
    "load_tokenizer",
    "make_loader",
    "open_data",
    "open_dataset",
    "prefetched_micro_steps",
    "prepare_corpus",
    "train_tokenizer",
]
