"""Sessions: the contexts and losses of evaluation, generation equal to whole forwards, and nothing
that leaks from one call to the next.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mc_ds.config import ConfigError, RetrievalConfig
from mc_ds.evaluation.batches import with_tails
from mc_ds.focus.controller import MCController
from mc_ds.focus.policies import POLICIES
from mc_ds.focus.policies import policy as policy_of
from mc_ds.inference import InferenceModel, Sampling
from mc_ds.inference.tree.nets import TreeNets
from mc_ds.model.megacontext import ModelOutput, NodeTable
from tests.support.factories import VOCAB
from tests.support.optional import needs, needs_of
from tests.support.sessions import (
    TRAINED,
    assert_covers,
    batch_view,
    history,
    inference_model,
    ingested,
    longer,
    read_by_batches,
    whole_logits,
)
from tests.support.tiny_bundle import tiny_tokenizer

NETS = {scheme: inference_model(position_scheme=scheme) for scheme in ("span", "order")}
NETS["open"] = inference_model(position_scheme="order", lens_ask_reach="open")
NETS["shared"] = inference_model(position_scheme="order", lens_block_scores="shared")
NET = NETS["order"]
HORIZON, BUDGET, BLOCK = 5, 48, 4
RETRIEVAL = [name for name, spec in POLICIES.items() if spec.retrieval is not None]


@pytest.mark.parametrize("scheme", list(NETS))
@pytest.mark.parametrize("length", [TRAINED, TRAINED + 37])
@pytest.mark.parametrize("policy", ["lens", "recency", "random", "uniform", "blind", *RETRIEVAL])
def test_contexts_and_losses_are_those_of_evaluation(scheme: str, policy: str, length: int) -> None:
    needs_of(policy)
    net = NETS[scheme]
    mc = read_by_batches(net, length, BUDGET)
    wc_length = mc.train_wc_length
    tokens = torch.tensor([history(length + 1, seed) for seed in range(3)])
    controller = MCController(net.lensnet)
    with controller.inference(), torch.no_grad():
        table = net.model(tokens)
        assert isinstance(table, NodeTable)
        if policy == "blind":
            read = with_tails(table, NodeTable(*(part.roll(1, 0) for part in table)), mc)
        else:
            read = table
        view = batch_view(net, mc, controller, tokens, read, [(7, row) for row in range(3)])
        plan = policy_of(policy).choose(view, wc_length)
        output = net.model(tokens, plan.lods, plan.starts)
    assert isinstance(output, ModelOutput)
    known = length - HORIZON + 1
    for row in range(3):
        tail = tokens[row - 1, : known - 1].tolist() if policy == "blind" else None
        budget = BUDGET if policy in ("lens", "random", "uniform", "blind") else wc_length
        session = ingested(
            net,
            tokens[row, :known].tolist(),
            policy,
            budget,
            seed=(7, row),
            tail=tail,
            search=False,
        )
        losses = session.losses(tokens[row, known:])
        lods, starts = session.working_context()
        assert torch.equal(torch.from_numpy(lods), plan.lods[row, : wc_length - HORIZON + 1])
        assert torch.equal(torch.from_numpy(starts), plan.starts[row, : wc_length - HORIZON + 1])
        torch.testing.assert_close(
            losses.nll, output.entry_nll[row, -HORIZON:], atol=1e-5, rtol=1e-5
        )
        assert torch.equal(losses.correct, output.horizon_likeliest[row] == tokens[row, -HORIZON:])
        assert session.nll(tokens[row, known:].tolist()) == pytest.approx(
            float(output.row_scores[row]), abs=1e-5
        )


@pytest.mark.parametrize("scheme", list(NETS))
@pytest.mark.parametrize("policy", ["lens", "recency", "uniform", "blind"])
def test_every_generated_token_is_that_of_a_whole_forward(scheme: str, policy: str) -> None:
    """Greedy, through refocuses and kept prefixes: each token is the likeliest of a forward over
    the context it was predicted from.
    """
    net = longer(NETS[scheme], TRAINED)
    session = ingested(net, history(110), policy)
    kept, lengths = [], []
    for _ in session.stream(25):
        lods, starts = session.working_context()
        tokens = session.tree.tokens(0, len(session)).tolist()
        context, token = (lods[:-1], starts[:-1]), tokens.pop()
        net.model.geometry = net.mc.geometry.with_length(len(tokens))
        logits = whole_logits(net, tokens, *context)[-1]
        assert int(logits.argmax()) == token
        lengths.append(len(lods))
        kept.append((*lods, *starts))
    assert max(lengths) <= BUDGET
    assert len(set(kept)) > 20
    assert (
        len(set(tokens)) > 10
    )  # it does not repeat one token, which a wrong cache would not notice


@pytest.mark.parametrize("horizon", [1, 3, 4, 6])
def test_room_ends_with_the_horizon_or_after_a_block(horizon: int) -> None:
    """With h up to K the room is used up first: looking at the context then does what the
    generation would do next, and no more.
    """
    net = inference_model(horizon_tokens=horizon)
    plain, looked = (ingested(net, history(140)) for _ in range(2))
    ids = []
    for piece in looked.stream(19):
        ids.append(piece.token)
        lods, starts = looked.working_context()
        assert len(lods) <= BUDGET
        assert_covers(lods, starts, 0, len(looked), BLOCK)
    assert ids == plain.generate(19)
    looked.phases.reset()
    looked.generate(19)
    # The shortlist in two contexts of one call, then the rounds of focus.
    assert looked.phases.calls["lens"] == 1 + 4 + 18 // min(horizon, BLOCK)


@pytest.mark.parametrize("every", [1, 2, 5])
def test_the_interval_between_refocuses_can_be_chosen(every: int) -> None:
    """The context before each token is the one that a refocus after r tokens leaves."""
    session = ingested(NET, history(140), refocus=every)
    assert session.settings.refocus == every
    seen = []
    for _ in session.stream(17):
        context = session.reader.context
        assert context is not None
        seen.append(context.window.known)
    # The last known token, and the context before it: r tokens are read in each context.
    assert seen == [140 + number // every * every for number in range(17)]


def test_logits_after_a_refocus_equal_a_fresh_session() -> None:
    """After long generation a loss is what a new session says of the same history: nothing of the
    way there is left.
    """
    session = ingested(NET, history(130))
    ids = session.generate(40)
    fresh = ingested(NET, history(130) + ids)
    answer = history(4, seed=8)
    torch.testing.assert_close(
        session.losses(answer).nll, fresh.losses(answer).nll, atol=1e-5, rtol=1e-5
    )
    assert session.generate(12) == fresh.generate(12)


def test_a_loss_leaves_no_trace() -> None:
    asked, silent = (ingested(NET, history(200)) for _ in range(2))
    first = asked.nll([1, 2, 3])
    assert asked.nll([9]) != first
    assert len(asked) == 200
    assert asked.generate(9) == silent.generate(9)
    before = asked.working_context()
    asked.nll([4, 5])
    for mine, its, theirs in zip(
        asked.working_context(), before, silent.working_context(), strict=True
    ):
        np.testing.assert_array_equal(mine, its)
        np.testing.assert_array_equal(mine, theirs)
    assert asked.nll([1, 2]) == pytest.approx(asked.nll([1, 2]))


def test_a_loss_in_the_middle_of_a_generation_does_not_disturb_it() -> None:
    plain = ingested(NET, history(150)).generate(12)
    session, ids = ingested(NET, history(150)), []
    for piece in session.stream(12):
        ids.append(piece.token)
        session.nll([5, 6, 7])
    assert ids == plain


def test_focus_sees_no_token_of_the_horizon_and_not_the_last_known_one() -> None:
    tokens = history(140)
    session, changed = (
        ingested(NET, tokens),
        ingested(NET, [*tokens[:-1], (tokens[-1] + 1) % VOCAB]),
    )
    contexts = []
    for answer in ([1, 2, 3, 4, 5], [6, 7, 8, 9, 10]):
        session.nll(answer)
        contexts.append(session.working_context())
    contexts.append(changed.working_context())
    other = ingested(NET, [*tokens[:-2], (tokens[-2] + 1) % VOCAB, tokens[-1]])
    other.refocus()
    for context in contexts[1:]:
        np.testing.assert_array_equal(contexts[0][0], context[0])
    scores = []
    for one in (session, other):
        context = one.reader.context
        assert context is not None
        seen = slice(0, context.window.visible)
        plan = [torch.from_numpy(x[seen])[None] for x in (context.lods, context.starts)]
        lens = one.reader.contexts.lens
        assert lens is not None
        with NET.controller.inference():
            scores.append(lens.scores(plan[0], plan[1], len(one)))
    assert not torch.equal(*scores)  # the token before the last does count


@pytest.mark.parametrize("policy", ["lens", "recency", "random", "uniform", "blind"])
@pytest.mark.parametrize("known", [1, 2, 7, 43, 44, 45, 46, 101, 102, 103, 104, 500])
def test_contexts_of_every_length_fit_the_budget_and_end_with_the_last_token(
    policy: str, known: int
) -> None:
    session = ingested(NET, history(known), policy)
    lods, starts = session.working_context()
    assert len(lods) == len(starts) <= BUDGET - HORIZON + 1
    assert_covers(lods, starts, starts[0], known, BLOCK)
    assert session.coverage == pytest.approx(1 - starts[0] / known)
    assert (session.coverage == 1) == (policy != "recency" or known <= BUDGET - HORIZON + 1)
    if known <= 44:
        assert (lods == 0).all()
    assert np.isfinite(session.nll(history(5)))
    for _ in session.stream(11):
        lods, starts = session.working_context()
        assert len(lods) <= BUDGET
        assert_covers(lods, starts, starts[0], len(session), BLOCK)
    assert len(session) == known + 11


def test_the_oldest_nodes_leave_when_even_the_coarsest_cover_is_too_long() -> None:
    """Spans of 16 tokens in 30 entries: some 300 tokens fit."""
    session = ingested(NET, history(1000), budget=30)
    lods, starts = session.working_context()
    assert starts[0] % 16 == 0
    assert 600 < starts[0] < 900
    assert session.coverage == pytest.approx(1 - starts[0] / 1000)
    assert_covers(lods, starts, starts[0], 1000, BLOCK)
    assert len(lods) <= 30 - HORIZON + 1
    firsts = []
    for _ in session.stream(40):
        lods, starts = session.working_context()
        firsts.append(starts[0])
        assert_covers(lods, starts, starts[0], len(session), BLOCK)
        assert len(lods) <= 30
    assert firsts == sorted(firsts)
    assert firsts[-1] > firsts[0]
    tokens = session.tree.tokens(0, len(session)).tolist()
    assert (
        int(
            whole_logits(longer(NET, len(tokens) - 1), tokens[:-1], lods[:-1], starts[:-1])[
                -1
            ].argmax()
        )
        == tokens[-1]
    )


def test_several_sessions_say_what_each_says_alone() -> None:
    """Histories of different lengths, refocuses at different times, one ends early."""
    lengths, sampling = [60, 131, 44, 300], Sampling(temperature=0.8, top_k=20, seed=11)
    alone = [
        ingested(NET, history(length, length), seed=(0, row)) for row, length in enumerate(lengths)
    ]
    single = [[piece.token for piece in session.stream(30, sampling)] for session in alone]
    stop = single[1][7]
    expected = [ids[: ids.index(stop) + 1] if stop in ids else ids for ids in single]
    together = NET.sessions(4, budget=BUDGET)
    for session, length in zip(together, lengths, strict=True):
        session.ingest(history(length, length))
    assert NET.generate(together, 30, sampling, stop_ids=[stop]) == expected
    assert [len(session) for session in together] == [
        length + len(ids) for length, ids in zip(lengths, expected, strict=True)
    ]
    # One of them alone, with the decoder they share, and two of them in another order.
    assert together[3].nll([1, 2]) == pytest.approx(
        ingested(NET, history(300, 300) + expected[3]).nll([1, 2]), abs=1e-5
    )
    fresh = [
        ingested(NET, history(length, length) + ids)
        for length, ids in zip(lengths, expected, strict=True)
    ]
    assert NET.generate([together[2], together[0]], 10) == [
        fresh[2].generate(10),
        fresh[0].generate(10),
    ]
    with pytest.raises(ConfigError, match="do not share a decoder"):
        NET.generate([together[0], alone[0]], 3)


def test_seeds_repeat_and_differ() -> None:
    def said(seed: int, own: int = 0) -> list[int]:
        session = ingested(NET, history(80), "uniform", seed=own)
        return session.generate(15, temperature=1.0, seed=seed)

    assert said(1) == said(1)
    for other in (said(2), said(1, own=1)):
        assert sum(a == b for a, b in zip(said(1), other, strict=True)) < 8
    rows = NET.sessions(3, "uniform", BUDGET)
    for session in rows:
        session.ingest(history(80))
    first, second, third = NET.generate(rows, 15, Sampling(temperature=1.0))
    assert len({tuple(first), tuple(second), tuple(third)}) == 3


def test_several_calls_draw_what_one_call_draws() -> None:
    whole, parts = (ingested(NET, history(30), "recency", 200) for _ in range(2))
    ids = whole.generate(12, temperature=2.0)
    assert [parts.generate(1, temperature=2.0)[0] for _ in range(12)] == ids
    assert len(set(ids)) > 4
    whole.truncate(30)
    assert whole.generate(12, temperature=2.0) == ids


def test_a_model_whose_logits_are_not_finite_says_nothing() -> None:
    net = inference_model()
    net.model.backbone.norm.weight.data[3] = float("nan")
    session = ingested(net, history(60))
    for temperature in (0.0, 1.0):
        with pytest.raises(ConfigError, match=r"logits after 60 tokens are not finite.*float32"):
            session.generate(3, temperature=temperature)
    assert len(session) == 60


def test_one_stop_string_may_be_given_as_it_is() -> None:
    net = inference_model()
    net.tokenizer = tiny_tokenizer()
    session = ingested(net, history(60))
    pieces = list(session.stream(30))
    word = pieces[9].text.split()[0]
    assert len(word) > 1
    for stop in (word, [word]):
        session.truncate(60)
        said = "".join(piece.text for piece in session.stream(30, stop=stop))
        whole = "".join(piece.text for piece in pieces)
        assert said == whole[: whole.index(word)]


def test_a_cut_history_is_as_if_nothing_had_followed() -> None:
    session = ingested(NET, history(600), search=True)
    session.generate(3)
    session.ingest(history(70, seed=3))
    session.nll([1])
    session.truncate(590)
    session.ingest(history(25, seed=4))
    fresh = ingested(NET, history(590) + history(25, seed=4), search=True)
    torch.testing.assert_close(
        session.losses([3, 4]).nll, fresh.losses([3, 4]).nll, atol=1e-5, rtol=1e-5
    )
    np.testing.assert_array_equal(session.working_context()[1], fresh.working_context()[1])
    with pytest.raises(ConfigError, match="cannot be cut"):
        session.truncate(616)


def test_a_session_goes_on_with_a_tree_on_disk(tmp_path: Path) -> None:
    with ingested(NET, history(333), tree=tmp_path / "tree") as session:
        said = session.nll([1, 2, 3])
    with NET.session("lens", BUDGET, tree=str(tmp_path / "tree")) as session:
        assert len(session) == 333
        assert session.nll([1, 2, 3]) == pytest.approx(said, abs=1e-5)


def test_what_was_ingested_outlives_a_session_that_nobody_closed(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), ingested(NET, history(333), tree=tmp_path / "tree").tree:
        raise KeyboardInterrupt  # what leaves a tree this way commits nothing
    with NET.session("lens", BUDGET, tree=tmp_path / "tree") as session:
        assert session.tree.tokens(0, len(session)).tolist() == history(333)


def test_an_ingest_that_fails_halfway_leaves_no_old_context(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = ingested(NET, history(200))
    session.nll([1])

    def full() -> None:
        raise OSError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(session.tree, "_after_batch", full)
        with pytest.raises(OSError, match="no room"):
            session.ingest(history(40, seed=3))
    assert len(session) == 240
    assert session.nll([1, 2]) == pytest.approx(
        ingested(NET, history(200) + history(40, seed=3)).nll([1, 2]), abs=1e-5
    )


def test_lensnet_stays_in_evaluation_mode() -> None:
    ingested(NET, history(200)).refocus()
    assert NET.lensnet is not None
    assert not NET.lensnet.training


def test_a_plain_language_model_has_sessions_too() -> None:
    net = inference_model(num_random_variants=0, train_wc_length=96)
    plain = InferenceModel(net.model, None, net.config)
    assert plain.model.gistnet is None
    session = ingested(plain, history(150), "recency")
    tokens = [*history(150), *session.generate(9)]
    window = torch.tensor(tokens[-44:-1])[None]
    zeros = np.zeros(43, np.int64)
    with torch.no_grad():
        logits = whole_logits(longer(plain, 43), window[0].tolist(), zeros, np.arange(43))
    assert session.coverage < 0.4
    assert session.nll(tokens[:3]) > 0
    assert int(logits[-1].argmax()) != -1


@needs("bm25s")
def test_blocks_that_were_retrieved_are_all_that_is_read(tmp_path: Path) -> None:
    """Saved and taken up again too."""
    session = ingested(NET, history(300), "bm25", budget=50)
    lods, starts = session.working_context()
    assert session.coverage == len(starts) / 300
    assert not lods.any()
    assert starts[0] < 250
    session.save(tmp_path / "saved")
    with NET.load_session(tmp_path / "saved") as again:
        assert again.settings == session.settings
        np.testing.assert_array_equal(again.working_context(), (lods, starts))
    said = session.generate(9)
    with NET.load_session(tmp_path / "saved") as again:
        assert again.generate(9) == said


def test_a_budget_may_shrink_and_grow_back(tmp_path: Path) -> None:
    session = ingested(NET, history(300), budget=60)
    whole = session.nll([1, 2])
    session.budget = BUDGET
    assert len(session.working_context()[0]) <= BUDGET
    assert session.nll([1, 2]) == pytest.approx(ingested(NET, history(300)).nll([1, 2]), abs=1e-5)
    session.save(tmp_path / "saved")
    with NET.load_session(tmp_path / "saved") as again:
        assert again.nll([1, 2]) == pytest.approx(session.nll([1, 2]), abs=1e-5)
    session.budget = 60
    assert session.nll([1, 2]) == pytest.approx(whole, abs=1e-5)
    for budget, message in ((61, "at most 60"), (5, "at least")):
        with pytest.raises(ConfigError, match=message):
            session.budget = budget


@needs("bm25s")
def test_retrieval_settings_are_checked_and_used() -> None:
    settings = RetrievalConfig(query_tokens=2, share=1.0, shape="cover")
    session = ingested(NET, history(300), "bm25", retrieval=settings)
    assert session.coverage == 1.0
    plain = InferenceModel(NET.model, None, NET.config)
    plain.nets = TreeNets(NET.model.backbone.embedding, None, None, block_size=BLOCK)
    for policy in RETRIEVAL:
        assert ingested(plain, history(300), policy).nll(history(3)) > 0
    with pytest.raises(ConfigError, match="needs gists"):
        plain.session("bm25", retrieval=settings)
    with pytest.raises(ConfigError, match="retrieval = 3 is not a RetrievalConfig"):
        NET.session("bm25", retrieval=3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="budget = 13"):
        NET.session("bm25", 13)


def test_phases_account_for_the_time() -> None:
    session = ingested(NET, history(300), search=True)
    session.phases.reset()
    session.generate(20)
    seconds, calls = session.phases.seconds(), session.phases.calls
    # At the start a shortlist of four contexts in one call, and four rounds; one at each refocus.
    assert calls["lens"] == 1 + 4 + 19 // BLOCK
    assert calls["search"] == 1 + 19 // BLOCK
    # Entries for LensNet and for the cache; of the tokens, only those that complete a block.
    assert calls["tree"] == calls["lens"] + (1 + 19 // BLOCK) + 20 // BLOCK
    assert all(
        seconds[name] > 0 for name in ("tree", "search", "lens", "allocator", "recompute", "decode")
    )
    assert seconds["ingest"] == 0
    assert 0 < session.phases.focus_share() < 1


def test_inference_needs_neither_training_nor_deepspeed() -> None:
    code = (
        "import sys, mc_ds.inference; print([name for name in sys.modules if"
        " name.startswith(('deepspeed', 'mc_ds.training'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
