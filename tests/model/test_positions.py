"""Gaussian RoPE against textbook formulas, Monte Carlo expectations and 40-digit phases."""

import math
from decimal import Decimal, localcontext
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from mc_ds.model.positions import rotary_tables, rotate

BASE = 10_000.0


def tables(
    entries: list[tuple[int, int]],
    *,
    block_size: int = 4,
    head_dim: int = 16,
    base: float = BASE,
    **options: str,
) -> tuple[Tensor, Tensor]:
    lods, starts = torch.tensor(entries).T
    cos, sin = rotary_tables(
        lods[None], starts[None], block_size=block_size, head_dim=head_dim, base=base, **options
    )
    return cos[0], sin[0]


def frequencies(head_dim: int, base: float = BASE) -> Tensor:
    return torch.tensor(
        [base ** (-2 * i / head_dim) for i in range(head_dim // 2)], dtype=torch.float64
    )


def textbook(x_WC: Tensor, positions: list[float]) -> Tensor:
    """RoFormer in Llama's layout: channel c pairs with c + C/2; the pair, as a complex number,
    turns by position * base^(-2c/C).
    """
    half = x_WC.size(-1) // 2
    pairs = torch.complex(x_WC[:, :half].double(), x_WC[:, half:].double())
    angles = torch.tensor(positions, dtype=torch.float64)[:, None] * frequencies(2 * half)
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1)


def test_lod0_is_ordinary_rope() -> None:
    positions = [0, 1, 2, 17, 500]
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    cos, sin = tables([(0, p) for p in positions])
    rotated = rotate(x[None, None], cos[None], sin[None])[0, 0]
    torch.testing.assert_close(rotated.double(), textbook(x, positions), atol=1e-6, rtol=1e-6)
    angles = torch.tensor(positions, dtype=torch.float64)[:, None] * BASE ** -(
        torch.arange(0, 16, 2).double() / 16
    )
    assert torch.equal(cos, angles.cos().float()), "no damping at all, not even by rounding"
    assert torch.equal(sin, angles.sin().float())


def test_rotate_has_the_convention_of_pretrained_llamas() -> None:
    """x * cos + rotate_half(x) * sin with both tables repeated over the two halves: what
    published weights expect.
    """
    x = torch.randn(2, 3, 4, 16, generator=torch.Generator().manual_seed(1))
    lods, starts = (
        torch.zeros(2, 4, dtype=torch.int64),
        torch.tensor([[0, 1, 2, 3], [5, 9, 10, 40]]),
    )
    cos, sin = rotary_tables(lods, starts, block_size=4, head_dim=16, base=BASE)
    both = (torch.cat([table, table], dim=-1)[:, None] for table in (cos, sin))
    cos_full, sin_full = both
    rotated_half = torch.cat([-x[..., 8:], x[..., :8]], dim=-1)
    torch.testing.assert_close(rotate(x, cos, sin), x * cos_full + rotated_half * sin_full)
    assert rotate(x.bfloat16(), cos, sin).dtype == torch.bfloat16


def test_attention_logits_depend_on_distance_alone() -> None:
    query, key = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(2)).unbind()

    def logit(at: int, to: int) -> float:
        (cos_q, sin_q), (cos_k, sin_k) = tables([(0, at)]), tables([(0, to)])
        return float(
            (rotate(query, cos_q[None], sin_q[None]) * rotate(key, cos_k[None], sin_k[None])).sum()
        )

    assert logit(9, 4) == pytest.approx(logit(109, 104), abs=1e-4)
    assert logit(9, 4) != pytest.approx(logit(4, 9), abs=1e-2)


@pytest.mark.parametrize("entry", [(1, 8), (2, 16), (2, 0)])
def test_gaussian_damping_is_the_expected_rotation_under_the_spans_moments(
    entry: tuple[int, int],
) -> None:
    level, start = entry
    span = torch.arange(start, start + 4**level).double()
    mean, deviation = span.mean(), span.std(correction=0)
    draws = mean + deviation * torch.randn(
        400_000, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )
    phases = draws[:, None] * frequencies(16)
    cos, sin = tables([entry])
    torch.testing.assert_close(cos[0].double(), phases.cos().mean(0), atol=6e-3, rtol=0)
    torch.testing.assert_close(sin[0].double(), phases.sin().mean(0), atol=6e-3, rtol=0)
    assert cos[0].hypot(sin[0])[0] < 0.6, "the fastest channel is damped"


def exact_rotation(position: str, head_dim: int, base: str) -> list[tuple[float, float]]:
    """Cosine and sine of position * base^(-2i/C), reduced modulo a full turn with 40 digits."""
    with localcontext() as context:
        context.prec = 40
        turn = 2 * Decimal("3.1415926535897932384626433832795028841971693993751")
        rotations = []
        for i in range(head_dim // 2):
            frequency = (Decimal(base).ln() * Decimal(-2 * i) / Decimal(head_dim)).exp()
            angle = float(Decimal(position) * frequency % turn)
            rotations.append((math.cos(angle), math.sin(angle)))
        return rotations


@pytest.mark.parametrize("base", ["10000", "500000"])
@pytest.mark.parametrize("start", [3_000_000, 3_000_001, 123_456_784])
def test_phases_are_right_after_millions_of_tokens(start: int, base: str) -> None:
    cos, sin = tables([(0, start)], head_dim=64, base=float(base))
    expected = torch.tensor(exact_rotation(str(start), 64, base), dtype=torch.float64)
    torch.testing.assert_close(
        torch.stack([cos[0], sin[0]], dim=-1).double(), expected, atol=3e-7, rtol=0
    )


def test_the_phase_of_a_gist_is_that_of_its_middle() -> None:
    cos, sin = tables([(1, 3_000_000)], head_dim=64)
    damping = torch.exp(-0.5 * (4**2 - 1) / 12 * frequencies(64) ** 2)
    expected = (
        torch.tensor(exact_rotation("3000001.5", 64, "10000"), dtype=torch.float64)
        * damping[:, None]
    )
    torch.testing.assert_close(
        torch.stack([cos[0], sin[0]], dim=-1).double(), expected, atol=3e-7, rtol=0
    )


def test_tables_are_float32_whatever_the_ambient_precision() -> None:
    plain = tables([(1, 3_000_000), (0, 12)])
    with torch.autocast("cpu", torch.bfloat16):
        mixed = tables([(1, 3_000_000), (0, 12)])
    for table, other in zip(plain, mixed, strict=True):
        assert other.dtype == torch.float32
        assert torch.equal(table, other)


def test_by_order_an_entry_is_a_token_at_its_place_whatever_it_covers() -> None:
    entries = [(2, 0), (1, 16), (0, 20), (0, 21), (0, 3_000_000)]
    cos, sin = tables(entries, scheme="order")
    plain = tables([(0, place) for place in range(len(entries))])
    assert torch.equal(cos, plain[0])
    assert torch.equal(sin, plain[1])


def test_by_order_one_table_serves_all_rows() -> None:
    lods, starts = torch.zeros(3, 5, dtype=torch.int64), torch.arange(15).view(3, 5)
    cos, sin = rotary_tables(lods, starts, block_size=4, head_dim=16, base=BASE, scheme="order")
    assert cos.shape == sin.shape == (1, 5, 8)
    x = torch.randn(3, 2, 5, 16, generator=torch.Generator().manual_seed(2))
    one = rotate(x[1:2], cos, sin)
    torch.testing.assert_close(rotate(x, cos, sin)[1:2], one)


@pytest.mark.parametrize("scheme", ["span", "order"])
def test_tables_of_a_plan_on_the_host_may_be_on_another_device(
    scheme: Literal["span", "order"],
) -> None:
    lods, starts = torch.tensor([[1, 0, 0]]), torch.tensor([[0, 4, 5]])
    options: dict[str, Any] = dict(block_size=4, head_dim=16, base=BASE, scheme=scheme)
    here = rotary_tables(lods, starts, **options)
    there = rotary_tables(lods, starts, **options, device=torch.device("meta"))
    assert [table.device.type for table in there] == ["meta", "meta"]
    assert [table.shape for table in there] == [table.shape for table in here]
    same = rotary_tables(lods, starts, **options, device=torch.device("cpu"))
    assert all(torch.equal(*tables) for tables in zip(same, here, strict=True))
