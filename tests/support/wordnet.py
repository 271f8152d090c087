"""A small database in WordNet's format: own words and glosses in files as wndb(5WN) describes."""

from pathlib import Path
from typing import NamedTuple


class Synset(NamedTuple):
    """Words with one meaning. `rare` are words of which no sense was tagged, `later` those that
    have another sense before this one.
    """

    words: str
    gloss: str
    rare: str = ""
    later: str = ""


NOUNS = [
    Synset("boat ship", "a thing that carries people over water"),
    Synset("road street", "a way for cars; `they crossed it'"),
    Synset("cave grotto", "a hollow under a hill (often wet)"),
    Synset("sea ocean", "salt water between lands"),
    Synset("baby infant", "a child in its first year"),
    Synset("film movie", "moving pictures on a screen"),
    Synset("cash money", "what one pays with"),
    Synset("forest woods", "land full of trees"),
    Synset("gift present", "a thing given to please"),
    Synset("doctor physician", "one who treats the sick"),
    Synset("error mistake", "what was done wrong"),
    Synset("stone rock", "a hard piece of the ground"),
    Synset("house home", "where a family lives", rare="domicile"),
    Synset("jail prison", "a place to lock up thieves"),
    Synset("shop store", "where goods are sold"),
    Synset("coat jacket", "clothing for cold days"),
    Synset("novel book", "a long story in print", later="volume"),
    Synset("pupil student", "one who learns at school"),
    Synset("harbour port", "where vessels can lie safely"),
    Synset("meal dinner", "food eaten at one time"),
    Synset("rug carpet", "a woven cover for a floor"),
    Synset("volume loudness", "how strong a sound is"),
    Synset("hill mound", "raised ground lower than peaks"),
    Synset("cottage", "a small dwelling in the country", rare="bungalow"),
]
VERBS = [
    Synset("begin start", "take the first step"),
    Synset("shut close", "make no longer open"),
    Synset("answer reply", "say something back"),
    Synset("weep cry", "shed tears"),
    Synset("jump leap", "rise by the force of legs"),
    Synset("buy purchase", "get by paying"),
    Synset("hurry rush", "move in haste"),
    Synset("mend repair", "make whole again"),
    Synset("shout yell", "use a loud voice"),
    Synset("throw hurl", "send through air by hand"),
    Synset("need require", "be unable to do without"),
    Synset("choose select", "take one of several"),
]
ADJECTIVES = [
    Synset("big large", "of great size"),
    Synset("quick fast", "taking little time"),
    Synset("glad happy", "full of joy"),
    Synset("sick ill", "in bad health"),
    Synset("rich wealthy", "owning very much"),
    Synset("silent quiet", "without any noise"),
    Synset("empty vacant", "with nothing inside"),
    Synset("clever smart", "having a good mind"),
    Synset("afraid scared", "feeling fear"),
    Synset("brave bold", "facing danger calmly"),
    Synset("strange odd", "unlike what one knows"),
    Synset("Old_Norse", "of vikings"),
]
ADVERBS = [
    Synset("often frequently", "many times"),
    Synset("nearly almost", "not quite"),
    Synset("seldom rarely", "few times"),
    Synset("maybe perhaps", "it can be so"),
]
SYNSETS = {"noun": NOUNS, "verb": VERBS, "adj": ADJECTIVES, "adv": ADVERBS}
WORDS = " ".join(
    f"{synset.words} {synset.gloss}" for synsets in SYNSETS.values() for synset in synsets
)
"""All words and glosses, as a text for a tokenizer."""
_PREFACE = "  1 A preface, as the real files have one.  \n  2 Its lines begin with blanks.  \n"


def write_wordnet(folder: Path) -> Path:
    """Write the database into a new folder and return it."""
    folder.mkdir()
    for part, synsets in SYNSETS.items():
        data = _PREFACE
        senses: dict[str, list[tuple[bool, bool, str]]] = {}
        for synset in synsets:
            offset = f"{len(data):08d}"
            words = f"{synset.words} {synset.rare} {synset.later}".split()
            for word in words:
                is_later, is_tagged = word in synset.later.split(), word not in synset.rare.split()
                senses.setdefault(word.lower(), []).append((is_later, is_tagged, offset))
            listed = " ".join(f"{word} 0" for word in words)
            pointers = "001 @ 00000001 n 0000"
            data += f"{offset} 03 {part[0]} {len(words):02x} {listed} {pointers} | {synset.gloss}; "
            data += '"an example with carpet and boat"  \n'
        (folder / f"data.{part}").write_text(data)
        index = _PREFACE
        for word, found in sorted(senses.items()):
            offsets = " ".join(offset for _, _, offset in sorted(found))
            tagged = sum(is_tagged for _, is_tagged, _ in found)
            count = len(found)
            index += f"{word} {part[0]} {count} 2 @ ~ {count} {tagged} {offsets}  \n"
        (folder / f"index.{part}").write_text(index)
    return folder
