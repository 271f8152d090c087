"""A history may change while it is read: by its own session in the middle of a stream, or by
another session over the same tree.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from mc_ds.inference import MegaContextTree, Session
from tests.support.sessions import history, inference_model

NET = inference_model(position_scheme="order")
BUDGET = 48


def session_over(tree: MegaContextTree | str = "ram", length: int = 0, seed: int = 0) -> Session:
    session = NET.session("lens", BUDGET, tree, search=True)
    session.ingest(history(length, seed))
    return session


def assert_as_fresh(session: Session) -> None:
    """It says what a new session says of the same tokens, and continues them alike."""
    session.refocus()  # after a generation its context followed another one
    fresh = session_over()
    fresh.ingest(session.tree.tokens(0, len(session)).tolist())
    for mine, its in zip(session.working_context(), fresh.working_context(), strict=True):
        np.testing.assert_array_equal(mine, its)
    answer = history(4, seed=8)
    mine, its = session.losses(answer).nll, fresh.losses(answer).nll
    torch.testing.assert_close(mine, its, atol=1e-5, rtol=1e-5)
    assert session.generate(9) == fresh.generate(9)


CHANGES: dict[str, Callable[[Session], object]] = {
    "generate": lambda session: session.generate(2, temperature=1.0, seed=5),
    "generate_one": lambda session: session.generate(1, temperature=1.0, seed=5),
    "ingest": lambda session: session.ingest(history(3, seed=5)),
    "truncate": lambda session: session.truncate(len(session) - 7),
    "swap": lambda session: (session.truncate(len(session) - 1), session.ingest([3])),
    "nll": lambda session: session.nll([1, 2]),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("length", [15, 150])
def test_a_session_may_change_inside_its_own_stream(length: int, change: str) -> None:
    """In short histories all that was cached stays in the context: wrong keys would be seen at
    once.
    """
    session = session_over(length=length)
    for count, piece in enumerate(session.stream(9)):
        if count in (2, 3):
            last = session.tree.tokens(len(session) - 1, len(session))
            assert int(last[0]) == piece.token
            CHANGES[change](session)
    assert_as_fresh(session)


def test_a_session_may_change_while_another_one_beside_it_speaks() -> None:
    """Its next token was already drawn from what it knew before."""
    sessions = NET.sessions(2, budget=BUDGET, search=True)
    for session, length in zip(sessions, (20, 70), strict=True):
        session.ingest(history(length))
    drawn: list[list[int]] = [[], []]
    for count, piece in enumerate(NET.stream(sessions, 8)):
        drawn[piece.row].append(piece.token)
        if count == 4:
            assert piece.row == 0
            sessions[1].ingest(history(5, seed=3))
    said = [session.tree.tokens(0, len(session)).tolist() for session in sessions]
    assert said[0] == history(20) + drawn[0]
    assert said[1] == history(70) + drawn[1][:3] + history(5, seed=3) + drawn[1][3:]
    assert len(drawn[1]) == 8
    for session in sessions:
        assert_as_fresh(session)


@pytest.mark.parametrize("length", [30, 200])
def test_two_sessions_over_one_tree_follow_each_other(length: int) -> None:
    one = session_over(length=length)
    other = session_over(one.tree)
    for session in (one, other):
        session.nll([1])
        session.generate(3)
    one.refocus()  # what makes its context an old one is the other's ingest alone
    other.ingest(history(2, seed=1))
    assert_as_fresh(one)
    one.refocus()
    other.ingest(history(90, seed=2))
    assert one.coverage == other.coverage
    assert_as_fresh(one)
    one.truncate(length - 6)
    one.ingest(history(40, seed=4))
    other.nll([1])  # it now has keys of tokens that are cut next
    one.truncate(length - 3)
    one.ingest(history(37, seed=5))  # as long as before, but another text
    assert_as_fresh(other)
    assert_as_fresh(one)


def test_a_tree_may_grow_while_another_session_continues_it() -> None:
    one = session_over(length=60)
    other = session_over(one.tree)
    ids = []
    for piece in one.stream(10):
        ids.append(piece.token)
        if len(ids) == 4:
            other.ingest(history(2, seed=1))
        if len(ids) == 7:
            other.truncate(40)
    assert len(one) == len(other) == 43
    assert ids[7:] == session_over(length=40).generate(3)
    assert_as_fresh(one)
    assert_as_fresh(other)


def test_memory_follows_the_history_up_to_the_budget() -> None:
    """A budget is what a context may have at most, not what it takes."""
    session = NET.session("lens", 10**12)
    session.ingest(history(30))
    said = session.generate(12)
    small = NET.session("lens", BUDGET)
    small.ingest(history(30))
    assert said == small.generate(12)
    cached = session.reader.row.decoder
    assert cached.keys.size(3) == cached.values.size(3) < 200
    for _ in range(3):
        session.ingest(history(400, seed=1))
        session.nll([1])
    assert 1242 <= cached.keys.size(3) < 2 * 1242 + 100
    enough = NET.session("lens", 2000)
    enough.ingest(session.tree.tokens(0, len(session)).tolist())
    assert enough.nll([1, 2]) == pytest.approx(session.nll([1, 2]), abs=1e-5)
