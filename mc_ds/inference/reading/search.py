"""Search: the blocks of the whole history that best match the visible tail, whether or not the
working context shows them.

Focus that descends through coarse nodes loses small facts: an index vector at LOD2 sums K^2 tokens.
LensNet's first ask layer is a dot product between index vectors and the tail, so it can be asked of
every LOD1 node at once. LensNet, which sees more than one token's match, then rescores the best
matching ones in contexts like those it was trained on; those it scores highest are brought to the
surface of the context that focus starts from, where these scores hold (`candidates`).

The logit of node x and tail token t is gain * q.k / sqrt(C), q = Wq x and k = Wk t normed. The norm
of q is the node's own and is kept; Wq moves to the few keys. So a search is one product of the
index table with a [I, Q] matrix: memory traffic, and nothing else.

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
"""Of the index table, read at a time: what a disk tree keeps mapped."""


class BlockSearch:
    """Scores LOD1 nodes of one tree. Keeps one number per node, made once."""

    def __init__(self, lensnet: LensNet, tree: MegaContextTree) -> None:
        """`lensnet` must have an index and ask layers (`searchable`)."""
        self._tree, self._ask = tree, _first_ask(lensnet)
        self._scales = torch.empty(0, device=tree.device)
        self._rows = max(1, SLICE_BYTES // max(1, 4 * tree.shape.index_width))

    @torch.no_grad()
    def scores(self, tail_QI: Tensor, first: int, last: int) -> Tensor:
        """Return largest logit above the sink, float32 [n], of each LOD1 node [first, last) against
        a tail with these index vectors.
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
        """The nodes from `first` on are no more, or will be others."""
        self._scales = self._scales[:first]

    def _slices(self, first: int, last: int) -> Iterator[Tensor]:
        """Return the index vectors of nodes [first, last), a slice [*, I] at a time."""
        for start in range(first, last, self._rows):
            yield self._tree.index_table(1, start, min(start + self._rows, last)).to(
                self._tree.device
            )

    def _matching_vectors(self, tail_QI: Tensor) -> Tensor:
        """[I, Q]: Wq^T k of every tail token, gained: their products with a node's index vector are
        its logits, but for its norm.
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
    """Return whether LensNet matches the tail by index vectors: then blocks can be searched."""
    return lensnet is not None and lensnet.index is not None and len(lensnet.asks) > 0


def _first_ask(lensnet: LensNet) -> AskLayer:
    ask = lensnet.asks[0]
    assert isinstance(ask, AskLayer)
    return ask
