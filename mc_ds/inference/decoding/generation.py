"""Continues several histories at once: they share the decoder's steps, and each refocuses when it
is due.

Legend: R histories, D width, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mc_ds.config import ConfigError
from mc_ds.inference.decoding.sampling import Sampler, Sampling
from mc_ds.inference.decoding.text import Decode, TextStream
from mc_ds.inference.reader import Reader

TEXT_CONTEXT = 8
"""Tokens before a generation that decide how its first characters are written."""


class Piece(NamedTuple):
    """One generated token."""

    row: int
    """Which of the sessions."""
    token: int
    text: str
    """Text that has become certain with it; stop strings are left out. Empty without a
    tokenizer.
    """


def stream(
    readers: Sequence[Reader],
    max_new_tokens: int,
    sampling: Sampling,
    *,
    decode: Decode | None,
    stop: Sequence[str] = (),
    stop_ids: Sequence[int] = (),
) -> Iterator[Piece]:
    """Continues every history by at most `max_new_tokens` tokens; pieces come row by row.

    The readers must share a decoder (`InferenceModel.sessions`). Raises ConfigError where they do
    not, for a stop string without a tokenizer, and for an empty history.
    """
    if not readers:
        raise ConfigError("there is no session to continue: give at least one")
    decoder = readers[0].row.decoder
    rows = [reader.row.row for reader in readers]
    apart = any(reader.row.decoder is not decoder for reader in readers)
    if apart or len(set(rows)) < len(rows):
        raise ConfigError(
            f"{len(readers)} sessions that do not share a decoder: give those that one "
            f"model.sessions(...) made, each once"
        )
    if stop and decode is None:
        raise ConfigError(
            f"stop = {list(stop)} needs a tokenizer, and this model has none: give stop_ids"
        )
    if max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens = {max_new_tokens} is negative: use 0 or more")
    sampler = Sampler(sampling, rows=len(readers), device=readers[0].networks.device)
    texts = [_text_stream(reader, decode, stop) for reader in readers]
    return _pieces(readers, max_new_tokens, sampler, texts, stop_ids)


def _pieces(
    readers: Sequence[Reader],
    max_new_tokens: int,
    sampler: Sampler,
    texts: list[TextStream | None],
    stop_ids: Sequence[int],
) -> Iterator[Piece]:
    if max_new_tokens == 0:
        return
    head, phases = readers[0].networks.backbone.head, readers[0].phases
    going = [True] * len(readers)
    hidden = torch.cat([reader.begin() for reader in readers])
    for count in range(1, max_new_tokens + 1):
        with phases("decode"), torch.no_grad():
            ids = sampler.draw(head.logits(hidden))
            tokens = ids.tolist()
        for row, reader in enumerate(readers):
            if going[row]:
                reader.accept(tokens[row])
        # Whoever takes a piece may change a history before asking for the next one.
        versions = [reader.tree.version for reader in readers]
        for row, (token, text) in enumerate(zip(tokens, texts, strict=True)):
            if not going[row]:
                continue
            said = text.push(token) if text is not None else ""
            going[row] = (
                count < max_new_tokens
                and token not in stop_ids
                and not (text is not None and text.stopped)
            )
            if not going[row] and text is not None:
                said += text.close()
            yield Piece(row, token, said)
        if not any(going):
            return
        steps = [
            going[row] and reader.tree.version == versions[row] and reader.steps
            for row, reader in enumerate(readers)
        ]
        if any(steps):
            with phases("decode"):
                hidden = _step(readers, ids, steps)
        for row, reader in enumerate(readers):
            if going[row] and not steps[row]:
                hidden[row] = reader.state()[0]


@torch.no_grad()
def _step(readers: Sequence[Reader], ids_R: Tensor, steps: list[bool]) -> Tensor:
    """Final states [R, D] of the tokens just accepted by the readers that step; anything for the
    others.
    """
    decoder, embedding = readers[0].row.decoder, readers[0].networks.backbone.embedding
    anyone = readers[steps.index(True)]
    tables = [
        (reader if does else anyone).tables_at_end()
        for reader, does in zip(readers, steps, strict=True)
    ]
    cos, sin = (torch.cat(parts) for parts in zip(*tables, strict=True))
    inputs = embedding(ids_R), cos, sin
    rows = [reader.row.row for reader in readers]
    active = [row in rows and steps[rows.index(row)] for row in range(decoder.rows)]
    if rows == list(range(decoder.rows)):
        hidden = decoder.step(*inputs, active=active)
    else:  # the decoder steps all its rows
        at = torch.tensor(rows, device=ids_R.device)
        hidden = decoder.step(
            *(x.new_zeros(decoder.rows, x.size(1)).index_copy(0, at, x) for x in inputs),
            active=active,
        )[at]
    for reader, does in zip(readers, steps, strict=True):
        if does:
            reader.stepped()
    return hidden


def _text_stream(reader: Reader, decode: Decode | None, stop: Sequence[str]) -> TextStream | None:
    if decode is None:
        return None
    return TextStream(
        decode,
        stop,
        before=reader.tree.tokens(max(0, len(reader) - TEXT_CONTEXT), len(reader)).tolist(),
    )
