"""Packages with long text: their names, the location of their pages, and their download."""

import subprocess
import sys
import zipfile
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path
from typing import Literal

from mc_ds.config import ConfigError


@dataclass(frozen=True)
class Source:
    """A package and how to read its pages."""

    name: str
    registry: Literal["debian", "pypi"]
    pages: str
    """Glob pattern of the pages, relative to the unpacked package."""
    depth: int
    """Number of folder levels, below the pattern's fixed part, that identify a document: pages with
    the same folders at these levels are joined.
    """
    cleaning: Literal["text", "html", "wordnet"] = "text"
    left_out: tuple[str, ...] = ()
    """Top-level folders of the pages that are skipped, because they are not text."""


SOURCES = (
    Source("linux-doc", "debian", "usr/share/doc/*/Documentation/**/*.rst.gz", 3),
    Source(
        *("rust-doc", "debian", "usr/share/doc/rust-doc/html/**/*.html"),
        depth=2,
        cleaning="html",
        left_out=("src", "implementors"),
    ),
    Source("dict-gcide", "debian", "usr/share/dictd/*.dict.dz", 0),
    Source("wordnet-base", "debian", "usr/share/wordnet/data.*", 0, "wordnet"),
    *(
        Source(name, "pypi", "**/*.py", 2)
        for name in "sympy transformers django networkx sqlalchemy pandas scikit-learn".split()
    ),
)


@dataclass(frozen=True)
class Package:
    """An unpacked package."""

    root: Path
    version: str
    licence: str


def fetch(source: Source, folder: Path) -> Package:
    """Download a package and unpack it into an empty folder.

    Raises ConfigError if it has no pages, and OSError or CalledProcessError if a program is missing
    or fails.
    """
    package = _debian(source, folder) if source.registry == "debian" else _pypi(source, folder)
    if next(package.root.glob(source.pages), None) is None:
        raise ConfigError(
            f"{source.name} {package.version} has no files {source.pages}: leave it out, by listing"
            " the others with --sources"
        )
    return package


def _debian(source: Source, folder: Path) -> Package:
    depends = _output("apt-cache", "depends", "--important", source.name).split()
    versioned = [word for word in depends if word.startswith(f"{source.name}-")]
    name = versioned[0] if versioned else source.name  # linux-doc only depends on the real package
    _output("apt-get", "download", name, at=folder)
    (archive,) = folder.glob("*.deb")
    _output("dpkg-deb", "-x", str(archive), str(folder))
    licence = (folder / "usr/share/doc" / name / "copyright").read_text(errors="replace")
    return Package(folder, archive.name.split("_")[1], licence)


def _pypi(source: Source, folder: Path) -> Package:
    options = ("--no-deps", "--only-binary=:all:", "--quiet", "--dest", str(folder))
    _output(sys.executable, "-m", "pip", "download", *options, source.name)
    (archive,) = folder.glob("*.whl")
    with zipfile.ZipFile(archive) as wheel:
        wheel.extractall(folder)
    (path,) = folder.glob("*.dist-info/METADATA")
    metadata = Parser().parsestr(path.read_text(encoding="utf-8"))
    classifiers = metadata.get_all("Classifier", [])
    licence = [
        metadata.get("License-Expression") or metadata.get("License") or "",
        *(line for line in classifiers if line.startswith("License")),
    ]
    return Package(folder, metadata["Version"], "\n".join(licence))


def _output(*command: str, at: Path | None = None) -> str:
    done = subprocess.run(command, cwd=at, capture_output=True, text=True, check=True)
    return done.stdout
