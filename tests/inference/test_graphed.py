"""The decoder with fixed shapes computes what the plain one does, captured or not, and is captured
once for all that a session reads.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mc_ds.config import ConfigError
from mc_ds.inference import InferenceModel, Sampling, load_bundle
from mc_ds.inference import model as inference_module
from mc_ds.inference.decoding import graphed
from mc_ds.inference.decoding.decoder import Decoder, Tables
from mc_ds.inference.decoding.graphed import GraphedDecoder
from mc_ds.model.backbone import Backbone
from mc_ds.model.backbone.layers import plain_tables
from tests.support.factories import VOCAB, model, run_config
from tests.support.replayer import Replayer
from tests.support.sessions import history, inference_model

LENGTH = 70
"""More than the capacity of a plain decoder at first, so that its buffers grow."""
NETS: dict[int, Backbone] = {
    kv_heads: model(run_config(backbone=dict(num_kv_heads=kv_heads, init_std=0.3))).eval().backbone
    for kv_heads in (1, 2, 4)
}


def tables(seed: int, device: str = "cpu") -> Tables:
    """Rotary tables of a context: damped, as those of gists are, and different for each seed."""
    cos, sin = (table[0] for table in plain_tables(LENGTH, 8, 1e4, torch.device("cpu")))
    damping = torch.rand(LENGTH, 1, generator=torch.Generator().manual_seed(seed))
    return (cos * damping).to(device), (sin * damping).to(device)


def entries(count: int, seed: int, width: int = 32) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def read(decoder: Decoder, row: int, tables: Tables, keep: int, end: int, seed: int) -> None:
    """Recompute a row's cache from entry `keep` on, as a refocus does."""
    cos, sin = (table[keep:end] for table in tables)
    given = entries(end - keep, seed).to(decoder.keys)
    decoder.extend(row, given, cos, sin, keep=keep)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(list(NETS)),
    st.lists(st.tuples(st.integers(1, LENGTH - 1), st.integers(1, 4)), min_size=1, max_size=6),
    st.integers(0, 2**31),
)
def test_one_row_follows_refocuses_and_steps(
    kv_heads: int, rounds: list[tuple[int, int]], seed: int
) -> None:
    """Each round: a context of some length, which keeps a part of the cache, and some tokens."""
    recorder = Replayer()
    plain = Decoder(NETS[kv_heads], rows=1, capacity=LENGTH)
    fixed = GraphedDecoder(NETS[kv_heads], rows=1, capacity=LENGTH, recorder=recorder)
    for number, (end, steps) in enumerate(rounds):
        of_round = tables(seed + number)
        keep = min(plain.lengths[0], end - 1) // 2
        for decoder in (plain, fixed):
            read(decoder, 0, of_round, keep, end, seed + number)
        for token in range(min(steps, LENGTH - end)):
            ids = torch.tensor([(seed + token) % VOCAB])
            expected, found = (
                decoder.next_logits(ids, [of_round], [True]) for decoder in (plain, fixed)
            )
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert fixed.lengths == plain.lengths
    assert recorder.recorded <= 1 + 2  # the step, and passes over 64 and 128 entries
    for decoder in (plain, fixed):
        read(decoder, 0, tables(0), 0, LENGTH, 1)
        with pytest.raises(ValueError, match=f"a row of {LENGTH} entries is full"):
            decoder.next_logits(torch.tensor([0]), [tables(0)], [True])


@pytest.fixture
def short_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Passes over fewer entries than usual, so that short contexts take passes of all sizes."""
    monkeypatch.setattr(graphed, "SLOT_MULTIPLE", 8)
    return [72, 40, 24, 16, 8]


@pytest.mark.parametrize("kv_heads", list(NETS))
def test_every_recomputation_of_a_size_is_one_pass(kv_heads: int, short_passes: list[int]) -> None:
    """Recomputes the end of rows beside each other, in random order, from any entry on."""
    generator = np.random.default_rng(kv_heads)
    recorder = Replayer()
    plain = Decoder(NETS[kv_heads], rows=2, capacity=LENGTH)
    fixed = GraphedDecoder(NETS[kv_heads], rows=2, capacity=LENGTH, recorder=recorder)
    taken = set()
    for number in range(60):
        row, of_round = number % 2, tables(number)
        end = int(generator.integers(1, LENGTH + 1))
        cached = int(generator.integers(min(end - 1, plain.lengths[row]) + 1))
        keep = fixed.kept(cached, end)
        assert keep == (0 if end - cached > 40 else cached)
        taken.add(min(size for size in short_passes if size >= end - keep))
        cos, sin = (table[keep:end] for table in of_round)
        given = entries(end - keep, number)
        expected, found = (
            decoder.extend(row, given, cos, sin, keep=keep) for decoder in (plain, fixed)
        )
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        found = fixed.extend(row, given, cos, sin, keep=keep, last=1)
        torch.testing.assert_close(found, expected[-1:], atol=1e-5, rtol=1e-5)
        assert fixed.lengths == plain.lengths
        for buffer, other in ((plain.keys, fixed.keys), (plain.values, fixed.values)):
            valid, of_fixed = buffer[:, row, :, :end], other[:, row, :, :end]
            torch.testing.assert_close(of_fixed, valid, atol=1e-5, rtol=1e-5)
    assert taken == set(short_passes)
    assert recorder.recorded == len(short_passes)


def test_a_history_that_is_read_once_is_not_worth_a_capture(short_passes: list[int]) -> None:
    recorder = Replayer()
    decoder = GraphedDecoder(NETS[2], rows=1, capacity=LENGTH, recorder=recorder)
    read(decoder, 0, tables(0), 0, LENGTH, 0)
    read(decoder, 0, tables(0), 60, LENGTH, 0)
    assert recorder.recorded == 0
    read(decoder, 0, tables(0), 0, LENGTH - 1, 0)
    assert recorder.recorded == 1


def test_the_states_of_a_pass_outlive_the_next_one(short_passes: list[int]) -> None:
    """Several rows are read one after another before anything uses their states."""
    decoder = GraphedDecoder(NETS[2], rows=2, capacity=LENGTH, recorder=Replayer())
    cos, sin = tables(0)
    for _ in range(2):
        first, second = (decoder.extend(r, entries(LENGTH, r), cos, sin, keep=0) for r in range(2))
    expected = Decoder(NETS[2], rows=1, capacity=LENGTH)
    for row, found in enumerate((first, second)):
        states = expected.extend(0, entries(LENGTH, row), cos, sin, keep=0)
        torch.testing.assert_close(found, states, atol=1e-5, rtol=1e-5)


def test_long_recomputations_are_launched_kernel_by_kernel(
    monkeypatch: pytest.MonkeyPatch, short_passes: list[int]
) -> None:
    """Their computation takes longer than the launches."""
    weights, _ = Decoder(NETS[2], rows=1, capacity=1).blocks[0]
    work = sum(weight.numel() for weight in weights) + 2 * 72 * 32  # S = 72, H C = 32
    monkeypatch.setattr(graphed, "MOST_WORK", 24 * work)
    recorder = Replayer()
    plain = Decoder(NETS[2], rows=1, capacity=LENGTH)
    fixed = GraphedDecoder(NETS[2], rows=1, capacity=LENGTH, recorder=recorder)
    for keep, recorded in ((0, 0), (0, 0), (30, 0), (46, 0), (46, 1)):
        assert fixed.kept(keep, LENGTH) == keep
        for decoder in (plain, fixed):
            read(decoder, 0, tables(keep), keep, LENGTH, keep)
        assert recorder.recorded == recorded
    torch.testing.assert_close(
        fixed.keys[..., :LENGTH, :], plain.keys[..., :LENGTH, :], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("kv_heads", list(NETS))
def test_rows_wait_end_and_refocus_beside_each_other(kv_heads: int) -> None:
    plain = Decoder(NETS[kv_heads], rows=3, capacity=LENGTH)
    fixed = GraphedDecoder(NETS[kv_heads], rows=3, capacity=LENGTH, recorder=Replayer())
    of_rows: list[Tables | None] = [tables(row) for row in range(3)]
    lengths = [20, 7, LENGTH]
    for decoder in (plain, fixed):
        for row, length in enumerate(lengths):
            of_row = of_rows[row]
            assert of_row is not None
            read(decoder, row, of_row, 0, length, row)
    of_rows[2] = None  # the full row waits
    for count in range(9):
        if count == 4:  # the second row refocuses to a longer context, with other tables
            of_rows[1] = refocused = tables(7)
            for decoder in (plain, fixed):
                read(decoder, 1, refocused, 3, 40, 7)
        active = [True, count not in (2, 3), False]
        ids = torch.tensor([count, 2 * count, -1])
        expected, found = (decoder.next_logits(ids, of_rows, active) for decoder in (plain, fixed))
        torch.testing.assert_close(found[active], expected[active], atol=1e-5, rtol=1e-5)
        assert fixed.lengths == plain.lengths
    assert fixed.lengths == [29, 45, LENGTH]
    # What the waiting row had cached is unchanged.
    last = (entries(1, 9), *(table[-1:] for table in tables(2)))
    expected, found = (decoder.extend(2, *last, keep=LENGTH - 1) for decoder in (plain, fixed))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


class Spied:
    """A model whose sessions have decoders of one kind, and the logits of all their steps."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, net: InferenceModel, recorder: Replayer | None
    ) -> None:
        self.logits: list[Tensor] = []
        kind = Decoder if recorder is None else partial(GraphedDecoder, recorder=recorder)
        monkeypatch.setattr(inference_module, "Decoder", partial(self._made, kind))
        self.net = net

    def _made(self, kind: Callable[..., Decoder], *args: Any, **options: Any) -> Decoder:
        decoder = kind(*args, **options)
        step = decoder.next_logits

        def spy(ids: Tensor, tables: Sequence[Tables | None], active: list[bool]) -> Tensor:
            logits = step(ids, tables, active)
            self.logits.append(logits[torch.tensor(active)].clone())
            return logits

        decoder.next_logits = spy  # type: ignore[method-assign]
        return decoder


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("lengths", [[150], [9, 150, 40]], ids=str)
def test_sessions_generate_the_same(
    monkeypatch: pytest.MonkeyPatch, lengths: list[int], temperature: float
) -> None:
    """Through several refocuses, an ingest between two generations, a smaller budget, and with a
    part of the sessions alone. K = 4 tokens lie between refocuses; at most 48 entries fit.
    """
    said, logits, recorder = [], [], Replayer()
    for kind in (None, recorder):
        spied = Spied(monkeypatch, inference_model(), kind)
        sessions = spied.net.sessions(len(lengths), "lens", 48, search=True)
        for session, length in zip(sessions, lengths, strict=True):
            session.ingest(history(length, seed=length))
        sampling = Sampling(temperature, seed=3)
        tokens = [spied.net.generate(sessions, 23, sampling)]
        sessions[-1].ingest(history(11, seed=1))
        tokens.append(spied.net.generate(sessions[-1:], 9, sampling))
        for session in sessions:
            session.budget = 44
        tokens.append(spied.net.generate(sessions[::-1], 9, sampling))
        said.append(tokens)
        logits.append(spied.logits)
    assert said[0] == said[1]
    assert len(logits[0]) == len(logits[1]) > 20
    for expected, found in zip(*logits, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert recorder.recorded == 1 + 1  # the step, and the pass over 64 entries


def test_in_bfloat16_both_decoders_differ_by_rounding_alone() -> None:
    net = model(run_config(backbone=dict(init_std=0.3))).eval().backbone.to(torch.bfloat16)
    plain = Decoder(net, rows=1, capacity=LENGTH)
    fixed = GraphedDecoder(net, rows=1, capacity=LENGTH, recorder=Replayer())
    for decoder in (plain, fixed):
        read(decoder, 0, tables(0), 0, 50, 0)
    for token in range(5):
        ids = torch.tensor([token])
        expected, found = (
            decoder.next_logits(ids, [tables(0)], [True]) for decoder in (plain, fixed)
        )
        assert found.dtype == torch.float32
        assert (found - expected).norm() < 0.05 * expected.norm()


def test_a_graph_is_refused_where_there_is_none() -> None:
    net = inference_model()
    with pytest.raises(
        ConfigError, match="cuda_graphs = True needs a GPU, and the model is on cpu"
    ):
        InferenceModel(net.model, net.lensnet, net.config, cuda_graphs=True)
    with pytest.raises(ConfigError, match="cuda_graphs = True needs a GPU"):
        load_bundle("missing", cuda_graphs=True)
    with pytest.raises(ConfigError, match="cuda_graphs = 'on' is unknown"):
        InferenceModel(net.model, net.lensnet, net.config, cuda_graphs="on")  # type: ignore[arg-type]
    session = InferenceModel(net.model, net.lensnet, net.config).session("recency")
    assert type(session.reader.row.decoder) is Decoder


@pytest.mark.gpu
def test_a_captured_step_equals_the_plain_one() -> None:
    """On a GPU, float32: sessions with CUDA graphs and without say the same, over refocuses."""
    nets = [inference_model() for _ in range(2)]
    said = []
    for net, graphs in zip(nets, (True, False), strict=True):
        assert net.lensnet is not None
        model = InferenceModel(net.model.cuda(), net.lensnet.cuda(), net.config, cuda_graphs=graphs)
        sessions = model.sessions(3, "lens", 48, search=True)
        assert type(sessions[0].reader.row.decoder) is (GraphedDecoder if graphs else Decoder)
        for session, length in zip(sessions, (9, 150, 40), strict=True):
            session.ingest(history(length, seed=length))
        tokens = [model.generate(sessions, 23, Sampling(1.0, seed=3))]
        tokens.append(model.generate(sessions[1:], 9))
        said.append((tokens, [session.nll([1, 2]) for session in sessions]))
    assert said[0][0] == said[1][0]
    assert said[0][1] == pytest.approx(said[1][1], abs=1e-4)


@pytest.mark.gpu
def test_a_captured_step_has_the_logits_of_the_plain_one() -> None:
    net = NETS[2].cuda()
    plain, fixed = (kind(net, rows=1, capacity=LENGTH) for kind in (Decoder, GraphedDecoder))
    for number, end in enumerate((30, 55)):
        of_round = tables(number, "cuda")
        for decoder in (plain, fixed):
            read(decoder, 0, of_round, number * 10, end, number)
        for token in range(4):
            ids = torch.tensor([token], device="cuda")
            expected, found = (
                decoder.next_logits(ids, [of_round], [True]) for decoder in (plain, fixed)
            )
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.gpu
def test_the_host_waits_once_per_token() -> None:
    """Between two refocuses, which K = 4 tokens separate, only the drawn token is waited for."""
    net = inference_model()
    assert net.lensnet is not None
    session = InferenceModel(net.model.cuda(), net.lensnet.cuda(), net.config).session("lens", 48)
    session.ingest(history(150))
    pieces = session.stream(4)
    for _ in range(2):  # the first launch captures the step and writes the rotary tables
        next(pieces)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            assert len(list(pieces)) == 2
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 2, [str(wait.message) for wait in waits]
