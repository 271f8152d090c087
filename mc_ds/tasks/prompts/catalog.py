"""All prompt tasks by name, and names of groups of them."""

from mc_ds.tasks.prompts.base import PromptFamily
from mc_ds.tasks.prompts.lists import CommonWords, FrequentWords, VariableTracking
from mc_ds.tasks.prompts.needles import Needles
from mc_ds.tasks.prompts.stories import Stories

PROMPTS: dict[str, PromptFamily] = {
    "ruler_single_1": Needles(haystack="noise"),
    "ruler_single_2": Needles(),
    "ruler_single_3": Needles(secrets="uuids"),
    "ruler_multikey_1": Needles(keys=4),
    "ruler_multikey_2": Needles(haystack="needles"),
    "ruler_multikey_3": Needles(haystack="needles", names="uuids", secrets="uuids"),
    "ruler_multivalue": Needles(values=4),
    "ruler_multiquery": Needles(keys=4, asked=4),
    "ruler_vt": VariableTracking(),
    "ruler_cwe": CommonWords(),
    "ruler_fwe": FrequentWords(),
    "stories_1": Stories(kind=1),
    "stories_2": Stories(kind=2, events=16),
    "stories_3": Stories(kind=3, events=24),
    "stories_4": Stories(kind=4),
    "stories_5": Stories(kind=5, events=16),
}
"""The family of each task. The first eleven are RULER's tasks without its two on downloaded
questions.
"""
PROMPT_GROUPS: dict[str, tuple[str, ...]] = {
    group: tuple(name for name in PROMPTS if name.startswith(f"{group}_"))
    for group in ("ruler", "stories")
}
"""Names that stand for several tasks."""
