"""Search: find the blocks of the whole history that best match the visible tail, whether or not
they are in the working context.

Focus alone misses small facts under coarse nodes, since an index vector at LOD2 sums K^2 tokens.
LensNet's first ask layer, however, is a dot product of index vectors with the tail, which is cheap
enough for every LOD1 node. LensNet then rescores the best matching blocks (`candidates`).

The logit of node x and tail token t is gain * q.k / sqrt(I), with q = Wq x and k = Wk t, both
RMS-normed. The norms of q are computed once per node and kept, and Wq is multiplied into the few
keys. A search is then one product of the index table with an [I, Q] matrix, and costs one read of
the table.

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
"""Number of bytes of the index table that are read at a time."""


class BlockSearch:
    """Scores the LOD1 nodes of one tree against a tail. Keeps one number per node, the inverse norm
    of its query.
    """

    def __init__(self, lensnet: LensNet, tree: MegaContextTree) -> None:
        """`lensnet` must have an index and ask layers (`searchable`)."""
        self._tree, self._ask = tree, _first_ask(lensnet)
        self._scales = torch.empty(0, device=tree.device)
        self._rows = max(1, SLICE_BYTES // max(1, 4 * tree.shape.index_width))

    @torch.no_grad()
    def scores(self, tail_QI: Tensor, first: int, last: int) -> Tensor:
        """Return for each LOD1 node in [first, last) its largest logit over the tail's tokens minus
        the logit of the sink, float32 [n]. `tail_QI` are the index vectors of the tail.
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
        """Discard the norms of the nodes from `first` on, which were removed or will change."""
        self._scales = self._scales[:first]

    def _slices(self, first: int, last: int) -> Iterator[Tensor]:
        """Yield the index vectors of nodes [first, last) in slices [*, I]."""
        for start in range(first, last, self._rows):
            yield self._tree.index_table(1, start, min(start + self._rows, last)).to(
                self._tree.device
            )

    def _matching_vectors(self, tail_QI: Tensor) -> Tensor:
        """Return gain * Wq^T k / sqrt(I) of every tail token, [I, Q]. Its product with a node's
        index vector, divided by the norm of the node's query, is the logit.
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
