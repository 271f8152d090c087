"""From a bundle to a folder that `transformers.AutoModelForCausalLM` loads: the backbone alone, one parameter at a time."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from mc_ds.config import ConfigError
from mc_ds.data.tokenizer import HFTokenizer
from mc_ds.storage import sync_folder, write_text
from mc_ds.weights.bundle import Bundle, open_bundle
from mc_ds.weights.bundle.shard import ShardFile
from mc_ds.weights.pretrained.hf_folder import INDEX, WEIGHTS
from mc_ds.weights.pretrained.llama import hf_config, hf_names, part_rows

MAX_SHARD_BYTES = 4 << 30
"""Size above which weights go on in another file."""
TORCH_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def export_hf(
    bundle: Bundle | str | Path, out: str | Path, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> Path:
    """Writes the backbone of `bundle` as a Hugging Face folder at `out`, which appears whole or not at all.

    It reads plain text as the bundle reads a history at LOD0; GistNet and LensNet stay behind. A `tokenizer.json` is copied with what
    `transformers.AutoTokenizer` needs; a sentencepiece model of mc_ds is copied as it is, for `load_tokenizer`. Raises ConfigError where
    `out` exists.
    """
    bundle = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    out = Path(os.path.abspath(out))
    if out.exists():
        raise ConfigError(f"{out} exists: give another name or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f"{out.name}.tmp-", dir=out.parent))
    try:
        aside.chmod(0o755)
        _write_weights(bundle, aside, max_shard_bytes)
        _write_configs(bundle, aside)
        sync_folder(aside)
        aside.rename(out)
        sync_folder(out.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return out


def _write_weights(bundle: Bundle, folder: Path, max_shard_bytes: int) -> None:
    shards: list[ShardFile] = []
    try:
        for name in (name for name in bundle.parameters if name.startswith("backbone.")):
            tensor = bundle.weight(name)
            rows = part_rows(name, tuple(tensor.shape), bundle.config.backbone)
            for part, piece in zip(hf_names(name), tensor.split(rows), strict=True):
                _append(shards, folder, part, piece.contiguous(), max_shard_bytes)
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
    """Adds a tensor to the last file, or to a new one where that is full."""
    full = not shards or (
        shards[-1].data_bytes and shards[-1].data_bytes + tensor.nbytes > max_shard_bytes
    )
    if not full and shards[-1].add(name, tensor):
        return
    if shards:
        shards[-1].finish()
    shards.append(ShardFile(folder / f"{len(shards) + 1:05d}.partial"))
    assert shards[-1].add(name, tensor), f"the header of an empty file has no room for {name}"


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
