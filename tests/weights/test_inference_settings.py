"""`convert_checkpoint.py --set`: a bundle with other settings of inference and the same weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mc_ds.config.focus import FocusConfig
from mc_ds.inference import load_bundle
from mc_ds.weights.bundle import open_bundle
from tests.support import tiny_bundle
from tests.support.factories import mc_config, run_config
from tools.convert_checkpoint import main

TOKENS = dict(random_blocks=2, num_random_variants=2)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle of a model that reads tokens alone."""
    folder = tmp_path / "before"
    tiny_bundle.write(folder, run_config(mc_config(**TOKENS)))
    return folder


def convert(bundle: Path, out: Path, *settings: str) -> int:
    """Run the program with `--set` for each of `settings`."""
    return main([str(bundle), str(out), *(part for x in settings for part in ("--set", x))])


def test_settings_change_and_nothing_else(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "after"
    given = ("mc.recent_tokens=5", "mc.horizon_tokens=2", "focus.neighbours=0.5")
    assert convert(bundle, out, *given) == 0
    before, after = open_bundle(bundle), open_bundle(out)
    expected = before.config.model_dump()
    expected["mc"] |= {"recent_tokens": 5, "horizon_tokens": 2}
    expected["focus"] |= {"neighbours": 0.5}
    expected["train"] |= {"init_from": str(out)}  # a bundle names itself
    assert after.config.model_dump() == expected
    assert after.tree_hashes() == before.tree_hashes()
    for name, weight in after.weights():
        torch.testing.assert_close(weight, before.weight(name), rtol=0, atol=0)


def test_a_session_protects_the_new_tail(bundle: Path, tmp_path: Path) -> None:
    """A shorter tail leaves room for more blocks, and LensNet reads no more than the tail."""
    out = tmp_path / "after"
    assert convert(bundle, out, "mc.recent_tokens=5", "mc.horizon_tokens=2") == 0
    chosen: list[int] = []
    for folder in (bundle, out):
        model = load_bundle(folder)
        assert model.lensnet is not None
        assert model.lensnet.tail_len == model.mc.recent_tokens - model.mc.horizon_tokens
        session = model.session(policy="lens", budget=32, focus=FocusConfig(lens_blocks=32))
        session.ingest(np.arange(60) % 7)
        lods, starts = session.working_context()
        head = model.mc.geometry.with_length(60 - 1 + model.mc.horizon_tokens).head_len
        assert not lods.any()
        assert starts[starts >= head].tolist() == list(range(head, 60))
        chosen.append(int((starts < head).sum()))
    assert chosen == [32 - (64 - 52), 32 - (61 - 56)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["mc.block_size=8"], "mc.block_size = 8 cannot be changed after training: use mc.recent_"),
        (["mc.recent_tokens=many"], "mc.recent_tokens = 'many'"),
        (["mc.horizon_tokens=64"], "horizon_tokens = 64 must be below recent_tokens"),
        (["focus.neighbours=2"], "focus.neighbours = '2'"),
        (["focus.memory=true"] * 2, "--set 'focus.memory' is given 2 times: give each name once"),
    ],
)
def test_bad_settings_are_one_line_and_write_nothing(
    bundle: Path, tmp_path: Path, capsys: Any, settings: list[str], message: str
) -> None:
    out = tmp_path / "after"
    assert convert(bundle, out, *settings) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_a_setting_needs_a_value(bundle: Path, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        convert(bundle, tmp_path / "after", "mc.recent_tokens")
    assert "'mc.recent_tokens' has no name: use KEY=VALUE" in capsys.readouterr().err
