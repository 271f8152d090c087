"""A bundle of a backbone that was trained further and of an earlier LensNet."""

import pytest
import torch

from mc_ds.config import ConfigError, MCConfig
from mc_ds.weights.bundle import open_bundle
from mc_ds.weights.export import export_bundle
from tests.support import tiny_bundle
from tests.support.factories import mc_config, run_config
from tools.convert_checkpoint import main


def plain(folder, seed=1, *, mc=None, corpus=None, **backbone):
    """A bundle of a plain language model, whose sequences are longer."""
    config = run_config(MCConfig(**PLAIN, **(mc or {})), backbone)
    root, _ = tiny_bundle.networks(config, seed)
    return tiny_bundle.write_bundle(
        folder,
        config,
        tiny_bundle.tiny_tokenizer(),
        tiny_bundle.state_of(root, None).items(),
        step=11,
        source="an adapted backbone",
        metrics={"val/loss": 2.5},
        corpus=corpus,
    )


PLAIN = dict(
    seq_len=128,
    train_wc_length=128,
    block_size=4,
    max_lod=1,
    recent_tokens=16,
    horizon_tokens=4,
    num_random_variants=0,
)


def test_the_backbone_is_of_the_one_and_all_else_of_the_other(tmp_path, capsys):
    adapted = plain(tmp_path / "adapted")
    focus, _, _ = tiny_bundle.write(tmp_path / "focus", run_config(mc_config()))
    out = tmp_path / "joined"

    assert main([str(adapted), str(out), "--lens_from", str(focus)]) == 0

    joined, a, b = (open_bundle(path) for path in (out, adapted, focus))
    assert joined.config == b.config
    assert joined.step == 11
    assert joined.title == "an adapted backbone; GistNet and LensNet: a test"
    assert joined.title in capsys.readouterr().out
    assert joined.parameters == b.parameters
    parts = set()
    for name, weight in joined.weights():
        parts.add(name.partition(".")[0])
        origin = a if name.startswith("backbone.") else b
        torch.testing.assert_close(weight, origin.weight(name), rtol=0, atol=0)
    assert parts == {"backbone", "gistnet", "lensnet"}
    embedding = "backbone.embedding.weight"
    assert not torch.equal(joined.weight(embedding), b.weight(embedding))
    assert joined.load()[1] is not None
    assert not joined.validation()  # nothing was measured with these weights
    assert joined.tree_hashes() != b.tree_hashes()  # gists and index vectors depend on embeddings


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (dict(num_layers=3), "backbone.num_layers = 2 there, 3 here"),
        (dict(rope_base=5e4), "backbone.rope_base = 10000.0 there, 50000.0 here"),
        (dict(mc={"position_scheme": "order"}), "mc.position_scheme = 'span' there, 'order' here"),
    ],
)
def test_another_backbone_is_refused(tmp_path, backbone, message):
    adapted = plain(tmp_path / "adapted", **backbone)
    focus, _, _ = tiny_bundle.write(tmp_path / "focus")
    with pytest.raises(ConfigError, match=r"does not fit .*adapted: ") as error:
        export_bundle(adapted, tmp_path / "joined", lens_from=focus)
    assert message in str(error.value)
    assert not (tmp_path / "joined").exists()


def test_weights_without_a_lensnet_are_refused(tmp_path):
    adapted, other = plain(tmp_path / "adapted"), plain(tmp_path / "other", seed=2)
    with pytest.raises(
        ConfigError, match=r"lens_from = .*other has no LensNet: use weights that have one"
    ):
        export_bundle(adapted, tmp_path / "joined", lens_from=other)


@pytest.mark.parametrize(("of_focus", "recorded"), [("a" * 64, "a" * 64), ("b" * 64, None)])
def test_the_training_text_is_recorded_if_both_had_the_same(tmp_path, of_focus, recorded):
    adapted = plain(tmp_path / "adapted", corpus="a" * 64)
    focus, _, _ = tiny_bundle.write(tmp_path / "focus", corpus=of_focus)
    joined = export_bundle(adapted, tmp_path / "joined", lens_from=focus)
    assert open_bundle(joined).corpus_fingerprint == recorded


def test_another_tokenizer_is_refused(tmp_path):
    adapted = plain(tmp_path / "adapted")
    config = run_config()
    root, lensnet = tiny_bundle.networks(config)
    content = tiny_bundle.tiny_tokenizer().content().replace(b'"w3"', b'"v3"')
    focus = tiny_bundle.write_bundle(
        tmp_path / "focus",
        config,
        type(tiny_bundle.tiny_tokenizer())(content),
        tiny_bundle.state_of(root, lensnet).items(),
        step=7,
        source="a test",
    )
    with pytest.raises(ConfigError, match=r"focus has another tokenizer than .*adapted"):
        export_bundle(adapted, tmp_path / "joined", lens_from=focus)
