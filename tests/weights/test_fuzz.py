"""What comes from elsewhere, harmed at random with a fixed seed: each bundle, folder, file and call
is served, or refused in one line, within a minute and 2 GiB, and nothing is written anywhere else.
"""

import math
import os
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from mc_ds.inference import InferenceModel, Sampling, Session, load_bundle
from mc_ds.weights.export import export_bundle
from tests.support import guard, tiny_bundle, tiny_hf
from tests.support.guard import Outcome, guarded
from tests.support.mutations import STRANGE, harm_bundle, harm_bytes, harm_folder
from tests.support.optional import optional
from tests.support.tiny_bundle import write_bundle

pytestmark = pytest.mark.slow
PROMPT = "def read(path): return 12 "


class Findings:
    """How many actions ended rightly, the slowest, and what went wrong."""

    def __init__(self) -> None:
        self.outcomes: list[tuple[str, Outcome]] = []

    def add(self, what: str, outcome: Outcome) -> None:
        """Note an outcome."""
        self.outcomes.append((what, outcome))

    def check(self, count: int) -> None:
        """Report the slowest; fail where anything went wrong, or nothing was served or refused."""
        assert len(self.outcomes) == count
        what, slowest = max(self.outcomes, key=lambda found: found[1].seconds)
        served = sum(outcome.said == "served" for _, outcome in self.outcomes)
        print(f"{count}: {served} served; slowest {slowest.seconds:.1f} s: {what}: {slowest.said}")
        wrong = [
            f"{what}: {outcome.said}" for what, outcome in self.outcomes if not outcome.is_right
        ]
        assert not wrong, f"{len(wrong)} of {count}:\n" + "\n".join(wrong)
        assert 0 < served < count


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for one harmed thing at a time, beside others that nothing may write to."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked child has no others
    for name in ("home", "cwd"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "cwd")
    yield tmp_path
    torch.set_num_threads(threads)


def try_out(findings: Findings, what: str, place: Path, action: Callable[[], None]) -> Outcome:
    """Run an action that may write to `out` alone."""
    before = without_out(place)
    outcome = guarded(action)
    if without_out(place) != before:
        outcome = Outcome("it wrote elsewhere", outcome.seconds)
    if outcome.said != "served" and (place / "out").exists():
        outcome = Outcome(f"it left something behind: {outcome.said}", outcome.seconds)
    findings.add(what, outcome)
    return outcome


def without_out(place: Path) -> dict[str, tuple[int, int]]:
    """What lies in the place, but for the named output."""
    found = guard.entries(place)
    return {name: facts for name, facts in found.items() if name.partition("/")[0] not in ("out",)}


def serve(model: InferenceModel) -> None:
    """Use a model as a server does."""
    assert model.tokenizer is not None
    session = model.session("recency" if model.lensnet is None else "lens")
    session.ingest(model.tokenizer.encode_document(PROMPT * 8))
    ids = session.generate(3)
    assert all(0 <= token < model.tokenizer.vocab_size for token in ids)
    assert math.isfinite(session.nll(ids[:1] or [0]))
    assert isinstance(model.tokenizer.decode(ids), str)


def import_and_serve(source: Path, out: Path) -> None:
    serve(load_bundle(export_bundle(source, out)))


def test_500_bundles(place: Path) -> None:
    sound, harmed, findings = place / "sound", place / "harmed", Findings()
    tokenizer = tiny_bundle.tiny_tokenizer()
    config = tiny_bundle.run_config()
    with torch.no_grad():
        state = tiny_bundle.state_of(*tiny_bundle.networks(config)).items()
        write_bundle(sound, config, tokenizer, state, step=7, source="a test")
    for seed in range(500):
        rng = random.Random(seed)
        shutil.copytree(sound, harmed)
        what = f"bundle {seed}, {harm_bundle(rng, harmed)}"
        try_out(findings, what, place, lambda: serve(load_bundle(harmed)))
        shutil.rmtree(harmed)
    findings.check(500)


def test_200_hugging_face_folders(place: Path) -> None:
    sound, harmed, findings = place / "sound", place / "harmed", Findings()
    tiny_hf.write_folder(sound, tiny_hf.GQA)
    for seed in range(200):
        rng = random.Random(1_000 + seed)
        shutil.copytree(sound, harmed)
        what = f"folder {seed}, {harm_folder(rng, harmed)}"
        try_out(findings, what, place, lambda: import_and_serve(harmed, place / "out"))
        shutil.rmtree(harmed)
        shutil.rmtree(place / "out", ignore_errors=True)
    findings.check(200)


def test_100_gguf_files(place: Path) -> None:
    optional("gguf")
    from tests.weights.test_gguf import SHAPE, write

    content, harmed = write(place / "sound.gguf", SHAPE).read_bytes(), place / "harmed.gguf"
    findings = Findings()
    for seed in range(100):
        rng = random.Random(2_000 + seed)
        header = rng.choice([24, 600, 12_000, None])
        harmed.write_bytes(harm_bytes(rng, content, header))
        what = f"file {seed}, the first {header} bytes"
        try_out(findings, what, place, lambda: import_and_serve(harmed, place / "out"))
        shutil.rmtree(place / "out", ignore_errors=True)
    findings.check(100)


class Objects:
    """Draws arguments that a program may pass by mistake."""

    def __init__(self, rng: random.Random, out: Path) -> None:
        self.rng = rng
        self.values: list[Any] = [
            *STRANGE,
            *(b"x", object(), Path("/dev/null"), out, torch.ones(2), torch.tensor([1, 2])),
            *(2, 4, 20, 48, [1, 2, 3], ["x"], (1, "a"), "recency", "uniform", "ram", 0.7),
        ]

    def __call__(self) -> Any:
        return self.rng.choice(self.values)

    def length(self) -> Any:
        """A number of tokens to write: what is possible is small, or it would be written."""
        value = self()
        return 3 if isinstance(value, int) and value > 50 else value


def call(rng: random.Random, model: InferenceModel, session: Session, out: Path) -> None:
    """One call of the API with arguments drawn at random."""
    any_: Any = Objects(rng, out)
    options = (
        *("policy", "budget", "seed", "search", "tail", "focus", "keep_prefix", "refocus", "tree"),
    )
    sampling = ("temperature", "top_k", "top_p", "seed", "stop", "stop_ids")
    s: Any = session
    m: Any = model
    few = {name: any_() for name in rng.sample(options, rng.choice([1, 1, 2]))}
    drawn = {name: any_() for name in rng.sample(sampling, rng.choice([1, 1, 2]))}
    if few.get("tree") not in (None, "ram"):
        few["tree"] = few["tree"] if not isinstance(few["tree"], str | Path) else out
    calls: list[Callable[[], Any]] = [
        lambda: m.session(**few),
        lambda: m.session(**few).ingest([1, 2, 3]),
        lambda: s.generate(any_.length(), **drawn),
        lambda: s.generate(3, **drawn),
        lambda: list(s.stream(2, Sampling(any_(), any_(), any_(), any_()))),
        lambda: s.ingest(any_()),
        lambda: s.nll(any_()),
        lambda: s.truncate(any_()),
        lambda: m.load_session(any_()),
        lambda: load_bundle(any_()),
        lambda: m.sessions(any_(), **{k: v for k, v in few.items() if k not in ("tail", "tree")}),
        lambda: m.tokenizer.encode(any_()),
        lambda: m.tokenizer.decode(any_()),
        lambda: m.generate(any_(), 2),
        lambda: m.open_tree(out, create=any_()),
        lambda: s.save(out),
    ]
    rng.choice(calls)()
    assert math.isfinite(session.nll([1])) or not len(session)


def test_200_calls(place: Path) -> None:
    tiny_bundle.write(place / "sound")
    model, findings = load_bundle(place / "sound"), Findings()
    session = model.session()
    session.ingest([1, 5, 9] * 20)
    for seed in range(200):
        rng = random.Random(3_000 + seed)
        outcome = guarded(partial(call, rng, model, session, place / "out"))
        findings.add(f"call {seed}", outcome)
        shutil.rmtree(place / "out", ignore_errors=True)
        assert sorted(os.listdir(place)) == ["cwd", "home", "sound"]
        assert os.listdir(place / "cwd") == os.listdir(place / "home") == []
    findings.check(200)
