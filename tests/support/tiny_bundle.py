"""A tokenizer of as many words as the factories' models have ids, and bundles of such models."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers
import torch
from torch import Tensor

from mc_ds.config import RunConfig
from mc_ds.data.tokenizer import HFTokenizer, Tokenizer
from mc_ds.model.build import build_lensnet
from mc_ds.model.lensnet import LensNet
from mc_ds.model.megacontext import MegaContextModel
from mc_ds.weights.bundle import BundleWriter
from tests.support.factories import VOCAB, model, run_config, wake


def tiny_tokenizer(vocab_size: int = VOCAB) -> HFTokenizer:
    """Words w0, w1, ... and a separator."""
    words = ["<|endoftext|>", *(f"w{number}" for number in range(vocab_size - 1))]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(
            {word: token for token, word in enumerate(words)}, unk_token=words[0]
        )
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(words[:1])
    return HFTokenizer(tokenizer.to_str().encode())


def networks(config: RunConfig, seed: int = 0) -> tuple[MegaContextModel, LensNet | None]:
    """Random networks whose every part carries signal, in evaluation mode."""
    root, lensnet = model(config, seed).eval(), build_lensnet(config)
    return root, wake(lensnet).eval() if lensnet is not None else None


def state_of(root: MegaContextModel, lensnet: LensNet | None) -> dict[str, Tensor]:
    """All parameters under a bundle's names, tied ones under both."""
    lens = (
        {}
        if lensnet is None
        else {f"lensnet.{name}": value for name, value in lensnet.state_dict().items()}
    )
    return root.state_dict() | lens


def write_bundle(
    out: Path,
    config: RunConfig,
    tokenizer: Tokenizer,
    state: Iterable[tuple[str, Tensor]],
    **options: Any,
) -> Path:
    """A bundle of all parameters in `state`; `options` are BundleWriter's."""
    with BundleWriter(out, config, tokenizer, **options) as writer:
        for name, tensor in state:
            writer.add(name, tensor)
        return writer.finish()


def write(
    folder: Path, config: RunConfig | None = None, **options: Any
) -> tuple[Path, MegaContextModel, LensNet | None]:
    """A bundle of random networks, and the networks."""
    config = config or run_config()
    root, lensnet = networks(config)
    with torch.no_grad():
        path = write_bundle(
            folder,
            config,
            tiny_tokenizer(),
            state_of(root, lensnet).items(),
            step=7,
            **{"source": "a test", **options},
        )
    return path, root, lensnet
