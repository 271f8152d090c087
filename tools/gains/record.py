"""Records a window: the gains of single distant blocks, and the inputs of rankers.

A *gain* is the decrease of a slice's loss when a distant block replaces the oldest recent block.
All inputs are available while decoding, except `full_mass`, which needs attention over the whole
history. Queries come from the recency window. Keys come from a "local" pass, which processes each
token once, with the 512 to 1023 tokens before it (fewer at the start of a history).

Legend: S slices, M distant blocks, L layers, H heads, D width, Q query tokens, N tokens of distant
blocks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gains.layout import Layout
from gains.reader import Reader, attention_mass

LOCAL = 1024
"""Tokens per row of the local pass. Rows overlap by half: only second halves are used (and the
whole first row).
"""
ATTENDING = 8
"""Number of last known tokens whose attention is recorded."""
POOLED = (1, 4, 16)
"""Numbers of last known tokens over which query states are averaged."""


@dataclass
class Window:
    """The recording of one window; tensors on the reader's device."""

    recency: Tensor
    """[S] loss of the recency window."""
    full: Tensor
    """[S] loss with all T tokens as context."""
    gains: Tensor
    """[S, candidates] gain of each candidate block."""
    queries: Tensor
    """[S, POOLED, layers and final, D] mean states of the last known tokens in the recency
    window.
    """
    keys: Tensor
    """[M, layers, D] mean states of blocks in the local pass."""
    salience: Tensor
    """[M] mean loss of each block's tokens in the local pass."""
    late: Tensor
    """[S, layers, 2, M] largest cosine of token states within each block: with the last known
    token, and on average with the last 16.
    """
    expected: Tensor
    """[S, M] predicted next-token probability of each block's tokens, weighted by rarity."""
    local_mass: Tensor
    """[S, L H, M] attention from the recency window to keys of the local pass."""
    full_mass: Tensor
    """[S, L H, M] attention with all T tokens as context."""

    def kept(self, candidates: Tensor) -> "Window":
        """Return the recording of the candidate blocks only, in half precision on the CPU."""
        small = {name: tensor.cpu() for name, tensor in vars(self).items()}
        for name in ("keys", "salience"):
            small[name] = small[name][candidates]
        for name in ("late", "expected", "local_mass", "full_mass"):
            small[name] = small[name][..., candidates]
        return Window(
            **{
                name: tensor.half() if tensor.dim() > 1 else tensor
                for name, tensor in small.items()
            }
        )


def record_window(
    reader: Reader, ids: Tensor, candidates: Tensor, states_after: tuple[int, ...]
) -> Window:
    """Record one window of tokens `ids`, int64 [T + 1].

    `states_after` lists the layers after which hidden states are recorded.
    """
    layout = reader.layout
    full, full_mass = read_everything(reader, ids)
    recency = read_recency(reader, ids, states_after)
    local = read_distant(reader, ids, states_after, recency)
    horizons = layout.horizons().to(reader.device)
    contexts = torch.cat(
        [layout.recency.to(reader.device)[None], layout.replacing(candidates[:, None])]
    )
    entries = horizons.flatten().expand(len(contexts), -1)
    losses = reader.losses(ids, contexts, entries).unflatten(1, horizons.shape).mean(-1)
    return Window(
        recency=losses[0],
        full=full,
        gains=(losses[0] - losses[1:]).T,
        queries=recency.states,
        full_mass=full_mass,
        expected=expected_tokens(ids, recency.next_token, layout),
        **local,
    )


def read_everything(reader: Reader, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Run the backbone with all T tokens as context; return the losses of slices [S] and the
    attention to distant blocks [S, L H, M].
    """
    layout, device = reader.layout, reader.device
    starts = torch.arange(layout.seq_len, device=device)[None]
    queries = layout.known_entries(ATTENDING).to(device).flatten()
    allowed = starts <= queries[:, None]
    masses, x = [], None
    for layer, x in enumerate(reader.layers(ids, starts)):
        if layer < len(reader.blocks):
            q, k = reader.heads(layer, x, starts)
            mass = attention_mass(q[0][:, queries], k[0], allowed)
            masses.append(by_block(mass[..., : layout.distant * layout.block_size], layout))
    assert x is not None
    horizons = layout.horizons().to(device)
    return reader.nll(x[0, horizons], ids[horizons + 1]).mean(-1), torch.cat(masses, dim=1)


@dataclass
class Recency:
    """States and attention of the recency window."""

    states: Tensor
    """[S, POOLED, layers and final, D] mean states of the last known tokens."""
    tokens: Tensor
    """[layers, S, 16, D] states of the last 16 known tokens."""
    heads: list[tuple[Tensor, Tensor]]
    """For each layer, queries [H, S ATTENDING, C], and keys of all entries [J, W, C]."""
    next_token: Tensor
    """[S, V] predicted probabilities of each slice's first label."""


def read_recency(reader: Reader, ids: Tensor, states_after: tuple[int, ...]) -> Recency:
    """Run the recency window once, for all slices."""
    layout, device = reader.layout, reader.device
    starts = layout.starts(layout.recency.to(device)[None])
    place = {int(token): index for index, token in enumerate(starts[0])}
    last = torch.tensor(
        [[place[int(token)] for token in row] for row in layout.known_entries(max(POOLED))],
        device=device,
    )
    attending = last[:, -ATTENDING:].flatten()
    tokens, heads = [], []
    for layer, x in enumerate(reader.layers(ids, starts)):
        if layer in (*states_after, len(reader.blocks)):
            tokens.append(x[0, last].float())
        if layer < len(reader.blocks):
            q, k = reader.heads(layer, x, starts)
            heads.append((q[0][:, attending], k[0]))
    pooled = torch.stack([torch.stack([t[:, -n:].mean(1) for t in tokens], 1) for n in POOLED], 1)
    logits = reader.backbone.head.logits(x[0, last[:, -1]])
    return Recency(pooled, torch.stack(tokens[:-1]), heads, logits.softmax(-1))


def read_distant(
    reader: Reader, ids: Tensor, states_after: tuple[int, ...], recency: Recency
) -> dict[str, Tensor]:
    """Run the local pass over all distant blocks; return `keys`, `salience`, `late` and
    `local_mass` (see `Window`).
    """
    layout, device = reader.layout, reader.device
    length, count = layout.distant * layout.block_size, len(states_after)
    row, half = min(LOCAL, length), min(LOCAL, length) // 2
    firsts = torch.arange(0, length - half, half, device=device)
    starts = firsts[:, None] + torch.arange(row, device=device)

    def distant(x: Tensor) -> Tensor:
        """Select from [rows, W, ...] each distant token in the row where its context is longest;
        return [N, ...].
        """
        return torch.cat([x[0, :half], x[:, half:].flatten(0, 1)])[:length]

    window = layout.starts(layout.recency.to(device)[None])
    queries = layout.known_entries(ATTENDING).to(device).flatten()
    near = window <= queries[:, None]
    allowed = torch.cat([near.new_ones(len(queries), length), near], dim=1)
    keys: list[Tensor] = []
    late: list[Tensor] = []
    masses: list[Tensor] = []
    for layer, x in enumerate(reader.layers(ids, starts)):
        if layer in states_after:
            states = distant(x).float()
            keys.append(states.unflatten(0, (layout.distant, -1)).mean(1))
            late.append(late_matches(recency.tokens[len(late)], states, layout))
        if layer < len(reader.blocks):
            q, near_keys = recency.heads[layer]
            k = distant(reader.heads(layer, x, starts)[1].transpose(1, 2)).transpose(0, 1)
            mass = attention_mass(q, torch.cat([k, near_keys], dim=1), allowed)
            masses.append(by_block(mass[..., :length], layout))
    assert len(keys) == count
    nll = reader.nll(distant(x), ids[1 : length + 1])
    return {
        "keys": torch.stack(keys, 1),
        "salience": nll.unflatten(0, (layout.distant, -1)).mean(1),
        "late": torch.stack(late, 1),
        "local_mass": torch.cat(masses, dim=1),
    }


def by_block(mass_HQN: Tensor, layout: Layout) -> Tensor:
    """Return the attention to each distant block, the maximum over a slice's queries, [S, H, M].

    The history's first token is left out, because it attracts attention whatever its content.
    """
    mass_HQN = mass_HQN.clone()
    mass_HQN[..., 0] = 0
    per_block = mass_HQN.unflatten(-1, (layout.distant, -1)).sum(-1)
    return per_block.unflatten(1, (layout.slices, -1)).amax(2).transpose(0, 1)


def late_matches(queries_SQD: Tensor, states_ND: Tensor, layout: Layout) -> Tensor:
    """Return two similarities of each distant block, [S, 2, M]: the largest cosine of its tokens
    with the last query, and the mean over queries of their largest cosines.

    All states are first standardised per channel, by mean and deviation of the distant tokens:
    otherwise a few large channels would dominate every cosine.
    """
    mean, deviation = states_ND.mean(0), states_ND.std(0) + 1e-6
    queries, states = (
        torch.nn.functional.normalize(((x - mean) / deviation).clamp(-6, 6), dim=-1)
        for x in (queries_SQD, states_ND)
    )
    best = (queries @ states.T).unflatten(-1, (layout.distant, -1)).amax(-1)
    return torch.stack([best[:, -1], best.mean(1)], dim=1)


def expected_tokens(ids: Tensor, next_SV: Tensor, layout: Layout) -> Tensor:
    """Return the next-token probabilities of each distant block's tokens, summed with their rarity
    as weight, [S, M].
    """
    blocks = ids[: layout.distant * layout.block_size].view(layout.distant, -1)
    present = next_SV.new_zeros(layout.distant, next_SV.size(1)).scatter_(1, blocks, 1.0)
    rarity = (layout.distant / present.sum(0).clamp(min=1)).log()
    return (next_SV * rarity) @ present.T
