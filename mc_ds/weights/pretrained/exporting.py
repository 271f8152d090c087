"""Write a bundle's backbone as a folder that `transformers.AutoModelForCausalLM` can load, one
parameter at a time.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mc_ds.config import ConfigError
from mc_ds.data.tokenizer import HFTokenizer
from mc_ds.storage import StagedFolder, write_text
from mc_ds.weights.bundle import Bundle, open_bundle
from mc_ds.weights.bundle.shard import ShardFile
from mc_ds.weights.pretrained.hf_folder import INDEX, WEIGHTS, HFFolder
from mc_ds.weights.pretrained.llama import hf_config, hf_names, part_rows

MAX_SHARD_BYTES = 4 << 30
"""Size above which weights continue in another file."""
TORCH_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def export_hf(
    bundle: Bundle | str | Path, out: str | Path, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> Path:
    """Write the backbone of `bundle` as a Hugging Face folder at `out`, which appears complete and
    verified or not at all; return its path.

    The exported model computes the same as the bundle on a history at LOD0. GistNet and LensNet are
    left out. A `tokenizer.json` is copied, with the config that `transformers.AutoTokenizer` needs;
    a sentencepiece model of mc_ds is copied for `load_tokenizer`. Every parameter is read back and
    compared before the folder appears. Raises ConfigError if `out` exists.
    """
    bundle = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    out = Path(os.path.abspath(out))
    if out.exists():
        raise ConfigError(f"{out} exists: give another name or remove it")
    with StagedFolder(out) as staged:
        _write_weights(bundle, staged.path, max_shard_bytes)
        _write_configs(bundle, staged.path)
        _verify(bundle, staged.path)
        return staged.publish()


def _pieces(bundle: Bundle) -> Iterator[tuple[str, Tensor]]:
    """Yield the backbone's parameters under their Hugging Face names, one at a time."""
    for name in (name for name in bundle.parameters if name.startswith("backbone.")):
        tensor = bundle.weight(name)
        rows = part_rows(name, tuple(tensor.shape), bundle.config.backbone)
        for part, piece in zip(hf_names(name), tensor.split(rows), strict=True):
            yield part, piece.contiguous()


def _verify(bundle: Bundle, folder: Path) -> None:
    """Raise ConfigError unless the folder holds exactly the parameters of the bundle's backbone,
    bit for bit.
    """
    written, expected = HFFolder(folder), set()
    for name, piece in _pieces(bundle):
        expected.add(name)
        if name not in written.names() or not _same_bits(written.tensor(name), piece):
            raise ConfigError(f"{folder}: {name} was read back with other values: export again")
    if unexpected := written.names() - expected:
        raise ConfigError(
            f"{folder}: {min(unexpected)} is not a parameter of the bundle: export again"
        )


def _same_bits(one: Tensor, other: Tensor) -> bool:
    same_kind = one.dtype == other.dtype and one.shape == other.shape
    return same_kind and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def _write_weights(bundle: Bundle, folder: Path, max_shard_bytes: int) -> None:
    shards: list[ShardFile] = []
    try:
        for name, piece in _pieces(bundle):
            _append(shards, folder, name, piece, max_shard_bytes)
        shards[-1].finish()
    finally:
        for shard in shards:
            shard.close()
    if len(shards) == 1:
        shards[0].path.rename(folder / WEIGHTS)
        return
    index: dict[str, Any] = {
        "metadata": {"total_size": sum(shard.data_bytes for shard in shards)},
        "weight_map": {},
    }
    for number, shard in enumerate(shards, start=1):
        path = shard.path.rename(folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors")
        index["weight_map"] |= dict.fromkeys(shard.names, path.name)
    write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")


def _append(
    shards: list[ShardFile], folder: Path, name: str, tensor: Tensor, max_shard_bytes: int
) -> None:
    """Add a tensor to the last file, or to a new one if that is full."""
    full = not shards or (
        shards[-1].data_bytes and shards[-1].data_bytes + tensor.nbytes > max_shard_bytes
    )
    if not full and shards[-1].add(name, tensor):
        return
    if shards:
        shards[-1].finish()
    shards.append(ShardFile(folder / f"{len(shards) + 1:05d}.partial"))
    shards[-1].add(name, tensor)


def _write_configs(bundle: Bundle, folder: Path) -> None:
    tokenizer, context_len = bundle.tokenizer(), bundle.config.mc.seq_len
    config = hf_config(
        bundle.config.backbone, vocab_size=bundle.vocab_size, context_len=context_len
    )
    config |= {"bos_token_id": tokenizer.separator_id, "eos_token_id": tokenizer.separator_id}
    if bundle.manifest["dtype"] in TORCH_DTYPES:
        config["torch_dtype"] = TORCH_DTYPES[bundle.manifest["dtype"]]
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    tokenizer.save(folder)
    if isinstance(tokenizer, HFTokenizer):
        write_text(
            folder / "tokenizer_config.json",
            json.dumps(_tokenizer_config(tokenizer, context_len), indent=2) + "\n",
        )


def _tokenizer_config(tokenizer: HFTokenizer, context_len: int) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.separator,
        "eos_token": tokenizer.separator,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_len,
    }
