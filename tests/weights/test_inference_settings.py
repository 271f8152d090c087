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
SHORT = ("mc.recent_tokens=5", "mc.horizon_tokens=2")
HISTORY = np.arange(60) % 7


@pytest.fixture(params=[TOKENS, {}], ids=["tokens", "cover"])
def bundle(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A bundle of a model that reads tokens alone, or covers."""
    folder = tmp_path / "before"
    tiny_bundle.write(folder, run_config(mc_config(**request.param)))
    return folder


def convert(bundle: Path, out: Path, *settings: str) -> int:
    """Run the program with `--set` for each of `settings`."""
    options = [part for text in settings for part in ("--set", text)]
    return main([str(bundle), str(out), "--lens_from", str(bundle), *options])


def test_settings_change_and_nothing_else(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "after"
    assert convert(bundle, out, *SHORT, "focus.iterations=2", "retrieval.query_tokens=48") == 0
    before, after = open_bundle(bundle), open_bundle(out)
    expected = before.config.model_dump()
    expected["mc"] |= {"recent_tokens": 5, "horizon_tokens": 2}
    expected["focus"] |= {"iterations": 2}
    expected["retrieval"] |= {"query_tokens": 48}
    if before.config.train.init_from is not None:
        expected["train"] |= {"init_from": str(out)}  # a bundle names itself
    assert after.config.model_dump() == expected
    assert after.tree_hashes() == before.tree_hashes()
    assert "; mc.recent_tokens = 5, mc.horizon_tokens = 2, focus.iterations = 2" in after.title
    for name, weight in after.weights():
        torch.testing.assert_close(weight, before.weight(name), rtol=0, atol=0)


@pytest.mark.parametrize("bundle", [TOKENS], indirect=True)
def test_a_session_protects_the_new_tail(bundle: Path, tmp_path: Path) -> None:
    """A shorter tail leaves room for more blocks, and LensNet reads no more than the tail."""
    out = tmp_path / "after"
    assert convert(bundle, out, *SHORT) == 0
    chosen: list[int] = []
    for folder in (bundle, out):
        model = load_bundle(folder)
        assert model.lensnet is not None
        assert model.lensnet.tail_len == model.mc.recent_tokens - model.mc.horizon_tokens
        session = model.session(policy="lens", budget=32, focus=FocusConfig(lens_blocks=32))
        session.ingest(HISTORY)
        lods, starts = session.working_context()
        head = model.mc.geometry.with_length(60 - 1 + model.mc.horizon_tokens).head_len
        assert not lods.any()
        assert starts[starts >= head].tolist() == list(range(head, 60))
        chosen.append(int((starts < head).sum()))
    assert chosen == [32 - (64 - 52), 32 - (61 - 56)]


def test_a_saved_session_chooses_its_context_anew(bundle: Path, tmp_path: Path) -> None:
    """Its tree fits, but its context was chosen for another tail."""
    out = tmp_path / "after"
    assert convert(bundle, out, *SHORT) == 0
    old, new = load_bundle(bundle), load_bundle(out)
    session = old.session(policy="lens", budget=48)
    session.ingest(HISTORY)
    kept = session.working_context()
    session.save(tmp_path / "saved")
    fresh = new.session(policy="lens", budget=48)
    fresh.ingest(HISTORY)
    for model, expected in ((new, fresh.working_context()), (old, kept)):
        loaded = model.load_session(tmp_path / "saved")
        for found, right in zip(loaded.working_context(), expected, strict=True):
            assert found.tolist() == right.tolist()
    assert [x.tolist() for x in kept] != [x.tolist() for x in fresh.working_context()]


@pytest.mark.parametrize("bundle", [TOKENS], indirect=True)
def test_null_restores_a_default(bundle: Path, tmp_path: Path) -> None:
    assert convert(bundle, tmp_path / "eight", "focus.lens_blocks=8") == 0
    assert open_bundle(tmp_path / "eight").config.focus.lens_blocks == 8
    assert convert(tmp_path / "eight", tmp_path / "after", "focus.lens_blocks=null") == 0
    assert open_bundle(tmp_path / "after").config.focus.lens_blocks is None


@pytest.mark.parametrize("bundle", [TOKENS], indirect=True)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["mc.block_size=8"], "mc.block_size = 8 cannot be changed after training: use mc.recent_"),
        (["mc.recent_token=8"], "unknown key mc.recent_token: did you mean mc.recent_tokens?"),
        (["mc.recent_tokens=many"], "mc.recent_tokens = 'many'"),
        (["mc.recent_tokens=13"], "= 13 is a longer tail than in training: use at most 12"),
        (["mc.recent_tokens=95"], "= 95 is a longer tail than in training: use at most 12"),
        (["mc.recent_tokens=+13"], "= 13 is a longer tail than in training: use at most 12"),
        (["mc.recent_tokens= 13.0"], "= 13 is a longer tail than in training: use at most 12"),
        (["mc.horizon_tokens=12"], "horizon_tokens = 12 must be below recent_tokens"),
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


@pytest.mark.parametrize("text", ["mc.recent_tokens", "=5"])
def test_a_setting_is_a_key_and_a_value(tmp_path: Path, capsys: Any, text: str) -> None:
    with pytest.raises(SystemExit):
        convert(tmp_path, tmp_path / "after", text)
    assert f"'{text}': use KEY=VALUE" in capsys.readouterr().err
