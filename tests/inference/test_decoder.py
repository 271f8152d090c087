"""The cached decoder equals a full computation, however a context is cut into prefix, suffix and
steps.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mc_ds.inference.decoding.decoder import Decoder
from mc_ds.model.backbone import Backbone
from mc_ds.model.backbone.layers import plain_tables
from tests.support.factories import model, run_config

LENGTH = 23
NETS: dict[int, Backbone] = {
    kv_heads: model(run_config(backbone=dict(num_kv_heads=kv_heads, init_std=0.3))).eval().backbone
    for kv_heads in (1, 2, 4)
}
COS, SIN = (table[0] for table in plain_tables(LENGTH, 8, 1e4, torch.device("cpu")))
ENTRIES = torch.randn(3, LENGTH, 32, generator=torch.Generator().manual_seed(0))


def full(net: Backbone, row: int, length: int = LENGTH) -> Tensor:
    with torch.no_grad():
        return net.hidden(ENTRIES[row : row + 1, :length], COS[None, :length], SIN[None, :length])[
            0
        ]


def extended(
    decoder: Decoder, row: int, first: int, last: int, entries: Tensor = ENTRIES
) -> Tensor:
    return decoder.extend(
        row, entries[row, first:last], COS[first:last], SIN[first:last], keep=first
    )


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(list(NETS)),
    st.lists(st.integers(1, LENGTH), min_size=1, max_size=8),
    st.integers(0, 2**31),
)
def test_any_order_of_extending_and_stepping_equals_one_forward(
    kv_heads: int, cuts: list[int], seed: int
) -> None:
    net = NETS[kv_heads]
    decoder = Decoder(net, rows=1, capacity=LENGTH)
    draw = torch.Generator().manual_seed(seed)
    wrong = torch.randn(ENTRIES.shape, generator=draw)
    for cut in cuts:
        keep = min(decoder.lengths[0], cut - 1)
        if decoder.lengths[0] > keep:  # what lies behind the prefix was computed for other entries
            extended(decoder, 0, keep, LENGTH, wrong)
        if keep == cut - 1 and torch.rand(1, generator=draw) < 0.5:
            decoder.lengths[0] = keep
            got = decoder.step(ENTRIES[:1, keep], COS[keep : keep + 1], SIN[keep : keep + 1])
        else:
            got = extended(decoder, 0, keep, cut)
        assert decoder.lengths == [cut]
        torch.testing.assert_close(got, full(net, 0)[keep:cut], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kv_heads", list(NETS))
@pytest.mark.parametrize("last", [1, 3, 15])
@pytest.mark.parametrize("keep", [0, 6])
def test_the_last_states_are_computed_alone(kv_heads: int, last: int, keep: int) -> None:
    """Keys and values of all entries are in the cache nevertheless."""
    net, decoder = NETS[kv_heads], Decoder(NETS[kv_heads], rows=1, capacity=LENGTH)
    extended(decoder, 0, 0, keep + 2)
    new = slice(keep, 22)
    got = decoder.extend(0, ENTRIES[0, new], COS[new], SIN[new], keep=keep, last=last)
    expected = full(net, 0)
    torch.testing.assert_close(got, expected[22 - last : 22], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(
        extended(decoder, 0, 22, LENGTH), expected[22:], atol=2e-5, rtol=1e-4
    )


@pytest.mark.parametrize("kv_heads", list(NETS))
def test_rows_of_different_lengths_step_together_and_waiting_rows_stay(kv_heads: int) -> None:
    net = NETS[kv_heads]
    decoder = Decoder(net, rows=3, capacity=LENGTH)
    lengths = [20, 7, LENGTH]
    for row, length in enumerate(lengths):
        extended(decoder, row, 0, length)
    for count in range(3):
        places = [decoder.lengths[0], decoder.lengths[1], 0]
        inputs = torch.stack([ENTRIES[row, place] for row, place in enumerate(places)])
        active = [True, count != 1, False]
        hidden = decoder.step(inputs, COS[places], SIN[places], active=active)
        for row in range(2):
            torch.testing.assert_close(
                hidden[row], full(net, row)[places[row]], atol=2e-5, rtol=1e-4
            )
    assert decoder.lengths == [23, 9, 23]
    # The full row that waited goes on as if nothing had happened.
    got = decoder.extend(2, ENTRIES[2, 22:], COS[22:], SIN[22:], keep=22)
    torch.testing.assert_close(got, full(net, 2)[22:], atol=2e-5, rtol=1e-4)


def test_what_does_not_fit_is_refused() -> None:
    decoder = Decoder(NETS[2], rows=1, capacity=5)
    with pytest.raises(ValueError, match="at most 5"):
        extended(decoder, 0, 0, 6)
    with pytest.raises(ValueError, match="do not fit: 0 are cached"):
        extended(decoder, 0, 2, 4)
    extended(decoder, 0, 0, 5)
    with pytest.raises(ValueError, match="full"):
        decoder.step(ENTRIES[:1, 5], COS[5:6], SIN[5:6])
