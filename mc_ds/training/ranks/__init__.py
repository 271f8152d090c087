"""The ranks of a run: who they are, what they decide together, and checks of each other."""
