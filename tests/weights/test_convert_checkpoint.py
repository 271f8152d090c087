"""From checkpoints of real engines, of every ZeRO stage, precision and several numbers of ranks,
to bundles that answer as they did.
"""

import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mc_ds.config import ConfigError
from mc_ds.storage import MANIFEST, fingerprint, remove_folder, write_manifest, write_tensors
from mc_ds.weights.bundle import open_bundle
from mc_ds.weights.bundle.write import BundleWriter
from mc_ds.weights.checkpoint.lazy import load_lazy, piece_of, stored
from mc_ds.weights.checkpoint.read import last_validation
from mc_ds.weights.checkpoint.shards import engine_weights
from mc_ds.weights.export import export_bundle
from mc_ds.weights.open import open_weights
from tests.support.factories import tokens
from tests.support.processes import ROOT
from tests.support.tiny_bundle import tiny_tokenizer
from tests.support.tiny_run import edit_trainer, environment, run, run_ranks
from tools.bench.convert import measure
from tools.convert_checkpoint import main

STEP = "step_00000002"
ONE = [
    dict(label="zero1_fp32", stage=1, precision="fp32"),
    dict(label="zero3_bf16", stage=3, precision="bf16"),
]
TWO = [
    dict(label="zero1_bf16", stage=1, precision="bf16"),
    dict(label="zero1_accumulate", stage=1, precision="bf16", accumulate="fp32", max_lod=1),
    dict(label="zero1_frozen", stage=1, precision="bf16", frozen="backbone", steps=0),
    dict(label="zero2_fp32", stage=2, precision="fp32"),
    dict(label="zero2_bf16", stage=2, precision="bf16", tied=False, max_lod=1),
    dict(
        label="zero2_round_robin", stage=2, precision="fp32", zero={"round_robin_gradients": True}
    ),
    dict(label="zero2_aligned", stage=2, precision="bf16", zero={"parameter_alignment": True}),
    dict(label="zero2_plain", stage=2, precision="fp32", variants=0),
    dict(label="zero3_fp32", stage=3, precision="fp32"),
    dict(label="zero3_untied", stage=3, precision="fp32", tied=False, max_lod=1),
    dict(label="zero3_groups", stage=3, precision="bf16", zero={"sub_group_size": 3000}),
    dict(label="zero3_frozen", stage=3, precision="bf16", frozen="backbone", steps=0),
    dict(
        label="zero3_frozen_gists", stage=3, precision="bf16", frozen="gistnet", steps=0, max_lod=1
    ),
]
THREE = [  # sizes that three ranks cannot share equally: padding everywhere
    dict(label="zero1_three", stage=1, precision="bf16", accumulate="fp32"),
    dict(label="zero2_three", stage=2, precision="bf16"),
    dict(label="zero3_three", stage=3, precision="bf16", zero={"sub_group_size": 3000}),
    dict(label="zero3_three_frozen", stage=3, precision="bf16", frozen="gistnet", steps=0),
]
BY_WORLD = {1: ONE, 2: TWO, 3: THREE}
SCENARIOS = {
    scenario["label"]: (world, scenario)
    for world, scenarios in BY_WORLD.items()
    for scenario in scenarios
}
ALL = [
    pytest.param(label, marks=[pytest.mark.slow] if world == 3 else [])
    for label, (world, _) in SCENARIOS.items()
]


class Runs:
    """Runs of the scenarios, side by side in one folder; those of one number of ranks are made
    together when the first is asked for.
    """

    def __init__(self, folder):
        self.folder, self.made = folder, set()

    def __truediv__(self, label):
        world = SCENARIOS[label][0]
        if world not in self.made:
            path = self.folder / f"scenarios_{world}.json"
            path.write_text(json.dumps(BY_WORLD[world]))
            run_ranks(
                world,
                [ROOT / "tests" / "support" / "export_worker.py", path, self.folder],
                environment(self.folder),
            )
            self.made.add(world)
        return self.folder / label


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("export"))


@pytest.fixture
def copy(runs, tmp_path):
    """A run of its own, to be damaged."""

    def make(label):
        return Path(shutil.copytree(runs / label, tmp_path / label))

    return make


def live(runs, label):
    return torch.load(runs / label / "live.pt", weights_only=True)


def rank_file(run, rank, kind="optim"):
    return next(
        (run / "checkpoints" / STEP).glob(f"*zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt")
    )


def leftovers(folder):
    return sorted(path.name for path in folder.iterdir() if "bundle" in path.name)


def answer(model, config, rows):
    with torch.no_grad():
        return model(tokens(config.mc, 1), *rows)


# What is converted


@pytest.mark.parametrize("label", ALL)
def test_every_master_weight_is_found_exactly(runs, label):
    weights, masters = (
        engine_weights(runs / label / "checkpoints" / STEP),
        live(runs, label)["weights"],
    )
    _, scenario = SCENARIOS[label]
    assert weights.tensors.keys() == masters.keys()
    for name, value in weights:
        assert torch.equal(value, masters[name]), name
        is_frozen = scenario.get("frozen") and name.startswith(scenario["frozen"])
        assert value.dtype == (torch.bfloat16 if is_frozen else torch.float32)
    tied = (
        {"backbone.head.weight": "backbone.embedding.weight"} if scenario.get("tied", True) else {}
    )
    assert weights.tied == tied
    assert weights.state_dict().keys() == masters.keys() | tied.keys()


@pytest.mark.parametrize("label", ALL)
def test_the_bundle_answers_as_the_live_engine_did(runs, tmp_path, label):
    """Bit for bit: in bf16 an engine runs with its masters rounded, which is what a bundle in
    bf16 holds.
    """
    _, scenario = SCENARIOS[label]
    bundle = open_bundle(
        export_bundle(runs / label, tmp_path / "bundle", dtype=scenario["precision"])
    )
    model, lensnet = bundle.load()
    expected = live(runs, label)
    output = answer(model, bundle.config, expected["plan"])
    assert torch.equal(output.entry_nll, expected["entry_nll"])
    assert torch.equal(output.row_scores, expected["row_scores"])
    assert (model.backbone.head.weight is model.backbone.embedding.weight) == scenario.get(
        "tied", True
    )
    assert (lensnet is None) == (scenario.get("variants") == 0)
    if lensnet is not None:
        saved = torch.load(runs / label / "checkpoints" / STEP / "lens.pt", weights_only=True)[
            "lensnet"
        ]
        assert all(torch.equal(value, saved[name]) for name, value in lensnet.state_dict().items())
    world, stage = SCENARIOS[label][0], scenario["stage"]
    assert (
        bundle.manifest["source"]
        == f"run {label}, {STEP}, ZeRO-{stage} on {world} rank{'s' if world > 1 else ''}"
    )
    assert (bundle.step, bundle.manifest["dtype"]) == (2, scenario["precision"])


def test_tied_weights_are_stored_once(runs, tmp_path):
    tied, untied = (
        open_bundle(export_bundle(runs / label, tmp_path / label))
        for label in ("zero3_fp32", "zero3_untied")
    )
    assert tied.parameters.keys() == untied.parameters.keys() - {"backbone.head.weight"}
    assert (tied.tied, untied.tied) == ({"backbone.head.weight": "backbone.embedding.weight"}, {})


def test_bf16_rounds_the_masters_of_the_model_but_not_lensnet(runs, tmp_path):
    bundle = open_bundle(export_bundle(runs / "zero2_fp32", tmp_path / "bundle", dtype="bf16"))
    masters = live(runs, "zero2_fp32")["weights"]
    for name, value in bundle.weights():
        if name.startswith("lensnet."):
            assert value.dtype == torch.float32
        else:
            assert torch.equal(value, masters[name].to(torch.bfloat16))


def test_without_a_dtype_masters_stay_as_they_are(runs, tmp_path):
    bundle = open_bundle(export_bundle(runs / "zero3_groups", tmp_path / "bundle"))
    masters = live(runs, "zero3_groups")["weights"]
    assert {name for name, _ in bundle.weights()} - masters.keys() == {
        name for name, _ in bundle.weights("lensnet.")
    }
    assert all(torch.equal(bundle.weight(name), master) for name, master in masters.items())


def test_a_plain_run_is_joined_with_the_lensnet_of_another_run(runs, tmp_path):
    joined = open_bundle(
        export_bundle(
            runs / "zero2_plain",
            tmp_path / "bundle",
            lens_from=runs / "zero2_round_robin",
            dtype="bf16",
        )
    )
    plain, other = (live(runs, label)["weights"] for label in ("zero2_plain", "zero2_round_robin"))
    lens = torch.load(
        runs / "zero2_round_robin" / "checkpoints" / STEP / "lens.pt", weights_only=True
    )["lensnet"]
    expected = {f"lensnet.{name}": value for name, value in lens.items()} | {
        name: (plain if name.startswith("backbone.") else other)[name].bfloat16() for name in other
    }
    for name, weight in joined.weights():
        assert torch.equal(weight, expected[name]), name
    assert set(joined.parameters) | set(joined.tied) == set(expected) | set(joined.tied)
    assert joined.load()[1] is not None


def test_the_card_shows_the_last_validation_up_to_the_checkpoint(runs, tmp_path):
    assert last_validation(runs / "zero3_fp32" / "metrics.jsonl", step=2) == {"val/loss": 2.5}
    card = (export_bundle(runs / "zero3_fp32", tmp_path / "bundle") / "README.md").read_text()
    assert "| `val/loss` | 2.5 |" in card
    assert "9.5" not in card
    assert "ZeRO-3 on 2 ranks" in card
    changed = export_bundle(
        runs / "zero3_fp32", tmp_path / "changed", settings={"focus.iterations": "2"}
    )
    card = (changed / "README.md").read_text()
    assert "val/loss" not in card, "measured with the settings of the run"
    assert "; focus.iterations = 2 |" in card


# What is refused


def test_a_changed_byte_is_found_before_anything_is_written(copy, tmp_path):
    run = copy("zero3_fp32")
    shard = rank_file(run, 1)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(
        ConfigError, match=f"{shard.name} does not have the SHA-256 of the manifest"
    ):
        export_bundle(run, tmp_path / "bundle")
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    ("label", "rank"),
    [("zero1_accumulate", 1), ("zero2_bf16", 0), ("zero3_fp32", 0), ("zero3_groups", 1)],
)
def test_a_missing_shard_is_named(copy, tmp_path, label, rank, verify):
    run = copy(label)
    shard = rank_file(run, rank)
    shard.unlink()
    with pytest.raises(ConfigError, match=f"{shard.name} is missing"):
        export_bundle(run, tmp_path / "bundle", verify=verify)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("name", ["lens.pt", "model", "trainer.json"])
def test_other_files_that_are_missing_are_named(copy, tmp_path, name):
    run = copy("zero3_frozen")
    lost = rank_file(run, 1, "model") if name == "model" else run / "checkpoints" / STEP / name
    lost.unlink()
    with pytest.raises(
        ConfigError,
        match=(
            f"{lost.name} is missing" if name != "trainer.json" else "trainer.json cannot be read"
        ),
    ):
        export_bundle(run, tmp_path / "bundle", verify=False)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_shard_cut_short_is_named(copy, tmp_path, share):
    run = copy("zero1_bf16")
    shard = rank_file(run, 1)
    shard.write_bytes(shard.read_bytes()[: int(share * shard.stat().st_size)])
    with pytest.raises(ConfigError, match=f"{shard.name} has .* bytes, the manifest says"):
        export_bundle(run, tmp_path / "bundle")
    with pytest.raises(ConfigError, match=shard.name) as error:
        export_bundle(run, tmp_path / "bundle", verify=False)
    assert "\n" not in str(error.value)
    assert leftovers(tmp_path) == []


class Trap:
    """Does something when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("place", ["optim", "model", "lens.pt"])
def test_other_classes_are_refused_and_never_run(copy, tmp_path, place):
    run, sprung = copy("zero3_fp32"), tmp_path / "sprung"
    path = run / "checkpoints" / STEP / place if place == "lens.pt" else rank_file(run, 1, place)
    states = torch.load(path, weights_only=False)
    write_tensors(path, states | {"more": Trap(sprung)})
    manifest(run)  # whoever plants a class can write a manifest too
    with pytest.raises(
        ConfigError,
        match=(
            f"{path.name} holds posix.mkdir, which no checkpoint of this trainer holds: it is not"
            " loaded"
        ),
    ):
        export_bundle(run, tmp_path / "bundle")
    assert not sprung.exists()
    assert leftovers(tmp_path) == []


def manifest(run):
    checkpoint = run / "checkpoints" / STEP
    write_manifest(
        checkpoint,
        {path.name: fingerprint(path) for path in checkpoint.iterdir() if path.name != MANIFEST},
    )


def edit(path, change):
    """Changes what a file of `torch.save` holds."""
    states = torch.load(path, weights_only=False)
    change(states)
    write_tensors(path, states)


def test_parameters_that_the_files_do_not_account_for(copy, tmp_path):
    def rename(states):
        shapes = states["param_shapes"][0]
        states["param_shapes"][0] = {
            name.replace("head_up", "head_other"): shape for name, shape in shapes.items()
        }

    def forget(states):
        states["param_shapes"][1].popitem()

    def shorten(states):
        groups = states["optimizer_state_dict"]["fp32_flat_groups"]
        groups[0] = groups[0][:-1].clone()

    for change, kind, words in (
        (rename, "model", "gistnet.head_up.weight"),
        (forget, "model", "the share of one rank is"),
        (shorten, "optim", "the share of one rank is"),
    ):
        run = copy("zero3_fp32")
        edit(rank_file(run, 0, kind), change)
        with pytest.raises(ConfigError, match=words):
            export_bundle(run, tmp_path / "bundle", verify=False)
        shutil.rmtree(run)
    run = copy("zero2_fp32")

    def cut(states):
        groups = states["optimizer_state_dict"]["single_partition_of_fp32_groups"]
        groups[1] = groups[1][:-1].clone()

    edit(rank_file(run, 1), cut)
    with pytest.raises(
        ConfigError, match=r"group 1 has \d+ weights in the files of all ranks, not"
    ):
        export_bundle(run, tmp_path / "bundle", verify=False)
    assert leftovers(tmp_path) == []


def test_a_config_of_another_model_is_refused(copy, tmp_path):
    for changes, words in (
        (dict(ffn_dim=66), r"has shape \[\d+, \d+\], but \[\d+, \d+\] in this"),
        (dict(num_layers=3), r"backbone.num_layers = 3, but its files have 2"),
        (dict(wings=2), r"trainer.json: unknown key backbone.wings"),
    ):
        run = copy("zero3_fp32")
        edit_trainer(
            run / "checkpoints" / STEP,
            lambda trainer, changes=changes: trainer["config"]["backbone"].update(changes),
        )
        with pytest.raises(ConfigError, match=words):
            export_bundle(run, tmp_path / "bundle")
        shutil.rmtree(run)
    assert leftovers(tmp_path) == []


def test_the_config_of_a_checkpoint_is_its_own_whatever_the_run_is_today(copy, tmp_path):
    """A later start in the same folder writes another config.yaml."""
    run = copy("zero3_fp32")
    recipe = run / "config.yaml"
    for text in (recipe.read_text().replace("rope_base: 10000.0", "rope_base: 500000.0"), ""):
        assert text != recipe.read_text()
        recipe.write_text(text)
        bundle = open_bundle(export_bundle(run, tmp_path / "bundle", overwrite=True))
        assert bundle.config.backbone.rope_base == 1e4
    recipe.unlink()
    assert open_weights(run).config.backbone.rope_base == 1e4


def test_another_tokenizer_is_refused(copy, tmp_path):
    run = copy("zero3_fp32")
    tiny_tokenizer(50).save(run)
    with pytest.raises(
        ConfigError, match=r"tokenizer.json is not the tokenizer of .*: restore the run's own"
    ):
        export_bundle(run, tmp_path / "bundle")
    assert leftovers(tmp_path) == []


def test_what_is_no_checkpoint(runs, tmp_path):
    with pytest.raises(ConfigError, match="is not a checkpoint, a run with one, a bundle"):
        export_bundle(tmp_path, tmp_path / "bundle")
    bundle = export_bundle(runs / "zero3_fp32", tmp_path / "bundle")
    with pytest.raises(ConfigError, match="is a bundle already"):
        export_bundle(bundle, tmp_path / "other")
    with pytest.raises(ConfigError, match="exists: remove it, give another name"):
        export_bundle(runs / "zero3_fp32", bundle)


def test_a_damaged_newest_checkpoint_is_passed_over_and_named(copy, tmp_path, capsys):
    run = copy("zero3_fp32")
    newer = shutil.copytree(run / "checkpoints" / STEP, run / "checkpoints" / "step_00000004")
    for path in (run, run / "checkpoints", newer):
        assert open_weights(path).path == newer
    (newer / MANIFEST).unlink()
    assert STEP in open_bundle(export_bundle(run, tmp_path / "bundle")).title
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"checkpoint {newer} is damaged: no readable manifest.json")
    assert line.endswith(f": using {STEP}, the newest whole one")
    with pytest.raises(ConfigError, match=r"step_00000004 is damaged: .*name another one"):
        export_bundle(newer, tmp_path / "other")


# While the run goes on

PRUNED = (
    "step_00000002 was removed by its run while it was read .*: try again, or copy a checkpoint"
)


def going_on(run, monkeypatch, moment):
    """Lets the run save its next checkpoint and remove the last one, just before a function is called the first time."""
    module, name = moment.rsplit(".", 1)
    function, checkpoints = getattr(sys.modules[module], name), run / "checkpoints"

    def late(*args, **kwargs):
        if (checkpoints / STEP).exists():
            shutil.copytree(checkpoints / STEP, checkpoints / "step_00000004")
            remove_folder(checkpoints / STEP)
        return function(*args, **kwargs)

    monkeypatch.setattr(moment, late)


MOMENTS = [
    "mc_ds.weights.checkpoint.find.damage",
    "mc_ds.weights.checkpoint.read.read_trainer",
    "mc_ds.weights.checkpoint.read.engine_weights",
    "mc_ds.weights.checkpoint.read.lens_weights",
]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_that_prunes_gives_its_newer_checkpoint(copy, monkeypatch, capsys, moment):
    run = copy("zero3_fp32")
    going_on(run, monkeypatch, moment)
    assert open_weights(run).path.name == "step_00000004"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_named_checkpoint_that_is_pruned_is_not_called_damaged(copy, monkeypatch, moment):
    run = copy("zero3_fp32")
    going_on(run, monkeypatch, moment)
    with pytest.raises(ConfigError, match=PRUNED) as error:
        open_weights(run / "checkpoints" / STEP)
    assert "damaged" not in str(error.value)


def test_a_checkpoint_that_is_pruned_while_it_is_converted(copy, monkeypatch, tmp_path, capsys):
    run = copy("zero3_fp32")
    going_on(run, monkeypatch, "mc_ds.weights.checkpoint.lazy._read_into")
    assert main([str(run), str(tmp_path / "bundle")]) == 2
    said = capsys.readouterr().err
    assert re.search(PRUNED, said)
    assert said.count("\n") == 1
    assert leftovers(tmp_path) == []


# Interrupted


def test_an_error_in_the_middle_leaves_nothing(runs, tmp_path, monkeypatch):
    add, seen = BundleWriter.add, []

    def fail(writer, name, tensor):
        seen.append(name)
        if len(seen) == 9:
            assert leftovers(tmp_path)  # it is being written
            raise OSError(28, "No space left on device", "somewhere")
        add(writer, name, tensor)

    monkeypatch.setattr(BundleWriter, "add", fail)
    assert main([str(runs / "zero3_fp32"), str(tmp_path / "bundle")]) == 2
    assert leftovers(tmp_path) == []


KILLED = """
import os, sys
from mc_ds.weights.bundle.write import BundleWriter
add, seen = BundleWriter.add, []
def killed(writer, name, tensor):
    add(writer, name, tensor)
    seen.append(name)
    if len(seen) == 9:
        os.kill(os.getpid(), int(sys.argv[1]))
BundleWriter.add = killed
from tools.convert_checkpoint import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_conversion_leaves_no_bundle(runs, tmp_path, number):
    """TERM cleans up; after KILL the next conversion does."""
    ended = run(
        [sys.executable, "-c", KILLED, str(int(number)), runs / "zero3_fp32", tmp_path / "bundle"],
        environment(runs.folder),
    )
    assert ended.returncode != 0
    assert not (tmp_path / "bundle").exists()
    assert bool(leftovers(tmp_path)) == (number == signal.SIGKILL)
    export_bundle(runs / "zero3_fp32", tmp_path / "bundle")
    assert leftovers(tmp_path) == ["bundle"]


def test_a_conversion_leaves_another_one_alone(runs, tmp_path):
    source = runs / "zero3_fp32"
    first = open_bundle(export_bundle(source, tmp_path / "other"))
    with BundleWriter(
        tmp_path / "bundle", first.config, first.tokenizer(), step=1, source="the slower one"
    ) as writer:
        for name, tensor in first.weights():
            writer.add(name, tensor)
        with pytest.raises(ConfigError, match="bundle is in use by process"):
            export_bundle(source, tmp_path / "bundle")
        slow = writer.finish()
    assert open_bundle(slow).step == 1
    assert leftovers(tmp_path) == ["bundle"]


# The command line


def test_the_tool(runs, tmp_path, capsys):
    out, checkpoint = tmp_path / "bundle", runs / "zero3_fp32" / "checkpoints" / STEP
    assert main([str(checkpoint), str(out), "--dtype", "bf16"]) == 0
    assert f"{out}: run zero3_fp32, {STEP}, ZeRO-3 on 2 ranks" in capsys.readouterr().out
    assert main([str(checkpoint), str(out)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {out} exists")
    assert open_bundle(out).manifest["dtype"] == "bf16"
    assert main([str(checkpoint), str(out), "--overwrite", "--no_verify"]) == 0
    assert open_bundle(out).manifest["dtype"] == "fp32"
    assert leftovers(tmp_path) == ["bundle"]


def test_the_tool_puts_notes_into_the_card(runs, tmp_path, capsys):
    out, run = tmp_path / "bundle", str(runs / "zero3_fp32")
    assert main([run, str(out), "--note", "commit=abc", "--note", "command=train --a=b"]) == 0
    assert open_bundle(out).manifest["notes"] == {"commit": "abc", "command": "train --a=b"}
    assert "| command | train --a=b |" in (out / "README.md").read_text()
    capsys.readouterr()
    assert main([run, str(tmp_path / "other_bundle"), "--note", "commit="]) == 2
    assert (
        capsys.readouterr().err
        == "error: note 'commit': give a name and a text, both on one line\n"
    )
    with pytest.raises(SystemExit):
        main([run, str(tmp_path / "other_bundle"), "--note", "nameless"])
    assert "'nameless': use NAME=TEXT" in capsys.readouterr().err
    assert leftovers(tmp_path) == ["bundle"]


def test_the_tool_writes_a_folder_for_transformers_too(runs, tmp_path, capsys):
    out, hf = tmp_path / "bundle", tmp_path / "hf"
    assert main([str(runs / "zero3_untied"), str(out), "--hf", str(hf)]) == 0
    assert f"{hf}: the backbone" in capsys.readouterr().out
    shape = json.loads((hf / "config.json").read_text())
    assert (shape["model_type"], shape["tie_word_embeddings"]) == ("llama", False)
    assert torch.equal(
        load_file(hf / "model.safetensors")["lm_head.weight"],
        open_bundle(out).weight("backbone.head.weight"),
    )


# Files


def test_values_are_read_from_their_place_in_the_file(tmp_path):
    path = tmp_path / "state.pt"
    whole = torch.arange(1000, dtype=torch.float32)
    from_view = {
        "view": whole[100:107],
        "half": torch.arange(5, dtype=torch.bfloat16),
        "none": torch.empty(0, 3),
    }
    torch.save(from_view, path)
    state = load_lazy(path)
    assert state["view"].is_meta
    assert torch.equal(stored(path, state["view"]).read(), whole[100:107])
    assert torch.equal(stored(path, state["half"]).read(), torch.arange(5, dtype=torch.bfloat16))
    assert stored(path, state["none"]).read().shape == (0, 3)
    part = piece_of(path, state["view"]).part(3, 2)
    assert (part.count, part.offset) == (2, piece_of(path, state["view"]).offset + 12)


# Memory


@pytest.mark.slow
def test_memory_is_bounded_by_the_largest_tensor_and_not_by_the_model(tmp_path):
    """A checkpoint of 1.9 GB, of a model of 624 MB, whose largest tensor has 22 MB. (The C
    library keeps up to 64 MB that were freed.)
    """
    figures = measure(tmp_path, gigabytes=0.6, ranks=2, dtype="bf16")
    assert figures["wrong_values"] == 0
    assert figures["model"] > 20 * figures["largest_tensor"]
    assert (
        figures["peak_beyond_program"] < 2 * figures["largest_tensor"] + 64 < figures["model"] / 5
    )
