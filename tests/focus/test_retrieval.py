"""Retrieval policies: exact budgets and whole blocks in either shape, scores by slow references,
and options that change what they say and nothing else.
"""

import math
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mc_ds.config import ConfigError, FocusConfig, MCConfig, RetrievalConfig
from mc_ds.focus import block_lods
from mc_ds.focus.allocator import Scorer
from mc_ds.focus.controller import MCController
from mc_ds.focus.lexical import bm25, ngrams
from mc_ds.focus.opening import order_of, with_neighbours
from mc_ds.focus.policies import POLICIES, PolicySpec
from mc_ds.focus.view import Plan
from mc_ds.geometry import Geometry
from tests.support.factories import geometries, mc_config
from tests.support.optional import needs, needs_of
from tests.support.processes import inherited

RETRIEVAL = [name for name, spec in POLICIES.items() if spec.retrieval is not None]
ROWS, HORIZON, CPU = 2, 1, torch.device("cpu")


@dataclass
class Histories:
    """A view of random tokens that a table of random embeddings embeds; one token of horizon."""

    geometry: Geometry
    seed: int = 0
    mc: MCConfig = field(default_factory=mc_config)
    focus_config: FocusConfig = field(default_factory=FocusConfig)
    controller: MCController = field(default_factory=lambda: MCController(None))
    seeds: Sequence[tuple[int, ...]] = ((0,), (1,))
    device: torch.device = CPU
    answers: Tensor | None = None

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        self.seq_len = self.geometry.seq_len
        shape = ROWS, self.seq_len - HORIZON
        self.visible = torch.randint(30, shape, generator=generator)
        self.table = torch.randn(30, 8, generator=generator)
        self.mass = torch.rand(shape, generator=generator)

    def embeddings(self) -> Tensor:
        return self.table[self.visible]

    def attention(self, queries: int) -> Tensor:
        return self.mass / queries

    def lens_scores(self, lods: Tensor, starts: Tensor) -> Tensor:
        raise AssertionError("retrieval has no LensNet")

    def lens_blocks(self, earlier: int = 0) -> Tensor:
        raise AssertionError("retrieval has no LensNet")

    def focus(self, score: Scorer, wc_length: int) -> Plan:
        raise AssertionError("retrieval has no LensNet")


def spec_of(name: str, **options: object) -> PolicySpec:
    return POLICIES[name].using(RetrievalConfig.model_validate(options))


def plan_of(view: Histories, spec: PolicySpec, length: int) -> Plan:
    with view.controller.inference():
        return spec.choose(view, length)


def ranked(view: Histories, spec: PolicySpec, row: int) -> list[int]:
    """Blocks from the best match on, the later one first of equals."""
    assert spec.match is not None
    assert spec.query_tokens is not None
    assert spec.retrieval is not None
    scores = spec.match(view, spec.query_tokens)
    scores = with_neighbours(scores, spec.retrieval.neighbours)[row].tolist()
    return sorted(range(len(scores)), key=lambda block: (-scores[block], -block))


def wanted_blocks(view: Histories, spec: PolicySpec, row: int, count: int) -> set[int]:
    """The latest blocks and the best of the others, `count` in all."""
    assert spec.retrieval is not None
    blocks = view.geometry.head_nodes[1]
    latest = set(range(blocks - count + round(spec.retrieval.share * count), blocks))
    best = [block for block in ranked(view, spec, row) if block not in latest]
    return latest | set(best[: count - len(latest)])


@needs("bm25s")
@settings(max_examples=40, deadline=None)
@given(
    geometry=geometries(max_blocks=20),
    name=st.sampled_from(RETRIEVAL),
    share=st.sampled_from([0.25, 0.5, 1.0]),
    neighbours=st.sampled_from([0.0, 0.5]),
    query_tokens=st.integers(1, 40),
    units=st.integers(0, 40),
    seed=st.integers(0, 5),
)
def test_blocks_alone_are_whole_and_fill_the_budget(
    geometry: Geometry,
    name: str,
    share: float,
    neighbours: float,
    query_tokens: int,
    units: int,
    seed: int,
) -> None:
    """The tail, as many wanted blocks as fit, and the latest other tokens."""
    block, view = geometry.block_size, Histories(geometry, seed)
    length = geometry.seq_len - min(units, geometry.max_units) * (block - 1)
    spec = spec_of(name, share=share, neighbours=neighbours, query_tokens=query_tokens)
    lods, starts, *_ = plan_of(view, spec, length)
    assert starts.shape == (ROWS, length)
    assert not lods.any()
    tail = range(geometry.head_len, geometry.seq_len)
    count = min(max(0, length - len(tail)) // block, geometry.head_nodes[1])
    for row in range(ROWS):
        opened = wanted_blocks(view, spec, row, count)
        read = {*tail, *(token for b in opened for token in range(b * block, (b + 1) * block))}
        others = sorted(set(range(geometry.seq_len)) - read)
        missing = length - len(read)
        expected = read | set(others[-missing:]) if missing > 0 else set(sorted(read)[-length:])
        assert starts[row].tolist() == sorted(expected)


@needs("bm25s")
@settings(max_examples=40, deadline=None)
@given(
    geometry=geometries(max_blocks=20),
    name=st.sampled_from(RETRIEVAL),
    units=st.integers(0, 40),
    seed=st.integers(0, 5),
)
def test_covers_tile_the_history_and_open_what_is_wanted(
    geometry: Geometry, name: str, units: int, seed: int
) -> None:
    block, view = geometry.block_size, Histories(geometry, seed)
    length = geometry.seq_len - min(units, geometry.max_units) * (block - 1)
    spec = spec_of(name, shape="cover", share=0.5)
    lods, starts, *_ = plan_of(view, spec, length)
    ends = starts + block**lods
    assert lods.shape == (ROWS, length)
    assert (starts[:, 0] == 0).all()
    assert (ends[:, -1] == geometry.seq_len).all()
    assert (ends[:, :-1] == starts[:, 1:]).all()
    assert (starts % block**lods == 0).all()
    if geometry.max_lod == 1:  # an opened block takes one unit, wherever it lies
        blocks = block_lods(lods, starts, geometry)
        for row in range(ROWS):
            opened = set((blocks[row] == 0).nonzero()[:, 0].tolist())
            assert opened == wanted_blocks(view, spec, row, len(opened))


def test_a_block_counts_a_share_of_the_better_of_its_neighbours() -> None:
    scores = torch.tensor([[0.0, 4.0, 1.0, 0.0, -2.0]])
    expected = torch.tensor([[2.0, 4.5, 3.0, 0.5, -2.0]])
    assert torch.equal(with_neighbours(scores, 0.5), expected)
    assert torch.equal(with_neighbours(scores, 0.0), scores)
    assert torch.equal(with_neighbours(scores[:, :1], 0.5), scores[:, :1])


def test_blocks_beside_a_good_one_count_even_if_a_search_did_not_score_them() -> None:
    unknown = -torch.inf
    found = with_neighbours(torch.tensor([[unknown, 4.0, unknown, 1.0, unknown]]), 0.5)
    assert torch.equal(found, torch.tensor([[3.0, 4.5, 3.0, 1.5, 1.5]]))
    none = with_neighbours(torch.full((1, 3), unknown), 0.5)
    assert not none.isnan().any()


def test_the_latest_stay_and_the_later_of_equal_scores_comes_first() -> None:
    values = order_of(torch.tensor([[0.0, 2.0, 0.0, 1.0, -1.0]]), latest=2)
    assert values[0].argsort(descending=True).tolist() == [3, 4, 1, 2, 0]


def slow_bm25(documents: list[list[int]], query: list[int]) -> list[float]:
    """The formula, with the constants of Lucene, in which (k1 + 1) is left out."""
    k1, b, average = 1.5, 0.75, sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        counts, score = Counter(document), 0.0
        for term in set(query):
            holding = sum(term in other for other in documents)
            idf = math.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5))
            norm = k1 * (1 - b + b * len(document) / average)
            score += idf * counts[term] / (counts[term] + norm)
        scores.append(score)
    return scores


@needs("bm25s")
@pytest.mark.parametrize("vocab", [5, 60, 100_000])
def test_bm25_is_its_formula(vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    documents, query = rng.integers(vocab, size=(12, 6)), rng.integers(vocab, size=9)
    query[:2] = documents[3, :2]
    expected = slow_bm25(documents.tolist(), query.tolist())
    np.testing.assert_allclose(bm25(documents, query), expected, rtol=1e-5, atol=1e-6)


def test_every_run_of_tokens_has_a_number_of_its_own() -> None:
    largest = 2**20 - 2
    row = [0, 1, 0, 0, largest, 1, 0, largest, largest, largest]
    runs = [tuple(row[i : i + n]) for n in (1, 2, 3) for i in range(len(row) - n + 1)]
    numbers = ngrams(np.array([row]), 3)[0].tolist()
    assert len(numbers) == len(runs)
    assert len(set(zip(runs, numbers, strict=True))) == len(set(runs)) == len(set(numbers))
    np.testing.assert_array_equal(ngrams(np.array([[4, 7]]), 1), [[5, 8]])


@pytest.mark.parametrize("name", ["bm25", "ngram", "dense"])
def test_a_block_that_says_what_the_query_says_is_read_first(name: str) -> None:
    needs_of(name)
    view = Histories(Geometry(seq_len=96, block_size=8, max_lod=1, recent_tokens=16))
    view.visible[:, 24:32] = view.visible[:, -8:]
    spec = spec_of(name, query_tokens=8)
    assert [ranked(view, spec, row)[0] for row in range(ROWS)] == [3, 3]


@needs("bm25s")
def test_runs_tell_a_phrase_from_its_words() -> None:
    view = Histories(Geometry(seq_len=96, block_size=8, max_lod=1, recent_tokens=16))
    view.visible[:] = torch.arange(100, 195)
    view.visible[:, -4:] = torch.tensor([1, 2, 3, 4])
    view.visible[:, 8:12] = torch.tensor([1, 2, 3, 4])  # the phrase
    view.visible[:, 40:44] = torch.tensor([3, 1, 4, 2])  # the same words, later
    assert [ranked(view, spec_of(name, query_tokens=4), 0)[0] for name in ("bm25", "ngram")] == [
        5,
        1,
    ]


def test_dense_and_attention_are_what_they_say() -> None:
    view = Histories(Geometry(seq_len=60, block_size=4, max_lod=1, recent_tokens=8))
    embedded = view.embeddings()[0] - view.embeddings()[0].mean(0)
    query, match = embedded[-5:].mean(0), POLICIES["dense"].match
    assert match is not None
    cosines = [
        float(torch.cosine_similarity(embedded[i : i + 4].mean(0), query, dim=0))
        for i in range(0, 52, 4)
    ]
    torch.testing.assert_close(match(view, 5)[0], torch.tensor(cosines))
    attends = POLICIES["attention"].match
    assert attends is not None
    masses = view.attention(5)[0].tolist()
    sums = [sum(masses[max(1, i) : i + 4]) for i in range(0, 52, 4)]
    torch.testing.assert_close(attends(view, 5)[0], torch.tensor(sums))


@needs("bm25s")
def test_settings_change_retrieval_and_nothing_else() -> None:
    other = RetrievalConfig(query_tokens=3, share=1.0, shape="cover")
    for name, spec in POLICIES.items():
        if name not in RETRIEVAL:
            assert spec.using(other) is spec
            assert spec.query_tokens is None
        else:
            assert spec.using(other).query_tokens == 3
            assert spec.using(other).access is spec.access
    view = Histories(Geometry(seq_len=96, block_size=4, max_lod=1, recent_tokens=12))
    plans = {
        query: plan_of(view, spec_of("bm25", query_tokens=query), 48).starts for query in (2, 16)
    }
    assert not torch.equal(plans[2], plans[16])


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    for name in ("bm25", "ngram"):
        with pytest.raises(ConfigError, match=r"^bm25 and ngram need the bm25s package: .*retriev"):
            POLICIES[name].require()
    POLICIES["dense"].require()


@needs("bm25s")
@pytest.mark.parametrize("before", ["", "import jax.lax; mine = jax; "])
def test_retrieval_starts_no_jax_and_leaves_the_users_own(tmp_path: Path, before: str) -> None:
    """bm25s calls jax where it is installed; this one says so and works."""
    package = tmp_path / "installed" / "jax"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "lax.py").write_text("def top_k(*_):\n    print('jax was started')\n")
    code = before + (
        "import numpy as np; from mc_ds.focus.lexical import bm25; import sys; "
        "print(bm25(np.array([[1, 2], [3, 4]]), np.array([3])).argmax()); "
    )
    code += "assert sys.modules['jax'] is mine; " if before else "assert 'jax' not in sys.modules; "
    code += "import jax.lax; jax.lax.top_k()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=inherited(package.parent),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == ["1", "jax was started"]
