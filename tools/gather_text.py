"""Gathers long real text from Debian and Python packages, as JSON lines for prepare_data.py.

    python tools/gather_text.py text
    python tools/prepare_data.py text --train_tokenizer --out datasets/long

Downloads packages with manuals, dictionaries and source code through apt and pip, and joins pages
of one folder into long documents. text/LICENCES.md lists every package with its licence: read it
before you share the text. Needs apt-get, dpkg-deb and pip. Exit code: 0 done, 2 after an error.
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
from mc_ds.console import HelpFormatter, run_program
from mc_ds.storage import StagedFolder, reason, write_text

LONG = 64_000
"""Minimum characters of a long document: about 16,000 tokens."""


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument(
        "--sources",
        nargs="+",
        choices=[s.name for s in SOURCES],
        metavar="NAME",
        help=f"packages to use (default: all): {', '.join(s.name for s in SOURCES)}",
    )
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Gather the text, print its amount, and return the exit code."""
    args = parse(argv)
    chosen = [s for s in SOURCES if args.sources is None or s.name in args.sources]
    try:
        if args.out.exists():
            raise ConfigError(f"{args.out} exists: give another path, or remove it")
        with StagedFolder(args.out) as staged:
            licences = ["# Licences of the packages that contain this text", ""]
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
    """Write the documents of one source; yield the lines on its licence."""
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
        f" characters; {long:,} of them have at least {LONG:,} characters"
    )
    yield f"## {source.name} {package.version}"
    yield ""
    yield package.licence
    yield ""


if __name__ == "__main__":
    run_program(main)
