"""Runs that start from given weights, and what keeps them: bundles, runs and checkpoints, under
every ZeRO stage, on one rank and two.

All runs are of the real `Trainer` on a small corpus, several to a process
(tests/support/training_worker.py); the tests read what they left.
"""

import json
import shutil
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

from mc_ds.config import ConfigError, DataConfig, RunConfig
from mc_ds.data import Batch, MicroStep, load_tokenizer
from mc_ds.focus.controller import MCController
from mc_ds.model.build import build_model
from mc_ds.model.lensnet import LensNet
from mc_ds.model.megacontext import MegaContextModel
from mc_ds.training import lens as lens_module
from mc_ds.training.engine.initial import InitialWeights, Origin, fit_of, open_initial
from mc_ds.training.engine.preflight import with_initial_backbone
from mc_ds.training.guards.exit_codes import ExitCode, RunStopped
from mc_ds.training.loop import Trainer
from mc_ds.training.ranks.distributed import RankEnvironment
from mc_ds.training.step import StepRunner
from mc_ds.weights.checkpoint.shards import engine_weights
from mc_ds.weights.layout import layout_of
from mc_ds.weights.open import load_trained, open_weights
from tests.support import tiny_hf
from tests.support.factories import VOCAB, mc_config, plan, run_config, tokens
from tests.support.tiny_bundle import write_bundle
from tests.support.tiny_run import TIMED, Runs, settings

FROZEN = [("backbone", 1), ("backbone", 2), ("backbone", 3), ("all", 2), ("all", 3)]
"""What is frozen, and the ZeRO stage, of the runs on two ranks."""
RESIZED = [("backbone_3", 1), ("backbone_1", 3), ("all_3", 2)]
"""Of these, those that continue on one rank, and under which other stage."""
QUIET = dict(validation=dict(eval_interval=0), checkpoint=dict(interval=2))
SEEN = "source"
STILL = dict(lens_lr=1e-30)
FRESH_LENS = ["backbone", "gistnet"]


def weights_of(snapshot):
    return snapshot["weights"] | {
        f"lensnet.{name}": value for name, value in snapshot["lens"]["lensnet"].items()
    }


def start(source, frozen="none", **train):
    """Settings of three steps from `source`."""
    return dict(QUIET, train=dict(total_steps=3, init_from=str(source), frozen=frozen, **train))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A source run, bundles of it, and every run that starts from them."""
    runs = Runs(tmp_path_factory.mktemp("init_from"))
    runs.work(1, [runs.scenario(SEEN, train=dict(total_steps=3), **QUIET)])
    source, bundle, plain = (
        runs.folder / "runs" / SEEN,
        runs.folder / "bundle",
        runs.folder / "plain",
    )
    config = RunConfig.model_validate(settings(runs.folder, SEEN))
    whole = weights_of(runs.snapshots(SEEN)[-1])
    backbone = {name: value for name, value in whole.items() if name.startswith("backbone.")}
    language_model = config.model_copy(
        update={"mc": config.mc.model_copy(update={"num_random_variants": 0})}
    )
    for folder, model, weights in ((bundle, config, whole), (plain, language_model, backbone)):
        write_bundle(
            folder, model, load_tokenizer(source), weights.items(), step=3, source="a test"
        )

    two = [
        runs.scenario("run_3", stage=3, **start(source)),
        runs.scenario("run_2", stage=2, **start(source / "checkpoints")),
    ]
    two += [runs.scenario(f"bundle_{stage}", stage=stage, **start(bundle)) for stage in (1, 3)]
    for frozen, stage in FROZEN:
        name = f"{frozen}_{stage}"
        two.append(runs.scenario(name, stage=stage, **start(bundle, frozen)))
        if stage != 1:
            two.append(
                runs.scenario(f"{name}_cut", stage=stage, stop_after=2, **start(bundle, frozen))
            )
            gone = start("nowhere", frozen)  # a run that resumes has no need of its source
            two.append(runs.scenario(f"{name}_resumed", name=f"{name}_cut", stage=stage, **gone))
    runs.work(2, two)

    alone = [
        runs.scenario("still", stage=2, **start(bundle, learning_rate=1e-30)),
        runs.scenario("frozen", stage=2, **start(bundle, "all")),
        runs.scenario(
            "parts", stage=2, stop_after=2, **start(bundle, init_parts=["backbone", "lensnet"])
        ),
        runs.scenario("plain", stage=2, stop_after=0, **start(plain)),
        runs.scenario("wide_lens", stage=2, stop_after=0, mc=dict(lens_dim=64), **start(bundle)),
        runs.scenario("fresh", stage=2, stop_after=2, train=dict(total_steps=3), **QUIET),
        runs.scenario(
            "plain_lens",
            stop_after=1,
            mc=STILL | dict(lens_index_white=False),
            **start(bundle, init_parts=FRESH_LENS),
        ),
        runs.scenario("white_lens", stop_after=1, mc=STILL, **start(bundle, init_parts=FRESH_LENS)),
        runs.scenario("asleep", mc=dict(lens_start_step=9), **start(bundle, init_parts=FRESH_LENS)),
        runs.scenario(
            "woken_white", stop_after=1, mc=STILL, **start(runs.folder / "runs" / "asleep")
        ),
        runs.scenario(
            "woken_plain",
            stop_after=1,
            mc=STILL | dict(lens_index_white=False),
            **start(runs.folder / "runs" / "asleep"),
        ),
        runs.scenario("loaded_lens", stop_after=1, mc=STILL, **start(bundle)),
        runs.scenario(
            "follows",
            stage=2,
            stop_after=2,
            data=dict(tokenizer=str(bundle), vocab_size=4096),
            **start(bundle),
        ),
    ]
    for before, after in RESIZED:
        name = f"{before}_on_{after}"
        folder = runs.folder / "runs" / name
        shutil.copytree(runs.folder / "runs" / before, folder)
        shutil.rmtree(folder / "checkpoints" / "step_00000003")
        alone.append(runs.scenario(name, stage=after, **start("nowhere", before.partition("_")[0])))
    runs.work(1, alone)
    return runs


def same(a, b):
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def moved(snapshots):
    """The parts whose weights the run has changed."""
    first, last = weights_of(snapshots[0]), weights_of(snapshots[-1])
    return {name.partition(".")[0] for name in first if not torch.equal(first[name], last[name])}


def distance(a, b):
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


# Loading


@pytest.mark.parametrize("label", ["run_3", "run_2", "bundle_1", "bundle_3", "backbone_3", "all_3"])
def test_all_ranks_start_from_the_weights_of_the_source(runs, label):
    source = weights_of(runs.snapshots(SEEN)[-1])
    for rank in (0, 1):
        first = runs.snapshots(label, rank)[0]
        assert same(weights_of(first), source)
        assert first["lens"]["optimizer"]["state"] == {}
    assert not same(
        source, weights_of(runs.snapshots(SEEN)[0])
    )  # or all that would have been true without loading


def test_what_is_not_wanted_or_not_there_starts_fresh(runs):
    source, fresh = weights_of(runs.snapshots(SEEN)[-1]), weights_of(runs.snapshots("fresh")[0])
    for label, loaded in (
        ("parts", {"backbone", "lensnet"}),
        ("plain", {"backbone"}),
        ("wide_lens", {"backbone", "gistnet"}),
    ):
        for name, value in weights_of(runs.snapshots(label)[0]).items():
            part = name.partition(".")[0]
            if part in loaded:
                assert torch.equal(value, source[name]), (label, name)
            elif label != "wide_lens":
                assert torch.equal(value, fresh[name]), (label, name)


def test_checkpoints_say_what_the_run_started_from_and_go_on_saying_it(runs):
    def said(name, step):
        return json.loads(
            (
                runs.folder / "runs" / name / "checkpoints" / f"step_{step:08d}" / "trainer.json"
            ).read_text()
        )["init_from"]

    origin = said("all_2_cut", 2)
    assert (origin["path"], origin["step"], origin["parts"]) == (
        str(runs.folder / "bundle"),
        3,
        ["backbone", "gistnet", "lensnet"],
    )
    assert said("all_2_cut", 3) == origin
    assert said("parts", 2)["parts"] == ["backbone", "lensnet"]
    assert said("fresh", 2) is None


def test_a_tokenizer_given_is_the_one_in_use_and_decides_the_vocabulary(runs):
    """The recipe asks for 4096 pieces: the tokenizer has 300."""
    folder = runs.folder / "runs" / "follows"
    assert "vocab_size: 300\n" in (folder / "config.yaml").read_text()
    assert load_tokenizer(folder).sha256 == load_tokenizer(runs.folder / "bundle").sha256
    assert weights_of(runs.snapshots("follows")[0])["backbone.embedding.weight"].shape == (300, 32)
    caches = [
        json.loads((folder.with_name(name) / "checkpoints/step_00000002/trainer.json").read_text())
        for name in ("follows", "fresh")
    ]
    assert len({facts["requirements"]["data"] for facts in caches}) == 2
    assert len({facts["requirements"]["tokenizer"] for facts in caches}) == 1


# Freezing


@pytest.mark.parametrize(("frozen", "stage"), FROZEN)
def test_only_what_is_not_frozen_learns(runs, frozen, stage):
    assert (
        moved(runs.snapshots(f"{frozen}_{stage}"))
        == {"backbone": {"gistnet", "lensnet"}, "all": {"lensnet"}}[frozen]
    )
    assert moved(runs.snapshots("bundle_3")) == {"backbone", "gistnet", "lensnet"}


@pytest.mark.parametrize(("frozen", "stage"), FROZEN)
def test_stages_train_the_same_model_and_ranks_hold_the_same_bits(runs, frozen, stage):
    one, two = (runs.snapshots(f"{frozen}_{stage}", rank) for rank in (0, 1))
    assert all(same(weights_of(a), weights_of(b)) for a, b in zip(one, two, strict=True))
    for mine, reference in zip(one, runs.snapshots(f"{frozen}_3"), strict=True):
        assert distance(weights_of(mine), weights_of(reference)) <= 1e-5


def test_lensnet_learns_beside_a_frozen_model_what_it_would_beside_one_that_stands_still(runs):
    """By a learning rate that changes no bit of the model. Two ranks differ from one by rounding
    alone.
    """
    still = runs.snapshots("still")
    assert moved(still) == {"lensnet"}
    for reference, frozen, on_two_ranks in zip(
        still, runs.snapshots("frozen"), runs.snapshots("all_2"), strict=True
    ):
        assert same(weights_of(frozen), weights_of(reference))
        assert distance(weights_of(on_two_ranks), weights_of(reference)) <= 1e-5
    assert distance(weights_of(still[0]), weights_of(still[-1])) > 1e-4


def test_a_step_of_lensnet_alone_costs_the_model_nothing_but_its_forward(monkeypatch):
    """The engine here can do no more than that, and is refused gradients."""

    class Engine:
        def __init__(self, model):
            self.model = model

        def __call__(self, *args):
            assert not torch.is_grad_enabled()
            return self.model(*args)

        def gradient_accumulation_steps(self):
            return 2

    mc = mc_config()
    config = run_config(mc, init_from="a bundle", frozen="all")
    monkeypatch.setattr(lens_module.dist, "broadcast", lambda tensor, src: None)
    monkeypatch.setattr(lens_module.dist, "get_world_size", lambda group=None: 1)
    lensnet = LensNet(mc, dim=config.backbone.dim)
    lens, device = lens_module.ReplicatedLens(lensnet, mc, config.train), torch.device("cpu")
    runner = StepRunner(
        config,
        Engine(MegaContextModel(config, vocab_size=VOCAB)),
        lens,
        MCController(lensnet),
        device,
        None,
    )
    batch = Batch(
        tokens(mc, 2),
        *plan(mc, 2),
        torch.ones(2, mc.horizon_tokens),
        torch.arange(2),
        MicroStep(0, 0, mc.train_wc_length, 0),
    )
    before = [parameter.clone() for parameter in lens.parameters]
    result = runner.run(0, iter([batch, batch]), lens_start=0)
    assert any(not torch.equal(a, b) for a, b in zip(before, lens.parameters, strict=True))
    assert result.finite
    assert {"train/lr", "train/grad_norm"}.isdisjoint(result.host)
    assert result.host["mc/lens_step_applied"] == 1
    assert result.statistics.record()["train/loss"] > 0


def test_the_record_of_lensnet_alone_is_whole(runs):
    records = runs.records("all_3")
    assert [record["step"] for record in records] == [1, 2, 3]
    for record in records:
        assert {
            "train/loss",
            "train/forward_ms",
            "mc/lens_loss",
            "mc/adv_delta_mean",
            "mc/lens_lr",
        } <= record.keys()
        assert "train/backward_ms" not in record
        assert record["mc/lensnet_calls"] == 2 * record["step"]


# Checkpoints


@pytest.mark.parametrize(("frozen", "stage"), FROZEN[1:])
def test_a_run_with_frozen_weights_resumes_as_if_never_interrupted(runs, frozen, stage):
    name = f"{frozen}_{stage}"
    for rank in (0, 1):
        straight, resumed = runs.snapshots(name, rank), runs.snapshots(f"{name}_resumed", rank)
        assert all(
            same(weights_of(a), weights_of(b)) for a, b in zip(straight[2:], resumed, strict=True)
        )
        assert torch.equal(
            straight[-1]["lens"]["moments"]["sum_sq"], resumed[-1]["lens"]["moments"]["sum_sq"]
        )
    untimed = [
        [
            {key: value for key, value in record.items() if not key.endswith(TIMED)}
            for record in runs.records(of)
        ]
        for of in (name, f"{name}_cut")
    ]
    assert untimed[0] == untimed[1]


@pytest.mark.parametrize(("before", "after"), RESIZED)
def test_other_ranks_and_stages_continue_with_the_frozen_weights(runs, before, after):
    straight, resized = runs.snapshots(before), runs.snapshots(f"{before}_on_{after}")
    assert len(resized) == 2
    for mine, theirs in zip(resized, straight[2:], strict=True):
        assert distance(weights_of(mine), weights_of(theirs)) <= 1e-5
    assert moved(resized) == moved(straight[2:])
    frozen = {
        name
        for name in straight[0]["weights"]
        if before.startswith("all") or name.startswith("backbone.")
    }
    assert all(
        torch.equal(straight[0]["weights"][name], resized[-1]["weights"][name]) for name in frozen
    )


@pytest.mark.parametrize(("frozen", "stage"), FROZEN)
def test_frozen_weights_are_in_the_checkpoint(runs, frozen, stage, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(runs.folder / "library"))
    folder = runs.folder / "runs" / f"{frozen}_{stage}"
    stored, live = (
        engine_weights(folder / "checkpoints" / "step_00000003").state_dict(),
        runs.snapshots(folder.name)[-1]["weights"],
    )
    assert same({name: stored[name].detach() for name in live}, live)
    trained = load_trained(str(folder), device=torch.device("cpu"))
    assert same({name: value.detach() for name, value in trained.model.named_parameters()}, live)


def test_another_choice_of_what_learns_is_another_run(runs, refusal):
    assert "train.frozen = 'backbone' there, 'none' here: use the same" in refusal(
        "backbone_2", **start(runs.folder / "bundle")
    )


# What is refused, and what is said


@pytest.fixture
def refusal(runs, single_process, monkeypatch):
    """Why a run cannot start, in one line."""
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(runs.folder / "library"))

    def call(name, **changes):
        config = RunConfig.model_validate(settings(runs.folder, name, stage=2, **changes))
        with pytest.raises((RunStopped, ConfigError)) as caught, ExitStack() as held:
            Trainer(config, RankEnvironment(0, 0, 1, 1, "single"), held=held)
        assert getattr(caught.value, "code", ExitCode.CONFIG) is ExitCode.CONFIG
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return call


@pytest.fixture
def origin():
    """A source of the default test configuration."""
    config = run_config().with_vocabulary(VOCAB)
    shapes = layout_of(config, vocab_size=VOCAB).shapes
    return Origin(
        "there",
        7,
        "0",
        VOCAB,
        "tokenizer",
        "there",
        config,
        shapes,
    )


def here(mc=None, backbone=None, **train):
    return run_config(
        mc_config(**(mc or {})), backbone, init_from="there", **train
    ).with_vocabulary(VOCAB)


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (
            here(backbone=dict(ffn_dim=48)),
            (
                "backbone.blocks.0.gate_up.weight is [128, 32] there, [96, 32] here: use the same"
                " backbone"
            ),
        ),
        (
            here(backbone=dict(num_layers=3)),
            (
                "backbone.blocks.2.attention_norm.weight is missing there, [32] here: use the same"
                " backbone"
            ),
        ),
        (
            here(backbone=dict(num_layers=1)),
            (
                "backbone.blocks.1.attention_norm.weight is [32] there, missing here: use the same"
                " backbone"
            ),
        ),
        (
            here(backbone=dict(rope_base=5e5)),
            "backbone.rope_base = 10000.0 there, 500000.0 here: use the same backbone",
        ),
        (
            here(dict(max_lod=1), frozen="all"),
            (
                "train.frozen = 'all' would freeze a random GistNet (gistnet.level_embedding is"
                " [2, 32] there, [1, 32] here): use train.frozen = backbone"
            ),
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(origin, config, line):
    with pytest.raises(ConfigError) as caught:
        fit_of(origin, config, tokenizer="tokenizer")
    assert str(caught.value) == f"train.init_from = there: {line}"


def test_another_tokenizer_is_refused_and_the_right_one_named(origin):
    with pytest.raises(
        ConfigError, match=r"vocabulary 61 there, 61 here\): set data.tokenizer = there$"
    ):
        fit_of(origin, here(), tokenizer="another")


@pytest.mark.parametrize(
    ("config", "fresh"),
    [
        (here(), {}),
        (
            here(init_parts=["backbone"]),
            {"gistnet": "not in train.init_parts", "lensnet": "not in train.init_parts"},
        ),
        (here(dict(lens_heads=4)), {"lensnet": "mc.lens_heads = 2 there, 4 here"}),
        (
            here(dict(lens_layers=1)),
            {"lensnet": "lensnet.asks.1.gain is [1, 1, 1] there, missing here"},
        ),
    ],
)
def test_gistnet_and_lensnet_are_taken_whole_or_not_at_all(origin, config, fresh):
    loaded = [part for part in ("backbone", "gistnet", "lensnet") if part not in fresh]
    assert fit_of(origin, config, tokenizer="tokenizer") == (loaded, fresh)


def test_a_plain_language_model_takes_the_backbone_alone(origin):
    assert fit_of(origin, here(dict(num_random_variants=0)), tokenizer="tokenizer") == (
        ["backbone"],
        {},
    )


def test_the_line_says_what_is_loaded_what_is_fresh_and_what_the_weights_are_not_used_to(origin):
    only_model = {
        name: shape for name, shape in origin.shapes.items() if not name.startswith("lensnet.")
    }
    origin = replace(origin, shapes=only_model)
    config = here(dict(position_scheme="order"))
    initial = InitialWeights(origin, fit_of(origin, config, tokenizer="tokenizer"), torch.empty)
    assert (
        initial.line(config)
        == "starts from there (step 7): backbone, gistnet; lensnet is initialised randomly (missing there);"
        " mc.position_scheme = 'span' there, 'order' here"
    )
    shared = here(dict(lens_block_scores="shared"))
    assert initial.line(shared).endswith("mc.lens_block_scores = 'own' there, 'shared' here")


def test_a_source_that_cannot_be_used_leaves_no_run(runs, refusal, tmp_path):
    bundle, damaged = runs.folder / "bundle", tmp_path / "damaged"
    shutil.copytree(bundle, damaged)
    weights = next(damaged.glob("gistnet*"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    checkpoint = (
        shutil.copytree(runs.folder / "runs" / SEEN, tmp_path / "run")
        / "checkpoints"
        / "step_00000003"
    )
    (checkpoint / "lens.pt").unlink()
    cases = {
        f"another tokenizer (vocabulary 300 there, 302 here): set data.tokenizer = {bundle}": dict(
            start(bundle), data=dict(vocab_size=302)
        ),
        "nothing does not exist: give the folder of a run": start(tmp_path / "nothing"),
        f"train.init_from: bundle {damaged} is damaged: {weights.name}": start(damaged),
        f"train.init_from: checkpoint {checkpoint} is damaged: lens.pt is missing": start(
            checkpoint
        ),
    }
    for line, changes in cases.items():
        assert line in refusal("refused", **changes)
        assert not any(path.is_file() for path in (runs.folder / "runs" / "refused").rglob("*"))


def test_a_run_that_resumes_has_the_backbone_of_its_checkpoint(runs):
    """Where it gives none; its source may be gone."""
    recipe = settings(runs.folder, SEEN, train=dict(init_from="gone"))
    del recipe["backbone"]
    config = RunConfig.model_validate(recipe)
    shapes = with_initial_backbone(config, runs.folder / "runs" / SEEN).backbone
    assert (shapes.dim, shapes.num_layers, shapes.ffn_dim) == (32, 2, 48)
    with pytest.raises(ConfigError, match=r"^train\.init_from: gone does not exist"):
        with_initial_backbone(config, runs.folder / "runs" / "new")


def test_of_a_run_the_newest_whole_checkpoint_is_taken(runs, single_process, tmp_path, capsys):
    source = shutil.copytree(runs.folder / "runs" / SEEN, tmp_path / "run")
    (source / "checkpoints" / "step_00000003" / "lens.pt").unlink()
    config = RunConfig.model_validate(settings(runs.folder, "new", **start(source)))
    initial = open_initial(config, tokenizer=load_tokenizer(source).sha256)
    assert (initial.origin.step, initial.fit.fresh) == (2, {})
    (line,) = capsys.readouterr().err.splitlines()
    assert "step_00000003 is damaged: lens.pt is missing: using step_00000002" in line


def test_a_hugging_face_folder_gives_the_backbone(single_process, tmp_path):
    folder = tiny_hf.write_folder(tmp_path / "hf", tiny_hf.GQA)
    source = open_weights(folder)
    config = starting_from(folder, source)
    initial = open_initial(config, tokenizer=load_tokenizer(folder).sha256)
    assert initial.fit.loaded == ["backbone"]
    assert initial.fit.fresh == {"gistnet": "missing there", "lensnet": "missing there"}
    model = build_model(config, vocab_size=source.vocab_size)
    initial.load_model(model)
    loaded = dict(model.named_parameters())
    assert all(torch.equal(loaded[name], weight) for name, weight in source.weights())


def test_a_tokenizer_that_no_folder_has_takes_a_bundle(single_process, tmp_path):
    """The model has more rows than its tokenizer has ids."""
    fewer = tiny_hf.byte_level(300)
    folder = tiny_hf.write_folder(tmp_path / "hf", tiny_hf.GQA, tokenizer=fewer)
    config = starting_from(folder, open_weights(folder))
    with pytest.raises(
        ConfigError, match=r"vocabulary 320 there.*: convert the model to a bundle with tools/"
    ):
        open_initial(config, tokenizer=load_tokenizer(folder).sha256)


def starting_from(folder, source):
    """A run of the source's decoder and tokenizer."""
    data = DataConfig(tokenizer=str(folder), vocab_size=source.vocab_size)
    config = run_config(mc_config(), init_from=str(folder))
    return config.model_copy(update={"backbone": source.config.backbone, "data": data})


def test_a_fresh_lensnet_starts_white_and_a_loaded_one_as_it_was(runs):
    weights = {
        name: runs.snapshots(name)[-1]["lens"]["lensnet"]
        for name in (SEEN, "plain_lens", "white_lens", "loaded_lens")
    }
    assert distance(weights[SEEN], weights["loaded_lens"]) == 0
    plain, white = (
        weights[name].pop("index.project.weight") for name in ("plain_lens", "white_lens")
    )
    assert distance(weights["plain_lens"], weights["white_lens"]) < 1e-20, "nothing else differs"
    assert float((plain - white).norm() / plain.norm()) > 0.05


def test_a_lensnet_that_was_taken_before_it_had_learnt_starts_white_too(runs):
    asleep, plain, white = (
        runs.snapshots(name)[-1]["lens"]["lensnet"]
        for name in ("asleep", "woken_plain", "woken_white")
    )
    assert distance(asleep, plain) < 1e-20
    assert (
        distance({"P": asleep["index.project.weight"]}, {"P": white["index.project.weight"]}) > 1e-3
    )
    prepared = [
        runs.snapshots(name)[-1]["lens"]["prepared"]
        for name in ("asleep", "woken_white", "loaded_lens")
    ]
    assert prepared == [False, True, True]
