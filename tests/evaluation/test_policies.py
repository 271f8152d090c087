"""Policies: exact budgets, blind to the horizon, controls that control, and losses that are the
model's own.
"""

from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch

from mc_ds.config import FocusConfig, RetrievalConfig
from mc_ds.config.data import RECALL_TASKS, TaskName
from mc_ds.config.run import PolicyName
from mc_ds.evaluation.batches import Batches, BatchReading
from mc_ds.evaluation.measure import Evaluator, Samples, sequence_before
from mc_ds.evaluation.records import Record
from mc_ds.evaluation.report import (
    access_lines,
    best_queries,
    best_query_lines,
    lens_ratio_lines,
    table,
)
from mc_ds.focus import block_lods, even_blocks, uniform_blocks
from mc_ds.focus.controller import InvariantError, MCController
from mc_ds.focus.policies import POLICIES, Access, policy
from mc_ds.focus.view import Plan
from mc_ds.model.lensnet import LensNet
from mc_ds.model.megacontext import ModelOutput, NodeTable
from mc_ds.tasks import TASK_NAMES, TaskSample
from mc_ds.tasks.prompts import PROMPTS
from tests.support.factories import VOCAB, mc_config, model, run_config, tokens, wake
from tests.support.optional import needs, needs_of

MC = mc_config(lens_matches="words")
GEOMETRY = MC.geometry
LENGTH = MC.train_wc_length
CPU = torch.device("cpu")
RETRIEVAL = [name for name, spec in POLICIES.items() if spec.retrieval is not None]
"""Whose contexts are the subject of test_retrieval.py."""


class Setup:
    """An untrained model and LensNet with signal on every path."""

    def __init__(self) -> None:
        self.model = model(run_config(MC)).eval()
        torch.manual_seed(1)
        self.controller = MCController(wake(LensNet(MC, dim=32)).eval())
        self.tokens = tokens(MC, 4)
        self.other = self.tokens.clone()
        self.other[:, -12:-5] = (self.other[:, -12:-5] + 7) % VOCAB
        self.spans = [
            np.array([[5, 8]]),
            np.array([[30, 31], [60, 63]]),
            np.array([[0, 4]]),
            np.empty((0, 2), np.int64),
        ]

    def batches(self, batch_size: int = 4, seed: int = 3, threshold: float = 0.0) -> Batches:
        return Batches(
            forward=self.model,
            mc=MC,
            controller=self.controller,
            focus=FocusConfig(threshold=threshold),
            seed=seed,
            batch_size=batch_size,
            device=CPU,
        )

    def evaluator(self, batch_size: int) -> Evaluator:
        return Evaluator(self.batches(batch_size))

    def samples(self, **changes: Any) -> Samples:
        """Four histories, each with another question; `blind` reads the tail of the row before."""
        ids = dict(tokens=self.tokens, other=self.other, before=self.tokens.roll(1, 0)) | changes
        rows = {
            name: [sample_of(row, spans) for row, spans in zip(table, self.spans, strict=True)]
            for name, table in ids.items()
        }
        asked = [replace(a, other=b) for a, b in zip(rows["tokens"], rows["other"], strict=True)]
        return Samples([0, 1, 2, 3], asked, rows["before"])

    @torch.no_grad()
    def reading(self, samples: Samples, batches: Batches | None = None) -> BatchReading:
        return (batches or self.batches()).read(samples, list(POLICIES.values()))

    def plan(
        self,
        name: str,
        samples: Samples,
        length: int = LENGTH,
        batches: Batches | None = None,
    ) -> Plan:
        with self.controller.inference(), torch.no_grad():
            spec = policy(name)
            return self.reading(samples, batches).plan(
                spec, spec.fixed_length(MC) if spec.fixed_length else length
            )


def sample_of(ids: torch.Tensor, spans: Any) -> TaskSample:
    mask = np.ones(MC.horizon_tokens, np.float32)
    return TaskSample(ids.numpy(), mask, spans, np.empty((0, 2), np.int64), None)


@pytest.fixture(scope="module")
def setup() -> Setup:
    return Setup()


@pytest.mark.parametrize("name", [name for name in POLICIES if name not in RETRIEVAL])
def test_every_policy_has_exactly_the_budget_and_its_cover(setup: Setup, name: str) -> None:
    for length in (LENGTH, 66, GEOMETRY.coarsest_length + 3):
        lods, starts = setup.plan(name, setup.samples(), length)[:2]
        ends = starts + 4**lods
        expected = {"full": GEOMETRY.seq_len, "tail": GEOMETRY.recent_tokens}.get(name, length)
        assert lods.shape == starts.shape == (4, expected)
        assert (ends[:, :-1] == starts[:, 1:]).all()
        assert (ends[:, -1] == GEOMETRY.seq_len).all()
        assert (starts % 4**lods == 0).all()
        assert (
            starts[:, 0] == (GEOMETRY.seq_len - expected if name in ("recency", "tail") else 0)
        ).all()
        assert (lods[:, -MC.recent_tokens :] == 0).all()


@pytest.mark.parametrize(
    "name", ["lens", "blind", "other_question", "random", "uniform", *RETRIEVAL]
)
def test_no_choice_sees_the_horizon(setup: Setup, name: str) -> None:
    needs_of(name)
    changed, other, partner = setup.tokens.clone(), setup.other.clone(), setup.tokens.roll(1, 0)
    for ids in (changed, other, partner):
        ids[:, -1 - MC.horizon_tokens :] = (ids[:, -1 - MC.horizon_tokens :] + 11) % VOCAB
    before = setup.plan(name, setup.samples())
    after = setup.plan(name, setup.samples(tokens=changed, other=other, before=partner))
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])


def test_controls_read_another_tail_and_another_question(setup: Setup) -> None:
    samples = setup.samples()
    plan = setup.plan("random", samples)
    retold = setup.tokens.clone()  # the tail alone is another sequence's
    retold[:, MC.seq_len - MC.recent_tokens :] = retold.roll(1, 0)[
        :, MC.seq_len - MC.recent_tokens :
    ]
    with setup.controller.inference(), torch.no_grad():
        views = setup.reading(samples).views
        own, blind, other = (
            views[told].lens_scores(plan.lods, plan.starts)
            for told in (Access.VISIBLE, Access.UNRELATED_TAIL, Access.OTHER_QUESTION)
        )
        expected = setup.reading(setup.samples(tokens=retold)).views[Access.VISIBLE]
        torch.testing.assert_close(blind, expected.lens_scores(plan.lods, plan.starts))
    assert (own - blind).abs().max() > 1e-3
    assert (own - other).abs().max() > 1e-3
    whole = setup.model(setup.tokens)
    assert isinstance(whole, NodeTable)
    assert torch.equal(views[Access.VISIBLE].nodes.nodes, whole.nodes), "its own tails are kept"
    # Where the sequence before has the same visible tail, blindness changes nothing.
    twins = setup.samples(before=setup.tokens)
    lens = setup.plan("lens", samples).lods
    assert torch.equal(setup.plan("lens", twins).lods, setup.plan("blind", twins).lods)
    assert not torch.equal(lens, setup.plan("blind", samples).lods)
    assert not torch.equal(lens, setup.plan("other_question", samples).lods)
    swapped = setup.samples(tokens=setup.other, other=setup.tokens)
    assert torch.equal(setup.plan("lens", swapped).lods, setup.plan("other_question", samples).lods)
    assert torch.equal(lens, setup.plan("other_question", swapped).lods)


def test_oracle_opens_what_matters_and_uniform_what_is_recent(setup: Setup) -> None:
    samples = setup.samples()
    for length in (LENGTH, 45):
        plan = setup.plan("oracle", samples, length)
        blocks = block_lods(plan.lods, plan.starts, GEOMETRY)
        for row, spans in enumerate(setup.spans):
            for first, last in spans:
                assert (blocks[row, first // 4 : (last - 1) // 4 + 1] == 0).all()
    plan = setup.plan("uniform", samples)
    uniform = block_lods(plan.lods, plan.starts, GEOMETRY)[0]
    first_open = int((uniform == 0).nonzero()[0])
    assert (uniform[first_open:] == 0).all()
    assert (uniform[:-1] >= uniform[1:]).all()


def test_focus_is_a_function_of_the_history_alone(setup: Setup) -> None:
    """Neither the seed nor a sample's number moves it: it starts from the even cover, not from a
    random one.
    """
    first = setup.plan("lens", setup.samples())
    renumbered = replace(setup.samples(), ids=[7, 8, 9, 10])
    other = setup.plan("lens", renumbered, batches=setup.batches(seed=99))
    assert torch.equal(first.lods, other.lods)
    assert not torch.equal(first.lods, setup.plan("uniform", setup.samples()).lods)
    start = setup.plan("lens", setup.samples(), batches=setup.batches(threshold=9.0))
    blocks = block_lods(start.lods, start.starts, GEOMETRY)
    assert torch.equal(blocks, even_blocks(4, GEOMETRY, LENGTH, CPU))
    assert not torch.equal(blocks, uniform_blocks(4, GEOMETRY, LENGTH, CPU))


def test_policies_need_the_inference_phase_and_a_known_name(setup: Setup) -> None:
    reading = setup.reading(setup.samples())
    for name in ("lens", "oracle"):
        with pytest.raises(InvariantError):
            reading.plan(policy(name), LENGTH)
    with pytest.raises(ValueError, match="recency, random"):
        setup.evaluator(2).run(Planted(), ["newest"], [0.5], range(2))


class Planted:
    """Random tokens with one span that matters per sequence, and half of the horizon masked."""

    name = "planted"

    def sample(self, index: int, stage: int = 0) -> TaskSample:
        rng = np.random.default_rng(index)
        mask = np.array([0, 1, 1, 0, 1], np.float32)
        span = 4 * rng.integers(0, 20)
        return TaskSample(
            rng.integers(0, VOCAB, MC.seq_len + 1),
            mask,
            np.array([[span, span + 3]]),
            np.array([[0, 2]]),
            None,
        )


def test_records_are_what_the_model_says(setup: Setup) -> None:
    evaluator = setup.evaluator(2)
    with setup.controller.inference():
        records = evaluator.run(
            Planted(), ["recency", "oracle", "other_question", "full"], [0.5, 0.8], range(5)
        )
    assert [(r.policy, r.budget, r.wc_length) for r in records] == [
        ("recency", 0.5, 48),
        ("recency", 0.8, 75),
        ("oracle", 0.5, 48),
        ("oracle", 0.8, 75),
        ("full", 1.0, 96),
    ]
    recency = records[0]
    losses, right = [], []
    for index in range(5):
        sample = Planted().sample(index)
        ids = torch.from_numpy(sample.tokens)[None]
        starts = torch.arange(48, 96)[None]
        with torch.no_grad():
            output = setup.model(
                ids, torch.zeros_like(starts), starts, torch.from_numpy(sample.horizon_mask)[None]
            )
        assert isinstance(output, ModelOutput)
        losses.append(float(output.entry_nll[0, [-4, -3, -1]].mean()))
        right += (output.horizon_likeliest == ids[:, -5:])[0, [1, 2, 4]].tolist()
    np.testing.assert_allclose(recency.losses, losses, rtol=1e-5)
    assert recency.horizon_loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert recency.stderr == pytest.approx(np.std(losses, ddof=1) / 5**0.5, rel=1e-4)
    assert recency.accuracy == pytest.approx(np.mean(right))
    assert recency.hit_rate == pytest.approx(
        np.mean([Planted().sample(i).spans[0, 0] >= 48 for i in range(5)])
    )
    assert recency.distractor_rate == 0.0
    assert [r.hit_rate for r in records[2:]] == [1.0, 1.0, 1.0]


def test_the_sequence_before_is_a_matter_of_the_samples_alone() -> None:
    assert [sequence_before(index) for index in range(4)] == [1, 0, 1, 2]


@pytest.mark.parametrize("count", [1, 5])
def test_blind_reads_the_same_tails_whatever_the_batch_size(setup: Setup, count: int) -> None:
    """A last batch of one row included, and drawings too."""
    ids, losses, contexts = range(count), [], []
    for batch_size in (1, 2, 4, 5):
        evaluator = setup.evaluator(batch_size)
        with setup.controller.inference():
            losses.append(evaluator.run(Planted(), ["blind"], [0.5], ids)[0].losses)
            contexts.append(
                [
                    evaluator.contexts(Planted(), ["lens", "blind"], 0.5, index).contexts
                    for index in ids
                ]
            )
    for others in losses[1:]:
        np.testing.assert_allclose(others, losses[0], rtol=1e-5)
    for index in ids:
        samples = Samples.of(Planted(), [policy("blind")], [index])
        with setup.controller.inference(), torch.no_grad():
            plan = setup.batches().read(samples, [policy("blind")]).plan(policy("blind"), LENGTH)
        for drawn in contexts:
            np.testing.assert_array_equal(drawn[index]["blind"][0], plan.lods[0].numpy())


def test_nodes_of_other_sequences_are_made_for_the_controls_alone(setup: Setup) -> None:
    calls: list[tuple[int, ...]] = []

    def forward(*args: torch.Tensor) -> Any:
        calls.append(tuple(args[0].shape))
        return setup.model(*args)

    evaluator = Evaluator(replace(setup.batches(2), forward=forward))
    made = []
    for names in (["lens"], ["lens", "blind"], ["lens", "other_question"]):
        calls.clear()
        with setup.controller.inference():
            evaluator.run(Questioned(), names, [0.5], range(4))
        made.append(len(calls))
    assert made == [4, 8, 8], "two batches: nodes, a forward per policy, and nodes for the control"


def test_samples_without_another_question_cost_as_many_calls(setup: Setup) -> None:
    """Ranks that share a model must make the same calls, whichever samples they have."""
    calls: list[int] = []

    def forward(*args: torch.Tensor) -> Any:
        calls[-1] += 1
        return setup.model(*args)

    evaluator = Evaluator(replace(setup.batches(2), forward=forward))
    for task in (Questioned(), Planted()):
        calls.append(0)
        with setup.controller.inference():
            records = evaluator.run(task, ["lens", "other_question", "blind"], [0.5], range(4))
    assert calls[0] == calls[1] == 2 * 6
    assert [record.policy for record in records] == ["lens", "blind"]


class Questioned(Planted):
    """Every third sample has no other question."""

    def sample(self, index: int, stage: int = 0) -> TaskSample:
        sample, other = super().sample(index), super().sample(index + 100)
        return sample if index % 3 == 2 else replace(sample, other=other)


def test_samples_without_another_question_do_not_take_others_with_them(setup: Setup) -> None:
    """A record of `other_question` is that of all samples that have one, whatever their batches."""
    records = []
    for batch_size in (1, 2, 7):
        evaluator = setup.evaluator(batch_size)
        with setup.controller.inference():
            records += evaluator.run(Questioned(), ["other_question"], [0.5], range(7))
    for record in records:
        assert record.n == 5
        assert record.ids == [0, 1, 3, 4, 6]
        np.testing.assert_allclose(record.losses, records[0].losses, rtol=1e-5)
        assert (record.accuracy, record.hit_rate) == (records[0].accuracy, records[0].hit_rate)


class Chained(Planted):
    """Two answers of two hops: the facts asked for stand at the beginning, one of those that they
    name stands where recency reads it.
    """

    def sample(self, index: int, stage: int = 0) -> TaskSample:
        spans = np.array([[0, 3], [60, 63], [8, 11], [40, 43]])
        return replace(super().sample(index), spans=spans, hops=2)


def test_hit_rates_tell_the_hops_apart(setup: Setup) -> None:
    evaluator = setup.evaluator(2)
    with setup.controller.inference():
        chained = evaluator.run(Chained(), ["recency", "full"], [0.5], range(3))
        planted = evaluator.run(Planted(), ["full"], [0.5], range(3))
    assert [(r.hit_rate, r.hit_rates_by_hop) for r in chained] == [
        (0.25, [0.0, 0.5]),
        (1.0, [1.0, 1.0]),
    ]
    assert planted[0].hit_rates_by_hop is None
    assert "0.000 0.500" in table(chained)
    assert "by_hop" not in table(planted)


@needs("bm25s")
def test_each_query_of_a_retrieval_policy_is_measured_and_the_best_is_named(setup: Setup) -> None:
    queries = [RetrievalConfig(query_tokens=query, neighbours=0.25) for query in (2, 8)]
    names = ["recency", "bm25", "attention"]
    with setup.controller.inference():
        both = Evaluator(setup.batches(2), queries).run(Planted(), names, [0.5, 0.8], range(5))
        alone = [
            Evaluator(setup.batches(2), [query]).run(Planted(), names, [0.5, 0.8], range(5))
            for query in queries
        ]
    assert [(r.policy, r.query_tokens, r.budget) for r in both] == [
        ("recency", None, 0.5),
        ("recency", None, 0.8),
        *((name, n, share) for name in names[1:] for n in (2, 8) for share in (0.5, 0.8)),
    ]
    for record in both:
        assert record.settings == ({"neighbours": 0.25} if record.query_tokens else {})
    assert [r for r in both if r.query_tokens != 8] == alone[0]
    assert [r for r in both if r.query_tokens != 2] == alone[1]
    half = [record for record in both if record.budget == 0.5]
    _, small, large, *_ = half
    best = min(small, large, key=lambda record: record.horizon_loss)
    assert access_lines(record.policy for record in half) == [
        "policies that read only the history's length: recency",
        "policies that read all tokens before the horizon: bm25",
        "policies that read all tokens before the horizon, and the backbone's attention on them: "
        "attention",
    ]
    assert best_query_lines(half)[0] == (
        f"planted, 48 entries for 96 tokens: the best query of bm25 is the last "
        f"{best.query_tokens} tokens (of 2, 8)"
    )
    assert [r for r in best_queries(half) if r.policy == "bm25"] == [best]
    assert "query_tokens" in table(half)
    assert "query_tokens" not in table(half[:1])


def test_what_lensnet_is_worth_is_said_per_length() -> None:
    def record(policy: str, wc_length: int, loss: float) -> Record:
        figures = dict(
            stderr=0.0,
            accuracy=0.0,
            hit_rate=None,
            hit_rates_by_hop=None,
            distractor_rate=None,
            n=1,
            losses=[loss],
            ids=[0],
        )
        return Record(
            task="recall",
            policy=policy,
            budget=wc_length / 96,
            wc_length=wc_length,
            seq_len=96,
            horizon_loss=loss,
            **figures,
        )  # type: ignore[arg-type]

    half = [
        record("recency", 48, 2.0),
        record("lens", 48, 0.02),
        record("blind", 48, 0.0),
        record("random", 48, 1.6),
    ]
    assert lens_ratio_lines(
        [*half, record("full", 96, 1.0), record("lens", 75, 0.5), record("recency", 75, 0.4)]
    ) == [
        "recall, 48 entries for 96 tokens: the loss under lens is 0.01x recency, 0.0125x random",
        "recall, 75 entries for 96 tokens: the loss under lens is 1.25x recency",
    ]
    assert lens_ratio_lines([half[0], half[2]]) == lens_ratio_lines([half[1]]) == []


def test_names_in_the_configuration_are_those_of_the_rooms() -> None:
    assert get_args(TaskName) == (*TASK_NAMES, *PROMPTS)
    assert get_args(PolicyName) == tuple(POLICIES)
    by_meaning = {"synonym", "gloss"}
    of_facts = {name for name in TASK_NAMES if name.startswith("recall")}
    assert set(RECALL_TASKS) == of_facts | by_meaning
