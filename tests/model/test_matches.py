"""The features of lexical matches, against a slow reference that reads tokens one by one."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mc_ds.model.lensnet.lensnet import LensNet
from mc_ds.model.lensnet.matches import (
    ABSENT,
    NAMES,
    NGRAMS,
    QUERIES,
    RECENT,
    SATURATION,
    SUFFIX,
    match_features,
    with_block_before,
)
from tests.support.factories import mc_config, model, plan, run_config, tokens, wake


def rarity(holding: int, blocks: int) -> float:
    return math.log(1 + (blocks - holding + 0.5) / (holding + 0.5))


def bm25(block: list[int], query: list[int], blocks: list[list[int]]) -> float:
    total = 0.0
    for word in set(query):
        count = block.count(word)
        weight = rarity(sum(word in other for other in blocks), len(blocks))
        total += weight * count * (SATURATION + 1) / (count + SATURATION)
    return total


def grams_ending_in(history: list[int], first: int, last: int, n: int) -> set[tuple[int, ...]]:
    """The n-grams of the block before and the block [first, last) whose last token is in it."""
    return {tuple(history[end - n + 1 : end + 1]) for end in range(first, last) if end - n + 1 >= 0}


def reference(history: list[int], tail: list[int], block: int, count: int) -> list[list[float]]:
    blocks = [history[n * block : (n + 1) * block] for n in range(count)]
    recent = tail[-RECENT:]

    def ngrams(number: int, n: int, *, before: bool) -> float:
        if number < 0:
            return 0.0
        asked = {tuple(recent[end - n + 1 : end + 1]) for end in range(n - 1, len(recent))}
        held = [grams_ending_in(history, b * block, (b + 1) * block, n) for b in range(count)]
        inside = grams_ending_in(blocks[number], 0, block, n) if before else held[number]
        return sum(rarity(sum(gram in other for other in held), count) for gram in asked & inside)

    rows = []
    for number in range(count):
        longest = 0
        for place in range(number * block, (number + 1) * block):
            length = 0
            while (
                length < min(SUFFIX, len(tail), place, block)
                and history[place - 1 - length] == tail[-1 - length]
            ):
                length += 1
            longest = max(longest, length)
        rare = [
            rarity(sum(word in other for other in blocks), count)
            for word in set(recent)
            if word in blocks[number]
        ]
        rows.append(
            [
                *(bm25(blocks[number], tail[-n:], blocks) for n in QUERIES),
                *(ngrams(number, n, before=False) for n in NGRAMS),
                max(rare, default=0.0),
                float(longest),
                bm25(blocks[number - 1], recent, blocks) if number else 0.0,
                ngrams(number - 1, NGRAMS[-1], before=True),
            ]
        )
    return rows


@given(data=st.data())
def test_features_equal_the_slow_reference(data: st.DataObject) -> None:
    block, count = data.draw(st.integers(13, 20)), data.draw(st.integers(1, 6))
    words = data.draw(st.integers(1, 12))
    ids = st.integers(0, words - 1)
    length = block * count
    history = data.draw(st.lists(ids, min_size=length, max_size=length))
    tail = data.draw(st.lists(ids, min_size=1, max_size=max(QUERIES)))
    if data.draw(st.booleans()):  # a repeated passage, across the edge of a block
        first = data.draw(st.integers(0, max(0, length - len(tail))))
        history[first : first + len(tail)] = tail[: length - first]
    blocks = with_block_before(torch.tensor([history]), block, count)
    found = match_features(blocks, torch.tensor([tail]))
    expected = torch.tensor(reference(history, tail, block, count), dtype=torch.float64)
    torch.testing.assert_close(found[0].double(), expected.log1p(), atol=1e-5, rtol=1e-5)


def test_only_the_last_words_are_read_and_what_is_absent_matches_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    history = torch.randint(30, (2, 96), generator=generator)
    tail = torch.randint(30, (2, 80), generator=generator)
    history[:, 40:44] = tail[:, -4:]
    blocks = with_block_before(history, 16, 6)
    assert (blocks[:, 0, :16] == ABSENT).all()
    found = match_features(blocks, tail)
    torch.testing.assert_close(found, match_features(blocks, tail[:, -max(QUERIES) :]))
    earlier = tail.clone()
    earlier[:, -RECENT:] += 1
    moved = (match_features(blocks, earlier) - found).abs().amax((0, 1))
    assert (moved > 0).all(), dict(zip(NAMES, moved.tolist(), strict=True))


def test_a_passage_that_goes_on_is_found_where_it_goes_on() -> None:
    """The end of the tail stands at the end of block 2: its continuation is in block 3."""
    history = torch.arange(96)
    tail = history[None, 30:48]
    found = match_features(with_block_before(history[None], 16, 6), tail)[0]
    suffix = found[:, NAMES.index("suffix")].expm1().round()
    assert suffix.tolist() == [0, 0, 0, 12, 0, 0]


MC = mc_config(
    seq_len=192, recent_tokens=48, horizon_tokens=16, train_wc_length=96, lens_matches="words"
)


def scored(lens: LensNet, ids: Tensor) -> Tensor:
    net, (lods, starts) = model(run_config(MC)), plan(MC, len(ids))
    with torch.no_grad():
        output = net(ids, lods, starts, torch.ones(len(ids), MC.horizon_tokens))
        return lens(output.visible_entries, lods, starts, output.lod0, ids)


@pytest.mark.parametrize("read", [True, False])
def test_scores_never_depend_on_the_horizon(read: bool) -> None:
    lens, ids = wake(LensNet(MC, dim=32)), tokens(MC, 2)
    assert lens.matches is not None
    if not read:
        lens.matches = None
    before = scored(lens, ids)
    changed = ids.clone()
    visible = MC.seq_len - MC.horizon_tokens
    changed[:, visible:] = (changed[:, visible:] + 1) % 61
    torch.testing.assert_close(scored(lens, changed), before, atol=0, rtol=0)


def test_what_matches_is_scored_otherwise() -> None:
    """The same embeddings and index vectors, but other tokens for the matches."""
    lens, ids = wake(LensNet(MC, dim=32)), tokens(MC, 1)
    net, (lods, starts) = model(run_config(MC)), plan(MC, 1)
    with torch.no_grad():
        output = net(ids, lods, starts, torch.ones(1, MC.horizon_tokens))
        given_ = output.visible_entries, lods, starts, output.lod0
        before = lens(*given_, ids)
        other = ids.clone()
        other[:, 40:44] = ids[
            :, MC.seq_len - MC.horizon_tokens - 4 : MC.seq_len - MC.horizon_tokens
        ]
        assert ((lens(*given_, other) - before).abs() > 1e-6).any()
        lens.matches = None
        torch.testing.assert_close(lens(*given_, other), lens(*given_, ids), atol=0, rtol=0)
