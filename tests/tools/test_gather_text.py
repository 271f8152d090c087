"""Gathering text: pages become long clean documents, licences are listed."""

import gzip
import json
from pathlib import Path

import gather_text
import pytest
from gathering import packages, pages
from gathering.packages import SOURCES, Package, Source
from gathering.pages import clean, documents

HTML = Source("x", "debian", "doc/**/*.html", 1, "html", left_out=("src",))


def lay(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = text.encode()
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return root


def test_pages_of_one_folder_are_joined_in_the_order_of_names(tmp_path: Path) -> None:
    source = Source("manual", "debian", "doc/**/*.rst.gz", 1)
    files = {"doc/b/2.rst.gz": "two", "doc/b/1.rst.gz": "one", "doc/b/c/3.rst.gz": "three"}
    lay(
        tmp_path, {**files, "doc/a/1.rst.gz": "alone", "doc/a/x.txt": "no page", "doc/0.rst.gz": ""}
    )
    assert list(documents(source, tmp_path)) == [
        ("manual a", "alone"),
        ("manual b", "one\n\ntwo\n\nthree"),
    ]


def test_folders_that_are_no_text_are_left_out(tmp_path: Path) -> None:
    lay(tmp_path, {"doc/src/1.html": "code", "doc/book/src/2.html": "text"})
    assert list(documents(HTML, tmp_path)) == [("x book", "text")]


def test_what_gets_too_long_is_cut_after_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "LONGEST", 10)
    lay(tmp_path, {"a/1.py": "one\ntwo\n", "a/2.py": "three four five six"})
    found = list(documents(Source("code", "pypi", "**/*.py", 2), tmp_path))
    assert [title for title, _ in found] == ["code a", "code a (2)", "code a (3)"]
    assert "".join(text for _, text in found) == "one\ntwo\n\nthree four five six"
    assert all(len(text) <= 10 for _, text in found)


def test_html_is_read_as_people_would() -> None:
    page = (
        "<head><title>no</title></head><nav>no</nav><h1>Title</h1>\n<p>Some <b>bold</b>\n text &amp;"
        " more.</p><script>no()</script><pre>fn main() {\n    x\n}</pre>"
    )
    assert clean(page, HTML) == "Title\n\nSome bold text & more.\n\nfn main() {\n    x\n}"


def test_an_entry_of_wordnet_is_words_and_meaning() -> None:
    text = (
        "  1 This software is licensed\n"
        "00005930 03 n 02 dwarf 0 little_one 0 001 @ 00004475 n 0000 | an atypically small one  \n"
    )
    source = Source("w", "debian", "data.*", 0, "wordnet")
    assert clean(text, source) == "dwarf, little one: an atypically small one"


def test_every_source_is_written_with_its_licence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fetch(source: Source, folder: Path) -> Package:
        lay(folder, {"a/1.py": f"{source.name} " * 9999, "b/1.py": "short"})
        return Package(folder, "1.2", f"licence of {source.name}")

    monkeypatch.setattr(gather_text, "fetch", fetch)
    out = tmp_path / "text"
    assert gather_text.main([str(out), "--sources", "sympy", "pandas"]) == 0
    lines = gzip.decompress((out / "sympy.jsonl.gz").read_bytes()).decode().splitlines()
    assert [json.loads(line)["title"] for line in lines] == ["sympy a", "sympy b"]
    licences = (out / "LICENCES.md").read_text()
    assert "## sympy 1.2\n\nlicence of sympy\n" in licences
    assert "licence of pandas" in licences
    assert "1 of them have at least 64,000 characters" in capsys.readouterr().out.splitlines()[1]
    monkeypatch.setattr(gather_text, "fetch", None)  # refused before anything is downloaded
    assert gather_text.main([str(out)]) == 2
    assert "exists" in capsys.readouterr().err


def test_the_licence_of_a_debian_package_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some copyright files begin with pages of excluded files."""
    copyright_file = "Files-Excluded:\n" + " vendor/thing\n" * 9000 + "License: MIT or Apache-2.0\n"
    commands: list[tuple[str, ...]] = []

    def output(*command: str, at: Path | None = None) -> str:
        commands.append(command)
        if command[:2] == ("apt-get", "download"):
            assert at is not None
            (at / "linux-doc-6.1_6.1.5-1_all.deb").write_bytes(b"")
        if command[0] == "dpkg-deb":
            documentation = "usr/share/doc/linux-doc-6.1"
            pages = {
                f"{documentation}/copyright": copyright_file,
                f"{documentation}/Documentation/a.rst.gz": "text",
            }
            lay(Path(command[3]), pages)
        return "linux-doc\n  Depends: linux-doc-6.1\n" if command[0] == "apt-cache" else ""

    monkeypatch.setattr(packages, "_output", output)
    (source,) = (source for source in SOURCES if source.name == "linux-doc")
    package = packages.fetch(source, tmp_path)
    assert (package.version, package.licence) == ("6.1.5-1", copyright_file)
    assert ("apt-get", "download", "linux-doc-6.1") in commands


def test_names_of_sources_are_unique() -> None:
    assert len({source.name for source in SOURCES}) == len(SOURCES)
