"""Evaluate policies on the long held-out documents of a corpus (`launch/evaluate.py --refocus`).

Legend: T tokens, W entries.
"""

import sys
from collections.abc import Iterator, Sequence

from mc_ds.config import ConfigError
from mc_ds.data import RunData
from mc_ds.evaluation.report import access_lines, settings_lines
from mc_ds.evaluation.request import Request
from mc_ds.evaluation.streaming.documents import long_documents
from mc_ds.evaluation.streaming.records import StreamRecord, save_stream, stream_table
from mc_ds.evaluation.streaming.streaming import DocumentReader, Documents, Setting, Streaming
from mc_ds.focus.policies import PolicySpec


def stream(
    reader: DocumentReader,
    corpus: RunData,
    specs: Sequence[PolicySpec],
    request: Request,
    records: list[StreamRecord],
) -> Iterator[str]:
    """Read long held-out documents at every budget. After each batch of documents all records so
    far are written, behind `records`, to which those of the finished budgets are added; yields one
    table per budget.

    Raises ConfigError for a policy, length or corpus that cannot be read this way.
    """
    for streaming in _plans(reader, specs, request):
        documents = _documents(corpus, streaming.document_tokens, request)
        found: list[StreamRecord] = []
        for found in streaming.run(documents):
            save_stream([*records, *found], request.out)
        records += found
        access = access_lines(record.policy for record in found) + settings_lines(found)
        yield "\n".join([stream_table(found), *access, f"records: {request.out}"])


def _plans(
    reader: DocumentReader, specs: Sequence[PolicySpec], request: Request
) -> list[Streaming]:
    """Return a validated `Streaming` for every W."""
    mc = reader.mc
    return [
        Streaming(
            reader=reader,
            budget=mc.geometry.reachable_at_most(share * mc.seq_len),
            predicted=request.predict,
            settings=[Setting(spec, r) for r in request.refocus for spec in specs],
        )
        for share in request.shares(mc)
    ]


def _documents(corpus: RunData, tokens: int, request: Request) -> Documents:
    """Draw documents of that many tokens from the held-out text, or from all of it if that is
    requested. Warns if there are fewer than requested; raises ConfigError if there is none.
    """
    whole = request.text is not None and request.text.whole
    documents = long_documents(
        [domain.shards for domain in (*corpus.val, *(corpus.train if whole else ()))],
        length=tokens,
        count=request.samples,
        seed=request.seed,
    )
    kind = "" if whole else "held-out "
    if not documents:
        raise ConfigError(
            f"no {kind}document has {tokens} tokens: use a shorter history (--seq_lens), fewer"
            " predicted tokens (--predict) or another text (--dataset)"
        )
    if len(documents) < request.samples:
        print(
            f"warning: only {len(documents)} {kind}documents have {tokens} tokens; "
            f"{request.samples} were requested",
            file=sys.stderr,
        )
    return documents
