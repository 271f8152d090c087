"""Gather long real text from Debian and Python packages, as JSON lines for prepare_data.py.

    python tools/gather_text.py text
    python tools/prepare_data.py text --train_tokenizer --out datasets/long

Manuals, dictionaries and source code that the registries of apt and pip serve; pages of one folder
are joined into long documents. text/LICENCES.md lists every package with its licence: read it
before you pass the text on. Needs apt-get, dpkg-deb and pip. Exit code: 0 done, 2 for what cannot
work, told in one line.
"""

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from gathering.packages import SOURCES, Source, fetch
from gathering.pages import documents

from mc_ds.config import ConfigError
from mc_ds.console import run_program
from mc_ds.storage import StagedFolder, reason, write_text

LONG = 64_000
"""Characters of a document that has about 16,000 tokens."""


def parse(argv: list[str]) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument(
        "--sources", nargs="+", choices=[s.name for s in SOURCES], metavar="NAME", help="not all"
    )
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Gather, and say how much."""
    args = parse(argv)
    chosen = [s for s in SOURCES if args.sources is None or s.name in args.sources]
    try:
        if args.out.exists():
            raise ConfigError(f"{args.out} exists: give another name, or remove it")
        with StagedFolder(args.out) as staged:
            licences = ["# Licences of the packages that this text is from", ""]
            for source in chosen:
                licences += gather(source, staged.path)
            write_text(staged.path / "LICENCES.md", "\n".join(licences) + "\n")
            staged.publish()
    except (ConfigError, OSError) as error:
        print(f"error: {reason(error) if isinstance(error, OSError) else error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"error: {' '.join(error.cmd)}: {error.stderr.strip()[-300:]}", file=sys.stderr)
        return 2
    print(f"{args.out}: ready; licences are in LICENCES.md")
    return 0


def gather(source: Source, out: Path) -> Iterator[str]:
    """Write the documents of one source; yield its part of the list of licences."""
    with tempfile.TemporaryDirectory() as name:
        package = fetch(source, Path(name))
        count = characters = long = 0
        with gzip.open(out / f"{source.name}.jsonl.gz", "wt", encoding="utf-8") as file:
            for title, text in documents(source, package.root):
                file.write(json.dumps({"title": title, "text": text}) + "\n")
                count, characters = count + 1, characters + len(text)
                long += len(text) >= LONG
    print(
        f"{source.name} {package.version}: {count:,} documents, {characters / 1e6:,.1f} M"
        f" characters; {long:,} documents of {LONG:,} and more"
    )
    yield f"## {source.name} {package.version}"
    yield ""
    yield package.licence
    yield ""


if __name__ == "__main__":
    run_program(main)
