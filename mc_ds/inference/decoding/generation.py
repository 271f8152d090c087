"""Continue several histories in one batch: they share the decoder's steps, and each refocuses when
due.

Legend: R histories, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mc_ds.config import ConfigError
from mc_ds.inference.decoding.decoder import Tables
from mc_ds.inference.decoding.ending import Ending
from mc_ds.inference.decoding.sampling import Sampler, Sampling
from mc_ds.inference.decoding.text import Decode, TextStream
from mc_ds.inference.reader import Reader

TEXT_CONTEXT = 8
"""Preceding tokens given to the detokenizer, since they can affect the first characters."""


class Piece(NamedTuple):
    """One generated token."""

    row: int
    """Index of its session."""
    token: int
    text: str
    """Text that the token completes, without stop strings; empty without a tokenizer."""


def stream(
    readers: Sequence[Reader], ending: Ending, sampling: Sampling, *, decode: Decode | None
) -> Iterator[Piece]:
    """Continue every history until its ending. Yields one piece per row and step, in the order of
    rows.

    The readers must share a decoder (`InferenceModel.sessions`). Raises ConfigError at the call if
    they do not, or for a stop string without a tokenizer; during iteration, for an empty history or
    logits that are not finite.
    """
    if not readers:
        raise ConfigError("sessions is empty: give at least one session to continue")
    decoder = readers[0].row.decoder
    rows = {reader.row.row for reader in readers}
    if any(reader.row.decoder is not decoder for reader in readers) or len(rows) < len(readers):
        raise ConfigError(
            f"these {len(readers)} sessions do not share a decoder: give different sessions of one "
            "call of model.sessions(...)"
        )
    if not isinstance(sampling, Sampling):
        raise ConfigError(f"sampling = {sampling!r} is not a Sampling: give one, or leave it out")
    if ending.stops and decode is None:
        raise ConfigError(
            f"stop = {list(ending.stops)} needs a tokenizer, and this model has none: give stop_ids"
        )
    return _pieces(readers, ending, sampling, decode)


def _pieces(
    readers: Sequence[Reader], ending: Ending, sampling: Sampling, decode: Decode | None
) -> Iterator[Piece]:
    if ending.max_new_tokens == 0:
        return
    networks, phases = readers[0].networks, readers[0].phases
    sampler = Sampler(
        sampling,
        seeds=[reader.settings.seed for reader in readers],
        device=networks.device,
    )
    texts = [_text_stream(reader, decode, ending.stops) for reader in readers]
    unfinished = [True] * len(readers)
    head = networks.backbone.head
    states = torch.cat([reader.begin() for reader in readers])
    with phases("decode"), torch.no_grad():
        logits = head.logits(states)
    for count in range(1, ending.max_new_tokens + 1):
        with phases("decode"), torch.no_grad():
            ids = sampler.draw(logits, list(map(len, readers)))
            tokens = ids.tolist()
        active = [row for row in range(len(readers)) if unfinished[row]]
        for row in active:
            _check_drawn(tokens[row], readers[row])
        for row in active:
            readers[row].accept(tokens[row])
        # The consumer of a piece may change a history before it takes the next one.
        versions = [reader.tree.version for reader in readers]
        for row in active:
            token, text = tokens[row], texts[row]
            new_text = text.push(token) if text is not None else ""
            unfinished[row] = (
                count < ending.max_new_tokens
                and token not in ending.stop_ids
                and not (text is not None and text.stopped)
            )
            if not unfinished[row] and text is not None:
                new_text += text.close()
            yield Piece(row, token, new_text)
        if not any(unfinished):
            return
        steps = [
            unfinished[row] and reader.tree.version == versions[row] and reader.can_step
            for row, reader in enumerate(readers)
        ]
        if any(steps):
            with phases("decode"):
                logits = _step(readers, ids, steps)
        for row, reader in enumerate(readers):
            if unfinished[row] and not steps[row]:
                state = reader.state()
                with phases("decode"), torch.no_grad():
                    logits[row] = head.logits(state)[0]


def _check_drawn(token: int, reader: Reader) -> None:
    if token < 0:
        dtype = str(reader.networks.backbone.embedding.weight.dtype).removeprefix("torch.")
        raise ConfigError(
            f"the logits after {len(reader)} tokens are not finite: the weights are damaged, or "
            f"{dtype} overflows: load them with another dtype"
        )


@torch.no_grad()
def _step(readers: Sequence[Reader], ids_R: Tensor, steps: list[bool]) -> Tensor:
    """Run one decoder step and return the logits [R, V] after the tokens just accepted. The logits
    of readers that do not step are undefined.
    """
    decoder = readers[0].row.decoder
    rows = [reader.row.row for reader in readers]
    active, tables = [False] * decoder.rows, list[Tables | None]([None] * decoder.rows)
    for reader, row, does in zip(readers, rows, steps, strict=True):
        if does:
            active[row], tables[row] = True, reader.tables
    if rows == list(range(decoder.rows)):
        logits = decoder.next_logits(ids_R, tables, active)
    else:  # scatter the readers' rows among all rows of the decoder
        at = torch.tensor(rows, device=ids_R.device)
        of_all = ids_R.new_zeros(decoder.rows).index_copy(0, at, ids_R)
        logits = decoder.next_logits(of_all, tables, active)[at]
    for reader, does in zip(readers, steps, strict=True):
        if does:
            reader.record_step()
    return logits


def _text_stream(reader: Reader, decode: Decode | None, stop: Sequence[str]) -> TextStream | None:
    if decode is None:
        return None
    return TextStream(
        decode,
        stop,
        before=reader.tree.tokens(max(0, len(reader) - TEXT_CONTEXT), len(reader)).tolist(),
    )
