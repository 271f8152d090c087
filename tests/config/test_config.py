"""Configuration: precedence, a dotted override for every field, one-line errors, recipes."""

import itertools
import json
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from mc_ds.config import PRESETS, ConfigError, MCConfig, RunConfig
from mc_ds.config.cli import help_text, load_config
from mc_ds.config.errors import field_paths
from mc_ds.config.help import MATTER
from mc_ds.config.recipe import read_recipe, to_yaml
from mc_ds.geometry import Geometry
from mc_ds.variants import TrainingWCVariationAllocator
from mc_ds.weights.compatibility import changes
from tests.support.factories import mc_config

RECIPES = sorted((Path(__file__).parents[2] / "launch" / "recipes").rglob("*.yaml"))
LEAVES = [
    path
    for path, field in field_paths(RunConfig).items()
    if not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel))
]


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe and returns the option that names it."""

    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return f"--config={path}"

    return write


def value_at(config, path):
    for name in path.split("."):
        config = getattr(config, name)
    return config


def schedule(*stages):
    """`mc.wc_schedule` of (start step, W) pairs, as an option has it."""
    return json.dumps(
        [{"start_step": start, "train_wc_length": length} for start, length in stages]
    )


def error_of(*argv):
    with pytest.raises(ConfigError) as caught:
        load_config(argv)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Precedence


def test_nothing_given_is_the_default():
    assert load_config([]) == RunConfig()


def test_command_line_over_recipe_over_preset_over_default(recipe):
    option = recipe("backbone: {preset: 124m, num_layers: 6}\nseed: 3")
    config = load_config([option, "--seed", "5", "--backbone.ffn_dim=1024"])
    assert (config.backbone.preset, config.backbone.dim) == ("124m", 768)  # preset over default
    assert config.backbone.num_layers == 6  # recipe over preset
    assert (config.seed, config.backbone.ffn_dim) == (5, 1024)  # command line over both


def test_a_preset_on_the_command_line_replaces_the_recipes_shape_and_nothing_else(recipe):
    option = recipe("backbone: {preset: tiny, dim: 384, num_heads: 6, init_std: 0.01}")
    backbone = load_config([option, "--backbone.preset", "8b"]).backbone
    assert {name: getattr(backbone, name) for name in PRESETS["8b"]} == PRESETS["8b"]
    assert backbone.init_std == 0.01


def test_the_environment_is_not_read(monkeypatch):
    monkeypatch.setenv("SEED", "7")
    monkeypatch.setenv("seed", "7")
    assert load_config([]).seed == 0


# The command line


@pytest.mark.parametrize("path", LEAVES)
def test_every_field_has_an_override(path):
    default = RunConfig().model_dump(mode="json")
    for name in path.split("."):
        default = default[name]
    text = default if isinstance(default, str) else json.dumps(default)
    assert value_at(load_config([f"--{path}={text}"]), path) == value_at(RunConfig(), path)
    assert value_at(load_config([f"--{path}", text]), path) == value_at(RunConfig(), path)


@pytest.mark.parametrize(
    ("argv", "path", "expected"),
    [
        (["--mc.num_random_variants=7"], "mc.num_random_variants", 7),
        (["--mc.num_random_variants", "7"], "mc.num_random_variants", 7),
        (["--dry_run"], "dry_run", True),
        (["--dry_run", "--seed=1"], "dry_run", True),
        (["--dry_run", "true", "--seed=1"], "dry_run", True),
        (["--telemetry.wandb", "false"], "telemetry.wandb", False),
        (["--telemetry.wandb=False"], "telemetry.wandb", False),
        (["--mc.gist_dim=64", "--mc.gist_dim=null"], "mc.gist_dim", None),
        (["--train.activation_checkpointing"], "train.activation_checkpointing", 1.0),
        (["--train.activation_checkpointing", "--seed=1"], "train.activation_checkpointing", 1.0),
        (["--train.activation_checkpointing", "--seed=1"], "seed", 1),
        (["--train.activation_checkpointing", "true"], "train.activation_checkpointing", 1.0),
        (["--train.activation_checkpointing=False"], "train.activation_checkpointing", 0.0),
        (["--train.activation_checkpointing", "0.5"], "train.activation_checkpointing", 0.5),
        (["--train.activation_checkpointing=0.25"], "train.activation_checkpointing", 0.25),
        (["--name=123"], "name", "123"),
        (["--train.learning_rate=1e-4"], "train.learning_rate", 1e-4),
        (["--local_rank=1", "--seed=2"], "seed", 2),
        (["--seed=2", "--local_rank", "1"], "seed", 2),
        (["--local-rank=1", "--resume", "never"], "resume", "never"),
    ],
)
def test_forms_of_an_option(argv, path, expected):
    assert value_at(load_config(argv), path) == expected


def test_lists_are_json():
    mc = load_config([f"--mc.wc_schedule={schedule((0, 4096), (10, 2112))}"]).mc
    assert [(stage.start_step, stage.train_wc_length) for stage in mc.wc_schedule] == [
        (0, 4096),
        (10, 2112),
    ]


# Help


def test_the_whole_help_lists_every_field_with_doc_and_default():
    text = help_text(["--config=x", "--help-all"])
    assert not [path for path in LEAVES if f"  --{path}\n" not in text]
    text = " ".join(text.split())
    assert "--mc.block_size Children per gist, K. (default: 32)" in text
    assert "(one of auto, on, off; default: auto)" in text
    assert "(one of tiny, 124m, 360m, 1b, 8b, 70b; default: -)" in text
    assert "(default: [48])" in text


@pytest.mark.parametrize("argv", [["--help"], ["--seed=1", "-h"], ["-h", "--seed=1"]])
def test_the_help_fits_one_screen(argv):
    lines = help_text(argv, prog="train.py").splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80
    assert len(MATTER) == 30
    assert set(MATTER) <= set(LEAVES)
    assert re.search(r"^  --train\.total_steps 1000 +optimizer steps$", "\n".join(lines), re.M)


@pytest.mark.parametrize("argv", [["--help", "data"], ["--help=data", "--seed=1"]])
def test_the_help_of_a_section_lists_its_fields_alone(argv):
    listed = re.findall(r"^  --(\S+)$", help_text(argv), re.M)
    assert listed == [path for path in LEAVES if path.startswith("data.")]


def test_the_help_of_a_setting_is_its_own():
    assert help_text(["--help", "mc.block_size"]) == (
        "  --mc.block_size\n      Children per gist, K. (default: 32)"
    )


def test_the_help_of_what_does_not_exist_says_so():
    with pytest.raises(ConfigError, match=r"^--help tran: .* did you mean train\?$"):
        help_text(["--help", "tran"])


def test_nobody_asked_for_help():
    assert help_text(["--name", "help", "--seed=1"]) is None


def test_every_field_is_documented():
    assert [path for path, field in field_paths(RunConfig).items() if not field.description] == []


# Errors: one line that says what would be right


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (
            ["--mc.num_variants=3"],
            "unknown key --mc.num_variants: did you mean --mc.num_random_variants?",
        ),
        (["--learning_rate=3"], "unknown key --learning_rate: did you mean --train.learning_rate?"),
        (["--train.lr=3"], "unknown key --train.lr: did you mean --train.learning_rate?"),
        (["--mc.lr=3"], "unknown key --mc.lr: did you mean --mc.lens_lr?"),
        (["--mc.seed=3"], "unknown key --mc.seed: did you mean --seed?"),
        (
            ["--train.bs=3"],
            (
                "unknown key --train.bs: did you mean --train.global_batch_size or"
                " --train.micro_batch_size?"
            ),
        ),
        (
            ["--train.steps=3"],
            "unknown key --train.steps: did you mean --train.total_steps or --train.warmup_steps?",
        ),
        (
            ["--profile=5"],
            "profile: '5' should be STEP:N, e.g. 100:5 for five steps after step 100",
        ),
        (
            ["--profile=998:3"],
            (
                "profile = '998:3' ends at step 1001, beyond train.total_steps = 1000: profile"
                " earlier steps"
            ),
        ),
        (["--gpus=3"], "unknown key --gpus: --help-all lists every field"),
        (["--mc.block_size"], "--mc.block_size has no value: give --mc.block_size=VALUE"),
        (
            ["--mc.block_size", "--dry_run"],
            "--mc.block_size has no value: give --mc.block_size=VALUE",
        ),
        (["demo.yaml"], "unexpected argument 'demo.yaml': options are --key=value or --key value"),
        (["--train.grad_clip=0"], "train.grad_clip = '0': should be greater than 0"),
        (
            ["--train.precision=fp16"],
            "train.precision = 'fp16': should be 'auto', 'fp32', 'bf16' or 'fp8'",
        ),
        (
            ["--mc.lens_ask_reach=open", "--mc.lens_layers=1"],
            (
                "mc: lens_ask_reach = 'open' needs a second ask layer, but lens_layers = 1 and"
                " lens_ask = 'tied': use lens_layers >= 2 and lens_ask = 'tied' or 'untied', or"
                " lens_ask_reach = 'tail'"
            ),
        ),
        (
            ["--mc.num_random_variants=1"],
            (
                "mc: num_random_variants = 1 gives no pairs to learn from: use 0 (plain language"
                " model) or at least 2"
            ),
        ),
        (
            ['--mc.wc_schedule=[{"start_step": 0}]'],
            "mc.wc_schedule[0].train_wc_length is missing: give it a value",
        ),
        (["--mc.wc_period=0"], "mc.wc_period = '0': should be greater than 0"),
        (
            ["--mc.wc_period=5"],
            (
                "mc: wc_period = 5 repeats wc_schedule, which is empty: add stages to wc_schedule,"
                " or leave out wc_period"
            ),
        ),
        (
            ["--mc.wc_period=5", f"--mc.wc_schedule={schedule((0, 4096), (5, 2112))}"],
            ("mc: wc_period = 5 ends before the last stage of wc_schedule starts: use at least 6"),
        ),
        (
            [f"--mc.wc_schedule={schedule((0, 159), (5, 2112))}"],
            (
                "mc.wc_schedule: train_wc_length = 159 is the coarsest length, so all variants"
                " would be the same: use another reachable length between 159 and 4096, or"
                " num_random_variants = 0"
            ),
        ),
        (
            ["--mc.seq_len=4096", "--mc.training_lod2_probability=0", "--mc.train_wc_length=252"],
            (
                "mc.train_wc_length = 252 is reached by only one context, with all nodes at one"
                " level, so all variants would be the same: use another reachable length between"
                " 159 and 4096, or num_random_variants = 0"
            ),
        ),
        (["--mc.lens_temperature=inf"], "mc.lens_temperature = 'inf': should be a finite number"),
        (["--train.learning_rate=nan"], "train.learning_rate = 'nan': should be a finite number"),
        (
            ["--train.activation_checkpointing=1.5"],
            "train.activation_checkpointing = '1.5': should be less than or equal to 1",
        ),
        (
            ["--train.activation_checkpointing", "-0.5"],
            "train.activation_checkpointing = '-0.5': should be greater than or equal to 0",
        ),
        (
            ["--train.activation_checkpointing", "yes"],
            (
                "train.activation_checkpointing = 'yes': should be a valid number, unable to parse"
                " string as a number"
            ),
        ),
        (
            ["--train.learning_rate"],
            "--train.learning_rate has no value: give --train.learning_rate=VALUE",
        ),
        (
            [
                "--train.frozen=backbone",
                "--train.init_from=x",
                f"--mc.wc_schedule={schedule((0, 4096), (5, 2112))}",
            ],
            (
                "train.frozen = 'backbone' leaves nothing to learn in the stages of mc.wc_schedule"
                " with W = T = 4096: remove these stages"
            ),
        ),
        (
            ["--data.vocab_size=200"],
            (
                "data: vocab_size = 200 is outside of 300 to 65536, the range for training a"
                " tokenizer: change it, or give data.tokenizer"
            ),
        ),
        (
            ["--train.frozen=backbone"],
            (
                "train.frozen = 'backbone' would freeze random weights: give train.init_from, or"
                " use train.frozen = none"
            ),
        ),
        (
            ["--train.frozen=all", "--train.init_from=x", '--train.init_parts=["backbone"]'],
            (
                "train.frozen = 'all' would freeze a GistNet with random weights: add gistnet to"
                " train.init_parts, or use train.frozen = backbone"
            ),
        ),
        (
            ["--train.frozen=all", "--train.init_from=x", "--mc.num_random_variants=0"],
            (
                "train.frozen = 'all' leaves nothing to learn without variants: use train.frozen ="
                " none, or mc.num_random_variants >= 2"
            ),
        ),
        (
            ["--train.init_from=x", '--train.init_parts=["lensnet"]'],
            (
                "train.init_parts = ['lensnet'] lacks backbone, whose embeddings GistNet and"
                " LensNet read: add it"
            ),
        ),
        (
            ["--train.warmup_steps=2000"],
            "train.warmup_steps = 2000 must be below train.total_steps = 1000",
        ),
    ],
)
def test_error_lines(argv, expected):
    assert error_of(*argv) == expected


@pytest.mark.parametrize("probability", [0.0, 0.5])
def test_lengths_at_which_all_variants_are_the_same_are_refused(probability):
    """Against what the allocator draws, over all small geometries."""
    for block, max_lod, seq_len in itertools.product((2, 3, 4), (1, 2, 3), range(10, 32, 3)):
        geometry = Geometry(seq_len=seq_len, block_size=block, max_lod=max_lod, recent_tokens=4)
        for units in range(1, geometry.max_units):
            length = seq_len - units * (block - 1)
            shape = dict(block_size=block, max_lod=max_lod, recent_tokens=4)
            allocator = TrainingWCVariationAllocator(
                geometry, length, lod2_probability=probability, lod2_max_share=0.5
            )
            drawn = [allocator.sample(8, (seed, 0)) for seed in range(12)]
            covers = {
                (lods[row].tobytes(), starts[row].tobytes())
                for lods, starts in drawn
                for row in range(8)
            }
            mc = dict(
                seq_len=seq_len,
                train_wc_length=length,
                horizon_tokens=2,
                training_lod2_probability=probability,
                **shape,
            )
            if len(covers) == 1:
                with pytest.raises(ValueError, match="reached by only one context"):
                    RunConfig.model_validate({"mc": mc})
            else:
                RunConfig.model_validate({"mc": mc})


def test_an_unreachable_length_names_the_nearest_ones():
    assert error_of("--mc.train_wc_length=2113").endswith("use 2112 or 2143")


@pytest.mark.parametrize(
    "argv",
    [["--dry_run=maybe"], ["--mc.wc_schedule=[{"], ["--mc={bad"], ["--mc=null"], ["--seed", "-1"]],
)
def test_malformed_values_are_one_line(argv):
    assert argv[0].removeprefix("--").split("=")[0] in error_of(*argv)


def test_several_mistakes_share_the_line():
    message = error_of("--train.grad_clip=0", "--train.adam_beta1=2", "--mc.max_lod=9", "--seed=-1")
    assert message.count(": should be") == 3
    assert message.endswith("; and 1 more mistakes")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: {precison: bf16}", "unknown key train.precison: did you mean train.precision?"),
        ("horizon_tokens: 3", "unknown key horizon_tokens: did you mean mc.horizon_tokens?"),
        ("seed: 1\nname: a\nseed: 2", "line 3, column 1: duplicate key 'seed': keep one of them"),
        ("mc: {seq_len: 1, seq_len: 2}", "duplicate key 'seq_len'"),
        ("- 1", "should be a mapping of keys to values"),
        ("mc: 5", "mc = 5: should be a mapping of keys to values"),
        ("mc: [1", "line 1, column 7"),
        ("3: 1", "key 3 should be a string"),
    ],
)
def test_a_bad_recipe(recipe, text, expected):
    assert expected in error_of(recipe(text))


def test_a_missing_recipe(tmp_path):
    assert "cannot read the recipe" in error_of("--config", str(tmp_path / "none.yaml"))


# The schedule of W

LENGTHS = range(96, 20, -3)
"""Some that `mc_config` can reach, from uncompressed down."""


@st.composite
def schedules(draw):
    """One to four stages of any reachable lengths, and a period in which the last of them has at
    least one step.
    """
    starts = [0, *sorted(draw(st.lists(st.integers(1, 20), unique=True, max_size=3)))]
    stages = [(start, draw(st.sampled_from(LENGTHS))) for start in starts]
    period = starts[-1] + draw(st.integers(1, 9))
    return stages, period


def scheduled(stages, period=None, **changes):
    """An `MCConfig` of (start step, W) pairs."""
    listed = [{"start_step": start, "train_wc_length": length} for start, length in stages]
    return mc_config(wc_schedule=listed, wc_period=period, train_wc_length=stages[-1][1], **changes)


@given(schedules())
def test_a_period_repeats_its_stages(drawn):
    """Every stage for the steps that it lasts, period after period; and the same as one schedule
    with all of them written out.
    """
    stages, period = drawn
    mc = scheduled(stages, period)
    ends = [*(start for start, _ in stages[1:]), period]
    once = [
        length
        for (start, length), end in zip(stages, ends, strict=True)
        for _ in range(end - start)
    ]
    assert [mc.wc_length_at(step) for step in range(4 * period)] == 4 * once
    unrolled = scheduled(
        [(start + turn * period, length) for turn in range(4) for start, length in stages]
    )
    assert [unrolled.wc_length_at(step) for step in range(4 * period)] == 4 * once


@given(schedules())
def test_without_a_period_the_last_stage_stays(drawn):
    stages, period = drawn
    mc = scheduled(stages)
    assert [mc.wc_length_at(step) for step in range(period)] == [
        scheduled(stages, period).wc_length_at(step) for step in range(period)
    ]
    assert {mc.wc_length_at(step) for step in range(period, 5 * period)} == {stages[-1][1]}


@given(schedules(), st.integers(1, 30))
def test_some_looks_at_the_curriculum_fall_on_compressed_steps_whatever_the_period(drawn, interval):
    stages, period = drawn
    stages = [*stages[:-1], (stages[-1][0], 48)]
    mc = scheduled(stages, period)
    assert any(mc.varies_at(step - 1) for step in range(interval, interval * period + 1, interval))


@given(schedules(), st.integers(0, 99))
def test_the_plain_baseline_is_always_in_full_sight(drawn, step):
    mc = scheduled(*drawn, num_random_variants=0)
    assert mc.wc_length_at(step) == mc.seq_len
    assert mc.rows_at(mc.wc_length_at(step)) == 1
    assert not mc.varies_at(step)
    compressed = scheduled(*drawn)
    assert compressed.varies_at(step) == (compressed.wc_length_at(step) < compressed.seq_len)


@given(st.integers(2, 9))
def test_in_full_sight_there_is_one_row_else_baseline_and_variants(variants):
    mc = mc_config(num_random_variants=variants)
    assert [mc.rows_at(length) for length in LENGTHS] == [1] + [1 + variants] * (len(LENGTHS) - 1)


@pytest.mark.parametrize("name", ["", ".", "..", "...", "a/b", "../a", "/a", "a\n", "a b"])
def test_a_run_has_a_folder_of_its_own_below_out_dir(name):
    with pytest.raises(
        ConfigError, match=r"^name: .* is no folder name: use letters, digits"
    ) as error:
        load_config([f"--name={name}"])
    assert "\n" not in str(error.value)


# Recipes


def test_a_recipe_is_read_by_yamls_core_schema(recipe):
    path = recipe("name: 2024-01-01\ntrain: {compile: on, learning_rate: 1e-4}").removeprefix(
        "--config="
    )
    assert read_recipe(path) == {
        "name": "2024-01-01",
        "train": {"compile": "on", "learning_rate": 1e-4},
    }


def test_a_setting_that_no_longer_exists_is_read_where_it_did_nothing() -> None:
    mc = MCConfig().model_dump()
    assert MCConfig.model_validate(mc | {"random_run": 1}) == MCConfig()
    with pytest.raises(ValidationError, match="random_run"):
        MCConfig.model_validate(mc | {"random_run": 2})


@pytest.mark.parametrize(
    ("text", "share"), [("false", 0.0), ("true", 1.0), ("True", 1.0), ("0.5", 0.5), ("1", 1.0)]
)
def test_the_share_of_recomputed_blocks_may_be_a_switch(recipe, text, share):
    config = load_config([recipe(f"train: {{activation_checkpointing: {text}}}")])
    assert config.train.activation_checkpointing == share
    assert type(config.train.activation_checkpointing) is float


@pytest.mark.parametrize("switch", [False, True])
def test_a_config_saved_with_the_switch_loads_and_is_the_same(switch):
    """As config.json in a bundle and the config in a checkpoint have it."""
    now = load_config([f"--train.activation_checkpointing={float(switch)}"])
    saved = now.model_dump(mode="json")
    saved["train"]["activation_checkpointing"] = switch
    assert RunConfig.model_validate(saved) == now
    assert changes(saved, now.model_dump(mode="json")) == []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_saves(path, tmp_path):
    config = load_config(["--config", str(path)])
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load_config(["--config", str(tmp_path / "config.yaml")]) == config


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_key_of_a_recipe_carries_its_doc(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    undocumented = [
        line
        for above, line in zip(["", *lines], lines, strict=False)
        if re.match(r"\s*\w+:", line) and not above.lstrip().startswith("# ") and " # " not in line
    ]
    assert undocumented == []


@given(
    name=st.from_regex(r"[A-Za-z0-9._-]*[A-Za-z0-9_-]", fullmatch=True),
    project=st.text(st.characters(exclude_categories=["Cs", "Cc"])),
)
def test_a_saved_config_loads_to_an_equal_one(tmp_path_factory, name, project):
    path = tmp_path_factory.mktemp("saved") / "config.yaml"
    config = RunConfig.model_validate({"name": name, "telemetry": {"wandb_project": project}})
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_config([f"--config={path}"]) == config
    assert (
        yaml.safe_load(path.read_text(encoding="utf-8"))["name"] == name
    )  # other readers of YAML agree


def test_a_mixture_on_the_command_line_replaces_the_recipe_s() -> None:
    config = load_config(
        ["--config", "launch/recipes/recall/recall.yaml", '--data.tasks={"corpus": 1}']
    )
    assert config.data.tasks == {"corpus": 1.0}
    assert config.data.vocab_size == 2048


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (['--data.tasks={"nope": 1}'], "recall"),
        (["--data.tasks={}"], "data.tasks"),
        (['--validation.policies=["newest"]'], "recency"),
        (
            [
                "--config",
                "launch/recipes/recall/recall.yaml",
                "--mc.num_random_variants=0",
                "--curriculum.horizon_loss=0",
            ],
            "one number of facts",
        ),
        (["--mc.train_wc_length=4096"], "the whole sequence"),
    ],
)
def test_tasks_policies_and_pointless_lengths_are_refused_up_front(
    options: list[str], says: str
) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        load_config(options)
    assert "\n" not in str(caught.value)


def test_a_given_tokenizer_may_have_a_vocabulary_that_is_never_trained() -> None:
    data = load_config(["--data.tokenizer=there", "--data.vocab_size=128256"]).data
    assert (data.tokenizer, data.vocab_size) == ("there", 128256)
    assert load_config([]).with_vocabulary(500).data.vocab_size == 500


def test_a_horizon_that_is_not_given_fits_the_tail() -> None:
    assert MCConfig().horizon_tokens == 64
    assert MCConfig(recent_tokens=16).horizon_tokens == 8
    assert MCConfig(recent_tokens=300, train_wc_length=2112).horizon_tokens == 64
    assert MCConfig(num_random_variants=1, lens_pair_baseline=True).rows_per_sequence == 2


# Paths


PATHS = ("out_dir", "deepspeed_config", "resume", "train.init_from", "data.root")
PATHS += ("data.cache_dir", "data.tokenizer")


@pytest.mark.parametrize("name", PATHS)
def test_a_path_begins_at_home_or_here_and_is_stored_absolute(name, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/of_someone")
    monkeypatch.chdir(tmp_path)

    def value(config):
        for part in name.split("."):
            config = getattr(config, part)
        return config

    for text, read, stored in (
        ("~/there", "/home/of_someone/there", "/home/of_someone/there"),
        ("there", "there", str(tmp_path / "there")),
        ("/there", "/there", "/there"),
    ):
        config = load_config([f"--{name}={text}"])
        assert value(config) == read
        assert value(config.with_absolute_paths()) == stored


def test_what_is_no_path_stays_as_it_is():
    config = RunConfig()
    stored = config.with_absolute_paths()
    assert (stored.resume, stored.data.root, stored.train.init_from) == ("auto", None, None)
    assert stored.with_absolute_paths() == stored
    assert RunConfig.model_validate(stored.model_dump(mode="json")) == stored


def test_an_error_is_one_printable_line_of_bounded_length():
    """Names in it may come from files: line breaks, terminal sequences, halves of characters."""
    assert str(ConfigError("a\nb \x1b[31m \ud800 é模 ×")) == r"a\nb \x1b[31m \ud800 é模 ×"
    long = str(ConfigError("first " + "x" * 10**6 + " last"))
    assert long.startswith("first ")
    assert long.endswith(" last")
    assert len(long) < 2_010
