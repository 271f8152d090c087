"""The networks that compute a tree: embeddings of tokens, gists of blocks, index vectors of tokens.

A generation completes one block at a time, by launches of many small kernels: on a GPU these are
one CUDA graph.

Legend: n tokens, m blocks, K block size, D width of gists, I width of index vectors. Source:
docs/inference.md, "Inference".
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mc_ds.model.gistnet import GistNet
from mc_ds.model.lensnet import IndexNet, LensNet, sum_children
from mc_ds.model.megacontext import MegaContextModel
from mc_ds.model.recording import CapturedFunction, Capturing


@dataclass(frozen=True)
class TreeShape:
    """Sizes and dtypes of a tree's nodes."""

    block_size: int
    """Children per gist, K."""
    max_lod: int
    """Coarsest level; 0 if the model has no GistNet."""
    dim: int
    """Width D of gists."""
    index_width: int
    """Width I of index vectors; 0 without an index."""
    dtype: torch.dtype
    """Dtype of gists; index vectors are float32."""
    vocab_size: int
    """Number of token ids."""

    def span(self, level: int) -> int:
        """Return the number of tokens that a node at `level` covers, K^level."""
        return self.block_size**level


class TreeNets:
    """Embedding, GistNet and IndexNet as functions of tensors, without gradients. GistNet and
    IndexNet are optional. Not thread-safe if anything is captured.
    """

    def __init__(
        self,
        embedding: torch.nn.Embedding,
        gistnet: GistNet | None,
        index: IndexNet | None,
        *,
        block_size: int,
        capturing: Capturing | None = None,
    ) -> None:
        """`capturing` captures the nodes of single blocks; None: nothing is captured."""
        self._capturing, self._single_blocks = capturing, 0
        self._block: CapturedFunction | None = None
        self._embedding, self._gistnet, self._index = embedding, gistnet, index
        weight = embedding.weight
        self.device = weight.device
        self.shape = TreeShape(
            block_size=block_size,
            max_lod=gistnet.max_lod if gistnet is not None else 0,
            dim=weight.size(1),
            index_width=index.project.out_features if index is not None else 0,
            dtype=weight.dtype,
            vocab_size=weight.size(0),
        )

    @classmethod
    def of(
        cls,
        model: MegaContextModel,
        lensnet: LensNet | None,
        capturing: Capturing | None = None,
    ) -> "TreeNets":
        """Return the networks of a model. Without a GistNet a tree holds only tokens; without a
        LensNet with an index it holds no index vectors.
        """
        index = lensnet.index if lensnet is not None and model.gistnet is not None else None
        block_size = model.mc.block_size
        return cls(
            model.backbone.embedding,
            model.gistnet,
            index,
            block_size=block_size,
            capturing=capturing,
        )

    def same_as(self, other: "TreeNets") -> bool:
        """Return whether these are the same network objects as in `other`, so that trees can be
        exchanged.
        """
        mine = (self._embedding, self._gistnet, self._index)
        theirs = (other._embedding, other._gistnet, other._index)
        return all(a is b for a, b in zip(mine, theirs, strict=True))

    @torch.no_grad()
    def embed(self, tokens_n: Tensor) -> Tensor:
        """Return LOD0 nodes [n, D] of token ids [n] on the networks' device."""
        return self._embedding(tokens_n)

    @torch.no_grad()
    def blocks(self, tokens_n: Tensor) -> tuple[Tensor, Tensor]:
        """Return the nodes at LOD1 of whole blocks of token ids [n] on the networks' device: gists
        [m, D] and index vectors [m, I].
        """
        if self._capturing is None or len(tokens_n) > self.shape.block_size:
            return self._blocks(tokens_n)
        self._single_blocks += 1
        if self._single_blocks == 1:  # one block in all is not worth a capture
            return self._blocks(tokens_n)
        self._block = self._block or CapturedFunction(self._blocks, self._capturing)
        gists, index = self._block(tokens_n)
        return gists, index

    @torch.no_grad()
    def _blocks(self, tokens_n: Tensor) -> tuple[Tensor, Tensor]:
        lod0_nD = self.embed(tokens_n)
        gists = self.gists(lod0_nD.unflatten(0, (-1, self.shape.block_size)), 1)
        return gists, sum_children(self.token_index(lod0_nD)[None], self.shape.block_size)[0]

    @torch.no_grad()
    def gists(self, children_mKD: Tensor, level: int) -> Tensor:
        """Return the gists [m, D] at `level` of m blocks of K nodes of the level below."""
        assert self._gistnet is not None
        return self._gistnet.gists(children_mKD.flatten(0, 1)[None], level)[0]

    @torch.no_grad()
    def token_index(self, lod0_nD: Tensor) -> Tensor:
        """Return index vectors [n, I] of LOD0 nodes [n, D], float32; I is 0 without an index."""
        if self._index is None:
            return torch.empty(lod0_nD.size(0), 0, device=lod0_nD.device)
        dtype = self._index.project.weight.dtype
        with torch.autocast(lod0_nD.device.type, dtype, enabled=dtype != torch.float32):
            return self._index.token_vectors(lod0_nD[None])[0]
