"""The folder of a run as a report reads it, without training."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from reporting.glossary import Entry

POLICIES = {"lens": 288, "recency": 288, "random": 288, "blind": 288, "full": 512}
"""Policies of an evaluation, with their entries."""
SEQUENCES = 10


def write_run(
    folder: Path,
    *,
    name: str = "tried",
    steps: int = 60,
    evaluations: Mapping[str, list[dict[str, Any]]] | None = None,
) -> None:
    """Write records of `steps` steps, settings, and files of evaluations by name."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    records = [_record(step, steps, rng) for step in range(steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    config = {
        "name": name,
        "backbone": {"dim": 192, "num_layers": 4},
        "mc": {"seq_len": 512, "train_wc_length": 288, "num_random_variants": 4},
        "train": {"total_steps": 60},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    for stem, found in (evaluations or {}).items():
        (folder / f"{stem}.json").write_text(json.dumps(found))


def _record(step: int, steps: int, rng: np.random.Generator) -> dict[str, Any]:
    record: dict[str, Any] = {"step": step}
    if step:
        record |= {
            "train/loss": 8 - 4 * step / steps + float(rng.normal(0, 0.2)),
            "train/tokens": 2048.0 * step,
            "train/tokens_per_s": 900.0 + step,
            "train/step_ms": 100.0,
            "train/data_wait_ms": 1.0,
            "train/forward_ms": 30.0,
            "train/backward_ms": 55.0,
            "train/peak_memory_gb": 0.0,
            "mc/lens_loss": 0.69 + float(rng.normal(0, 0.01)),
            "mc/preference_corr_mean": float(rng.normal(0, 0.2)),
            "mc/preference_corr_lod_only": float(rng.normal(0, 0.1)),
            "mc/adv_delta_mean": 0.1,
            "mc/horizon_spread": 0.05,
            **{f"mc/lod_loss/{level}": 5.0 + level for level in range(3)},
            **{f"mc/lod_count/{level}": 200.0 - 90 * level for level in range(3)},
        }
    if step % 20 == 0:
        record["val/loss"] = 8 - 4 * step / steps
        record |= {
            f"val/horizon_loss/{policy}": 5.0 + shift
            for policy, shift in (("recency", 0), ("blind", 0.1), ("lens", -0.25), ("full", -0.5))
        }
        record |= {
            "val/continuation/0/prompt": "if a <b>:\n    `return`",
            "val/continuation/0/model": f"**{step}**",
            "val/continuation/0/text": "\n\nelse:",
        }
    return record


def evaluation(shift: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return records of lens and the policies of `shift`, whose losses differ from its by that."""
    rng, base = np.random.default_rng(1), np.random.default_rng(0).uniform(1, 3, SEQUENCES)
    records = []
    for policy in ("lens", *shift):
        noise = rng.normal(0, 0.01, SEQUENCES) if policy != "lens" else 0
        losses = base + noise + shift.get(policy, 0.0)
        if shift.get(policy) == 0.0:  # as often above as below
            losses = base + 0.1 * np.where(np.arange(SEQUENCES) % 2, 1, -1)
        records.append(
            {
                "task": "recall",
                "policy": policy,
                "budget": POLICIES[policy] / 512,
                "wc_length": POLICIES[policy],
                "seq_len": 512,
                "horizon_loss": float(losses.mean()),
                "stderr": 0.1,
                "accuracy": 0.5,
                "hit_rate": 0.5,
                "n": SEQUENCES,
                "losses": losses.tolist(),
                "ids": list(range(SEQUENCES)),
            }
        )
    return records


def meaning_of(key: str, entries: list[Entry]) -> str:
    """What the glossary's row of `key` says; empty where it has none."""
    for entry in entries:
        parts = re.split(r"\{[^}]*\}", entry.key)
        if re.fullmatch("[^/]+".join(map(re.escape, parts)), key):
            return entry.meaning
    return ""
