"""What cannot be had is refused in one line that names it, before anything changes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mc_ds.config import ConfigError
from mc_ds.inference import InferenceModel, Sampling, load_bundle
from tests.support.factories import VOCAB
from tests.support.sessions import history, inference_model, ingested
from tests.support.tiny_bundle import write

NET = inference_model(position_scheme="order")


def refused(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        call()
    assert "\n" not in str(error.value)


def test_sessions_that_cannot_be_had() -> None:
    plain = InferenceModel(
        inference_model(num_random_variants=0, train_wc_length=96).model, None, NET.config
    )
    make: Any = NET.session
    for call, said in [
        (lambda: make("newest"), r"policy = 'newest' is unknown: use recency, random"),
        (lambda: make(["lens"]), r"policy = \['lens'\] is unknown"),
        (lambda: make("lens", 12), r"budget = 12 .* use at least 22"),
        (lambda: make("recency", 5), r"budget = 5 .* horizon_tokens = 5"),
        (lambda: make("lens", 48.0), r"budget = 48.0 is not a number of entries"),
        (lambda: make("lens", "48"), r"budget = '48' is not a number of entries"),
        (lambda: make("lens", True), r"budget = True is not a number of entries"),
        (lambda: make(search=-1), r"search = -1"),
        (lambda: make(search=2.5), r"search = 2.5"),
        (lambda: make(search="all"), r"search = 'all'"),
        (lambda: inference_model(lens_index=False).session(search=True), r"search = True needs"),
        (lambda: make(seed=-1), r"seed = \(-1,\)"),
        (lambda: make(seed=None), r"seed = \(None,\)"),
        (lambda: make(seed=(1, "a")), r"seed = \(1, 'a'\)"),
        (lambda: make(keep_prefix=-0.5), r"keep_prefix = -0.5"),
        (lambda: make(keep_prefix=float("nan")), r"keep_prefix = nan"),
        (lambda: make(keep_prefix="a"), r"keep_prefix = 'a'"),
        (lambda: make(refocus=0), r"refocus = 0 is not .* use 1 to 5"),
        (lambda: make(refocus=6), r"refocus = 6 is not .* use 1 to 5"),
        (lambda: make(refocus=True), r"refocus = True"),
        (lambda: make(refocus=2.0), r"refocus = 2.0"),
        (lambda: make(focus={"iterations": 2}), r"focus = \{'iterations': 2\}"),
        (lambda: make("blind", tail=[1, 2]), r"tail: 2 tokens .* 7"),
        (lambda: make("lens", tail=[VOCAB] * 9), rf"tail: token id {VOCAB} is not in the vocab"),
        (lambda: make("lens", tail=[-1] * 9), r"tail: token id -1 is not in the vocabulary"),
        (lambda: make("lens", tail="what is this"), r"tail: tokens of .* cannot be added"),
        (lambda: make("lens", tail=7), r"tail: tokens of .* cannot be added"),
        (lambda: make(tree=7), r"tree = 7 is not a tree: give \"ram\""),
        (
            lambda: make(tree=inference_model(dim=16).open_tree("ram")),
            r"made by another model",
        ),
        (lambda: make(tree=inference_model().open_tree("ram")), r"made by another model"),
        (lambda: NET.sessions(0), r"count = 0"),
        (lambda: NET.sessions(2.0), r"count = 2.0"),  # type: ignore[arg-type]
        (lambda: plain.session("uniform"), r"plain language model: use recency"),
        (lambda: InferenceModel(NET.model, None, NET.config).session("lens"), r"needs a LensNet"),
    ]:
        refused(call, said)


def test_calls_that_cannot_work_leave_the_session_as_it_was() -> None:
    session: Any = ingested(NET, history(60))
    empty: Any = NET.session()
    for call, said in [
        (lambda: empty.nll([1]), r"no history"),
        (lambda: empty.generate(1), r"no history"),
        (lambda: session.nll([]), r"0 tokens .* 1 to horizon_tokens = 5"),
        (lambda: session.nll([1] * 6), r"6 tokens"),
        (lambda: session.nll([VOCAB]), rf"{VOCAB} is not in the vocabulary"),
        (lambda: session.nll("ab"), r"tokens of .* cannot be added"),
        (lambda: session.ingest([-1]), r"-1 is not in the vocabulary"),
        (lambda: session.ingest(None), r"tokens of .* cannot be added"),
        (lambda: session.ingest([[1, 2]]), r"shape \(1, 2\)"),
        (lambda: session.ingest([1, [2]]), r"not one sequence"),
        (lambda: session.ingest([1.0]), r"float64 cannot be added"),
        (lambda: session.ingest(torch.ones(3, dtype=torch.bfloat16)), r"bfloat16 cannot be added"),
        (lambda: session.ingest([10**30]), r"object cannot be added"),
        (lambda: session.truncate(61), r"cannot be cut to 61"),
        (lambda: session.truncate(-1), r"cannot be cut to -1"),
        (lambda: session.truncate(2.5), r"cannot be cut to 2.5"),
        (lambda: session.truncate("9"), r"cannot be cut to '9'"),
        (lambda: session.generate(-1), r"max_new_tokens = -1"),
        (lambda: session.generate(2.5), r"max_new_tokens = 2.5"),
        (lambda: session.generate("2"), r"max_new_tokens = '2'"),
        (lambda: session.generate(1, temperature=-1.0), r"temperature = -1"),
        (lambda: session.generate(1, temperature="1"), r"temperature = '1'"),
        (lambda: session.generate(1, temperature=1, top_k=2.5), r"top_k = 2.5"),
        (lambda: session.generate(1, temperature=1, top_p="x"), r"top_p = 'x'"),
        (lambda: session.generate(1, seed=-1), r"seed = -1"),
        (lambda: session.generate(1, stop=["x"]), r"needs a tokenizer"),
        (lambda: session.generate(1, stop=[b"x"]), r"stop = b'x'"),
        (lambda: session.generate(1, stop=5), r"stop = 5"),
        (lambda: session.generate(1, stop_ids=5), r"stop_ids = 5"),
        (lambda: session.generate(1, stop_ids=["x"]), r"stop_ids = \['x'\]"),
        (lambda: session.stream(1, {"temperature": 1}), r"sampling = \{'temperature': 1\}"),
        (lambda: NET.generate([], 3), r"sessions is empty"),
    ]:
        refused(call, said)
    assert len(session) == 60
    assert session.generate(0) == []
    assert session.nll([1]) == pytest.approx(ingested(NET, history(60)).nll([1]), abs=1e-5)


@pytest.mark.parametrize("where", ["ram", "disk"])
def test_a_closed_session_says_that_it_is_closed(tmp_path: Path, where: str) -> None:
    session = ingested(NET, history(60), tree="ram" if where == "ram" else tmp_path / "tree")
    session.nll([1])
    session.close()
    session.close()
    calls: list[Callable[[], Any]] = [
        lambda: session.nll([1]),
        lambda: session.generate(2),
        lambda: session.ingest([1]),
        lambda: session.truncate(3),
        lambda: session.tree.tokens(0, 3),
        lambda: session.tree.gists(1, torch.tensor([0])),
        lambda: session.save(tmp_path / "saved"),
        lambda: NET.session("lens", 48, session.tree),
    ]
    for call in calls:
        refused(call, "closed")
    assert len(session) == 60
    assert not (tmp_path / "saved").exists()


def test_devices_and_dtypes_that_cannot_be_had(tmp_path: Path) -> None:
    bundle, _, _ = write(tmp_path / "bundle", NET.config)
    load: Any = load_bundle
    for options, said in [
        (dict(device="xyz"), r"device = 'xyz': not a device: use cpu or cuda"),
        (dict(device=None), r"device = None: not a device"),
        (dict(device="meta"), r"device = meta: not supported"),
        (dict(device="cuda:99"), r"device = cuda:99: only \d+ GPUs are visible"),
        (dict(dtype=torch.int64), r"dtype = torch.int64 is not supported"),
        (dict(dtype="bf16"), r"dtype = 'bf16' is not supported"),
        (dict(dtype=torch.float8_e4m3fn), r"dtype = torch.float8_e4m3fn is not supported"),
        (dict(dtype=torch.complex64), r"dtype = torch.complex64 is not supported"),
    ]:
        refused(lambda options=options: load(bundle, **options), said)  # type: ignore[misc]
    refused(lambda: load(7), r"7 ")


def test_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    bundle, _, _ = write(tmp_path / "bundle", NET.config)
    refused(lambda: load_bundle(bundle, device="cuda"), r"device = cuda: only 0 GPUs are visible")


def test_sampling_is_checked_where_it_is_made() -> None:
    refused(lambda: Sampling(float("nan")), r"temperature = nan")
