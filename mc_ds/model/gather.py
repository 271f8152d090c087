"""Look up rows of a table, with gradients that are the same in every run.

Legend: B sequences, P table rows per sequence, D their width, R rows of entries, W entries.
"""

import torch.nn.functional as F
from torch import Tensor


def gather_entries(nodes_BPD: Tensor, index_RW: Tensor) -> Tensor:
    """Gather the entries [R, W, D] of each row from the node table of its sequence. Rows of a
    sequence are adjacent.

    Uses an embedding look-up, whose backward adds the contributions of all rows in a fixed order.
    """
    batch, nodes, dim = nodes_BPD.shape
    first = nodes * index_RW.new_ones(batch).cumsum(0).sub(1)
    flat = (index_RW.view(batch, -1) + first[:, None]).view(index_RW.shape)
    return F.embedding(flat, nodes_BPD.reshape(batch * nodes, dim))
