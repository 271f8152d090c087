"""The ranks of a run: their environment, joint decisions, and checks of each other."""
