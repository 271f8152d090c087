"""Weights of any origin open with one function, without an engine."""

from pathlib import Path

import pytest
import torch

from mc_ds.config import ConfigError
from mc_ds.inference import load_bundle
from mc_ds.weights.bundle import open_bundle
from mc_ds.weights.export import export_bundle
from mc_ds.weights.open import open_weights
from tests.support import tiny_hf
from tests.support.tiny_bundle import write


def test_a_folder_of_hugging_face_answers_as_its_bundle_does(tmp_path: Path) -> None:
    folder = tiny_hf.write_folder(tmp_path / "hf", tiny_hf.GQA)
    direct = open_weights(folder)
    bundle = open_bundle(export_bundle(folder, tmp_path / "bundle"))
    assert (direct.parameters, direct.tied, direct.vocab_size) == (
        bundle.parameters,
        bundle.tied,
        bundle.vocab_size,
    )
    assert direct.tokenizer().content() == bundle.tokenizer().content()
    assert direct.tree_hashes() == bundle.tree_hashes()
    for (name, mine), (other, theirs) in zip(direct.weights(), bundle.weights(), strict=True):
        assert name == other
        assert torch.equal(mine, theirs)
    served = load_bundle(folder)
    assert served.hashes == (bundle.gistnet_hash, bundle.lensnet_hash)
    with served.session("recency", 64) as session:
        session.ingest(served.tokenizer.encode_document(tiny_hf.TEXT[0]))
        assert len(session.generate(3)) == 3


def test_the_hashes_of_a_tree_are_the_same_from_a_bundle_and_from_its_parameters(
    tmp_path: Path,
) -> None:
    """A run and the bundle made of it serve the same trees."""
    bundle = open_bundle(write(tmp_path / "bundle")[0])
    assert super(type(bundle), bundle).tree_hashes() == bundle.tree_hashes()
    assert bundle.tree_hashes()[0] != bundle.tree_hashes()[1]


def test_mixed_dtypes_load_as_float32_and_others_as_they_are_stored(tmp_path: Path) -> None:
    bundle = open_bundle(write(tmp_path / "bundle", dtype="bf16")[0])
    model, lensnet = bundle.load()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert lensnet is not None
    assert {parameter.dtype for parameter in lensnet.parameters()} == {torch.float32}


def test_what_is_none_of_them_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no weights")
    for path, words in (
        (tmp_path / "gone", "gone does not exist: give the folder of a run"),
        (tmp_path, "is not a checkpoint, a run with one, a bundle, a Hugging Face folder"),
        (tmp_path / "notes.txt", "not a readable GGUF file|needs the gguf package"),
    ):
        with pytest.raises(ConfigError, match=words) as error:
            open_weights(path)
        assert "\n" not in str(error.value)
