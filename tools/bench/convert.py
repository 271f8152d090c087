"""Measures the peak memory and speed of tools/convert_checkpoint.py.

    python tools/bench/convert.py --gigabytes 4 --ranks 4

It converts a synthetic ZeRO-3 checkpoint of any size, with DeepSpeed's files: optimizer files have
float32 master weights and both moments, so that the checkpoint is three times as large as the
model. Each value depends on its parameter's name and position, and is verified in the bundle.
Prints the results as one JSON line.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from math import prod
from pathlib import Path
from typing import Any

import deepspeed
import tokenizers
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from torch import Tensor, nn

from mc_ds.config import BackboneConfig, MCConfig, RunConfig
from mc_ds.config.recipe import to_yaml
from mc_ds.console import HelpFormatter, run_program
from mc_ds.data.tokenizer import HFTokenizer, Tokenizer
from mc_ds.model.build import build_lensnet, build_networks
from mc_ds.storage import replace_text, write_manifest, write_tensors, write_text
from mc_ds.training.engine.engine import parameter_groups
from mc_ds.weights.bundle import open_bundle
from mc_ds.weights.checkpoint.folder import checkpoint_name

ROOT = Path(__file__).parents[2]
VOCABULARY = 4096
STEP = 100
CHUNK = 1 << 22
"""Number of values generated at a time."""
MEASURED = """
import re, sys
from pathlib import Path
from tools.convert_checkpoint import main
code = main(sys.argv[1:])
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
sys.exit(code)
"""
SMALL = 0.001
"""Gigabytes of a tiny model, whose conversion gives the memory of the program itself."""


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=0.6, help="size of the model in float32")
    parser.add_argument("--ranks", type=int, default=2, help="number of ranks of the checkpoint")
    parser.add_argument(
        "--dtype", choices=["fp32", "bf16"], default=None, help="data type of the bundle"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=None,
        help="folder for temporary files (default: the system's)",
    )
    return parser.parse_args(argv)


def sized_config(gigabytes: float) -> RunConfig:
    """Return a config whose model has about this size in float32."""
    dim = 2048 if gigabytes >= 2 else 1024 if gigabytes >= 0.1 else 64
    ffn = 8 * dim // 3 // 64 * 64
    per_layer = 4 * (4 * dim * dim + 3 * dim * ffn)
    layers = max(1, round((gigabytes * 1e9 - 4 * VOCABULARY * dim) / per_layer))
    backbone = BackboneConfig(
        dim=dim, num_layers=layers, num_heads=dim // 64, num_kv_heads=dim // 64, ffn_dim=ffn
    )
    return RunConfig(name="sized", backbone=backbone, mc=MCConfig(gist_dim=64), seed=1)


def value(name: str, start: int, count: int) -> Tensor:
    """Return elements `start` to `start + count` of a parameter, float32.

    They depend on name and position such that any mix-up in a conversion changes values.
    """
    place = torch.arange(start, start + count, dtype=torch.int64)
    return ((place * 2654435761 + zlib.crc32(name.encode())) % (1 << 24)).float() / (1 << 24) - 0.5


def tokenizer() -> Tokenizer:
    """Return a tokenizer with VOCABULARY ids."""
    words = ["<|endoftext|>", *(f"w{number}" for number in range(VOCABULARY - 1))]
    model = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(
            {word: token for token, word in enumerate(words)}, unk_token=words[0]
        )
    )
    model.add_special_tokens(words[:1])
    return HFTokenizer(model.to_str().encode())


def write_checkpoint(run: Path, config: RunConfig, ranks: int) -> Path:
    """Write a run with one ZeRO-3 checkpoint, and return the checkpoint's path.

    Only one rank's share is in memory at a time.
    """
    model, _ = build_networks(config, vocab_size=VOCABULARY, device="meta")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [
        {names[id(p)]: p.shape for p in group["params"]} for group in parameter_groups(model, 0.1)
    ]
    checkpoint = run / "checkpoints" / checkpoint_name(STEP)
    checkpoint.mkdir(parents=True)
    replace_text(run / "config.yaml", to_yaml(config))
    tokenizer().save(run)
    torch.manual_seed(0)
    lensnet = build_lensnet(config)
    assert lensnet is not None
    files = {"lens.pt": write_tensors(checkpoint / "lens.pt", {"lensnet": lensnet.state_dict()})}
    for rank in range(ranks):
        name = f"zero_pp_rank_{rank}_mp_rank_00_{{}}_states.pt"
        for kind, states in (
            ("model", model_states(model, groups, ranks)),
            ("optim", optimizer_states(groups, rank, ranks)),
        ):
            path = checkpoint / name.format(kind)
            files[path.name] = write_tensors(path, states)
            del states
    facts = {
        "step": STEP,
        "world_size": ranks,
        "zero_stage": 3,
        "sub_group_size": None,
        "config": config.model_dump(mode="json"),
        "corpus": "of words",
        "requirements": {"tokenizer": tokenizer().sha256, "data": "gone"},
    }
    files["trainer.json"] = write_text(checkpoint / "trainer.json", json.dumps(facts))
    write_manifest(checkpoint, files)
    return checkpoint


def model_states(
    model: nn.Module, groups: list[dict[str, torch.Size]], ranks: int
) -> dict[str, Any]:
    """Return the model states as saved by ZeRO-3: names without values, and shapes in the
    optimizer's order.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    return {
        "module": {name: torch.empty(0) for name in named},
        "buffer_names": [],
        "param_shapes": groups,
        "frozen_param_shapes": {},
        "shared_params": {"backbone.head.weight": "backbone.embedding.weight"},
        "frozen_param_fragments": {},
        "dp_world_size": ranks,
        "ds_version": deepspeed.__version__,
    }


def optimizer_states(groups: list[dict[str, torch.Size]], rank: int, ranks: int) -> dict[str, Any]:
    """Return one rank's optimizer states as saved by ZeRO-3."""
    flat = []
    for shapes in groups:
        masters = torch.zeros(sum(-(-prod(shape) // ranks) for shape in shapes.values()))
        at = 0
        for name, shape in shapes.items():
            share = -(-prod(shape) // ranks)
            for start in range(0, share, CHUNK):
                place = rank * share + start
                count = min(CHUNK, share - start, prod(shape) - place)  # beyond is padding
                if count > 0:
                    masters[at + start : at + start + count] = value(name, place, count)
            at += share
        flat.append(masters)
    moments = {
        n: {
            "step": torch.tensor(1.0),
            "exp_avg": torch.zeros_like(f),
            "exp_avg_sq": torch.zeros_like(f),
        }
        for n, f in enumerate(flat)
    }
    optimizer = {
        "zero_stage": ZeroStageEnum.weights,
        "loss_scaler": LossScaler(scale=1.0),
        "dynamic_loss_scale": False,
        "overflow": False,
        "partition_count": ranks,
        "optimizer_state_dict": {
            "state": moments,
            "param_groups": [{"params": [number]} for number in moments],
        },
        "fp32_flat_groups": flat,
    }
    return {"optimizer_state_dict": optimizer, "ds_config": {}, "ds_version": deepspeed.__version__}


def convert(checkpoint: Path, out: Path, dtype: str | None) -> tuple[float, float]:
    """Run the converter in a separate process; return its peak resident memory in bytes, and its
    seconds.

    The process measures its own peak, because the system's value for an ended child includes the
    parent's memory at the fork.
    """
    command = [
        sys.executable,
        "-c",
        MEASURED,
        str(checkpoint),
        str(out),
        *(["--dtype", dtype] if dtype else []),
    ]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environ = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    done = subprocess.run(
        command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True, check=True
    )
    return 1024.0 * int(done.stdout.splitlines()[-1]), time.monotonic() - started


def wrong_values(out: Path) -> int:
    """Return the number of values in the bundle that differ from the checkpoint's."""
    bundle, wrong = open_bundle(out, verify=True), 0
    for name, tensor in bundle.weights():
        flat = tensor.flatten()
        for start in range(0, 0 if name.startswith("lensnet.") else flat.numel(), CHUNK):
            part = flat[start : start + CHUNK]
            wrong += int((part != value(name, start, part.numel()).to(part.dtype)).sum())
    return wrong


def measure(folder: Path, gigabytes: float, ranks: int, dtype: str | None) -> dict[str, float]:
    """Measure one conversion and return the results; sizes are in MB."""
    config = sized_config(gigabytes)
    checkpoint = write_checkpoint(folder / "run", config, ranks)
    small = write_checkpoint(folder / "small", sized_config(SMALL), ranks)
    program, _ = convert(small, folder / "small_bundle", dtype)
    peak, seconds = convert(checkpoint, folder / "bundle", dtype)
    bundle = open_bundle(folder / "bundle", verify=False)
    sizes = [
        4 * prod(shape)
        for name, shape in bundle.parameters.items()
        if not name.startswith("lensnet.")
    ]
    return {
        "model": sum(sizes) / 1e6,
        "checkpoint": sum(path.stat().st_size for path in checkpoint.iterdir()) / 1e6,
        "ranks": ranks,
        "largest_tensor": max(sizes) / 1e6,
        "program": program / 1e6,
        "peak": peak / 1e6,
        "peak_beyond_program": (peak - program) / 1e6,
        "seconds": seconds,
        "wrong_values": wrong_values(folder / "bundle"),
    }


def main(argv: list[str]) -> int:
    """Run the benchmark, print the results and remove all files."""
    args = parse(argv)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        figures = measure(Path(folder), args.gigabytes, args.ranks, args.dtype)
    print(json.dumps({name: round(figure, 1) for name, figure in figures.items()}))
    return 0


if __name__ == "__main__":
    run_program(main)
