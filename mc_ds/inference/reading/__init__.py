"""Choosing working contexts from a tree: windows, policies, and the search for blocks."""
