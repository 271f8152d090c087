"""The report of a run: figures in words that follow from the files, a page that holds everything,
and the statistics behind it.
"""

import json
import re
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reporting.charts import Bars, Lines, charts_of, evaluation_charts
from reporting.evaluations import Evaluation, read_evaluations
from reporting.figures import figure
from reporting.glossary import glossary
from reporting.runs import Run, open_run
from reporting.statistics import chance_band, paired, smoothed, window_of
from reporting.verdict import Answer, lensnet_works, what_was_trained

from tests.support.optional import optional
from tests.support.processes import ROOT
from tests.support.report_run import POLICIES, evaluation, meaning_of, write_run
from tools.report import main
from tools.report import write_report as write_a_report


def write_report(folder: Path) -> Path:
    optional("plotly")
    return write_a_report(folder)


def test_a_smoothed_curve_is_the_mean_around_each_value() -> None:
    assert smoothed([1, 2, 3, 4, 9], 3).tolist() == [1.5, 2, 3, 16 / 3, 6.5]
    assert window_of(19) == 1
    assert [window_of(n) % 2 for n in range(20, 400)] == [1] * 380


def test_noise_stays_within_the_band_of_chance_and_a_trend_leaves_it() -> None:
    noise = np.random.default_rng(0).normal(0, 0.3, 4000)
    window = 41
    inside = np.abs(smoothed(noise, window)) <= chance_band(noise.tolist(), window)
    assert 0.93 < inside.mean() < 0.97
    trend = noise - np.linspace(0, 1, 4000)
    np.testing.assert_allclose(
        chance_band(trend.tolist(), window), chance_band(noise.tolist(), window), rtol=1e-3
    )
    assert (smoothed(trend, window) < -chance_band(trend.tolist(), window))[2000:].all()


def test_the_sign_flip_test_counts_every_way() -> None:
    ours, theirs = np.array([1.0, 2, 4, 8, -3]), np.zeros(5)
    sums = [abs(float(np.dot(signs, ours))) for signs in product((1, -1), repeat=5)]
    found = paired(ours.tolist(), theirs.tolist())
    assert found.chance == np.mean([value >= 12 for value in sums])
    assert found.mean == pytest.approx(2.4)
    assert found.stderr == pytest.approx(ours.std(ddof=1) / np.sqrt(5))
    assert paired([2.0], [1.0]).stderr is None
    assert paired([2.0] * 40, [1.0] * 40).certainty == "sure"
    assert paired([0.0] * 9, [0.0] * 9).certainty == "could be luck"


def run_with(tmp_path: Path, **shift: float) -> tuple[Run, list[Evaluation]]:
    """A run whose evaluation has losses that differ from those of lens by `shift` per policy."""
    write_run(tmp_path, evaluations={"eval": evaluation(shift)})
    return open_run(tmp_path), read_evaluations(tmp_path)


@pytest.mark.parametrize(
    ("shift", "answer", "said"),
    [
        ({"recency": 0.5, "random": 0.7, "blind": 0.6}, Answer.YES, "recency, random and blind"),
        ({"recency": -0.5, "random": 0.7, "blind": 0.6}, Answer.NO, "a higher loss than recency"),
        (
            {"recency": 0.5, "random": 0.7, "blind": 0.0},
            Answer.UNCLEAR,
            "significantly from that of blind",
        ),
    ],
)
def test_the_answer_follows_from_paired_differences(
    tmp_path: Path, shift: dict[str, float], answer: Answer, said: str
) -> None:
    verdict = lensnet_works(*run_with(tmp_path, **shift))
    assert verdict.answer is answer
    assert said in verdict.reason
    assert len(verdict.evidence) == 4
    assert "preference correlation" in verdict.evidence[-1]


def test_an_evaluation_of_another_model_is_no_answer_about_this_one(tmp_path: Path) -> None:
    better = dict.fromkeys(("recency", "random", "blind"), 1.0)
    write_run(tmp_path, evaluations={"recall": evaluation(better)})
    focus = {"model": "assets/recall_small", "maps": []}
    (tmp_path / "recall_focus.json").write_text(json.dumps(focus))
    found = read_evaluations(tmp_path)
    assert [each.model for each in found] == ["assets/recall_small"]
    assert lensnet_works(open_run(tmp_path), found).answer is Answer.ABSENT
    focus["model"] = str(tmp_path / "bundle")
    (tmp_path / "recall_focus.json").write_text(json.dumps(focus))
    verdict = lensnet_works(open_run(tmp_path), read_evaluations(tmp_path))
    assert verdict.answer is Answer.YES


def test_what_was_trained_is_said_with_its_figures(tmp_path: Path) -> None:
    write_run(tmp_path, steps=40)
    assert what_was_trained(open_run(tmp_path)) == (
        "tried: a decoder of 4 layers, 192 wide, which reads 512 tokens as 288 entries, trained"
        " for 40 of 60 steps (81,920 tokens). Its held-out loss went from 8.00 to 4.00 nats"
        " per token."
    )


def test_charts_hold_what_the_records_hold(tmp_path: Path) -> None:
    write_run(tmp_path)
    run = open_run(tmp_path)
    charts = {chart.name: chart for chart in charts_of(run)}
    (training, held_out) = charts["loss"].curves
    assert training.points == run.series("train/loss")
    assert training.smooth != training.points
    assert held_out.points == held_out.smooth, "few values are drawn as they are"
    policies = {curve.label: dict(curve.points) for curve in charts["policies"].curves}
    assert list(policies) == ["lens", "blind", "full"]
    assert policies["lens"][60] == pytest.approx(-0.25), "less recency, at the same step"
    split = charts["step_split"]
    assert sum(dict(curve.points)[7] for curve in split.curves) == run.records[7]["train/step_ms"]
    assert "memory" not in charts, "0 on CPUs says nothing"
    assert charts["preference"].band is not None


def test_another_run_is_drawn_beside_it(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_run(tmp_path / name)
    one, two = open_run(tmp_path / "one"), open_run(tmp_path / "two")
    curves = charts_of(one, two)[0].curves
    assert [(curve.key, curve.against) for curve in curves[:2]] == [
        ("train/loss", False),
        ("train/loss", True),
    ]
    assert curves[0].colour == curves[1].colour


def test_one_budget_is_bars_and_several_are_lines(tmp_path: Path) -> None:
    records = evaluation({"recency": 0.5, "full": -0.1})
    (bars,) = evaluation_charts(Evaluation(tmp_path / "eval.json", records))
    assert isinstance(bars, Bars)
    assert [(bar.kind, bar.label) for bar in bars.bars] == [
        ("lens", "lens (288)"),
        ("rival", "recency (288)"),
        ("bound", "full (512)"),
    ]
    more = [{**record, "wc_length": 400, "budget": 0.8} for record in records[:2]]
    (lines,) = evaluation_charts(Evaluation(tmp_path / "eval.json", records + more))
    assert isinstance(lines, Lines)
    assert [point[0] for point in lines.lines["lens"]] == [288, 400]


def test_plotly_accepts_every_figure(tmp_path: Path) -> None:
    Figure = optional("plotly.graph_objects").Figure
    run, evaluations = run_with(tmp_path, recency=0.5, full=-0.1)
    drawings = [*charts_of(run, run), *evaluation_charts(evaluations[0])]
    for drawing in drawings:
        text = re.sub(r'"@[\w-]+"', '"#123456"', json.dumps(figure(drawing)))
        assert len(Figure(json.loads(text)).data) > 0
    assert len(drawings) > 8


def test_the_glossary_has_every_key_of_the_documentation(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "metrics.md").read_text()
    documented = set(re.findall(r"^\| `([^`]+)`", page, flags=re.MULTILINE))
    entries = glossary()
    assert {entry.key for entry in entries} == documented
    assert meaning_of("mc/lod_loss/2", entries).startswith("next-token loss of the entries")
    assert meaning_of("val/horizon_loss/lens", entries).startswith("loss of the horizon, by its")
    assert meaning_of("train/unknown", entries) == ""
    write_run(tmp_path)
    assert all(meaning_of(key, entries) for key in open_run(tmp_path).keys)
    html = write_report(tmp_path).read_text()
    assert all(f"<code>{key}</code>" in html for key in documented)


def test_the_page_is_one_file_below_8_mb_with_pictures_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    optional("plotly")
    run_with(tmp_path / "one", recency=0.5)
    run_with(tmp_path / "two", recency=0.4)
    assert main([str(tmp_path / "one"), "--against", str(tmp_path / "two")]) == 0
    page = tmp_path / "one" / "report.html"
    assert str(page) in capsys.readouterr().out
    assert page.stat().st_size < 8_000_000
    head, _, rest = page.read_text().partition("</style>")
    body = rest.partition('<script type="application/json"')[0]
    assert "default-src 'none'" in head
    assert not re.findall(r'(?:src|href)=(?!"#|"data:)', head + body)
    assert "one against two" not in body
    assert "tried against tried" in body
    pictures = {path.stem for path in (tmp_path / "one" / "report").glob("*.png")}
    assert pictures == set(re.findall(r'id="chart-([^"]+)"', body))


def test_continuations_are_shown_as_they_are_from_first_to_last(tmp_path: Path) -> None:
    write_run(tmp_path, steps=200)
    page = write_report(tmp_path).read_text()
    shown = page.partition("What the model writes")[2].partition("<h2")[0]
    assert "<pre>\n… if a &lt;b&gt;:\n    `return`</pre>" in shown
    assert re.findall(r"<td>([^<]*)</td><td><pre>\n([^<]*)</pre>", shown) == [
        *((f"step {step}", f"**{step}**") for step in (0, 40, 80, 120, 160, 200)),
        ("true text", "\n\nelse:"),
    ]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 3.0}\n')
    assert "What the model writes" not in write_report(tmp_path).read_text()


def test_text_of_files_cannot_become_markup(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><!--"
    maps = [
        {
            "title": evil,
            "block_size": 8,
            "known": 1,
            "pieces": [evil, "x"],
            "spans": [],
            "not_asked": [],
            "contexts": {"lens": [{"first": 0, "lods": [0]}]},
        }
    ]
    write_run(tmp_path, name=evil, evaluations={"eval": evaluation({"recency": 1.0})})
    (tmp_path / "eval_focus.json").write_text(json.dumps({"model": evil, "maps": maps}))
    page = write_report(tmp_path).read_text()
    assert "<script>alert" not in page
    data = page.split('<script type="application/json" id="data">')[1].split("</script>")[0]
    assert json.loads(data)["maps"][0]["pieces"] == [evil, "x"]


RECORDS = json.dumps(evaluation({"recency": 0.5}))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "metrics.jsonl does not exist: give the folder of a run"),
        ({"metrics.jsonl": '{"step": 1}', "config.yaml": "a: [1"}, "config.yaml is not YAML"),
        (
            {"metrics.jsonl": '{"step": 1}', "x.json": RECORDS, "x_focus.json": "[1]"},
            "x_focus.json is not a file of focus maps",
        ),
    ],
)
def test_what_cannot_be_reported_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], files: dict[str, Any], message: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert main([str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


def test_a_run_without_lensnet_has_a_page_too(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 3.0}\n')
    page = write_report(tmp_path).read_text()
    assert "this run did not train a LensNet" in page
    assert set(POLICIES) >= {"lens"}
