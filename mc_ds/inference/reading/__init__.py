"""Chooses working contexts from a tree: windows, policies, the search for blocks."""
