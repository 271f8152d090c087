"""Prompts as training data: the prompt is the one that is asked in evaluation, its answers begin
the horizon, and nothing else there counts.
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mc_ds.config import ConfigError, RunConfig
from mc_ds.data import RunData, StdlibCorpus, open_data
from mc_ds.tasks import TaskSample
from mc_ds.tasks.mixture import evaluated_task, make_source, run_task
from mc_ds.tasks.prompts import PROMPTS, AnsweredPrompts, PromptTask, TextSource, score
from tests.support.factories import mc_config

T, H = 4096, 64


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> RunData:
    folder = tmp_path_factory.mktemp("text")
    for number, text in enumerate(StdlibCorpus(val_fraction=0.05).documents("val")):
        (folder / f"{number}.txt").write_text(text)
    return open_data(config(folder).data)


def config(folder: Path, **data: Any) -> RunConfig:
    mc = mc_config(
        seq_len=T,
        block_size=32,
        max_lod=1,
        train_wc_length=T - 31 * 32,
        recent_tokens=256,
        horizon_tokens=H,
    )
    where = dict(source="files", root=str(folder), cache_dir=str(folder / "cache"))
    given = where | dict(vocab_size=1200, val_fraction=0.3, num_workers=0) | data
    return RunConfig.model_validate(dict(mc=mc.model_dump(), data=given))


def source_of(data: RunData) -> TextSource:
    return TextSource(data.tokenizer, data.train)


def made(name: str, data: RunData, **mc: Any) -> AnsweredPrompts:
    prompts = PromptTask(name, PROMPTS[name], source_of(data), seed=3)
    lengths = dict(seq_len=T, block_size=32, max_lod=1, recent_tokens=256, horizon_tokens=H)
    lengths |= dict(train_wc_length=T - 31 * 32) | mc
    return AnsweredPrompts(prompts, mc_config(**lengths))


def parts(sample: TaskSample) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What is read, what counts, and what follows it."""
    horizon = sample.tokens[T - H + 1 :]
    counted = int(sample.horizon_mask.sum())
    assert sample.horizon_mask.tolist() == [1.0] * counted + [0.0] * (H - counted)
    return sample.tokens[: T - H + 1], horizon[:counted], horizon[counted:]


@pytest.mark.parametrize("name", PROMPTS)
def test_a_sequence_is_a_prompt_and_then_the_answers_that_score_full_marks(
    name: str, data: RunData
) -> None:
    task = made(name, data)
    for index in range(3):
        sample = task.sample(index)
        prompt = PromptTask(name, PROMPTS[name], source_of(data), seed=3).prompt(index, T - H + 1)
        assert len(sample.tokens) == T + 1
        read, answer, after = parts(sample)
        assert np.array_equal(read, prompt.tokens)
        assert len(after) == H - len(answer)
        text = data.tokenizer.decode(answer)
        assert text.lstrip(" ") == ", ".join(prompt.answers) + ".\n"
        assert score(prompt, text) == 1.0
        assert np.array_equal(sample.spans, prompt.spans)
        assert np.array_equal(sample.distractors, prompt.distractors)


def test_a_needle_is_read_before_the_horizon(data: RunData) -> None:
    sample = made("ruler_single_2", data).sample(0)
    (span,) = sample.spans
    needle = data.tokenizer.decode(sample.tokens[slice(*span)])
    secret = data.tokenizer.decode(parts(sample)[1]).strip(" .\n")
    assert len(secret) == 7
    assert f"is {secret}." in needle


def test_samples_are_pure_functions_of_seed_and_index(data: RunData) -> None:
    task = made("ruler_multikey_1", data)
    samples = [task.sample(index).tokens for index in range(5)]
    copy = pickle.loads(pickle.dumps(task))
    again = [copy.sample(index, stage=7).tokens for index in reversed(range(5))][::-1]
    for one, other in zip(samples, again, strict=True):
        assert np.array_equal(one, other)
    assert len({tokens[T - H + 1 :].tobytes() for tokens in samples}) == 5


def test_what_does_not_fit_is_refused_in_one_line(data: RunData) -> None:
    for mc, message in (
        (dict(horizon_tokens=8), r"answers take \d+ tokens, more than mc.horizon_tokens = 8: use"),
        (dict(seq_len=128, train_wc_length=128 - 31, recent_tokens=80), "tokens are too few"),
    ):
        with pytest.raises(ConfigError, match=rf"^task ruler_single_3: .*{message}") as error:
            made("ruler_single_3", data, **mc)
        assert "\n" not in str(error.value)


def test_a_mixture_trains_on_prompts_of_the_training_text_and_validates_on_others(
    data: RunData, tmp_path: Path
) -> None:
    tasks = {"corpus": 0.25, "ruler_single_2": 0.75}
    run = config(tmp_path, tasks=tasks)
    source = make_source(run, data, data.train)
    samples = [source.sample(index, 0) for index in range(256)]
    asked = [sample for sample in samples if sample.horizon_mask.sum() < H]
    assert len(asked) == 192
    assert source.epochs(256).keys() == {"corpus", "ruler_single_2"}
    trained = {sample.tokens.tobytes() for sample in asked}
    held_out = run_task("ruler_single_2", run, data, data.val, seed=run.seed)
    later = evaluated_task(
        "ruler_single_2", run, data, data.val, seed=1, wc_length=T, as_trained=True
    )
    for task in (held_out, later):
        assert task.sample(0).tokens.tobytes() not in trained
        assert len(task.sample(0).spans) == 1


def test_at_most_so_many_passes_over_the_text_are_told(data: RunData) -> None:
    task, length = made("ruler_single_2", data), T - H + 1
    (tokens,) = [len(domain.shards) for domain in data.train]
    assert task.epochs(10) == {"ruler_single_2": pytest.approx(10 * length / tokens)}
