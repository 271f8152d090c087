"""The data room: corpus, tokenizer, token shards, stateless sampling, and micro-batches with
their working-context plans.

Data flows `corpus` -> `tokenizer` -> `shards` (all three prepared once by `prepare`) ->
`sampler` -> `source` -> `loader`, which adds the plans of the training allocator. A new corpus
is one class (`Corpus`), a new kind of sample is one class (`SampleSource`).
"""

from mc_ds.data.batch import Batch, MicroStep, Sample, SampleSource
from mc_ds.data.corpus import Corpus, Split, StdlibCorpus
from mc_ds.data.loader import MicroBatchDataset, make_loader, prefetched_micro_steps
from mc_ds.data.prepare import PreparedCorpus, prepare_corpus
from mc_ds.data.sampler import WindowSampler
from mc_ds.data.shards import ShardWriter, TokenShards
from mc_ds.data.source import LanguageModelSource
from mc_ds.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

__all__ = [
    "Batch",
    "Corpus",
    "LanguageModelSource",
    "MicroBatchDataset",
    "MicroStep",
    "PreparedCorpus",
    "Sample",
    "SampleSource",
    "ShardWriter",
    "Split",
    "StdlibCorpus",
    "TokenShards",
    "Tokenizer",
    "WindowSampler",
    "load_tokenizer",
    "make_loader",
    "prefetched_micro_steps",
    "prepare_corpus",
    "train_tokenizer",
]
