"""A run whose main task is prompts: it trains on their answers, compares policies on them, and
leaves out what needs a second question.
"""

import json
import sys
from pathlib import Path

from tests.support.processes import ROOT
from tests.support.tiny_run import environment, run, settings


def test_a_run_learns_from_prompts_and_says_what_is_found_in_them(tmp_path: Path) -> None:
    recipe = settings(
        tmp_path,
        "prompts",
        stage=1,
        mc=dict(
            seq_len=2048,
            block_size=16,
            max_lod=1,
            train_wc_length=2048 - 15 * 80,
            recent_tokens=512,
            horizon_tokens=128,
        ),
        data=dict(tasks={"ruler_vt": 0.75, "corpus": 0.25}),
        train=dict(total_steps=4),
        validation=dict(
            eval_interval=2,
            policies=["recency", "random", "lens", "blind", "full"],
            continuations=1,
        ),
    )
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    command = [sys.executable, ROOT / "launch" / "train.py", "--config", tmp_path / "recipe.yaml"]
    done = run([*command], environment(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (tmp_path / "runs" / "prompts" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    (last,) = [record for record in records if record["step"] == 4 and "val/loss" in record]
    for policy in ("recency", "random", "lens", "blind"):
        assert 0 <= last[f"val/hit_rate/{policy}"] < 1
    assert last["val/hit_rate/full"] == 1
    assert last["mc/preference_pair_count"] > 0
    assert last["val/continuation/0/prompt"].rstrip().endswith(":")
