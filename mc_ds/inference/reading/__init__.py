"""From a tree to a working context: windows, policies, the search for blocks."""
