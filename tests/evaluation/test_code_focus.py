"""The trained model for Python files that ships: it is whole and small, says how it was made, fits
its recipe, and opens the block in which a text went on after the words it has just written.
"""

import random
import re

from mc_ds.config.cli import load_config
from mc_ds.inference import load_bundle
from mc_ds.weights.bundle import open_bundle
from mc_ds.weights.layout import layout_of
from tests.support.processes import ROOT

ASSET = ROOT / "assets" / "code_focus"
RECIPES = ROOT / "launch" / "recipes" / "code"

PASSAGE = '''
def settle_ledger(accounts, clearing_window):
    """Return the balance of every account after the clearing window."""
    totals = dict.fromkeys(accounts, 0)
    for entry in clearing_window.entries:
        totals[entry.debtor] -= entry.amount
        totals[entry.creditor] += entry.amount
    return totals
'''
AGAIN = '''
def settle_ledger(accounts, clearing_window):
    """Return the balance of every account after the clearing window."""
    totals = dict.fromkeys(accounts, 0)
    for entry in clearing_window.entries:
        totals[entry.debtor] -='''


def test_it_is_whole_small_and_says_how_it_was_made() -> None:
    bundle = open_bundle(ASSET)
    assert {path.name for path in ASSET.iterdir()} == {*bundle.manifest["files"], "manifest.json"}
    assert sum(path.stat().st_size for path in ASSET.iterdir()) <= 12_000_000
    notes, card = bundle.manifest["notes"], (ASSET / "README.md").read_text()
    assert all(f"| {name} | {notes[name]} |" in card for name in ("command", "commit", "hardware"))
    named = re.findall(r"launch/recipes/\w+/\w+\.yaml", notes["command"])
    assert [ROOT / name for name in named] == [
        RECIPES / "code_base.yaml",
        RECIPES / "code_focus.yaml",
    ]


def test_its_recipe_makes_such_a_model() -> None:
    bundle = open_bundle(ASSET, verify=False)
    config = load_config(["--config", str(RECIPES / "code_focus.yaml")])
    assert layout_of(config, vocab_size=bundle.vocab_size).shapes == bundle.parameters
    assert config.mc == bundle.config.mc
    base = load_config(["--config", str(RECIPES / "code_base.yaml")])
    assert config.backbone == base.backbone == bundle.config.backbone


def test_it_opens_where_the_text_went_on_before() -> None:
    """A function stands once, far back in a file of other functions. When the file begins to write
    it again, LensNet opens its blocks; from another end of the file it does not.
    """
    model = load_bundle(str(ASSET))
    assert model.tokenizer is not None
    encode = model.tokenizer.encode
    passage, block_size = encode(PASSAGE), model.config.mc.block_size
    before, after = (encode(filler(lines, seed)) for lines, seed in ((200, 0), (200, 1)))
    first = len(before) // block_size
    wanted = set(range(first, (len(before) + len(passage)) // block_size + 1))
    opened = {}
    for end in (AGAIN, filler(12, 2)):
        history = [*before, *passage, *after, *encode(end)]
        assert 7000 < len(history) < 8192, len(history)
        with model.session("lens", 1000) as session:
            session.ingest(history)
            lods, starts = session.working_context()
        assert not lods.any(), "it reads tokens alone"
        opened[end] = {int(start) // block_size for start in starts} & wanted
    assert len(opened[AGAIN]) >= 2
    assert len(opened[AGAIN]) > len(opened[filler(12, 2)])


def filler(lines: int, seed: int) -> str:
    """Return lines of code that differ from one another."""
    names = random.Random(seed)

    def word() -> str:
        return "".join(names.choice(["ka", "lo", "mi", "ru", "te", "no", "pa"]) for _ in range(3))

    return "".join(f"{word()} = {word()}({names.randrange(900)}, {word()})\n" for _ in range(lines))
