"""Generating with several sessions at once: they share the decoder's steps, and each refocuses when it is due.

Legend: R sessions, D width, V vocabulary.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mc_ds.config import ConfigError
from mc_ds.inference.decoding.sampling import Sampler, Sampling
from mc_ds.inference.decoding.text import Decode, TextStream
from mc_ds.inference.session import Piece, Session

TEXT_CONTEXT = 8
"""Tokens before a generation that decide how its first characters are written."""


def stream(
    sessions: Sequence[Session],
    max_new_tokens: int,
    sampling: Sampling,
    *,
    decode: Decode | None,
    stop: Sequence[str] = (),
    stop_ids: Sequence[int] = (),
) -> Iterator[Piece]:
    """Continues every session by at most `max_new_tokens` tokens; pieces come row by row.

    The sessions must share a decoder (`InferenceModel.sessions`). Raises ConfigError where they do not, for a stop string without a
    tokenizer, and for an empty history.
    """
    if not sessions:
        raise ConfigError("there is no session to continue: give at least one")
    decoder = sessions[0].lane.decoder
    rows = [session.lane.row for session in sessions]
    if any(session.lane.decoder is not decoder for session in sessions) or len(set(rows)) < len(
        rows
    ):
        raise ConfigError(
            f"{len(sessions)} sessions that do not share a decoder: give those that one model.sessions(...) made, each once"
        )
    if stop and decode is None:
        raise ConfigError(
            f"stop = {list(stop)} needs a tokenizer, and this model has none: give stop_ids"
        )
    if max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens = {max_new_tokens} is negative: use 0 or more")
    sampler = Sampler(sampling, rows=len(sessions), device=sessions[0].model.device)
    texts = [_text_stream(session, decode, stop) for session in sessions]
    return _pieces(sessions, max_new_tokens, sampler, texts, stop_ids)


def _pieces(
    sessions: Sequence[Session],
    max_new_tokens: int,
    sampler: Sampler,
    texts: list[TextStream | None],
    stop_ids: Sequence[int],
) -> Iterator[Piece]:
    if max_new_tokens == 0:
        return
    head, phases = sessions[0].model.model.backbone.head, sessions[0].phases
    going = [True] * len(sessions)
    hidden = torch.cat([session.begin() for session in sessions])
    for count in range(1, max_new_tokens + 1):
        with phases("decode"), torch.no_grad():
            ids = sampler.draw(head.logits(hidden))
            tokens = ids.tolist()
        for row, (session, token, text) in enumerate(zip(sessions, tokens, texts, strict=True)):
            if not going[row]:
                continue
            session.accept(token)
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
            is_going and session.steps for is_going, session in zip(going, sessions, strict=True)
        ]
        if any(steps):
            with phases("decode"):
                hidden = _step(sessions, ids, steps)
        for row, session in enumerate(sessions):
            if going[row] and not steps[row]:
                hidden[row] = session.state()[0]


@torch.no_grad()
def _step(sessions: Sequence[Session], ids_R: Tensor, steps: list[bool]) -> Tensor:
    """Final states [R, D] of the tokens just accepted by the sessions that step; anything for the others."""
    decoder, backbone = sessions[0].lane.decoder, sessions[0].model.model.backbone
    anyone = sessions[steps.index(True)]
    tables = [
        (session if does else anyone).tables_at_end()
        for session, does in zip(sessions, steps, strict=True)
    ]
    cos, sin = (torch.cat(parts) for parts in zip(*tables, strict=True))
    inputs = backbone.embedding(ids_R), cos, sin
    rows = [session.lane.row for session in sessions]
    active = [row in rows and steps[rows.index(row)] for row in range(decoder.rows)]
    if rows == list(range(decoder.rows)):
        hidden = decoder.step(*inputs, active=active)
    else:  # the decoder steps all its rows
        at = torch.tensor(rows, device=ids_R.device)
        hidden = decoder.step(
            *(x.new_zeros(decoder.rows, x.size(1)).index_copy(0, at, x) for x in inputs),
            active=active,
        )[at]
    for session, does in zip(sessions, steps, strict=True):
        if does:
            session.stepped()
    return hidden


def _text_stream(session: Session, decode: Decode | None, stop: Sequence[str]) -> TextStream | None:
    if decode is None:
        return None
    return TextStream(
        decode,
        stop,
        before=session.tree.tokens(max(0, len(session) - TEXT_CONTEXT), len(session)).tolist(),
    )
