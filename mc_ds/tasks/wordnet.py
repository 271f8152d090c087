"""Read WordNet's database files (`index.noun`, `data.noun`, ...; format: wndb(5WN)), as Debian's
package `wordnet-base` installs them in /usr/share/wordnet.

Only words whose meaning is clear without a context are kept. A word belongs to a meaning if

- it is a single word of at least three lower-case letters;
- the meaning is its first, most frequent sense;
- this sense occurs in the texts that WordNet's editors tagged, which excludes rare words;
- it has no such sense as another part of speech.

So every word belongs to one meaning at most.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

from mc_ds.config import ConfigError

PARTS_OF_SPEECH = ("noun", "verb", "adj", "adv")
"""Suffixes of the database files."""
DEBIAN = "/usr/share/wordnet of Debian's package wordnet-base"
"""Where the files usually are, for messages."""
FILES = tuple(f"{kind}.{part}" for part in PARTS_OF_SPEECH for kind in ("index", "data"))
"""The database files that are read."""
_WORD = re.compile(r"[a-z]{3,}")
_REMARK = re.compile(r"\([^)]*\)")
_Parsed = TypeVar("_Parsed")


class Meaning(NamedTuple):
    """Words with one meaning, and its definition."""

    words: tuple[str, ...]
    gloss: str
    """The definition, without examples and remarks in parentheses."""


class _Synset(NamedTuple):
    offset: str
    words: tuple[str, ...]
    gloss: str


def read_meanings(folder: Path) -> list[Meaning]:
    """Return the meanings that have at least one such word, in the order of the files.

    Raises ConfigError if a file is missing or not in WordNet's format.
    """
    senses: dict[str, list[tuple[str, str]]] = {}
    for part in PARTS_OF_SPEECH:
        for word, offset in _lines(folder / f"index.{part}", _first_sense):
            senses.setdefault(word, []).append((part, offset))
    meanings = []
    for part in PARTS_OF_SPEECH:
        for synset in _lines(folder / f"data.{part}", _synset):
            sense = [(part, synset.offset)]
            words = tuple(word for word in synset.words if senses.get(word) == sense)
            if words and synset.gloss:
                meanings.append(Meaning(words, synset.gloss))
    return meanings


def _lines(path: Path, parse: Callable[[str], _Parsed | None]) -> Iterator[_Parsed]:
    """Yield what `parse` returns for each line of a database file after its preface, whose lines
    begin with a space. Leaves out None.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}): give a folder with WordNet's database"
            f" files, such as {DEBIAN}"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(_damaged(path, "it is not text")) from None
    for number, line in enumerate(text.split("\n"), start=1):
        if not line or line.startswith(" "):
            continue
        try:
            parsed = parse(line)
        except (ValueError, IndexError):
            raise ConfigError(_damaged(path, f"line {number} has another format")) from None
        if parsed is not None:
            yield parsed


def _damaged(path: Path, problem: str) -> str:
    return f"{path} is not a database file of WordNet: {problem}: install wordnet-base again"


def _first_sense(line: str) -> tuple[str, str] | None:
    """Return a word and the offset of its first sense; None if no sense of it was tagged.

    Fields: word, part of speech, number of senses, number of pointer kinds, these kinds, number of
    senses, number of tagged senses, offsets with the most frequent sense first.
    """
    fields = line.split()
    after = 4 + int(fields[3])
    tagged, offset = int(fields[after + 1]), fields[after + 2]
    return (fields[0], offset) if tagged else None


def _synset(line: str) -> _Synset | None:
    """Return a set of synonyms; None if none of its words is plain.

    Fields: offset, file of origin, part of speech, number of words (hexadecimal), each word with a
    number, ..., `|`, gloss.
    """
    data, _, gloss = line.partition(" | ")
    fields = data.split()
    words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
    plain = tuple(word for word in words if _WORD.fullmatch(word))
    definition = " ".join(_REMARK.sub(" ", gloss).partition(";")[0].partition('"')[0].split())
    return _Synset(fields[0], plain, definition) if plain else None
