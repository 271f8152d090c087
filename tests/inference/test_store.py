"""Saved sessions: they go on as if they had not stopped, and what was changed is refused in one
line.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mc_ds.config import ConfigError
from mc_ds.inference import InferenceModel
from mc_ds.storage import fingerprint, write_manifest
from tests.support.read_only import read_only
from tests.support.sessions import history, inference_model, ingested

NET = inference_model(position_scheme="order")
BUDGET = 48


def test_saved_sessions_go_on_as_if_they_had_not_stopped(tmp_path: Path) -> None:
    for where in ("ram", tmp_path / "tree"):
        session = ingested(NET, history(210), tree=where, seed=4, search=7)
        session.generate(6)
        session.save(tmp_path / "saved")
        session.save(tmp_path / "saved")  # in the place of the first
        before, settings = session.working_context(), session.settings
        said = (session.nll([1, 2]), session.generate(9)) if where == "ram" else None
        session.close()
        again = NET.load_session(tmp_path / "saved")
        assert again.settings == settings
        for mine, its in zip(again.working_context(), before, strict=True):
            np.testing.assert_array_equal(mine, its)
        if said is not None:
            assert (again.nll([1, 2]), again.generate(9)) == (
                pytest.approx(said[0], abs=1e-5),
                said[1],
            )
        again.close()
    assert {path.name for path in tmp_path.iterdir()} == {"saved", "tree"}
    with pytest.raises(ConfigError, match="another model"):
        InferenceModel(NET.model, NET.lensnet, NET.config).load_session(tmp_path / "saved")
    with pytest.raises(ConfigError, match="not a saved session"):
        NET.load_session(tmp_path)
    with pytest.raises(ConfigError, match="not a saved session"):
        ingested(NET, history(210)).save(tmp_path)


def test_numbers_of_numpy_are_saved_too(tmp_path: Path) -> None:
    of_numpy = {"search": np.int64(3), "refocus": np.int32(2), "budget": np.int64(BUDGET)}
    session = NET.session("lens", **of_numpy)
    session.ingest(history(150))
    session.save(tmp_path / "saved")
    settings = NET.load_session(tmp_path / "saved").settings
    assert (settings.search, settings.refocus, settings.budget) == (3, 2, BUDGET)


def test_saving_touches_nothing_but_the_saved_session(tmp_path: Path) -> None:
    mine = ("saved.new", "saved.old", "saved.partial", "other")
    for name in mine:
        (tmp_path / name).mkdir()
        (tmp_path / name / "thoughts.txt").write_text("mine")
    session = ingested(NET, history(210))
    for _ in range(2):
        session.save(tmp_path / "saved")
    for name in ("thoughts.txt", "tree/thoughts.txt"):
        (tmp_path / "saved" / name).write_text("mine")
        with pytest.raises(
            ConfigError, match=f"saved holds {name}, which is not part of the saved"
        ):
            session.save(tmp_path / "saved")
        assert (tmp_path / "saved" / name).read_text() == "mine"
        (tmp_path / "saved" / name).unlink()
    session.save(tmp_path / "saved")
    assert {path.name for path in tmp_path.iterdir()} == {*mine, "saved"}
    assert all((tmp_path / name / "thoughts.txt").read_text() == "mine" for name in mine)


@pytest.mark.parametrize("where", ["inside", "beside"])
def test_all_of_a_saved_session_is_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Its tree too: what is not on disk when the machine dies is not saved."""
    flushed: set[int] = set()
    fsync = os.fsync

    def flush(handle: int) -> None:
        flushed.add(os.fstat(handle).st_ino)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", flush)
    saved_after(tmp_path, tree="ram" if where == "inside" else tmp_path / "tree")
    files = [path for path in tmp_path.rglob("*") if path.name != "lock"]
    assert {"session.json", "context.safetensors", "tokens", "tokens.sums"} <= {
        path.name for path in files
    }
    assert [str(path) for path in files if path.stat().st_ino not in flushed] == []


def test_a_tree_whose_path_is_not_utf8_cannot_be_named(tmp_path: Path) -> None:
    tree = tmp_path / os.fsdecode(b"caf\xe9")
    with ingested(NET, history(60), tree=tree) as session:
        with pytest.raises(
            ConfigError, match=r"caf\\udce9, is not UTF-8, so .*: rename its folder"
        ):
            session.save(tmp_path / "saved")
        session.generate(1)
    assert [path.name for path in tmp_path.iterdir()] == [tree.name]


def test_a_live_tree_inside_a_saved_session_is_kept(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    with ingested(NET, history(210)) as session:
        session.save(saved)
    with NET.session("lens", BUDGET, tree=saved / "tree") as live:
        live.ingest(history(440))
        for session in (live, ingested(NET, history(30))):
            with pytest.raises(ConfigError, match=r"saved/tree is already open in process"):
                session.save(saved)
    with NET.load_session(saved) as session:
        assert len(session) == 650


def test_a_damaged_context_is_told_in_one_line(tmp_path: Path) -> None:
    session = ingested(NET, history(210))
    session.generate(1)
    session.save(tmp_path / "saved")
    path = tmp_path / "saved" / "context.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(
        ConfigError, match=r"saved is damaged \(context.safetensors does not have the SHA"
    ) as error:
        NET.load_session(tmp_path / "saved")
    assert "\n" not in str(error.value)


def saved_after(tmp_path: Path, *, tree: str | Path = "ram", length: int = 210) -> Path:
    """A saved session that has searched, focused and generated."""
    session = ingested(NET, history(length), tree=tree, seed=4, search=7)
    session.generate(2)
    session.save(tmp_path / "saved")
    session.close()
    return tmp_path / "saved"


def reseal(saved: Path) -> None:
    """Makes the manifest right for what the folder holds now."""
    names = ["session.json", "context.safetensors"]
    write_manifest(saved, {name: fingerprint(saved / name) for name in names})


def refused(saved: Path) -> str:
    with pytest.raises(ConfigError) as error:
        NET.load_session(saved)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("where", ["inside", "beside"])
def test_a_missing_tree_is_told_and_none_is_made(tmp_path: Path, where: str) -> None:
    beside = tmp_path / "tree"
    saved = saved_after(tmp_path, tree="ram" if where == "inside" else beside)
    tree = saved / "tree" if where == "inside" else beside
    tree.rename(tmp_path / "moved")
    assert f"{tree} holds no tree" in refused(saved)
    assert not tree.exists()
    (tmp_path / "moved").rename(tree)
    NET.load_session(saved).close()


Arrays = dict[str, Any]


def shifted(arrays: Arrays) -> Arrays:
    return arrays | {"starts": arrays["starts"] + 4}


def swapped(arrays: Arrays) -> Arrays:
    starts = arrays["starts"].copy()
    starts[[3, 4]] = starts[[4, 3]]
    return arrays | {"starts": starts}


def deeper(arrays: Arrays) -> Arrays:
    lods = arrays["lods"].copy()
    lods[-1] = 1
    return arrays | {"lods": lods}


def unaligned(arrays: Arrays) -> Arrays:
    """The first entry, a LOD2 node, cut in its middle: the cover is still one."""
    lods, starts = arrays["lods"].copy(), arrays["starts"].copy()
    place = int(np.flatnonzero((lods[:-1] == 2) & (lods[1:] == 2))[0])
    lods[place], lods[place + 1] = 1, 2
    starts[place + 1] -= 12
    return arrays | {"lods": lods, "starts": starts}


TAMPERED = {
    "shifted": shifted,
    "swapped": swapped,
    "deeper": deeper,
    "unaligned": unaligned,
    "shorter": lambda arrays: {name: array[:-1] for name, array in arrays.items()},
    "negative": lambda arrays: arrays | {"lods": arrays["lods"] - 1},
    "too coarse": lambda arrays: arrays | {"lods": arrays["lods"] + 3},
    "other numbers": lambda arrays: arrays | {"starts": arrays["starts"].astype(np.float64)},
    "smaller numbers": lambda arrays: arrays | {"lods": arrays["lods"].astype(np.int8)},
    "two axes": lambda arrays: arrays | {"lods": arrays["lods"][None]},
    "missing": lambda arrays: {"lods": arrays["lods"]},
    "unknown": lambda arrays: arrays | {"heard": arrays["lods"]},
    "rescored too many": lambda arrays: arrays | {"rescored": np.zeros(999, np.float32)},
    "rescored by words": lambda arrays: arrays | {"rescored": arrays["lods"]},
}


@pytest.mark.parametrize("how", TAMPERED)
def test_a_context_that_is_none_is_refused(tmp_path: Path, how: str) -> None:
    """Whoever changes it may change its hash too."""
    saved = saved_after(tmp_path, tree=tmp_path / "tree")
    path = saved / "context.safetensors"
    arrays = load_file(path)
    assert "rescored" in arrays
    save_file({name: np.ascontiguousarray(a) for name, a in TAMPERED[how](arrays).items()}, path)
    reseal(saved)
    assert "saved is damaged (context.safetensors" in refused(saved)
    save_file(arrays, path)
    reseal(saved)
    NET.load_session(saved).close()  # the tree was not left open


def with_path(content: Any, path: str, value: Any) -> Any:
    first, _, rest = path.partition(".")
    return content | {first: with_path(content[first], rest, value) if rest else value}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("tokens", -1),
        ("tokens", 10**18),
        ("tokens", "many"),
        ("tree", 5),
        ("tree", "no\0where"),
        ("hashes", ["a"]),
        ("window", {"known": 0, "first": 0}),
        ("window", {"known": 10**9, "first": 0}),
        ("window", {"known": 211, "first": 16}),
        ("window", {"known": 211, "first": -16}),
        ("window", {"known": 211, "first": 208}),
        ("window", {"known": 211}),
        ("settings.policy", "oracle"),
        ("settings.policy", "newest"),
        ("settings.budget", 10**30),
        ("settings.budget", 4),
        ("settings.budget", None),
        ("settings.seed", [-1]),
        ("settings.seed", 3),
        ("settings.search", "x"),
        ("settings.search", -2),
        ("settings.tail", [10**12] * 20),
        ("settings.tail", [-1] * 20),
        ("settings.tail", [1]),
        ("settings.keep_prefix", -1.0),
        ("settings.keep_prefix", "inf"),
        ("settings.refocus", 0),
        ("settings.refocus", 6),
        ("settings.refocus", "x"),
        ("settings.focus", {"iterations": 10**18, "threshold": -1}),
        ("settings.focus", None),
        ("settings", []),
        ("format", 1),
        ("format", [2]),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path: Path, path: str, value: Any) -> None:
    saved = saved_after(tmp_path)
    content = json.loads((saved / "session.json").read_text())
    (saved / "session.json").write_text(json.dumps(with_path(content, path, value)))
    reseal(saved)
    refused(saved)


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "[" * 100_000, '{"format": 2', '{"format": NaN}', "\ud800", "\xff"]
)
def test_what_is_no_json_is_refused(tmp_path: Path, text: str) -> None:
    saved = saved_after(tmp_path)
    (saved / "session.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    reseal(saved)
    assert "not a saved session" in refused(saved)


def test_a_saved_session_can_be_read_where_it_cannot_be_written(tmp_path: Path) -> None:
    saved = saved_after(tmp_path)
    session = NET.load_session(saved)
    expected = (
        session.working_context(),
        pytest.approx(session.nll([1, 2]), abs=1e-5),
        session.generate(5),
    )
    with read_only(tmp_path / "saved"):
        session = NET.load_session(saved)
        for mine, its in zip(session.working_context(), expected[0], strict=True):
            np.testing.assert_array_equal(mine, its)
        assert session.nll([1, 2]) == expected[1]
        assert session.generate(5) == expected[2]  # its tree is a copy in memory
        with pytest.raises((ConfigError, OSError)) as error:
            session.save(saved)
        assert "\n" not in str(error.value)


def test_a_session_reads_a_tree_that_cannot_be_written(tmp_path: Path) -> None:
    with ingested(NET, history(211), tree=tmp_path / "tree") as session:
        expected = pytest.approx(session.nll([1, 2]), abs=1e-5)
    with read_only(tmp_path / "tree"):
        with NET.session("lens", BUDGET, tmp_path / "tree") as session:
            assert session.nll([1, 2]) == expected
            for change in (
                lambda: session.generate(1),
                lambda: session.ingest([1]),
                lambda: session.truncate(9),
            ):
                with pytest.raises(ConfigError, match="is read-only") as error:
                    change()
                assert "\n" not in str(error.value)
            assert len(session) == 211
            session.ingest([])
            session.truncate(211)
            assert session.nll([1, 2]) == expected
            session.save(tmp_path / "saved")
        with NET.load_session(tmp_path / "saved") as session:
            assert session.nll([1, 2]) == expected
        with pytest.raises((ConfigError, OSError), match="new"):
            NET.session("lens", BUDGET, tmp_path / "tree" / "new")
    with NET.session("lens", BUDGET, tmp_path / "tree") as session:
        session.ingest([1])
        assert len(session) == 212
