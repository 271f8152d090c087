"""Prompts as training data: the prompt is the one that is asked in evaluation, its answers begin
the horizon, and nothing else there counts.
"""

import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader, Dataset

from mc_ds.config import ConfigError, MCConfig, RunConfig
from mc_ds.data import Domain, RunData, StdlibCorpus, TrainingSource, open_data
from mc_ds.tasks import TaskSample
from mc_ds.tasks.mixture import make_source, run_task
from mc_ds.tasks.prompts import PROMPTS, AnsweredPrompts, Prompt, PromptTask, TextSource, score
from tests.support.factories import mc_config

T, H = 4096, 64


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> RunData:
    folder = tmp_path_factory.mktemp("text")
    for number, text in enumerate(StdlibCorpus(val_fraction=0.05).documents("val")):
        (folder / f"{number}.txt").write_text(text)
    return open_data(config(folder).data)


def config(folder: Path, **data: Any) -> RunConfig:
    where = dict(source="files", root=str(folder), cache_dir=str(folder / "cache"))
    given = where | dict(vocab_size=1200, val_fraction=0.3, num_workers=0) | data
    return RunConfig.model_validate(dict(mc=lengths().model_dump(), data=given))


def source_of(data: RunData) -> TextSource:
    return TextSource(data.tokenizer, data.train)


def made(name: str, data: RunData, **mc: Any) -> AnsweredPrompts:
    prompts = PromptTask(name, PROMPTS[name], source_of(data), seed=3)
    return AnsweredPrompts(prompts, lengths(**mc))


def lengths(**changes: int) -> MCConfig:
    mc = dict(seq_len=T, block_size=32, max_lod=1, recent_tokens=256, horizon_tokens=H)
    return mc_config(**(mc | dict(train_wc_length=T - 31 * 32) | changes))


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


@pytest.mark.parametrize(
    ("name", "mc", "message"),
    [
        (
            "ruler_single_3",
            dict(horizon_tokens=8),
            r"answers do not fit mc.horizon_tokens = 8: use at least \d+",
        ),
        (
            "ruler_multiquery",
            dict(recent_tokens=H + 9),
            (
                rf"the question and mc.horizon_tokens = {H} take (\d+) tokens, more than"
                rf" mc.recent_tokens = {H + 9}: use at least \1"
            ),
        ),
        (
            "ruler_single_1",
            dict(seq_len=128, train_wc_length=128 - 31, recent_tokens=80),
            r"65 tokens are too few: .*: use at least \d+",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    name: str, mc: dict[str, int], message: str, data: RunData
) -> None:
    with pytest.raises(ConfigError, match=rf"^task {name}: {message}$"):
        made(name, data, **mc)


@pytest.mark.parametrize("name", ["ruler_cwe", "ruler_vt", "ruler_single_3", "stories_3"])
@pytest.mark.parametrize("seed", range(5))
def test_a_horizon_that_an_error_asks_for_is_enough(name: str, seed: int, data: RunData) -> None:
    prompts = PromptTask(name, PROMPTS[name], source_of(data), seed=seed)
    with pytest.raises(ConfigError) as error:
        AnsweredPrompts(prompts, lengths(horizon_tokens=2))
    enough = int(str(error.value).rpartition(" ")[2])
    AnsweredPrompts(prompts, lengths(horizon_tokens=enough))


def test_later_answers_that_are_longer_are_cut_off(data: RunData) -> None:
    """Those of `ruler_cwe` have ten words each."""

    class Prompts(PromptTask):
        def prompt(self, index: int, length: int) -> Prompt:
            prompt = super().prompt(index, length)
            return replace(prompt, answers=["1"] * 40) if index == 100 else prompt

    prompts = Prompts("ruler_cwe", PROMPTS["ruler_cwe"], source_of(data), seed=3)
    sample = AnsweredPrompts(prompts, lengths()).sample(100)
    assert len(sample.tokens) == T + 1
    assert sample.horizon_mask.tolist() == [1.0] * H


def test_several_values_of_a_name_are_answered_in_the_order_of_the_text(data: RunData) -> None:
    for index in range(5):
        sample = made("ruler_multivalue", data).sample(index)
        answer = data.tokenizer.decode(parts(sample)[1])
        needles = [data.tokenizer.decode(sample.tokens[slice(*span)]) for span in sample.spans]
        assert re.findall(r"\d{7}", answer) == re.findall(r"\d{7}", " ".join(needles))


def test_a_mixture_trains_on_prompts_of_all_training_texts(data: RunData, tmp_path: Path) -> None:
    tasks = {"corpus": 0.25, "ruler_single_2": 0.75}
    run = config(tmp_path, tasks=tasks)
    (text,) = data.train
    texts = [Domain("a", 1.0, text.shards), Domain("b", 3.0, data.val[0].shards)]
    source = make_source(run, data, texts)
    loader = DataLoader(_Asked(source), batch_size=None, num_workers=1)
    asked = [tokens for tokens, counted in loader if counted < H]
    assert len(asked) == 192
    here = [source.sample(index, 0) for index in range(256)]
    again = [sample.tokens for sample in here if sample.horizon_mask.sum() < H]
    for one, other in zip(asked, again, strict=True):
        assert np.array_equal(one, other)
    assert source.epochs(256).keys() == {"a", "b", "ruler_single_2/a", "ruler_single_2/b"}


def test_held_out_prompts_are_made_of_held_out_text(data: RunData, tmp_path: Path) -> None:
    run = config(tmp_path, tasks={"ruler_single_2": 1.0})
    task = run_task("ruler_single_2", run, data, data.val, seed=run.seed)
    texts = {
        split: data.tokenizer.decode(domains[0].shards.window(0, len(domains[0].shards)))
        for split, domains in (("train", data.train), ("val", data.val))
    }
    read = data.tokenizer.decode(task.sample(0).tokens[200 : T - 400])
    lines = [line for line in read.split("\n") if len(line) > 40 and "secret number" not in line]
    assert len(lines) > 10
    assert all(line in texts["val"] for line in lines[1:-1])
    assert not all(line in texts["train"] for line in lines[1:-1])


class _Asked(Dataset[tuple[Any, float]]):
    """Tokens of the first samples, and how many of their targets count."""

    def __init__(self, source: TrainingSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return 256

    def __getitem__(self, index: int) -> tuple[Any, float]:
        sample = self.source.sample(index, 0)
        return sample.tokens, float(sample.horizon_mask.sum())


def test_the_number_of_passes_over_the_text_is_an_upper_bound(data: RunData) -> None:
    task, length = made("ruler_single_2", data), T - H + 1
    (tokens,) = [len(domain.shards) for domain in data.train]
    assert task.epochs(10) == {"ruler_single_2": pytest.approx(10 * length / tokens)}
