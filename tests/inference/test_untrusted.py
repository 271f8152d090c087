"""Trees, saved sessions, texts and ids that come from elsewhere: refused in one line, nothing read
for ever and nothing written through a link.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mc_ds.config import ConfigError
from mc_ds.data import train_tokenizer
from mc_ds.data.tokenizer import HFTokenizer, Tokenizer, load_tokenizer
from mc_ds.inference import load_bundle
from tests.support.optional import needs
from tests.support.sessions import history, inference_model, ingested
from tests.support.tiny_bundle import tiny_tokenizer
from tests.support.tiny_hf import TEXT, byte_level

NET = inference_model()


def refused(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        call()
    assert str(error.value).isprintable()


@pytest.mark.parametrize("name", ["tokens", "gists.1", "index.2", "header.json", "lock"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_only_regular_files_in_trees(name: str, kind: str, tmp_path: Path) -> None:
    ingested(NET, history(60), tree=tmp_path / "tree").close()
    outside = tmp_path / "outside"
    outside.write_bytes(b"a file of the user's, longer than any of the tree's" * 1_000)
    before = outside.read_bytes()
    path = tmp_path / "tree" / name
    path.unlink(missing_ok=True)
    if kind == "link":
        path.symlink_to(outside)
    else:
        os.mkfifo(path)
    refused(lambda: NET.session(tree=tmp_path / "tree"), rf"{name} is not a regular file")
    assert outside.read_bytes() == before


def test_a_header_of_a_thousand_lists(tmp_path: Path) -> None:
    ingested(NET, history(60), tree=tmp_path / "tree").close()
    (tmp_path / "tree" / "header.json").write_text("[" * 100_000)
    refused(lambda: NET.session(tree=tmp_path / "tree"), r"header.json is damaged")


@pytest.mark.parametrize("name", ["session.json", "context.safetensors", "manifest.json"])
def test_only_regular_files_in_saved_sessions(name: str, tmp_path: Path) -> None:
    session = ingested(NET, history(60))
    session.nll([1])
    session.save(tmp_path / "saved")
    path = tmp_path / "saved" / name
    path.unlink()
    os.mkfifo(path)
    refused(lambda: NET.load_session(tmp_path / "saved"), rf"{name}.* not a regular file")


@pytest.mark.parametrize("path", [7, None, b"x", "a\0b", "\ud800"])
def test_what_is_no_path(path: Any) -> None:
    for call in (load_bundle, NET.load_session, NET.open_tree, NET.session().save):
        refused(lambda call=call: call(path), r"is not a path")  # type: ignore[misc]


def test_calls_that_the_fuzz_found() -> None:
    net: Any = NET
    for call, said in [
        (lambda: net.generate(["x"], 2), r"sessions = \['x'\] is not a list"),
        (lambda: net.generate(3, 2), r"sessions = 3 is not a list"),
        (lambda: net.sessions(10**18), r"count = 10+ sessions cannot be created"),
        (lambda: net.session(focus=torch.ones(2)), r"focus = tensor.* is not a FocusConfig"),
        (lambda: net.open_tree("ram", create=torch.ones(2)), r"create = tensor.*: use True or"),
    ]:
        refused(call, said)


@pytest.mark.parametrize("kind", ["tokenizer.json", "tokenizer.model"])
def test_texts_and_ids_that_are_none(kind: str) -> None:
    trained: Tokenizer = (
        HFTokenizer(byte_level(300)) if kind == "tokenizer.json" else train_tokenizer(TEXT, 400)
    )
    tokenizer: Any = trained
    for call, said in [
        (lambda: tokenizer.encode("cut \ud83d here"), r"a lone surrogate, .* at character 4"),
        (lambda: tokenizer.encode_many(["a", "\udce9"]), r"a lone surrogate, .* at character 0"),
        (lambda: tokenizer.encode(b"x"), r"text = b'x' is not text"),
        (lambda: tokenizer.encode(None), r"text = None is not text"),
        (lambda: tokenizer.decode("ab"), r"ids = 'ab' are not token ids"),
        (lambda: tokenizer.decode(3), r"ids = '3' are not token ids"),
        (lambda: tokenizer.decode([1.5]), r"are not token ids"),
        (lambda: tokenizer.decode([-1]), r"token id -1 is not in the vocabulary"),
        (lambda: tokenizer.decode([10**30]), r"token id 10+ is not in the vocabulary"),
    ]:
        refused(call, said)
    ids = tokenizer.encode("def read")
    assert tokenizer.decode(torch.tensor(ids)) == tokenizer.decode(ids) == "def read"


def test_a_tokenizer_whose_pattern_has_no_end_is_one_line() -> None:
    """The library panics where a pattern needs more steps than it allows."""
    content = tiny_tokenizer().content().decode()
    pattern = '{"type":"Split","pattern":{"Regex":"(a|aa)+$"},"behavior":"Isolated","invert":false}'
    harmed = content.replace('{"type":"WhitespaceSplit"}', pattern)
    assert harmed != content
    tokenizer = HFTokenizer(harmed.encode(), "theirs.json")
    refused(
        lambda: tokenizer.encode("a" * 20_000 + "!"), r"theirs.json is not a readable tokenizer"
    )


def test_a_tokenizer_that_is_not_there(tmp_path: Path) -> None:
    refused(lambda: load_tokenizer(tmp_path / "nothing"), r"tokenizer: .*nothing does not exist")
    refused(lambda: load_tokenizer(tmp_path), r"has no tokenizer: should contain tokenizer.json or")
    (tmp_path / "tokenizer.json").write_bytes(byte_level(300))
    assert load_tokenizer(tmp_path).vocab_size == 300


def test_a_model_needs_no_more_rows_than_its_tokenizer_can_have() -> None:
    tokenizer = HFTokenizer(byte_level(300))
    assert tokenizer.padded(320).vocab_size == 320
    refused(
        lambda: tokenizer.padded(2_000_000),
        r"a tokenizer with 300 ids does not fit a model with a vocabulary of",
    )


@needs("gguf")
def test_what_holds_no_weights(tmp_path: Path) -> None:
    refused(lambda: load_bundle(tmp_path / "nothing"), r"nothing does not exist")
    (tmp_path / "file").write_bytes(b"x")
    refused(lambda: load_bundle(tmp_path / "file"), r"file is not a readable GGUF file")
    os.mkfifo(tmp_path / "pipe")
    refused(lambda: load_bundle(tmp_path / "pipe"), r"pipe is not a readable GGUF file .*regular")
