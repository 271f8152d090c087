"""Preference learning: LensNet learns from pairs of variants of one sequence which focus decisions
lowered the loss.
"""

from mc_ds.preference.decisions import Decisions, decide
from mc_ds.preference.loss import PreferenceLoss, PreferenceResult, preference_loss
from mc_ds.preference.state import GainMoments

__all__ = [
    "Decisions",
    "GainMoments",
    "PreferenceLoss",
    "PreferenceResult",
    "decide",
    "preference_loss",
]
