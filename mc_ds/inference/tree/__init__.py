"""MegaContext trees of any length, in memory or on disk."""
