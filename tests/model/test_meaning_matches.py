"""The features of matches by meaning, against a slow reference that compares tokens one by one."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mc_ds.model.lensnet import LensNet
from mc_ds.model.lensnet.meaning import (
    LARGEST,
    NAMES,
    NEAREST,
    REACH,
    ROUNDING,
    Compared,
    MeaningFeatures,
)
from tests.support.factories import mc_config, model, plan, run_config, tokens, wake

WIDTH = 8


def features(seed: int = 0) -> MeaningFeatures:
    """With A and weights that are neither the identity nor zero."""
    torch.manual_seed(seed)
    module = wake(MeaningFeatures(WIDTH)).double()
    with torch.no_grad():
        module.transform.weight += 0.3 * torch.randn(WIDTH, WIDTH)
    return module


def compared(ids: Tensor, seed: int = 7) -> Compared:
    """Every id has its own vector, as with tokens."""
    table = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(seed))
    return Compared(ids, table.double()[ids])


def reference(module: MeaningFeatures, blocks: Compared, tail: Compared) -> list[list[float]]:
    """Features of the blocks of one sequence."""
    matrix = module.transform.weight

    def cosine(key: Tensor, query: Tensor) -> float:
        a, b = matrix @ key, matrix @ query
        return float(a @ b / (a.norm() * b.norm()))

    first = max(0, len(tail.ids) - REACH)
    queries, ids = tail.vectors[first:], tail.ids[first:].tolist()
    by_token = []
    for place, query in enumerate(queries):
        best = []
        for keys, key_ids in zip(blocks.vectors, blocks.ids.tolist(), strict=True):
            other = [k for k, i in zip(keys, key_ids, strict=True) if i != ids[place]]
            best.append(max((cosine(key, query) for key in other), default=-1.0))
        mean = sum(best) / len(best)
        variance = sum((x - mean) ** 2 for x in best) / len(best)
        normed = [q / q.square().mean().add(torch.finfo(q.dtype).eps).sqrt() for q in queries]
        before = normed[place - 1] if place else torch.zeros_like(query)
        weight = float(module.weight.weight[0] @ torch.cat([normed[place], before]))
        weight += float(module.distance_weight[REACH - len(ids) + place])
        by_token.append([(x - mean) / math.sqrt(variance + ROUNDING) + weight for x in best])
    rows = []
    for of_block in zip(*by_token, strict=True):
        ranked = sorted(of_block, reverse=True)
        rows.append(
            [
                *(ranked[min(rank, len(ranked) - 1)] for rank in range(LARGEST)),
                math.log(sum(map(math.exp, of_block))),
                *(max(of_block[-last:]) for last in NEAREST),
            ]
        )
    return rows


@settings(max_examples=30, deadline=None)
@given(data=st.data())
@torch.no_grad()
def test_features_equal_the_slow_reference(data: st.DataObject) -> None:
    block, count = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6))
    ids = st.integers(0, data.draw(st.integers(0, 63)))
    length = data.draw(st.one_of(st.integers(1, 60), st.integers(REACH - 1, REACH + 2)))
    own = data.draw(st.lists(ids, min_size=block * count, max_size=block * count))
    last = data.draw(st.lists(ids, min_size=length, max_size=length))
    module = features(data.draw(st.integers(0, 9)))
    blocks, tail = compared(torch.tensor(own).view(count, block)), compared(torch.tensor(last))
    found = module(
        Compared(*(part[None] for part in blocks)), Compared(*(part[None] for part in tail))
    )
    expected = torch.tensor([reference(module, blocks, tail)], dtype=torch.float64)
    torch.testing.assert_close(found.double(), expected, atol=1e-3, rtol=1e-3)
    assert found.shape == (1, count, len(NAMES))


def drawn(count: int = 9, block: int = 4, length: int = 12, seed: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randint(64, (2, count, block), generator=generator),
        torch.randint(64, (2, length), generator=generator),
    )


def test_blocks_in_another_order_have_their_features_in_that_order() -> None:
    own, last = drawn()
    module, order = features(), torch.randperm(9, generator=torch.Generator().manual_seed(1))
    found = module(compared(own), compared(last))
    torch.testing.assert_close(module(compared(own[:, order]), compared(last)), found[:, order])
    within = module(compared(own.flip(2)), compared(last))
    torch.testing.assert_close(within, found, msg="the order within a block does not matter")


def test_sequences_do_not_affect_each_other_and_padding_changes_nothing() -> None:
    own, last = drawn()
    module = features()
    found = module(compared(own), compared(last))
    torch.testing.assert_close(module(compared(own[1:]), compared(last[1:])), found[1:])
    for seed in (4, 5):
        more = torch.cat([own, drawn(5, seed=seed)[0]], dim=1)
        padded = module(compared(more), compared(last), torch.tensor([9]))
        torch.testing.assert_close(padded[:, :9], found)
        assert not padded[:, 9:].any()


def test_a_word_of_similar_meaning_is_found_in_its_block_and_an_equal_one_is_left_out() -> None:
    """Vectors that are orthogonal, but for one pair."""
    ids = torch.arange(12).view(1, 3, 4)
    vectors = torch.eye(20)[ids].double()
    asked = torch.tensor([[5, 19]])
    near = torch.stack([torch.eye(20)[5], torch.eye(20)[10] + 0.5 * torch.eye(20)[19]])
    module = MeaningFeatures(20).double()
    found = module(Compared(ids, vectors), Compared(asked, near[None].double()))[0]
    assert found[:, NAMES.index("largest_1")].argmax() == 2
    of_equal = module(Compared(ids, vectors), Compared(asked[:, :1], near[None, :1].double()))
    assert of_equal.abs().max() < 1e-6, "no other block has anything like it"


def test_matrix_and_weights_learn() -> None:
    own, last = drawn()
    module = features()
    module(compared(own), compared(last)).square().sum().backward()
    assert module.transform.weight.grad is not None
    assert module.weight.weight.grad is not None
    assert module.distance_weight.grad is not None
    assert (module.transform.weight.grad.abs() > 0).all()
    assert (module.weight.weight.grad.abs() > 0).all()
    learns = module.distance_weight.grad != 0
    assert learns[-12:].all()
    assert not learns[:-12].any()


# In LensNet

MC = mc_config(
    seq_len=192, recent_tokens=48, horizon_tokens=16, train_wc_length=96, lens_matches="meaning"
)


def scored(lens: LensNet, ids: Tensor) -> Tensor:
    net, (lods, starts) = model(run_config(MC)), plan(MC, len(ids))
    output = net(ids, lods, starts, torch.ones(len(ids), MC.horizon_tokens))
    scores: Tensor = lens(output.visible_entries, lods, starts, output.lod0, ids)
    return scores


def test_lensnet_reads_them_and_never_the_horizon() -> None:
    lens, ids = wake(LensNet(MC, dim=32)), tokens(MC, 2)
    assert lens.meaning is not None
    before = scored(lens, ids)
    before.square().sum().backward()
    assert all(parameter.grad.any() for parameter in lens.meaning.parameters())
    changed = ids.clone()
    visible = MC.seq_len - MC.horizon_tokens
    changed[:, visible:] = (changed[:, visible:] + 1) % 61
    torch.testing.assert_close(scored(lens, changed), before, atol=0, rtol=0)
    with torch.no_grad():
        lens.meaning.transform.weight[0] *= 2
    assert ((scored(lens, ids) - before).abs() > 1e-6).any()


def test_a_gradient_reaches_the_matrix_under_autocast() -> None:
    lens, ids = wake(LensNet(MC, dim=32)), tokens(MC, 2)
    exact = scored(lens, ids)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = scored(lens, ids)
    rounded.sum().backward()
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, atol=0.1, rtol=0.1)
    assert lens.meaning is not None
    assert lens.meaning.transform.weight.grad is not None
    assert lens.meaning.transform.weight.grad.isfinite().all()


def test_it_needs_index_vectors() -> None:
    with pytest.raises(ValueError, match="lens_matches = 'meaning' compares index vectors"):
        mc_config(lens_matches="meaning", lens_index=False)


@pytest.mark.parametrize(
    ("older", "name"), [(True, "words"), (False, "none"), ("true", "words"), ("False", "none")]
)
def test_older_configs_had_a_switch(older: object, name: str) -> None:
    mc = mc_config(lens_matches=older)
    assert mc.lens_matches == name
    torch.manual_seed(0)
    shapes = {key: value.shape for key, value in LensNet(mc, dim=32).state_dict().items()}
    assert ("matches.up.weight" in shapes) == (name == "words")
    assert not any(key.startswith("meaning") for key in shapes)
