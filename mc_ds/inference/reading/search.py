"""Search: finds the blocks of the whole history that best match the visible tail, whether or not
the working context contains them.

Small facts are lost when focus descends through coarse nodes, since an index vector at LOD2 sums
K^2 tokens. But LensNet's first ask layer is a dot product of index vectors and the tail, which can
be computed for every LOD1 node. LensNet, which considers more than one token's match, then rescores
the best matching blocks in contexts like those of training, and the ones with the highest scores
start at LOD1 in the context that focus edits (`candidates`).

The logit of node x and tail token t is gain * q.k / sqrt(C), with q = Wq x and k = Wk t, both
normed. The norms of q are computed once per node and kept, and Wq is multiplied into the few keys.
A search is then one product of the index table with an [I, Q] matrix; it costs one read of the
table.

Legend: n nodes, Q tail tokens, I width of index vectors. Source: docs/inference.md, "Inference".
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from mc_ds.inference.tree.tree import MegaContextTree
from mc_ds.model.lensnet import LensNet
from mc_ds.model.lensnet.ask import AskLayer

SLICE_BYTES = 2**25
"""Bytes of the index table that are read at a time, and that a disk tree keeps mapped."""


class BlockSearch:
    """Scores the LOD1 nodes of one tree. Keeps one number per node, the norm of its query."""

    def __init__(self, lensnet: LensNet, tree: MegaContextTree) -> None:
        """`lensnet` must have an index and ask layers (`searchable`)."""
        self._tree, self._ask = tree, _first_ask(lensnet)
        self._scales = torch.empty(0, device=tree.device)
        self._rows = max(1, SLICE_BYTES // max(1, 4 * tree.shape.index_width))

    @torch.no_grad()
    def scores(self, tail_QI: Tensor, first: int, last: int) -> Tensor:
        """Return, for each LOD1 node in [first, last), its largest logit over the tail with these
        index vectors, less that of the sink; float32 [n].
        """
        matching = self._matching_vectors(tail_QI)
        self._scales = torch.cat(
            [
                self._scales,
                *(self._scales_of(table) for table in self._slices(self._scales.size(0), last)),
            ]
        )
        products = [(table @ matching).amax(dim=-1) for table in self._slices(first, last)]
        return torch.cat(products) * self._scales[first:last] - self._ask.sink_logit.view(())

    def forget(self, first: int) -> None:
        """Discard the norms of the nodes from `first`, which were removed or will change."""
        self._scales = self._scales[:first]

    def _slices(self, first: int, last: int) -> Iterator[Tensor]:
        """Return the index vectors of nodes [first, last), a slice [*, I] at a time."""
        for start in range(first, last, self._rows):
            yield self._tree.index_table(1, start, min(start + self._rows, last)).to(
                self._tree.device
            )

    def _matching_vectors(self, tail_QI: Tensor) -> Tensor:
        """Return gain * Wq^T k of every tail token, [I, Q]: multiplied by a node's index vector and
        divided by the norm of its query they give its logits.
        """
        ask, width = self._ask, tail_QI.size(-1)
        keys_QI = F.rms_norm(ask.key(F.rms_norm(tail_QI, (width,))), (width,))
        vectors_QI = (keys_QI @ ask.query.weight) * ask.gain.view(()) * width**-0.5
        return vectors_QI.T.contiguous()

    def _scales_of(self, table_nI: Tensor) -> Tensor:
        """Return 1 / RMS of the nodes' queries, [n]."""
        queries = self._ask.query(table_nI)
        return queries.square().mean(dim=-1).clamp_min(torch.finfo(queries.dtype).tiny).rsqrt()


def searchable(lensnet: LensNet | None) -> bool:
    """Return whether LensNet has index vectors and ask layers, which a search needs."""
    return lensnet is not None and lensnet.index is not None and len(lensnet.asks) > 0


def _first_ask(lensnet: LensNet) -> AskLayer:
    ask = lensnet.asks[0]
    assert isinstance(ask, AskLayer)
    return ask
