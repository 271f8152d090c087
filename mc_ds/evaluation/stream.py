"""Evaluate policies on long documents (`launch/evaluate.py --refocus`).

Legend: T tokens, W entries.
"""

import sys
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from mc_ds.config import MCConfig
from mc_ds.config.history import with_history
from mc_ds.data import RunData
from mc_ds.evaluation.documents import long_documents
from mc_ds.evaluation.measure import specs_of
from mc_ds.evaluation.report import access_lines
from mc_ds.evaluation.request import Request
from mc_ds.evaluation.stream_records import StreamRecord, save_stream, stream_table
from mc_ds.evaluation.streaming import Setting, Streaming
from mc_ds.inference import InferenceModel, load_bundle
from mc_ds.weights.open import open_weights


def stream(
    bundle: str,
    request: Request,
    *,
    device: str,
    search: int | None = None,
    data_root: str | None = None,
) -> Iterator[str]:
    """Read long held-out documents at every requested length. After each document all records so
    far are written; yields one table per length.

    Raises ConfigError for a policy, length or corpus that cannot be read this way.
    """
    model = load_bundle(bundle, device=device)
    corpus = open_weights(bundle, verify=False).corpus(root=data_root)
    records: list[StreamRecord] = []
    for streaming in [*_plans(model, request, search)]:
        documents = _documents(corpus, streaming.mc, request)
        found: list[StreamRecord] = []
        for found in streaming.run(documents):
            save_stream([*records, *found], request.out)
        records += found
        access = access_lines(record.policy for record in found)
        yield "\n".join([stream_table(found), *access, f"records: {request.out}"])


def _plans(model: InferenceModel, request: Request, search: int | None) -> Iterator[Streaming]:
    """Yield a validated `Streaming` for every T and W."""
    names = request.policies_for(model.config, has_lensnet=model.lensnet is not None)
    for seq_len in request.seq_lens:
        config = model.config if seq_len is None else with_history(model.config, seq_len)
        mc, specs = config.mc, specs_of(names, request.retrieval(config))
        for share in request.shares(mc):
            yield Streaming(
                model=model,
                mc=mc,
                budget=mc.geometry.reachable_at_most(share * mc.seq_len),
                predicted=request.predict,
                settings=[Setting(spec, r) for r in request.refocus for spec in specs],
                focus=request.focus(config),
                seed=request.seed,
                search=search,
            )


def _documents(corpus: RunData, mc: MCConfig, request: Request) -> list[NDArray[np.int64]]:
    """Draw documents of T + 1 tokens. Warns if there are fewer than requested."""
    length = mc.seq_len + 1
    documents = long_documents(
        [domain.shards for domain in corpus.val],
        length=length,
        count=request.samples,
        seed=request.seed,
    )
    if len(documents) < request.samples:
        print(
            f"warning: only {len(documents)} held-out documents have {length} tokens; "
            f"{request.samples} were requested",
            file=sys.stderr,
        )
    return documents
