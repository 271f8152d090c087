"""Validation during training against direct forwards of the same sequences: which, in which
contexts, and how many of them count.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mc_ds.config import RetrievalConfig, RunConfig, ValidationConfig
from mc_ds.evaluation.batches import Batches
from mc_ds.evaluation.measure import Evaluator
from mc_ds.focus.controller import MCController
from mc_ds.model.lensnet import LensNet
from mc_ds.tasks import FINAL_STAGE, TaskSample, TaskSource
from mc_ds.tasks.base import no_spans
from mc_ds.training.telemetry.continuations import Continuation
from mc_ds.training.validation import HeldOut, Validator
from tests.support.factories import VOCAB, mc_config, model, run_config, wake
from tests.support.optional import needs

MC = mc_config()
POLICIES = ["recency", "random", "lens", "blind", "full"]


class StagedTask:
    """Noise, another one at each of three stages; in every second sequence half of the horizon
    counts.
    """

    name = "staged"

    def sample(self, index: int, stage: int = FINAL_STAGE) -> TaskSample:
        rng = np.random.default_rng([index, min(stage, 2)])
        mask = np.ones(MC.horizon_tokens, dtype=np.float32)
        mask[: index % 2 * 2] = 0
        spans = np.array([[4 * index, 4 * index + 2]])
        return TaskSample(
            rng.integers(VOCAB, size=MC.seq_len + 1),
            mask,
            spans=spans,
            distractors=no_spans(),
            other=None,
        )


TASK = StagedTask()


class Elsewhere(StagedTask):
    """Other noise."""

    def sample(self, index: int, stage: int = FINAL_STAGE) -> TaskSample:
        return super().sample(index + 1000, stage)


OTHER = Elsewhere()


class Questioned(StagedTask):
    """Asks something else of all samples but the second."""

    def sample(self, index: int, stage: int = FINAL_STAGE) -> TaskSample:
        sample, other = super().sample(index, stage), super().sample(index + 50, stage)
        return sample if index == 1 else replace(sample, other=other)


def decode(ids: Sequence[int]) -> str:
    """A character for each token."""
    return "".join(chr(ord("!") + token) for token in ids)


class Setup:
    """A validator of three sequences, which two micro-batches of two pad to four, and its
    untrained model.
    """

    def __init__(self, device: torch.device) -> None:
        config = run_config(MC, micro_batch_size=2, global_batch_size=4)
        self.config: RunConfig = config.model_copy(
            update={"validation": ValidationConfig(eval_sequences=3)}
        )
        self.model = model(config)
        torch.manual_seed(1)
        lensnet: LensNet = wake(LensNet(MC, dim=32))
        self.forwards: list[int] = []
        lensnet.register_forward_hook(
            lambda _, inputs, scores: self.forwards.append(scores.size(0))
        )
        self.controller = MCController(lensnet)
        self.validator = Validator(
            self.config,
            HeldOut(
                TaskSource(TASK),
                TASK,
                {"same": TaskSource(TASK), "other": TaskSource(OTHER)},
                decode,
            ),
            self.model,
            self.controller,
            device,
        )

    def evaluator(self) -> Evaluator:
        """Of the same model, without padding."""
        return Evaluator(
            Batches(
                forward=self.model.eval(),
                mc=MC,
                controller=self.controller,
                focus=self.config.focus,
                seed=self.config.seed,
                batch_size=2,
                device=torch.device("cpu"),
            )
        )

    def focus(self, index: int) -> tuple[Tensor, Tensor]:
        """`lods` and `starts` [1, W] that LensNet chooses for a sequence."""
        evaluator = self.evaluator()
        with self.controller.inference():
            share = MC.train_wc_length / MC.seq_len
            lods, starts = evaluator.contexts(TASK, ["lens"], share, index).contexts["lens"]
        return torch.from_numpy(lods)[None], torch.from_numpy(starts)[None]

    def direct(self, ids: range, lods: Tensor, starts: Tensor) -> Tensor:
        """Loss of the horizon [B] of sequences in one context [W] each."""
        samples = [TASK.sample(index) for index in ids]
        tokens = torch.from_numpy(np.stack([sample.tokens for sample in samples]))
        mask = torch.from_numpy(np.stack([sample.horizon_mask for sample in samples]))
        self.model.eval()
        with torch.no_grad():
            scores: Tensor = self.model(
                tokens, lods.expand(len(ids), -1), starts.expand(len(ids), -1), mask
            ).row_scores
        self.model.train()
        return scores


@pytest.fixture
def setup(single_process: torch.device) -> Setup:
    return Setup(single_process)


def test_every_policy_is_measured_and_lensnets_calls_are_counted(setup: Setup) -> None:
    assert setup.config.validation.policies == POLICIES
    record = setup.validator.run()
    assert {key for key in record if key.startswith("val/horizon_loss/")} == {
        f"val/horizon_loss/{name}" for name in POLICIES
    }
    assert record["val/lensnet_calls"] == len(setup.forwards) > 0
    once = len(setup.forwards)
    again = setup.validator.run()
    assert again == {**record, "val/lensnet_calls": 2 * once}, (
        "the same sequences and contexts each time"
    )
    assert setup.controller.training_calls == 0
    assert setup.model.training


def test_each_domain_has_a_loss_of_its_own(setup: Setup) -> None:
    """One domain reads what the mixture reads; padding counts in neither."""
    record = setup.validator.run()
    assert record["val/loss/same"] == record["val/loss"]
    assert abs(record["val/loss/other"] - record["val/loss"]) > 1e-4
    alone = Validator(
        setup.config,
        HeldOut(TaskSource(OTHER), OTHER, {}, decode),
        setup.model,
        setup.controller,
        setup.validator.device,
    ).run()
    assert alone["val/loss"] == record["val/loss/other"]
    assert "val/loss/other" not in alone


@needs("bm25s")
def test_retrieval_is_measured_with_the_settings_of_the_run(setup: Setup) -> None:
    names = ["bm25", "attention"]
    settings = RetrievalConfig(query_tokens=3, share=1.0, shape="cover")
    config = setup.config.model_copy(
        update={
            "validation": ValidationConfig(eval_sequences=4, policies=names),
            "retrieval": settings,
        }
    )
    held_out = HeldOut(TaskSource(TASK), TASK, {}, decode)
    validator = Validator(config, held_out, setup.model, setup.controller, torch.device("cpu"))
    record, reader = validator.run(), setup.evaluator().reader
    share = MC.train_wc_length / MC.seq_len
    with setup.controller.inference():
        expected = Evaluator(reader, [settings]).run(TASK, names, [share], range(4))
        default = Evaluator(reader).run(TASK, names, [share], range(4))
    for one, other in zip(expected, default, strict=True):
        assert record[f"val/horizon_loss/{one.policy}"] == pytest.approx(one.horizon_loss)
        assert one.losses != other.losses


def test_every_call_of_the_model_is_a_sign_of_life(setup: Setup) -> None:
    events: list[str] = []
    setup.model.register_forward_pre_hook(lambda *_: events.append("call"))
    setup.validator.mark = events.append
    setup.validator.run()
    assert len(events) > 2 * len(POLICIES)
    assert events[::2] == ["validation"] * (len(events) // 2)
    assert events[1::2] == ["call"] * (len(events) // 2)


def test_recency_and_full_sight_are_the_models_own_losses(setup: Setup) -> None:
    record = setup.validator.run()
    for name, length in (("recency", MC.train_wc_length), ("full", MC.seq_len)):
        starts = torch.arange(MC.seq_len - length, MC.seq_len)
        losses = setup.direct(range(4), torch.zeros_like(starts), starts)
        assert record[f"val/horizon_loss/{name}"] == pytest.approx(
            float(losses[:3].mean()), rel=1e-6
        )
        assert abs(float(losses.mean() - losses[:3].mean())) > 1e-4, "or padding would not show"


def test_padding_counts_in_no_policys_loss(setup: Setup) -> None:
    record = setup.validator.run()
    evaluator = setup.evaluator()
    with setup.controller.inference():
        measured = evaluator.run(TASK, POLICIES, [MC.train_wc_length / MC.seq_len], range(4))
    for one in measured:
        assert record[f"val/horizon_loss/{one.policy}"] == pytest.approx(
            np.mean(one.losses[:3]), rel=1e-6
        ), one.policy
        assert record[f"val/hit_rate/{one.policy}"] == pytest.approx(one.hit_rate)


def test_a_sequence_without_another_question_makes_no_room_for_padding(setup: Setup) -> None:
    """Of sequences 0 to 2 and the fourth, which is padding, the second has none."""
    setup.validator.task = Questioned()
    wanted = setup.config.validation.model_copy(update={"policies": ["other_question"]})
    setup.validator.config = setup.config.model_copy(update={"validation": wanted})
    found = setup.validator.run()["val/horizon_loss/other_question"]
    evaluator = setup.evaluator()
    with setup.controller.inference():
        (measured,) = evaluator.run(
            Questioned(), ["other_question"], [MC.train_wc_length / MC.seq_len], range(4)
        )
    assert measured.ids == [0, 2, 3]
    assert found == pytest.approx(np.mean(measured.losses[:2]), rel=1e-6)
    assert found != pytest.approx(np.mean(measured.losses), rel=1e-4)


def test_padding_counts_in_no_loss_of_variants_and_baseline(setup: Setup) -> None:
    record = setup.validator.run()
    losses: dict[int, Any] = {}
    setup.model.eval()
    for batch in setup.validator.batches:
        with torch.no_grad():
            output = setup.model(batch.tokens, batch.lods, batch.starts, batch.horizon_mask)
        rows = output.entry_nll.mean(1).unflatten(0, (-1, MC.rows_per_sequence))
        losses |= dict(zip(batch.sample_ids.tolist(), rows, strict=True))
    assert sorted(losses) == [0, 1, 2, 3]
    counted = torch.stack([losses[index] for index in range(3)])
    assert record["val/loss"] == pytest.approx(float(counted[:, 1:].mean()), rel=1e-6)
    assert record["val/loss_baseline"] == pytest.approx(float(counted[:, 0].mean()), rel=1e-6)


def test_all_sequences_are_of_the_last_stage(setup: Setup) -> None:
    for batch in setup.validator.batches:
        for tokens, index in zip(batch.tokens, batch.sample_ids.tolist(), strict=True):
            assert np.array_equal(tokens, TASK.sample(index, stage=2).tokens)
            assert not np.array_equal(tokens, TASK.sample(index, stage=0).tokens)


def test_continuations_are_what_the_model_finds_likeliest_in_lensnets_context(
    setup: Setup,
) -> None:
    """Against a forward per token over the whole sequence so far; sequence 2 is in a micro-batch
    with padding. The blocks weigh so much that the context decides, not the last token.
    """
    with torch.no_grad():
        for weight in setup.model.backbone.blocks.parameters():
            weight.mul_(20.0 if weight.dim() > 1 else 1.0)
    wanted = setup.config.validation.model_copy(update={"continuations": 3})
    setup.validator.config = setup.config.model_copy(update={"validation": wanted})
    found = setup.validator.continuations()
    assert [one.index for one in found] == [0, 1, 2]
    assert found == setup.validator.continuations()
    assert setup.model.training
    known = MC.seq_len + 1 - MC.horizon_tokens
    window = torch.arange(MC.seq_len - MC.train_wc_length, MC.seq_len)[None]
    for one in found:
        tokens = TASK.sample(one.index).tokens
        focus = setup.focus(one.index)
        ids = torch.tensor(tokens)[None]
        elsewhere: list[int] = []  # in the recency window
        for place in range(known, MC.seq_len + 1):
            ids[0, place:] = 7  # what is not written yet cannot matter
            with torch.no_grad():
                output = setup.model.eval()(ids, *focus)
                recent = setup.model(ids, torch.zeros_like(focus[0]), window)
            elsewhere.append(int(recent.horizon_likeliest[0, place - known]))
            ids[0, place] = output.horizon_likeliest[0, place - known]
        assert one.model == decode(ids[0, known:].tolist())
        assert one.text == decode(tokens[known:].tolist()) != one.model
        assert one.prompt == decode(tokens[known - 32 : known].tolist())
        assert len(set(one.model)) > 2, "or a repeated token would do"
        assert one.model != decode(elsewhere), "or any context would do"


def test_without_continuations_the_model_is_not_called_for_them(setup: Setup) -> None:
    calls: list[str] = []
    setup.validator.mark = calls.append
    none = setup.config.validation.model_copy(update={"continuations": 0})
    setup.validator.config = setup.config.model_copy(update={"validation": none})
    assert setup.validator.continuations() == []
    assert calls == []
    setup.validator.config = setup.config
    assert len(setup.validator.continuations()) == 1
    assert len(calls) == 1 + MC.horizon_tokens, "the tree, and a forward per token"


def test_a_continuation_is_whole_lines_whatever_it_holds() -> None:
    tokens = [ord(character) for character in "before\r\n\u2028\x85\x1b[2Jafter"]
    written = [ord(character) for character in "\n\x0c\r--"]
    one = Continuation.of("recall", 4, tokens, written, lambda ids: "".join(map(chr, ids)))
    assert (one.prompt, one.model, one.text) == (
        "before\r\n\u2028\x85\x1b[2J",
        "\n\x0c\r--",
        "after",
    )
    lines = one.lines()
    assert len(lines) == 3
    assert all(line.isprintable() for line in lines)
    assert list(one.fields()) == [
        f"val/continuation/4/{part}" for part in ("prompt", "model", "text")
    ]
