"""The tree: the same nodes however its tokens came, equal to the model's node table, at a bounded
cost.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mc_ds.config import ConfigError
from mc_ds.geometry import node_index
from mc_ds.inference.tree.disk import DiskTree
from mc_ds.inference.tree.nets import TreeNets
from mc_ds.inference.tree.ram import RamTree
from mc_ds.inference.tree.rows import RamRows
from mc_ds.model.recording import Capturing
from tests.support.factories import VOCAB, plan
from tests.support.replayer import Replayer
from tests.support.trees import HASHES, assert_same, levels, networks, node_table, stream, tree_nets

K = 4
NETS = tree_nets()
SHAPES: list[dict[str, Any]] = [
    {},
    dict(max_lod=1),
    dict(max_lod=3),
    dict(gist_dim=8),
    dict(lens_index=False),
]


def ram_tree(tokens: Any = (), nets: TreeNets = NETS, **options: Any) -> RamTree:
    tree = RamTree(nets, **options)
    tree.append(tokens)
    return tree


@pytest.mark.parametrize("options", SHAPES, ids=str)
@pytest.mark.parametrize("count", [96, 95, 64, 63, 3])
def test_a_tree_is_the_node_table_of_its_tokens(options: dict[str, Any], count: int) -> None:
    net, lens = networks(**options)
    tokens = stream(0, count)
    nodes, index = node_table(net, lens, tokens)
    tree = ram_tree(tokens, TreeNets.of(net, lens), batch_tokens=20)
    assert [tree.level_len(level) for level in range(net.mc.max_lod + 1)] == [
        len(level) for level in nodes
    ]
    for level, (gists, vectors) in enumerate(levels(tree), start=1):
        torch.testing.assert_close(gists, nodes[level], atol=1e-5, rtol=1e-5)
        if index:
            torch.testing.assert_close(vectors, index[level], atol=1e-5, rtol=1e-5)
            assert torch.equal(tree.index_table(level), vectors)
        else:
            assert vectors.shape == (tree.level_len(level), 0)


@pytest.mark.parametrize("count", [96, 90])
def test_a_whole_sequence_at_once_is_the_node_table_bit_for_bit(count: int) -> None:
    net, lens = networks()
    nodes, index = node_table(net, lens, stream(0, count))
    for level, (gists, vectors) in enumerate(
        levels(ram_tree(stream(0, count), TreeNets.of(net, lens))), start=1
    ):
        assert torch.equal(gists, nodes[level])
        torch.testing.assert_close(vectors, index[level], atol=1e-6, rtol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    chunks=st.lists(st.integers(0, 70), max_size=12),
    batch=st.sampled_from([1, K, 7 * K + 1, 1000]),
    max_lod=st.integers(1, 3),
)
def test_chunks_of_any_size_make_the_tree_of_all_at_once(
    chunks: list[int], batch: int, max_lod: int
) -> None:
    nets = tree_nets(max_lod=max_lod)
    tree, count = RamTree(nets, batch_tokens=batch), 0
    for chunk in chunks:
        tree.append(stream(count, count + chunk))
        count += chunk
    assert len(tree) == count
    assert_same(tree, ram_tree(stream(0, count), nets))


@settings(max_examples=20, deadline=None)
@given(chunks=st.lists(st.integers(0, 70), max_size=8))
def test_equal_batches_make_trees_equal_bit_for_bit(chunks: list[int]) -> None:
    """One block at a time, whether tokens come singly, in chunks or all at once."""
    one_block, chunked = dict(batch_tokens=K), RamTree(NETS, batch_tokens=K)
    for first, last in zip(np.cumsum([0, *chunks]), np.cumsum(chunks), strict=False):
        chunked.append(stream(int(first), int(last)))
    singly = RamTree(NETS)
    for token in stream(0, sum(chunks)):
        singly.append([token])
    assert_same(chunked, ram_tree(stream(0, sum(chunks)), **one_block), exact=True)
    assert_same(chunked, singly, exact=True)


def test_batches_begin_at_their_multiples_so_that_a_resumed_ingest_makes_the_same_ones() -> None:
    whole = ram_tree(stream(0, 400), batch_tokens=80)
    resumed = ram_tree(stream(0, 108), batch_tokens=80)
    resumed.append(stream(108, 400))
    for (gists, _), (others, _) in zip(levels(whole)[:1], levels(resumed)[:1], strict=True):
        assert torch.equal(gists[160 // K :], others[160 // K :])


def test_a_node_exists_as_soon_as_its_tokens_do_and_never_changes() -> None:
    tree, final = RamTree(NETS), levels(ram_tree(stream(0, 70)))
    for count, token in enumerate(stream(0, 70), start=1):
        tree.append([token])
        assert [tree.level_len(level) for level in range(3)] == [count, count // K, count // K**2]
        for (gists, index), (later_gists, later_index) in zip(levels(tree), final, strict=True):
            torch.testing.assert_close(gists, later_gists[: len(gists)], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(index, later_index[: len(index)], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "make", [list, tuple, np.array, torch.tensor, lambda ids: np.array(ids, dtype=np.uint16)]
)
def test_tokens_come_in_any_container_and_can_be_read_back(make: Any) -> None:
    ids = stream(0, 50)
    tree = ram_tree(make(ids[:18]))
    tree.append(make(ids[18:]))
    for start, stop in ((0, 50), (3, 17), (47, 50), (48, 49), (50, 50), (0, 0)):
        assert tree.tokens(start, stop).tolist() == ids[start:stop]
    places = torch.tensor([49, 0, 48, 3, 3, 47])
    assert tree.tokens_at(places).tolist() == [ids[place] for place in places.tolist()]
    assert tree.tokens(0, 50).dtype == tree.tokens_at(places).dtype == torch.int64


def test_reading_between_single_tokens_disturbs_nothing() -> None:
    tree = RamTree(NETS)
    for count, token in enumerate(stream(0, 50), start=1):
        tree.append([token])
        assert tree.tokens(0, count).tolist() == stream(0, count)
    assert_same(tree, ram_tree(stream(0, 50)))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([3, VOCAB], f"token id {VOCAB} is not in the vocabulary: ids are 0 to {VOCAB - 1}"),
        ([3] * 40 + [-1], "token id -1 is not in the vocabulary"),
        ([0.5, 1.0], "tokens of shape \\(2,\\) and type float64 cannot be added"),
        ([[1, 2], [3, 4]], "tokens of shape \\(2, 2\\)"),
        ([[1], [2, 3]], "not one sequence"),
        (["a"], "cannot be added"),
        ([True], "cannot be added"),
    ],
)
def test_what_is_no_token_is_refused_and_nothing_is_added(tokens: Any, message: str) -> None:
    tree = ram_tree(stream(0, 9))
    with pytest.raises(ConfigError, match=message):
        tree.append(tokens)
    assert_same(tree, ram_tree(stream(0, 9)), exact=True)


def test_what_does_not_exist_is_an_error() -> None:
    tree = ram_tree(stream(0, 30))
    with pytest.raises(ConfigError, match="tokens 5 to 31 do not exist: the tree has 30 tokens"):
        tree.tokens(5, 31)
    with pytest.raises(
        ConfigError, match="node 30 of level 0 does not exist: the tree has 30 at this level"
    ):
        tree.tokens_at(torch.tensor([2, 30]))
    with pytest.raises(ConfigError, match="node 7 of level 1 does not exist: the tree has 7 at"):
        tree.gists(1, torch.tensor([7]))
    with pytest.raises(
        ConfigError, match="node -1 of level 2 does not exist: the tree has 1 at this level"
    ):
        tree.index(2, torch.tensor([0, -1]))
    with pytest.raises(ConfigError, match="a tree of 30 tokens cannot be cut to 31: use 0 to 30"):
        tree.truncate(31)


@settings(max_examples=40, deadline=None)
@given(
    first=st.integers(0, 100),
    dropped=st.integers(0, K) | st.integers(0, 100),
    other=st.integers(0, 70),
)
def test_truncating_leaves_what_was_there_before(first: int, dropped: int, other: int) -> None:
    kept_tokens = max(0, first - dropped)
    tree = ram_tree(stream(0, first))
    before = levels(tree)
    tree.truncate(kept_tokens)
    for (gists, index), (old_gists, old_index) in zip(levels(tree), before, strict=True):
        assert torch.equal(gists, old_gists[: len(gists)])
        assert torch.equal(index, old_index[: len(index)])
    tree.append(stream(1000, 1000 + other))
    assert_same(tree, ram_tree(stream(0, kept_tokens) + stream(1000, 1000 + other)))


def test_entries_of_a_plan_are_the_models() -> None:
    net, lens = networks()
    tree = ram_tree(stream(0, 96), TreeNets.of(net, lens))
    lods, starts = plan(net.mc, 2)
    assert set(lods.unique().tolist()) == {0, 1, 2}
    nodes, index = (torch.cat(parts) for parts in node_table(net, lens, stream(0, 96)))
    for row in range(len(lods)):
        at = node_index(lods[row], starts[row], net.geometry)
        torch.testing.assert_close(
            tree.entries(lods[row], starts[row]), nodes[at], atol=1e-5, rtol=1e-5
        )
        indexed = tree.indexed_entries(lods[row], starts[row])
        torch.testing.assert_close(indexed, (nodes[at], index[at]), atol=1e-5, rtol=1e-5)
        assert indexed[1].dtype == torch.float32


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize(
    "places",
    [[3, 5, 4, 6], [6, 5, 4], [3, 4, 5, 6], [9]],
    ids=["as many as from 3 to 6", "descending", "consecutive", "one"],
)
def test_entries_in_any_order_are_those_of_their_nodes(
    places: list[int], level: int, tmp_path: Path
) -> None:
    at = torch.tensor(places)
    lods, starts = torch.full_like(at, level), at * K**level
    mixed = torch.cat([lods, lods.new_zeros(2)]), torch.cat([starts, starts.new_tensor([50, 51])])
    with DiskTree(tmp_path / "tree", NETS, **HASHES) as on_disk:
        on_disk.append(stream(0, 96))
        for tree in (ram_tree(stream(0, 96)), on_disk):
            for plan_lods, plan_starts in ((lods, starts), mixed):
                one_by_one = [
                    tree.indexed_entries(plan_lods[n : n + 1], plan_starts[n : n + 1])
                    for n in range(len(plan_lods))
                ]
                expected = tuple(torch.cat(parts) for parts in zip(*one_by_one, strict=True))
                torch.testing.assert_close(tree.indexed_entries(plan_lods, plan_starts), expected)


def test_entries_are_not_the_memory_of_the_tree() -> None:
    tree = ram_tree(stream(0, 96))
    lods, starts = torch.ones(4, dtype=torch.int64), torch.arange(4) * K
    entries, index = tree.indexed_entries(lods, starts)
    for rows in (entries, index, tree.entries(lods, starts)):
        rows.zero_()
    assert all(rows.any(dim=1).all() for rows in tree.indexed_entries(lods, starts))


@pytest.mark.parametrize("nodes", [[22, 23, 24], [3, 24], [-1, 0, 1]], ids=str)
def test_entries_of_nodes_that_do_not_exist_are_refused(nodes: list[int]) -> None:
    tree, at = ram_tree(stream(0, 96)), torch.tensor(nodes)
    wrong = -1 if -1 in nodes else 24
    with pytest.raises(
        ConfigError, match=f"node {wrong} of level 1 does not exist: the tree has 24"
    ):
        tree.entries(torch.ones_like(at), at * K)


class Counted:
    """Counts the blocks of every call of GistNet, per level."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: dict[int, list[int]] = {1: [], 2: []}
        gists = TreeNets.gists

        def counted(nets: TreeNets, children: Tensor, level: int) -> Tensor:
            self.calls[level].append(len(children))
            return gists(nets, children, level)

        monkeypatch.setattr(TreeNets, "gists", counted)


def test_single_tokens_cost_one_call_per_finished_node(monkeypatch: pytest.MonkeyPatch) -> None:
    counted, tree = Counted(monkeypatch), RamTree(NETS)
    for token in stream(0, 1000):
        tree.append([token])
    assert counted.calls == {1: [1] * 250, 2: [1] * 62}


@pytest.mark.parametrize("lens_index", [True, False])
def test_single_blocks_are_captured_once_for_all_trees(lens_index: bool) -> None:
    """The nodes of one block; those of several, and those above LOD1, are computed as before."""
    net, lens = networks(lens_index=lens_index)
    recorder = Replayer()
    nets = TreeNets.of(net, lens, Capturing(torch.device("cpu"), recorder))
    for number in range(2):
        tokens = stream(1000 * number, 1000 * number + 203)
        plain, tree = RamTree(TreeNets.of(net, lens)), RamTree(nets)
        for one in (plain, tree):
            one.append(tokens[:5])
            for token in tokens[5:70]:
                one.append([token])
            one.append(tokens[70:90])
            one.append(tokens[90:91])
            for first in range(91, 203, 4):
                one.append(tokens[first : first + 4])
        for level in (1, 2):
            nodes = torch.arange(tree.level_len(level))
            assert len(nodes) == 203 // K**level
            torch.testing.assert_close(
                tree.gists(level, nodes), plain.gists(level, nodes), atol=1e-5, rtol=1e-5
            )
            torch.testing.assert_close(
                tree.index(level, nodes), plain.index(level, nodes), atol=1e-5, rtol=1e-5
            )
    assert recorder.recorded == 1


def test_bulk_batches_are_large_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(monkeypatch)
    ram_tree(stream(0, 1000), batch_tokens=100)
    assert counted.calls == {1: [25] * 10, 2: [6, 6, 6, 7] * 2 + [6, 6]}


def test_growing_tables_copy_each_row_a_bounded_number_of_times() -> None:
    rows, grown, address = RamRows(3, torch.float32, torch.device("cpu")), 0, 0
    for first in range(50_000):
        rows.write(first, torch.full((1, 3), float(first)))
        grown += rows.between(0, 1).data_ptr() != address
        address = rows.between(0, 1).data_ptr()
    assert grown <= 8
    assert torch.equal(rows.between(0, 50_000)[:, 1], torch.arange(50_000.0))


def test_networks_of_lower_precision_make_trees_of_their_own() -> None:
    net, lens = networks()
    nets = TreeNets.of(net.to(torch.bfloat16), lens.to(torch.bfloat16))
    tree = ram_tree(stream(0, 40), nets)
    assert tree.gists(2, torch.tensor([0, 1])).dtype == torch.bfloat16
    assert tree.index_table(1).dtype == torch.float32
    in_full = ram_tree(stream(0, 40)).gists(1, torch.arange(10))
    torch.testing.assert_close(tree.gists(1, torch.arange(10)).float(), in_full, atol=0.1, rtol=0.1)


def test_a_plain_language_model_has_a_tree_of_tokens_alone() -> None:
    net, _ = networks(num_random_variants=0)
    tree = ram_tree(stream(0, 40), TreeNets.of(net, None))
    assert (tree.shape.max_lod, tree.shape.index_width, levels(tree)) == (0, 0, [])
    assert tree.tokens(30, 40).tolist() == stream(30, 40)
    starts = torch.arange(5, 9)
    assert torch.equal(
        tree.entries(torch.zeros_like(starts), starts),
        net.backbone.embedding(torch.tensor(stream(5, 9))),
    )


def test_a_closed_tree_takes_nothing_more() -> None:
    tree = ram_tree(stream(0, 9))
    tree.close()
    with pytest.raises(ConfigError, match="this tree is closed"):
        tree.append([1])


def test_a_copy_is_equal_bit_for_bit_and_independent() -> None:
    tree, copy = ram_tree(stream(0, 90)), RamTree(NETS)
    tree.copy_into(copy)
    assert_same(tree, copy, exact=True)
    copy.append(stream(90, 130))
    assert_same(copy, ram_tree(stream(0, 130)))
    assert len(tree) == 90
    with pytest.raises(ConfigError, match="give an empty tree of the same shape"):
        tree.copy_into(copy)
