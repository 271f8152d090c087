"""The bundle: what is written is read, by name, dtype and value; what is damaged, missing or
foreign is named in one line.
"""

import hashlib
import json
import random
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from mc_ds.config import ConfigError
from mc_ds.weights.bundle import BundleWriter, is_bundle, open_bundle
from mc_ds.weights.bundle.card import model_card
from mc_ds.weights.bundle.shard import DATA_START, ShardFile
from mc_ds.weights.layout import layout_of, tree_hashes
from tests.support.factories import VOCAB, mc_config, model, plan, run_config, tokens
from tests.support.processes import ROOT
from tests.support.tiny_bundle import networks, state_of, tiny_tokenizer, write, write_bundle

PLAIN = mc_config(num_random_variants=0)


def writer(folder, config=None, **options):
    return BundleWriter(
        folder / "bundle",
        config or run_config(),
        tiny_tokenizer(),
        step=1,
        source="a test",
        **options,
    )


def parameters(config=None):
    """All stored parameters of a random model by name."""
    config = config or run_config()
    layout = layout_of(config, vocab_size=VOCAB)
    return {
        name: value for name, value in state_of(*networks(config)).items() if name in layout.shapes
    }


def one_line(error):
    return "\n" not in str(error.value)


# Round trips


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_written_is_loaded(tmp_path, tied):
    config = run_config(backbone={"tie_embeddings": tied})
    path, root, lensnet = write(tmp_path / "bundle", config)
    bundle = open_bundle(path)
    assert (bundle.config, bundle.step, bundle.vocab_size) == (config, 7, VOCAB)
    assert bundle.tokenizer().encode("w3 w1") == [4, 2]
    loaded, loaded_lens = bundle.load(device="cpu")
    for module, original in ((loaded, root), (loaded_lens, lensnet)):
        state = original.state_dict()
        assert module.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
        assert not any(part.training for part in module.modules())
    assert (loaded.backbone.head.weight is loaded.backbone.embedding.weight) == tied
    rows = plan(config.mc, 2)
    with torch.no_grad():
        expected, output = (network(tokens(config.mc, 2), *rows) for network in (root, loaded))
        scores = [
            network(output.visible_entries, *rows, output.lod0, tokens(config.mc, 2))
            for network in (lensnet, loaded_lens)
        ]
    assert torch.equal(output.entry_nll, expected.entry_nll)
    assert torch.equal(*scores)


def test_a_plain_language_model_has_no_other_parts(tmp_path):
    path, root, _ = write(tmp_path / "bundle", run_config(PLAIN))
    bundle = open_bundle(path)
    loaded, lensnet = bundle.load()
    assert lensnet is None
    assert loaded.gistnet is None
    assert loaded.state_dict().keys() == root.state_dict().keys()
    assert {name.partition(".")[0] for name in bundle.parameters} == {"backbone"}
    assert not [file for file in path.iterdir() if file.name.startswith(("gistnet", "lensnet"))]


@pytest.mark.parametrize("stored", [None, "fp32", "bf16"])
@pytest.mark.parametrize("wanted", [None, torch.float32, torch.bfloat16])
def test_dtypes(tmp_path, stored, wanted):
    """The model has the stored dtype or the wanted one, LensNet always float32."""
    path, root, lensnet = write(tmp_path / "bundle", dtype=stored)
    bundle = open_bundle(path)
    assert bundle.manifest["dtype"] == (stored or "fp32")
    loaded, loaded_lens = bundle.load(dtype=wanted)
    kept = torch.bfloat16 if stored == "bf16" else torch.float32
    for (name, value), original in zip(
        loaded.state_dict().items(), root.state_dict().values(), strict=True
    ):
        assert torch.equal(value, original.to(kept).to(wanted or kept)), name
        assert value.dtype == (wanted or kept)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            loaded_lens.state_dict().values(), lensnet.state_dict().values(), strict=True
        )
    )


def test_a_smaller_lensnet_is_rounded_and_still_runs_in_float32(tmp_path):
    path, _, lensnet = write(tmp_path / "bundle", lens_dtype="bf16")
    _, loaded = open_bundle(path).load()
    for value, original in zip(
        loaded.state_dict().values(), lensnet.state_dict().values(), strict=True
    ):
        assert value.dtype == torch.float32
        assert torch.equal(value, original.bfloat16().float())
    with pytest.raises(ConfigError, match="lens_dtype = 'int8': use fp32, or bf16"):
        write(tmp_path / "wrong", lens_dtype="int8")


def test_tied_weights_are_stored_once_and_may_be_given_twice(tmp_path):
    state = parameters()
    both = {**state, "backbone.head.weight": state["backbone.embedding.weight"].clone()}
    once, twice = (
        open_bundle(
            write_bundle(
                tmp_path / name,
                run_config(),
                tiny_tokenizer(),
                weights.items(),
                step=1,
                source="a test",
            )
        )
        for name, weights in (("once", state), ("twice", both))
    )
    assert once.parameters == twice.parameters
    assert once.manifest["hashes"] == twice.manifest["hashes"]
    assert all(torch.equal(value, twice.weight(name)) for name, value in once.weights())
    assert once.tied == {"backbone.head.weight": "backbone.embedding.weight"}
    both["backbone.head.weight"][3, 4] += 1e-3
    with pytest.raises(
        ConfigError,
        match=(
            r"backbone.head.weight differs from backbone.embedding.weight.*set tie_embeddings ="
            r" false"
        ),
    ):
        write_bundle(
            tmp_path / "wrong",
            run_config(),
            tiny_tokenizer(),
            both.items(),
            step=1,
            source="a test",
        )
    assert not (tmp_path / "wrong").exists()


def test_another_length_of_history(tmp_path):
    path, *_ = write(tmp_path / "bundle")
    loaded, lensnet = open_bundle(path).load(seq_len=192)
    assert (loaded.mc.seq_len, loaded.mc.train_wc_length) == (192, 96)
    assert lensnet.config.seq_len == 192


def test_loaded_weights_do_not_depend_on_the_files(tmp_path):
    path, root, _ = write(tmp_path / "bundle")
    loaded, _ = open_bundle(path).load()
    file = next(path.glob("backbone-*"))
    with file.open("r+b") as content:
        content.seek(DATA_START)
        content.write(b"\xff" * 4096)
    assert torch.equal(loaded.backbone.embedding.weight, root.backbone.embedding.weight)


def test_reading_one_by_one(tmp_path):
    path, root, _ = write(tmp_path / "bundle")
    bundle = open_bundle(path)
    state = root.state_dict()
    gistnet = dict(bundle.weights("gistnet."))
    assert gistnet.keys() == {name for name in state if name.startswith("gistnet.")}
    assert all(torch.equal(value, state[name]) for name, value in gistnet.items())
    assert torch.equal(bundle.weight("backbone.norm.weight"), state["backbone.norm.weight"])
    with pytest.raises(KeyError):
        bundle.weight("backbone.head.weight")
    assert {name: tuple(value.shape) for name, value in bundle.weights()} == bundle.parameters


def test_making_a_layout_draws_no_random_numbers():
    before = torch.get_rng_state()
    layout_of(run_config(), vocab_size=VOCAB)
    assert torch.equal(torch.get_rng_state(), before)


def test_bundles_need_neither_deepspeed_nor_the_trainer():
    others = ("deepspeed", "mc_ds.training", "mc_ds.inference")
    code = (
        "import sys, mc_ds.weights.bundle; print([name for name in sys.modules if"
        f" name.startswith({others})])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        == "[]\n"
    )


# Files


def test_every_file_is_in_the_manifest_with_its_hash(tmp_path):
    path, *_ = write(tmp_path / "bundle", max_shard_bytes=20_000)
    manifest = json.loads((path / "manifest.json").read_text())
    files = {
        file.name: file.read_bytes() for file in path.iterdir() if file.name != "manifest.json"
    }
    assert manifest["files"] == {
        name: {"sha256": hashlib.sha256(c).hexdigest(), "bytes": len(c)}
        for name, c in sorted(files.items())
    }
    assert {"config.json", "README.md", "tokenizer.json"} <= files.keys()
    assert manifest["created_by"].keys() == {"mc_ds", "torch"}


def test_shards_are_safetensors_of_limited_size(tmp_path):
    limit = 20_000
    path, root, lensnet = write(tmp_path / "bundle", max_shard_bytes=limit)
    state = state_of(root, lensnet)
    found = {}
    for part in ("backbone", "gistnet", "lensnet"):
        files = sorted(path.glob(f"{part}-*"))
        assert [file.name for file in files] == [
            f"{part}-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)
        ]
        assert len(files) > 2
        for file in files:
            tensors = load_file(file)
            assert sum(tensor.nbytes for tensor in tensors.values()) <= limit or len(tensors) == 1
            assert found.keys().isdisjoint(tensors)
            found |= tensors
    assert found.keys() == open_bundle(path).parameters.keys()
    assert all(torch.equal(value, state[name]) for name, value in found.items())


def test_a_shard_goes_on_in_another_file_when_its_header_is_full(tmp_path):
    shard = ShardFile(tmp_path / "shard")
    tensors = {
        f"a.rather.long.name.of.a.parameter.{n}": torch.full((n % 3, 2), float(n))
        for n in range(1000)
    }
    written = [name for name, tensor in tensors.items() if shard.add(name, tensor)]
    shard.finish()
    assert 200 < len(written) < 1000
    assert written == shard.names == list(tensors)[: len(written)]
    assert (tmp_path / "shard").stat().st_size == DATA_START + sum(
        tensors[name].nbytes for name in written
    )
    found = load_file(tmp_path / "shard")
    assert all(torch.equal(found[name], tensors[name]) for name in written)


def test_many_parameters_need_many_files(tmp_path):
    config = run_config(
        PLAIN, {"num_layers": 60, "dim": 8, "num_heads": 2, "num_kv_heads": 1, "ffn_dim": 8}
    )
    path, root, _ = write(tmp_path / "bundle", config)
    assert len(list(path.glob("backbone-*"))) > 1
    loaded, _ = open_bundle(path).load()
    assert all(
        torch.equal(value, root.state_dict()[name]) for name, value in loaded.state_dict().items()
    )


def test_parameters_of_two_dtypes(tmp_path):
    state = parameters()
    for name in list(state)[::2]:
        if not name.startswith("lensnet."):
            state[name] = state[name].bfloat16()
    bundle = open_bundle(
        write_bundle(
            tmp_path / "bundle",
            run_config(),
            tiny_tokenizer(),
            state.items(),
            step=1,
            source="a test",
        )
    )
    assert bundle.manifest["dtype"] == "mixed"
    assert all(torch.equal(value, state[name]) for name, value in bundle.weights())
    assert {value.dtype for _, value in bundle.weights("backbone.")} == {
        torch.float32,
        torch.bfloat16,
    }
    for wanted in (None, torch.bfloat16):  # a model is of one dtype
        loaded, _ = bundle.load(dtype=wanted)
        assert {value.dtype for value in loaded.state_dict().values()} == {wanted or torch.float32}
        starts = torch.arange(48, 96)[None]
        assert loaded(
            torch.ones(1, 97, dtype=torch.int64), torch.zeros_like(starts), starts
        ).loss.isfinite()


def test_views_and_transposes_are_stored_as_they_look(tmp_path):
    state = parameters()
    name = "backbone.blocks.0.qkv.weight"
    state[name] = torch.stack([state[name].T] * 2)[1].T
    assert not state[name].is_contiguous()
    bundle = open_bundle(
        write_bundle(
            tmp_path / "bundle",
            run_config(),
            tiny_tokenizer(),
            state.items(),
            step=1,
            source="a test",
        )
    )
    assert torch.equal(bundle.weight(name), state[name])


# Hashes of what makes a tree


def hashes(config=None, change=None, order=None):
    state = parameters()
    if change is not None:
        state[change] = state[change] + 1
    names = sorted(state, key=order)
    digests = {name: hashlib.sha256(state[name].numpy().tobytes()).hexdigest() for name in names}
    return tree_hashes(config or run_config(), digests)


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        ("backbone.embedding.weight", {"gistnet", "lensnet"}),
        ("gistnet.level_embedding", {"gistnet"}),
        ("gistnet.blocks.1.down.weight", {"gistnet"}),
        ("lensnet.index.gate.2.bias", {"lensnet"}),
        ("lensnet.index.project.weight", {"lensnet"}),
        ("lensnet.blocks.0.qkv.weight", set()),
        ("lensnet.project.weight", set()),
        ("backbone.blocks.0.qkv.weight", set()),
        ("backbone.norm.weight", set()),
    ],
)
def test_tree_hashes_follow_what_decides_gists_and_index_vectors(change, changed):
    before, after = hashes(), hashes(change=change)
    assert {name for name in before if before[name] != after[name]} == changed


def test_tree_hashes_follow_settings_and_no_order():
    before = hashes()
    assert hashes(order=lambda name: random.Random(name).random()) == before
    halves = hashes(run_config(mc_config(block_size=2)))
    assert {name for name in before if before[name] != halves[name]} == {"gistnet", "lensnet"}
    narrow = hashes(run_config(mc_config(gist_dim=16)))
    assert {name for name in before if before[name] != narrow[name]} == {"gistnet"}
    assert hashes(run_config(mc_config(recent_tokens=16, lens_temperature=0.3))) == before


def test_the_opened_bundle_has_the_hashes(tmp_path):
    path, *_ = write(tmp_path / "bundle")
    bundle = open_bundle(path)
    assert (bundle.gistnet_hash, bundle.lensnet_hash) == (
        bundle.manifest["hashes"]["gistnet"],
        bundle.manifest["hashes"]["lensnet"],
    )
    assert len({bundle.gistnet_hash, bundle.lensnet_hash}) == 2
    half = open_bundle(write(tmp_path / "half", dtype="bf16")[0])
    assert half.gistnet_hash != bundle.gistnet_hash


# What a writer refuses


def test_missing_parameters_are_named(tmp_path):
    state = parameters()
    del state["gistnet.residual_gain"], state["lensnet.head_up.bias"]
    with pytest.raises(
        ConfigError,
        match=r"2 of \d+ parameters are missing: gistnet.residual_gain, lensnet.head_up.bias",
    ):
        write_bundle(
            tmp_path / "bundle",
            run_config(),
            tiny_tokenizer(),
            state.items(),
            step=1,
            source="a test",
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        (
            "backbone.blocks.2.out.weight",
            torch.ones(32, 32),
            "backbone.blocks.2.out.weight is not part of this configuration",
        ),
        (
            "backbone.blocks.1.out.weight",
            torch.ones(32, 33),
            r"has shape \[32, 33\], but \[32, 32\] in this",
        ),
        (
            "backbone.norm.weight",
            torch.ones(32, dtype=torch.int32),
            "is of torch.int32: weights must be floating-point numbers",
        ),
        (
            "backbone.norm.weight",
            torch.ones(32, dtype=torch.float16),
            "is of torch.float16, which bundles do not support: give dtype",
        ),
        ("backbone.head.weight", torch.ones(VOCAB, 31), "has shape"),
    ],
)
def test_wrong_parameters_are_refused(tmp_path, name, tensor, words):
    with writer(tmp_path) as bundle, pytest.raises(ConfigError, match=words) as error:
        bundle.add(name, tensor)
    assert one_line(error)
    assert list(tmp_path.iterdir()) == []


def test_a_parameter_comes_once(tmp_path):
    with writer(tmp_path, dtype="bf16") as bundle:
        bundle.add(
            "backbone.norm.weight", torch.ones(32, dtype=torch.float16)
        )  # converted, whatever it was
        with pytest.raises(ConfigError, match=r"backbone.norm.weight was added twice"):
            bundle.add("backbone.norm.weight", torch.ones(32))


def test_nothing_is_there_before_it_is_finished(tmp_path):
    with writer(tmp_path) as bundle:
        for name, value in parameters().items():
            bundle.add(name, value)
        assert not (tmp_path / "bundle").exists()
        bundle.finish()
        assert is_bundle(tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_what_is_there_is_kept(tmp_path):
    path, *_ = write(tmp_path / "bundle")
    with pytest.raises(
        ConfigError, match=r"exists: remove it, give another name, or overwrite it \(--overwrite\)"
    ):
        write(path)
    before = open_bundle(path)
    write(path, run_config(PLAIN), overwrite=True)
    assert open_bundle(path).config != before.config
    assert [entry.name for entry in tmp_path.iterdir()] == ["bundle"]
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "mine.txt").write_text("keep me")
    with pytest.raises(ConfigError, match="notes exists and is not a bundle"):
        write(notes, overwrite=True)
    assert (notes / "mine.txt").read_text() == "keep me"


def test_a_dtype_that_is_none(tmp_path):
    with pytest.raises(ConfigError, match="dtype = 'fp16': use fp32 or bf16"):
        writer(tmp_path, dtype="fp16")


# What a reader refuses


def test_folders_that_are_no_bundles(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "manifest.json").write_text('{"files": {}}')
    for folder in (tmp_path, tmp_path / "nothing", tmp_path / "checkpoint"):
        assert not is_bundle(folder)
        with pytest.raises(ConfigError, match="is not a bundle: give a folder made by"):
            open_bundle(folder)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "README.md", "backbone", "gistnet", "lensnet"]
)
@pytest.mark.parametrize("harm", ["byte", "cut", "gone"])
def test_a_damaged_file_is_named(tmp_path, name, harm):
    path, *_ = write(tmp_path / "bundle")
    file = next(path.glob(f"{name}*"))
    content = bytearray(file.read_bytes())
    if harm == "gone":
        file.unlink()
    elif harm == "cut":
        file.write_bytes(content[:-1])
    else:
        content[len(content) // 2] ^= 4
        file.write_bytes(content)
        if name == "backbone":
            open_bundle(path, verify=False)  # looks at sizes only
    with pytest.raises(ConfigError, match=f"bundle .* is damaged: {file.name}") as error:
        open_bundle(path, verify=harm == "byte")
    assert one_line(error)


def edit(path, name, change):
    """Changes a JSON file of a bundle and what the manifest says of it."""
    content = json.loads((path / name).read_text())
    change(content)
    (path / name).write_text(json.dumps(content))
    if name != "manifest.json":
        data = (path / name).read_bytes()
        proof = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        edit(path, "manifest.json", lambda manifest: manifest["files"].update({name: proof}))


def test_other_formats_and_strange_manifests(tmp_path):
    def move(manifest):
        manifest["parameters"]["backbone.norm.weight"]["file"] = "../secret"

    for number, (change, words) in enumerate(
        [
            (
                lambda manifest: manifest.update(format=2),
                "has bundle format 2, but this version reads format 1",
            ),
            (lambda manifest: manifest.update(hashes={}), "manifest.json is damaged"),
            (lambda manifest: manifest.update(step="soon"), "manifest.json is damaged"),
            (lambda manifest: manifest.update(files=[]), "manifest.json is damaged"),
            (
                lambda manifest: manifest["files"].pop("config.json"),
                "its list of files lacks config.json",
            ),
            (move, r"its list of files lacks \.\./secret"),
        ]
    ):
        path, *_ = write(tmp_path / str(number))
        edit(path, "manifest.json", change)
        with pytest.raises(ConfigError, match=words) as error:
            open_bundle(path)
        assert one_line(error)


def test_a_config_that_does_not_fit(tmp_path):
    path, *_ = write(tmp_path / "bundle")
    edit(path, "config.json", lambda content: content["run"]["mc"].update(lens_dim=64))
    with pytest.raises(ConfigError, match=r"lensnet.\S+ does not match its config"):
        open_bundle(path).load()
    edit(path, "config.json", lambda content: content["run"]["mc"].update(lens_colour="red"))
    with pytest.raises(ConfigError, match=r"config.json: unknown key mc.lens_colour"):
        open_bundle(path)
    edit(path, "config.json", lambda content: content.pop("run"))
    with pytest.raises(ConfigError, match=r"config.json is damaged"):
        open_bundle(path)


def test_a_shard_that_is_not_as_the_manifest_says(tmp_path):
    path, *_ = write(tmp_path / "bundle")
    edit(
        path,
        "manifest.json",
        lambda manifest: manifest["parameters"]["backbone.norm.weight"].update(dtype="bf16"),
    )
    bundle = open_bundle(path)
    with pytest.raises(
        ConfigError,
        match=r"norm.weight in backbone-00001-of-00001.safetensors does not match the manifest",
    ):
        list(bundle.weights("backbone.norm"))


# The card


def test_the_card_says_what_it_is(tmp_path):
    path, *_ = write(tmp_path / "bundle", metrics={"val/loss": 3.25})
    card = (path / "README.md").read_text()
    for words in (
        "# bundle",
        "| source | a test |",
        "| optimizer step | 7 |",
        "| block size K | 4 |",
        "| `val/loss` | 3.25 |",
        "load_bundle",
    ):
        assert words in card
    count = sum(value.numel() for value in model(run_config()).backbone.parameters())
    assert f"| backbone parameters | {count:,} |" in card
    plain = (write(tmp_path / "plain", run_config(PLAIN))[0] / "README.md").read_text()
    assert "lensnet" not in plain
    assert "block size" not in plain
    assert "## Figures" not in plain
    assert "## How it was made" not in plain


@pytest.mark.parametrize(
    ("name", "how"), [("recall_small", "GistNet summarises"), ("code_focus", "LensNet decides")]
)
def test_shipped_models_have_the_card_that_would_be_written_today(name, how):
    folder = ROOT / "assets" / name
    bundle = open_bundle(folder)
    shipped = (folder / "README.md").read_text().splitlines()
    card = model_card(name, bundle.config, bundle.manifest, {}).splitlines()
    assert not [line for line in card if line not in shipped]
    assert f"instead of its whole history: {how}" in card[2]


def test_the_card_has_the_notes_of_its_making(tmp_path):
    notes = {"command": "python train.py --seed 2 | tee log", "hardware": "one H200"}
    path, *_ = write(tmp_path / "bundle", notes=notes, trained_with={"torch": "2.11.0"})
    assert open_bundle(path).manifest["notes"] == notes
    card = (path / "README.md").read_text()
    for row in (
        "| command | python train.py --seed 2 \\| tee log |",
        "| hardware | one H200 |",
        "| trained with | torch 2.11.0 |",
    ):
        assert row in card
    assert card.index("## How it was made") < card.index("| command |") < card.index("## Use")
    for wrong in ({"command": "two\nlines"}, {"": "nameless"}, {"hardware": " "}):
        with pytest.raises(ConfigError, match="give a name and a text, both on one line") as error:
            write(tmp_path / "wrong", notes=wrong)
        assert one_line(error)
    assert [entry.name for entry in tmp_path.iterdir()] == ["bundle"]
