"""Which networks a configuration has, and where they are made."""

import torch

from mc_ds.model.build import build_lensnet, build_model, build_networks
from tests.support.factories import VOCAB, mc_config, run_config


def test_a_run_with_variants_has_a_lensnet_that_reads_its_models_entries() -> None:
    config = run_config(backbone=dict(dim=64))
    model, lens = build_networks(config, vocab_size=VOCAB)
    assert model.backbone.embedding.weight.shape == (VOCAB, 64)
    assert model.mc is config.mc
    assert lens is not None
    assert lens.project.weight.shape == (config.mc.lens_dim, 64)
    assert lens.config is config.mc
    assert {p.device.type for net in (model, lens) for p in net.parameters()} == {"cpu"}


def test_a_plain_language_model_has_no_lensnet() -> None:
    config = run_config(mc_config(num_random_variants=0))
    assert build_lensnet(config) is None
    model, lens = build_networks(config, vocab_size=VOCAB)
    assert lens is None
    assert model.gistnet is None


def test_networks_on_meta_take_no_memory() -> None:
    config = run_config()
    model, lens = build_networks(config, vocab_size=VOCAB, device="meta")
    assert lens is not None
    assert all(p.is_meta for net in (model, lens) for p in net.parameters())
    made = build_model(config, vocab_size=VOCAB)
    assert {name: p.shape for name, p in model.named_parameters()} == {
        name: p.shape for name, p in made.named_parameters()
    }
    assert torch.get_default_device() == torch.device("cpu"), "as before"
