"""A bundle may come from anyone: what it claims is compared before anything is made of it, and of
paths it decides nothing.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from launch.evaluate import main as evaluate
from mc_ds.config import ConfigError, RunConfig
from mc_ds.config.errors import field_paths
from mc_ds.config.portable import is_path, without_paths
from mc_ds.data import OtherText
from mc_ds.data.tokenizer import HFTokenizer, load_tokenizer
from mc_ds.inference import load_bundle
from mc_ds.weights.bundle import open_bundle
from mc_ds.weights.bundle.read import Bundle
from tests.support.factories import VOCAB, run_config
from tests.support.mutations import DEEP, dumps, reseal
from tests.support.processes import ROOT
from tests.support.tiny_bundle import tiny_tokenizer, write

Change = Callable[[Any], Any]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("bundle") / "bundle")[0]


@pytest.fixture
def bundle(sound: Path, tmp_path: Path) -> Path:
    """A bundle of its own, to be harmed."""
    (tmp_path / "bundle").mkdir()
    for path in sound.iterdir():
        (tmp_path / "bundle" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "bundle"


def edit(bundle: Path, name: str, change: Change) -> None:
    content = json.loads((bundle / name).read_text())
    change(content)
    (bundle / name).write_bytes(dumps(content))
    if name != "manifest.json":
        reseal(bundle, "tokenizer.json")


def refused(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        call()
    assert str(error.value).isprintable()


def test_a_tokenizer_that_the_manifest_does_not_list_is_nothing(bundle: Path) -> None:
    model = bundle / "tokenizer.model"
    (bundle / "tokenizer.json").rename(model)
    other = tiny_tokenizer(VOCAB)

    def rename(manifest: Any) -> None:
        manifest["files"][model.name] = manifest["files"].pop("tokenizer.json")
        manifest["tokenizer"]["file"] = model.name

    edit(bundle, "manifest.json", rename)
    (bundle / "tokenizer.json").write_bytes(other.content())
    refused(open_bundle(bundle).tokenizer, r"tokenizer.model is not a readable sentencepiece model")
    refused(
        lambda: load_tokenizer(bundle), r"tokenizer.model is not a readable sentencepiece model"
    )


def test_the_tokenizer_is_the_one_that_the_manifest_describes(bundle: Path) -> None:
    assert isinstance(open_bundle(bundle).tokenizer(), HFTokenizer)
    edit(bundle, "manifest.json", lambda manifest: manifest["tokenizer"].update(sha256="0" * 64))
    refused(open_bundle(bundle).tokenizer, rf"tokenizer.json has {VOCAB} pieces and SHA-256")
    (bundle / "tokenizer.json").write_bytes(tiny_tokenizer(VOCAB + 1).content())
    edit(bundle, "config.json", lambda config: None)
    refused(open_bundle(bundle).tokenizer, rf"has {VOCAB + 1} pieces .*but {VOCAB} and")


@pytest.mark.parametrize("size", [10, 2**32, None, "61", 10**400])
def test_every_vocabulary_is_the_same(bundle: Path, size: Any) -> None:
    edit(bundle, "config.json", lambda config: config.update(vocab_size=size))
    refused(lambda: open_bundle(bundle), r"vocab_size = .*its tokenizer has 61 pieces")


@pytest.mark.parametrize("rows", [VOCAB - 1, VOCAB + 1])
def test_the_embedding_has_a_row_for_each_piece(bundle: Path, rows: int) -> None:
    """What has fewer fails at the first id beyond them, what has more writes ids without text."""
    name = "backbone.embedding.weight"
    (path,) = bundle.glob("backbone*")
    tensors = load_file(path)
    tensors[name] = torch.zeros(rows, tensors[name].size(1))
    save_file(tensors, path)
    edit(bundle, "manifest.json", lambda there: there["parameters"][name].update(shape=[rows, 32]))
    reseal(bundle, "tokenizer.json")
    refused(
        lambda: open_bundle(bundle), rf"has 61 pieces, and its embedding the shape \[{rows}, 32\]"
    )


def names_no_path(out: Path, config: RunConfig) -> Bundle:
    """Write a bundle of a run whose paths begin with `/author`, add them to it by hand, and open
    it: nothing names them, and text comes from the user alone.
    """
    path = write(out, config)[0]
    assert not [file.name for file in path.iterdir() if b"/author" in file.read_bytes()]
    edit(path, "config.json", lambda there: there.update(run=config.model_dump(mode="json")))
    opened = open_bundle(path)
    assert "/author" not in opened.config.model_dump_json()
    refused(opened.corpus, r"a bundle does not record their folder: give it by --data_root")
    return opened


def test_no_path_is_written_into_a_bundle_or_read_from_it(tmp_path: Path) -> None:
    paths = [name for name, field in field_paths(RunConfig).items() if is_path(field)]
    assert {"out_dir", "data.root", "data.cache_dir", "data.tokenizer", "train.init_from"} <= {
        *paths
    }
    content = run_config().model_dump()
    for name in paths:
        section = content
        for key in name.split(".")[:-1]:
            section = section[key]
        section[name.rpartition(".")[2]] = f"/author/{name}"
    content["data"]["source"] = "files"
    config = RunConfig.model_validate(content)
    opened = names_no_path(tmp_path / "bundle", config)
    assert opened.config == without_paths(config, own=str(tmp_path / "bundle"))


def test_a_bundle_of_a_run_on_datasets_names_none_of_them(tmp_path: Path) -> None:
    content = run_config().model_dump()
    content["data"] |= {
        "datasets": [{"path": "/author/books"}, {"path": "/author/code", "weight": 2.0}],
        "validation": [{"path": "/author/held-out"}],
    }
    names_no_path(tmp_path / "bundle", RunConfig.model_validate(content))


def test_text_to_measure_on_comes_from_the_user(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    for number in range(40):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"w7 w{number} " * 40)
    edit(bundle, "config.json", lambda content: content["run"]["data"].update(source="files"))
    corpus = open_bundle(bundle).corpus(other=OtherText(str(tmp_path / "texts")))
    assert "w7" in corpus.tokenizer.decode(corpus.train[0].shards.window(0, 9))
    assert corpus.cache.is_relative_to(Path(".cache"))
    few = ["--policies", "recency", "--samples", "1", "--device", "cpu", "--out", "eval.json"]
    assert evaluate(["--bundle", str(bundle), *few]) == 2
    assert not Path("eval.json").exists()
    assert evaluate(["--bundle", str(bundle), "--data_root", "texts", *few]) == 0
    assert json.loads(Path("eval.json").read_text())


def test_the_shipped_bundle_names_no_path() -> None:
    config = json.loads((ROOT / "assets" / "recall_small" / "config.json").read_text())
    read = RunConfig.model_validate(config["run"])
    assert read == without_paths(read, own=".")


@pytest.mark.parametrize("name", ["config.json", "README.md", "backbone", "tokenizer.json"])
@pytest.mark.parametrize("kind", ["link", "pipe", "device", "folder"])
def test_only_regular_files(bundle: Path, kind: str, name: str) -> None:
    path = next(bundle.glob(f"{name}*"))
    path.rename(bundle.parent / "outside")
    match kind:
        case "link":
            path.symlink_to(bundle.parent / "outside")
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "folder":
            path.mkdir()
    refused(lambda: open_bundle(bundle), rf"{path.name} is (a link, not a file|not a regular file)")
    refused(lambda: open_bundle(bundle, verify=False), rf"{path.name} is ")


def test_a_manifest_that_is_a_link(bundle: Path) -> None:
    """As in the cache of a hub."""
    (bundle / "manifest.json").rename(bundle.parent / "blob")
    (bundle / "manifest.json").symlink_to(bundle.parent / "blob")
    refused(lambda: open_bundle(bundle), r"manifest.json cannot be read: it is a link.*cp -L")


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_a_manifest_that_never_ends(bundle: Path, make: Callable[[Path], None]) -> None:
    (bundle / "manifest.json").unlink()
    make(bundle / "manifest.json")
    refused(lambda: open_bundle(bundle), "is not a bundle")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda run: run["backbone"].update(num_layers=10**18),
            r"num_layers = 10+: should be less",
        ),
        (
            lambda run: run["backbone"].update(num_layers=900),
            r"num_layers = 900, but its files have 2",
        ),
        (lambda run: run["mc"].update(gist_layers=10**18), r"gist_layers = 10+: should be less"),
        (lambda run: run["mc"].update(gist_layers=900), r"gist_layers = 900, but its files have 2"),
        (lambda run: run["mc"].update(lens_layers=10**18), r"lens_layers = 10+: should be less"),
        (lambda run: run["mc"].update(lens_layers=900), r"lens_layers = 900, but its files have 2"),
        (lambda run: run["focus"].update(iterations=10**18), r"iterations = 10+: should be less"),
        (
            lambda run: run["mc"].update(num_random_variants=10**18),
            r"num_random_variants = 10+: should be less",
        ),
        (lambda run: run["backbone"].update(ffn_dim=10**18), r"ffn_dim = 10+: should be less"),
        (lambda run: run["backbone"].update(dim=64), r"dim = 64, but its files have .* \[61, 32\]"),
        (lambda run: run["mc"].update(lens_temperature=float("inf")), r"temperature = inf"),
        (lambda run: run.update(name="a\nb"), r"'a\\nb' is no folder name"),
        (lambda run: run.update({"a\nb": 1}), r"unknown key a\\nb"),
        (lambda run: run.update(seed=DEEP), r"config.json cannot be read: RecursionError"),
    ],
)
def test_what_the_config_claims(bundle: Path, change: Change, said: str) -> None:
    edit(bundle, "config.json", lambda content: change(content["run"]))
    refused(lambda: open_bundle(bundle), said)


def parameter(**facts: Any) -> Change:
    return lambda manifest: manifest["parameters"]["backbone.norm.weight"].update(facts)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (parameter(shape=None), r"norm.weight.shape = None: should be a valid list"),
        (parameter(shape=[-32]), r"shape\[0\] = -32: should be greater than 0"),
        (parameter(shape=[10**18]), r"norm.weight in backbone-.* does not match the manifest"),
        (parameter(dtype="int8"), r"dtype = 'int8'"),
        (parameter(file="a\0b"), r"manifest.json is damaged"),
        (parameter(file="\ud800"), r"manifest.json is damaged"),
        (lambda manifest: manifest.update(step=-1), r"step = -1"),
        (lambda manifest: manifest.update(step=DEEP), r"is not a bundle"),
        (lambda manifest: manifest.update(tied=[]), r"tied = \[\]"),
        (lambda manifest: manifest.update(tokenizer=None), r"tokenizer = None"),
        (lambda manifest: manifest["tokenizer"].update(file="config.json"), r"is not a tokenizer"),
        (lambda manifest: manifest["files"].update({"\0": {}}), r"manifest.json is damaged"),
        (
            lambda manifest: manifest["files"]["README.md"].update(bytes=float("inf")),
            r"manifest.json is damaged",
        ),
        (
            lambda manifest: manifest["files"].update({"\ud800": {"bytes": 1, "sha256": ""}}),
            r"is not a file of the folder",
        ),
    ],
)
def test_what_the_manifest_claims(bundle: Path, change: Change, said: str) -> None:
    edit(bundle, "manifest.json", change)
    refused(lambda: open_bundle(bundle), said)


def test_weights_that_are_not_finite_are_not_served(bundle: Path) -> None:
    (path,) = bundle.glob("gistnet*")
    tensors = load_file(path)
    tensors["gistnet.residual_gain"].view(-1)[0] = torch.nan
    save_file(tensors, path)
    reseal(bundle, "tokenizer.json")
    refused(lambda: load_bundle(bundle), r"gistnet.residual_gain holds values that are not finite")


def test_a_folder_whose_name_is_not_utf8(bundle: Path) -> None:
    """The library of safetensors takes no such path; the bundle is whole."""
    odd = bundle.rename(bundle.parent / os.fsdecode(b"caf\xe9"))
    refused(
        lambda: load_bundle(odd),
        r"caf\\udce9/.*is not UTF-8, which paths .* must be: rename the file",
    )
