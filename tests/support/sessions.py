"""Small models and histories for the tests of sessions, and the same figures by whole forwards."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mc_ds.config import FocusConfig, MCConfig
from mc_ds.evaluation.batches import Batches, BatchView
from mc_ds.focus.controller import MCController
from mc_ds.geometry import Geometry, node_index
from mc_ds.inference import InferenceModel, Session
from mc_ds.model.gather import gather_entries
from mc_ds.model.lensnet import LensNet
from mc_ds.model.megacontext import NodeTable
from mc_ds.model.positions import rotary_tables
from tests.support.factories import VOCAB, mc_config, model, run_config, wake

TRAINED = 96
"""T of `mc_config`; W = 48, h = 5, K = 4, two levels."""


def inference_model(
    *, dim: int = 32, focus: dict[str, Any] | None = None, seed: int = 0, **mc: Any
) -> InferenceModel:
    """Untrained, with signal on every path: wide weights, so that it says something else at every
    place.
    """
    config = run_config(mc_config(**mc), backbone=dict(dim=dim, tie_embeddings=False, init_std=0.3))
    config = config.model_validate(
        {**config.model_dump(), "focus": {"threshold": 0.0, **(focus or {})}}
    )
    net = model(config, seed)
    torch.manual_seed(seed + 1)
    return InferenceModel(
        net, wake(LensNet(config.mc, dim=config.backbone.dim)), config, hashes=("a" * 64, "b" * 64)
    )


def batches(
    net: InferenceModel, *, focus: FocusConfig | None = None, seed: int = 0, batch_size: int = 2
) -> Batches:
    """The same model as it is evaluated in batches."""
    return Batches(
        forward=net.model,
        mc=net.mc,
        controller=MCController(net.lensnet),
        focus=focus or net.config.focus,
        seed=seed,
        batch_size=batch_size,
        device=torch.device("cpu"),
    )


def history(length: int, seed: int = 0) -> list[int]:
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def whole_logits(
    net: InferenceModel, tokens: Sequence[int], lods: NDArray[np.int64], starts: NDArray[np.int64]
) -> Tensor:
    """Logits [W, V] of a working context, with the tree made by one forward and nothing cached."""
    with torch.no_grad():
        table = net.model(torch.tensor([list(tokens)]))
        assert isinstance(table, NodeTable)
        plan = torch.from_numpy(lods)[None], torch.from_numpy(starts)[None]
        mc, backbone = net.mc, net.model.backbone
        geometry = Geometry(len(tokens), mc.block_size, mc.max_lod, mc.recent_tokens)
        entries = gather_entries(table.nodes, node_index(*plan, geometry))
        tables = rotary_tables(
            *plan,
            block_size=mc.block_size,
            head_dim=backbone.config.head_dim,
            base=backbone.config.rope_base,
            scheme=mc.position_scheme,
        )
        return backbone.head.logits(backbone.hidden(entries, *tables)[0])


def longer(net: InferenceModel, length: int) -> InferenceModel:
    """The same networks with a model whose own forward reads `length` tokens."""
    net.model.geometry = net.mc.geometry.with_length(length)
    return net


def read_by_batches(net: InferenceModel, length: int, budget: int) -> MCConfig:
    """Make the root module read `length` tokens in up to `budget` entries; return these settings."""
    longer(net, length)
    wc_length = net.model.geometry.reachable_at_most(budget)
    mc = net.mc.model_copy(update={"seq_len": length, "train_wc_length": wc_length})
    assert net.lensnet is not None
    net.lensnet.geometry = mc.geometry
    return mc


def batch_view(
    net: InferenceModel,
    mc: MCConfig,
    controller: MCController,
    tokens: Tensor,
    nodes: NodeTable,
    seeds: Sequence[tuple[int, ...]],
) -> BatchView:
    """What evaluation in batches gives a policy to read: the node table of `tokens`, no spans."""
    return BatchView(
        mc=mc,
        controller=controller,
        focus_config=net.config.focus,
        forward=net.model,
        tokens=tokens,
        nodes=nodes,
        lens_tokens=tokens,
        spans=[],
        seeds=seeds,
        device=torch.device("cpu"),
    )


def assert_covers(
    lods: NDArray[np.int64], starts: NDArray[np.int64], first: int, known: int, block: int
) -> None:
    """The entries tile the tokens from `first` to `known`, each aligned."""
    spans = block**lods
    assert starts[0] == first
    assert (starts[1:] == (starts + spans)[:-1]).all()
    assert starts[-1] + spans[-1] == known
    assert (starts % spans == 0).all()


def ingested(
    net: InferenceModel,
    tokens: list[int],
    policy: str = "lens",
    budget: int = 48,
    **options: Any,
) -> Session:
    session = net.session(policy, budget, **options)
    session.ingest(tokens)
    return session
