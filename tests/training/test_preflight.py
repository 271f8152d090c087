"""What is cheap is found out before any token is made and before ranks meet."""

from pathlib import Path
from typing import Any

import pytest

from mc_ds.config import ConfigError, DataConfig, RunConfig
from mc_ds.data import Tokenizer, train_tokenizer
from mc_ds.model.build import build_model
from mc_ds.training.engine.preflight import with_initial_backbone
from mc_ds.training.loop import Trainer
from mc_ds.training.planning.dry_run import dry_run
from mc_ds.training.ranks.distributed import RankEnvironment
from tests.support.datasets import WORDS, write_dataset
from tests.support.tiny_bundle import write_bundle
from tests.support.tiny_run import settings

PLAIN = dict(num_random_variants=0)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(WORDS, vocab_size=300)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A plain language model of 300 pieces, two blocks of 32 channels."""
    folder = tmp_path_factory.mktemp("origin")
    config = RunConfig.model_validate(settings(folder, "origin", mc=PLAIN))
    config = config.with_vocabulary(300)
    model = build_model(config, vocab_size=300)
    write_bundle(
        folder / "bundle", config, tokenizer, model.state_dict().items(), step=3, source="a test"
    )
    return folder / "bundle"


@pytest.fixture
def refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Why a run cannot start, in one line; neither text nor ranks are asked for."""

    def never(*args: object, **options: object) -> None:
        raise AssertionError("too late")

    monkeypatch.setattr("mc_ds.training.loop.open_run_data", never)
    monkeypatch.setattr("mc_ds.training.loop.start_distributed", never)

    def call(**changes: Any) -> str:
        config = RunConfig.model_validate(settings(tmp_path, "run", **changes))
        with pytest.raises(ConfigError) as caught:
            Trainer(config, RankEnvironment(0, 0, 1, 1, "single"))
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "runs").exists()
        return str(caught.value)

    return call


def test_another_backbone_than_that_of_the_source(refusal: Any, bundle: Path) -> None:
    said = refusal(backbone=dict(num_layers=3), train=dict(init_from=str(bundle)))
    assert (
        "backbone.blocks.2.attention_norm.weight is missing there, [32] here: use the same" in said
    )


def test_a_tokenizer_to_be_trained_that_cannot_be_the_sources(refusal: Any, bundle: Path) -> None:
    said = refusal(data=dict(vocab_size=302), train=dict(init_from=str(bundle)))
    assert said.endswith(f"(vocabulary 300 there, 302 here): set data.tokenizer = {bundle}")


def test_a_given_tokenizer_and_that_of_the_datasets(
    refusal: Any, bundle: Path, tmp_path: Path
) -> None:
    other = train_tokenizer(WORDS, vocab_size=310)
    (tmp_path / "given").mkdir()
    other.save(tmp_path / "given")
    write_dataset(tmp_path / "books", other)
    for data in (
        dict(tokenizer=str(tmp_path / "given")),
        dict(datasets=[dict(path=str(tmp_path / "books"))]),
    ):
        said = refusal(data=data, train=dict(init_from=str(bundle)))
        assert "with another tokenizer (vocabulary 300 there, 310 here)" in said


def test_a_dry_run_names_the_dataset_that_is_missing_or_of_another_tokenizer(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    def refused(path: Path, **data: Any) -> str:
        data |= dict(datasets=[dict(path=str(path))])
        with pytest.raises(ConfigError) as caught:
            dry_run(RunConfig.model_validate(settings(tmp_path, "run", data=data)))
        return str(caught.value)

    said = refused(tmp_path / "books")
    assert said.startswith(f"{tmp_path / 'books'} is not a dataset: ")
    assert said.endswith("give a folder made by tools/prepare_data.py")
    (tmp_path / "given").mkdir()
    tokenizer.save(tmp_path / "given")
    write_dataset(tmp_path / "books", train_tokenizer(WORDS, vocab_size=310))
    said = refused(tmp_path / "books", tokenizer=str(tmp_path / "given"))
    assert "was made with another tokenizer (vocabulary 310)" in said
    write_dataset(tmp_path / "papers", tokenizer)
    for section in ("datasets", "validation"):  # the first one's tokenizer is expected of others
        others = {section: [dict(path=str(tmp_path / name)) for name in ("papers", "books")]}
        given = dict(datasets=[dict(path=str(tmp_path / "papers"))]) | others
        with pytest.raises(ConfigError, match=r"dataset .*/books was made with another tokenizer"):
            dry_run(RunConfig.model_validate(settings(tmp_path, "run", data=given)))


def test_a_source_that_is_not_there(refusal: Any) -> None:
    assert refusal(train=dict(init_from="nowhere")).startswith(
        "train.init_from: nowhere does not exist: give"
    )


def test_tasks_that_do_not_fit_the_lengths(refusal: Any) -> None:
    said = refusal(data=dict(tasks={"recall": 1}, recall=dict(facts_by_stage=[40])))
    assert said.startswith("task recall: mc.horizon_tokens = 6 cannot hold its answers")


def without_backbone(folder: Path, bundle: Path, **changes: Any) -> RunConfig:
    recipe = settings(folder, "run", mc=PLAIN, train=dict(init_from=str(bundle)), **changes)
    given = changes.get("backbone")
    recipe.pop("backbone")
    return RunConfig.model_validate(recipe | ({"backbone": given} if given else {}))


def test_the_backbone_is_that_of_the_source_where_none_is_given(
    tmp_path: Path, bundle: Path
) -> None:
    config = without_backbone(tmp_path, bundle)
    assert config.backbone.dim == 192
    shapes = with_initial_backbone(config, tmp_path / "runs" / "run").backbone
    assert (shapes.dim, shapes.num_layers, shapes.ffn_dim, shapes.rope_base) == (32, 2, 48, 1e4)
    assert "9,600" in dry_run(config), "parameters of the embedding"


def test_what_is_given_of_the_backbone_stays(tmp_path: Path, bundle: Path) -> None:
    for given, dim, layers in (
        (dict(num_layers=3), 32, 3),
        (dict(preset="124m"), 768, 12),
    ):
        config = without_backbone(tmp_path, bundle, backbone=given)
        shapes = with_initial_backbone(config, tmp_path / "runs" / "run").backbone
        assert (shapes.dim, shapes.num_layers) == (dim, layers)


@pytest.mark.parametrize("local_rank", [0, 1])
def test_one_rank_per_host_hashes_a_prepared_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local_rank: int
) -> None:
    """A corpus of a terabyte takes one rank 23 minutes."""
    asked: list[bool] = []

    def opened(config: DataConfig, *, verify: bool) -> None:
        asked.append(verify)
        raise ConfigError("far enough")

    monkeypatch.setattr("mc_ds.training.loop.open_run_data", opened)
    config = RunConfig.model_validate(settings(tmp_path, "run"))
    with pytest.raises(ConfigError, match="far enough"):
        Trainer(config, RankEnvironment(2 + local_rank, local_rank, 4, 2, "launcher"))
    assert asked == [local_rank == 0]
