"""Gains of single blocks: what is recorded, what words tell, what choices are worth."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gains.choices import greedy_losses, policy_losses
from gains.estimate import chosen_gains, left_out_errors, set_features
from gains.inputs import Inputs
from gains.layout import Layout
from gains.lexical import NAMES, lexical_features
from gains.rankers import Reads, Training, assemble, captured, ensemble_scores, train_ranker
from gains.reader import Reader, attention_mass
from gains.record import record_window
from gains.store import (
    Raw,
    encode,
    fit,
    log_mass,
    mass_bytes,
    project,
    read_parts,
    whitening,
    write_parts,
)
from gains.tables import clustered
from gains.windows import documents, parse_source

from mc_ds.config import BackboneConfig
from mc_ds.model.backbone import Backbone

LAYOUT = Layout(
    seq_len=128, wc_length=64, tail=32, block_size=8, horizon=4, slices=3, stride=8
)  # 12 blocks, 4 recent, 8 distant
VOCAB = 64


@pytest.fixture(scope="module")
def reader() -> Reader:
    torch.manual_seed(0)
    config = BackboneConfig(
        dim=32, num_layers=3, num_heads=4, num_kv_heads=2, ffn_dim=48, init_std=0.3
    )
    backbone = Backbone(config, vocab_size=VOCAB).double().eval()
    return Reader(backbone.requires_grad_(False), LAYOUT, rows=5)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(VOCAB, (LAYOUT.seq_len + 1,), generator=torch.Generator().manual_seed(1))


def naive_loss(reader: Reader, ids: torch.Tensor, tokens: list[int], slice_: int) -> float:
    """Loss of one slice whose context is exactly these tokens and what is known of the tail."""
    known = LAYOUT.known[slice_]
    starts = torch.tensor([*tokens, *range(LAYOUT.seq_len - LAYOUT.tail, known + LAYOUT.horizon)])[
        None
    ]
    cos, sin = reader.tables(starts)
    hidden = reader.backbone.hidden(reader.backbone.embedding(ids[starts]), cos, sin)
    labels = ids[starts + 1]
    return float(
        reader.backbone.head(hidden[0, -LAYOUT.horizon :], labels[0, -LAYOUT.horizon :]).nll.mean()
    )


def block(*numbers: int) -> list[int]:
    return [token for n in numbers for token in range(n * 8, n * 8 + 8)]


def test_gains_are_differences_of_losses_read_one_slice_at_a_time(reader, ids):
    found = record_window(reader, ids, torch.tensor([1, 6]), (1, 2))
    for s in range(LAYOUT.slices):
        recency = naive_loss(reader, ids, block(8, 9, 10, 11), s)
        assert float(found.recency[s]) == pytest.approx(recency, abs=1e-5)
        for row, candidate in enumerate((1, 6)):
            gain = recency - naive_loss(reader, ids, block(candidate, 9, 10, 11), s)
            assert float(found.gains[s, row]) == pytest.approx(gain, abs=1e-5)
        assert float(found.full[s]) == pytest.approx(
            naive_loss(reader, ids, list(range(96)), s), abs=1e-5
        )


def test_nothing_a_ranker_sees_depends_on_the_horizon(reader, ids):
    changed = ids.clone()
    first = LAYOUT.known[-1] + 1  # the last slice's first label
    changed[first:] = (changed[first:] + 7) % VOCAB
    before, after = (record_window(reader, x, torch.tensor([0]), (1, 2)) for x in (ids, changed))
    assert not torch.equal(before.recency, after.recency)
    for name in ("queries", "keys", "salience", "late", "expected", "local_mass", "full_mass"):
        assert torch.equal(getattr(before, name), getattr(after, name)), name
    features = [lexical_features(x.numpy().astype(np.uint16), LAYOUT) for x in (ids, changed)]
    assert np.array_equal(*features)


def test_the_last_known_token_is_seen(reader, ids):
    changed = ids.clone()
    changed[LAYOUT.known[-1]] = (changed[LAYOUT.known[-1]] + 7) % VOCAB
    before, after = (record_window(reader, x, torch.tensor([0]), (1, 2)) for x in (ids, changed))
    for name in ("queries", "late", "expected", "local_mass", "full_mass"):
        assert torch.equal(getattr(before, name)[:-1], getattr(after, name)[:-1]), name
        assert not torch.equal(getattr(before, name)[-1], getattr(after, name)[-1]), name


def test_attention_mass_is_that_of_the_layer(reader, ids):
    starts = torch.arange(20)[None]
    x = next(reader.layers(ids, starts))
    q, k = reader.heads(0, x, starts)
    weights = reader.blocks[0].weights()
    normed = F.rms_norm(x, (32,), weights.attention_norm, reader.blocks[0].shape.norm_eps)
    v = F.linear(normed, weights.qkv)[0, :, 48:].view(20, 2, 8).transpose(0, 1)
    mass = attention_mass(q[0], k[0], torch.ones(20, 20, dtype=torch.bool).tril()).double()
    mixed = (mass @ v.repeat_interleave(2, 0)).transpose(0, 1).reshape(20, 32)
    expected = F.scaled_dot_product_attention(q, k, v[None], is_causal=True, enable_gqa=True)
    assert torch.allclose(mixed, expected[0].transpose(0, 1).reshape(20, 32), atol=1e-5)


def test_policies_read_what_they_score_highest(reader, ids):
    scores = torch.zeros(2, LAYOUT.slices, LAYOUT.distant)
    scores[0, :, 5], scores[0, :, 2] = 2, 1
    scores[1, :, 0], scores[1, 2, 7] = 1, 2
    losses, recency = policy_losses(reader, ids, scores, (1, 2))
    assert float(recency[1]) == pytest.approx(
        naive_loss(reader, ids, block(8, 9, 10, 11), 1), abs=1e-5
    )
    assert float(losses[0, 0, 1]) == pytest.approx(
        naive_loss(reader, ids, block(2, 5, 10, 11), 0), abs=1e-5
    )
    assert float(losses[1, 1, 0]) == pytest.approx(
        naive_loss(reader, ids, block(0, 9, 10, 11), 1), abs=1e-5
    )
    assert float(losses[2, 1, 1]) == pytest.approx(
        naive_loss(reader, ids, block(0, 7, 10, 11), 2), abs=1e-5
    )


def test_more_blocks_than_the_window_holds_are_refused(reader, ids):
    with pytest.raises(ValueError, match="5 blocks cannot replace the 4 recent ones"):
        policy_losses(reader, ids, torch.zeros(1, LAYOUT.slices, LAYOUT.distant), (5,))


def test_the_greedy_oracle_is_the_best_of_each_round(reader, ids):
    found = record_window(reader, ids, torch.arange(LAYOUT.distant), (1, 2))
    losses = greedy_losses(reader, ids, found.gains, [0, 2], 2)
    for row, s in enumerate((0, 2)):
        assert float(losses[row, 0]) == pytest.approx(float(found.recency[s]), abs=1e-5)
        best = min(0.0, -float(found.gains[s].max())) + float(found.recency[s])
        assert float(losses[row, 1]) == pytest.approx(best, abs=1e-5)
        if best < float(found.recency[s]):
            first = int(found.gains[s].argmax())
            pairs = [
                naive_loss(reader, ids, block(*sorted((first, other)), 10, 11), s)
                for other in range(LAYOUT.distant)
                if other != first
            ]
            assert float(losses[row, 2]) == pytest.approx(min(best, *pairs), abs=1e-5)


def test_word_matches_are_told_by_hand():
    tokens = np.arange(129, dtype=np.uint16) + 1000  # all different
    known = LAYOUT.known[1]
    tokens[17:20] = tokens[known - 2 : known + 1]  # block 2 holds the last three known tokens
    found = dict(zip(NAMES, np.moveaxis(lexical_features(tokens, LAYOUT), 2, 0), strict=True))
    matched = np.log(1 + (12 - 1 + 0.5) / 1.5)
    for name in ("bm25_4", "bm25_16", "bm25_48"):
        assert found[name][1, 2] == pytest.approx(3 * matched, rel=1e-5)
        assert np.count_nonzero(found[name][1]) == 1
    assert found["rarest"][1, 2] == pytest.approx(matched, rel=1e-5)
    assert found["ngram_3"][1, 2] == pytest.approx(np.log(12.5 / 1.5), rel=1e-5)
    assert found["ngram_2"][1, 2] == pytest.approx(2 * np.log(12.5 / 1.5), rel=1e-5)
    assert found["suffix"][1, 2] == 3
    assert np.count_nonzero(found["suffix"][1]) == 1
    assert found["before_bm25"][1, 3] == found["after_bm25"][1, 1] == found["bm25_16"][1, 2]


def test_projections_are_white_and_attention_survives_its_byte():
    states = (
        torch.randn(500, 6, generator=torch.Generator().manual_seed(2)) @ torch.randn(6, 6) * 3 + 5
    )
    white = project(states, whitening(states, 4)).float() / 32
    assert torch.allclose(white.T @ white / 500, torch.eye(4), atol=0.05)
    mass = torch.tensor([0.0, 1e-5, 3e-3, 0.4, 1.0])
    back = np.exp(log_mass(mass_bytes(mass).numpy()))
    assert back == pytest.approx([1e-6, 1e-5, 3e-3, 0.4, 1.0], rel=0.03)


def test_a_recording_comes_back_from_its_files(reader, ids, tmp_path):
    raws = []
    for window, candidates in enumerate(
        (torch.arange(8), torch.tensor([1, 4, 6]), torch.arange(3))
    ):
        content = record_window(reader, ids, candidates, (1, 2)).kept(candidates)
        raws.append(Raw(window, candidates, content))
    codec = fit(raws[1:], width=4, heads=5)
    write_parts(tmp_path, [encode(raw, codec) for raw in raws])
    back = read_parts(tmp_path)
    assert [int(window["window"]) for window in back] == [0, 1, 2]
    for raw, window in zip(raws, back, strict=True):
        assert np.array_equal(window["candidates"], raw.candidates)
        assert np.array_equal(window["gains"], raw.content.gains)
        mass = raw.content.local_mass[:, codec.local_heads].float().clamp(min=1e-6)
        assert np.exp(log_mass(window["local_mass"])) == pytest.approx(mass.numpy(), rel=0.03)
    with pytest.raises(ValueError, match="already contains a recording"):
        write_parts(tmp_path, [encode(raws[0], codec)])
    with pytest.raises(FileNotFoundError, match=r"run `record` first"):
        read_parts(tmp_path / "none")


def synthetic(windows: int, seed: int) -> Inputs:
    """Gains that follow the first of two word features and the product of query and key."""
    drawn = torch.Generator().manual_seed(seed)
    words = torch.randn(windows, 3, 12, 2, generator=drawn)
    query, key = (torch.randn(windows, n, 4, generator=drawn) for n in (3, 12))
    gains = 0.02 * words[..., 0] + 0.02 * (query[:, :, None] * key[:, None]).sum(-1) / 2
    return Inputs(
        {"distance": words[..., 1:], "words": words}, {"free": query}, {"free": key}, gains
    )


def test_rankers_learn_from_what_they_read_alone():
    training = Training(epochs=40, hidden=16, products=8, dropout=0.0)
    train, test = synthetic(60, 1), synthetic(40, 2)
    gained = {}
    for name, reads in {
        "none": Reads(("distance",)),
        "words": Reads(("distance", "words")),
        "both": Reads(("distance", "words"), ("free",), ("free",)),
    }.items():
        ranker = train_ranker(assemble(reads, train), train.gains, training, seed=0)
        scores = ensemble_scores([ranker], assemble(reads, test)).detach()
        gained[name] = float(captured(scores, test.gains, 1).mean())
    best = float(test.gains.amax(-1).mean())
    assert abs(gained["none"]) < 0.2 * best
    assert 0.4 * best < gained["words"] < 0.85 * best
    assert gained["both"] > 0.9 * best


def test_small_files_of_a_folder_are_joined_and_long_ones_cut(tmp_path):
    for name, size in {"a/1.txt": 30, "a/2.txt": 30, "b/1.txt": 30, "b/2.txt": 200}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x" * size)
    pattern = f"{tmp_path}/**/*.txt"
    joined = list(documents(parse_source(f"test,english,9,join:{pattern}"), (50, 100)))
    assert [(name[-7:], len(text)) for name, text in joined] == [("a/2.txt", 61), ("b/2.txt", 100)]
    assert not list(documents(parse_source(f"test,english,9:{pattern}"), (50, 100)))
    with pytest.raises(ValueError, match="should have the form split,kind,limit"):
        parse_source("test,english:x")


def test_errors_are_clustered_by_window():
    same = np.repeat([[0.1], [0.3]], 50, axis=1)
    assert clustered(same) == pytest.approx((0.2, 0.1))


def test_the_law_of_sets_finds_the_law_they_follow():
    drawn = np.random.default_rng(0)
    gains, scores = drawn.normal(size=(40, 3, 9)), {k: drawn.normal(size=(40, 3, 9)) for k in "abc"}
    law = np.array([-0.1, 0.8, 0.2, 0.05])
    measured = {
        k: np.stack([set_features(chosen_gains(s, gains, z)) @ law for z in (2, 4)], axis=-1)
        for k, s in scores.items()
    }
    for text in left_out_errors(scores, gains, measured, (2, 4)):
        assert text.count("0.0000") == 4, text
