"""The documentation says what the code says: citations have their heading, links their target,
metrics their entry, settings exist.
"""

import ast
import re
from pathlib import Path

import pytest

from mc_ds.config import RunConfig
from mc_ds.config.cli import CommandLine
from mc_ds.config.errors import field_paths
from mc_ds.training.guards.exit_codes import ExitCode

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "ds_configs" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
SOURCES = [
    path for room in ("mc_ds", "launch", "tools") for path in sorted((ROOT / room).rglob("*.py"))
]

PROGRAMS = [
    "launch/generate.py",
    *(
        f"tools/{path.name}"
        for path in sorted((ROOT / "tools").glob("*.py"))
        if path.name not in ("ablate.py", "plan_run.py", "benchmark.py")  # they take others too
    ),
]
BENCHMARKS = sorted(path.stem for path in (ROOT / "tools" / "bench").glob("*.py"))


def headings(page):
    return re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)


def anchor(heading):
    """A heading's name in links, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_every_citation_names_a_page_and_its_heading():
    cited = {
        citation
        for path in SOURCES
        for citation in re.findall(r'docs/([\w/-]+\.md),\s+"([^"]+)"', path.read_text())
    }
    assert cited
    assert not {(page, name) for page, name in cited if name not in headings(ROOT / "docs" / page)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_can_be_read(page):
    assert len(page.read_text().splitlines()) <= (200 if page.name == "README.md" else 400)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_has_its_target(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, fragment = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not fragment or fragment in map(anchor, headings(linked)), target


def documented_metrics():
    """Keys in the tables of docs/metrics.md, with `*` for what varies."""
    page = (ROOT / "docs" / "metrics.md").read_text()
    rows = "\n".join(line for line in page.splitlines() if line.startswith("|"))
    keys = re.findall(r"`((?:train|mc|val|data)/[^`]+)`", rows)
    return {re.sub(r"\{[^}]*\}", "*", key) for key in keys}


def recorded_metrics():
    """Keys in the sources, with `*` for what varies."""
    literals = {
        key
        for path in SOURCES
        for key in re.findall(r'"((?:train|mc|val|data)/[\w/{}.]+)"', path.read_text())
    }
    return {re.sub(r"\{[^}]*\}", "*", key) for key in literals}


SAMPLES = {f"mc/adv_delta_{part}" for part in ("mean", "p95", "std")}
"""Keys that a sample set is recorded under."""


def test_every_metric_is_documented():
    assert recorded_metrics() - {"mc/adv_delta"} | SAMPLES <= documented_metrics()


def test_every_documented_metric_is_recorded():
    assert documented_metrics() <= recorded_metrics() | SAMPLES


def test_every_setting_is_read():
    """Somewhere beyond the checks of its own section."""
    read = set()
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        checks = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef) and node.name.startswith("_check")
            for inner in ast.walk(node)
        }
        read |= {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and id(node) not in checks
        }
    leaves = {path.rpartition(".")[2] for path in field_paths(RunConfig)}
    assert not leaves - read


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_option_in_a_command_exists(page):
    settings = set(field_paths(CommandLine)) | {"help"}
    for program, known in (
        (r"launch/(?:train\.py|slurm/train\.sbatch)", settings),
        (r"launch/(?:evaluate\.py|slurm/evaluate\.sbatch)", options_of("launch/evaluate.py")),
        (r"tools/ablate\.py", options_of("tools/ablate.py") | settings),
        (r"tools/plan_run\.py", options_of("tools/plan_run.py") | settings),
        *(
            (rf"tools/benchmark\.py {name}", options_of(f"tools/bench/{name}.py") | settings)
            for name in BENCHMARKS
        ),
        *((name.replace(".", r"\."), options_of(name)) for name in PROGRAMS),
    ):
        commands = re.findall(program + r"(?:[^\n]*\\\n)*[^\n`]*", page.read_text())
        given = {
            name
            for command in commands
            for name in re.findall(r"--([\w.]+)", command.split("#")[0])
        }
        assert given <= known, program


CURRENT_PAGES = [
    page for page in PAGES if "experiments" not in page.parts and page.name != "CHANGELOG.md"
]
"""Pages that describe this version; the others name settings of earlier ones too."""


@pytest.mark.parametrize("page", CURRENT_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_setting_that_a_page_names_exists(page):
    paths = {name for name in field_paths(RunConfig) if "." in name}
    sections = {name.partition(".")[0] for name in paths}
    named = re.findall(r"`(?:--)?([a-z]+\.[a-z][a-z0-9_.]*)\b(?![.(/])", page.read_text())
    settings = {name for name in named if name.partition(".")[0] in sections}
    files = {name for name in settings if name.endswith((".py", ".log", ".md"))}
    assert not settings - files - paths


def options_of(program):
    """Options of a program that argparse reads, also those that a benchmark shares with another."""
    source = (ROOT / program).read_text()
    for module, names in re.findall(r"^from bench\.(\w+) import (.*)$", source, re.M):
        other = (ROOT / "tools" / "bench" / f"{module}.py").read_text()
        for shared in re.findall(r"add_\w+_options", names):
            source += re.search(rf"^def {shared}\(.*?(?=^def )", other, re.M | re.S).group()
    return {"help", *re.findall(r'add_argument\(\s*"--(\w+)"', source)}


def test_every_exit_code_is_in_the_readme():
    table = (ROOT / "README.md").read_text()
    assert not [
        code.name for code in ExitCode if f"| {code.value} | {code.meaning} |\n" not in table
    ]


def test_the_annotated_tree_names_what_exists():
    assert not [path for path in annotated_tree() if not (ROOT / path).exists()]


def test_every_room_and_program_is_in_the_annotated_tree():
    patterns = ("mc_ds/*", "launch/*", "tools/*.*", "docs/*", "assets/*")
    found = [path.relative_to(ROOT) for pattern in patterns for path in ROOT.glob(pattern)]
    ours = [path for path in found if path.name not in ("__init__.py", "py.typed", "__pycache__")]
    assert not set(ours) - set(annotated_tree())


def annotated_tree():
    """Paths that the README's tree names, relative to the root."""
    tree = (ROOT / "README.md").read_text().split("## Where things are")[1].split("```")[1]
    paths: list[Path] = []
    folders: list[str] = []
    for line in filter(str.strip, tree.splitlines()):
        depth = (len(line) - len(line.lstrip())) // 2
        folders = [*folders[:depth], line.split()[0]]
        paths.append(Path(*folders))
    return paths
