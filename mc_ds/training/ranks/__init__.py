"""Ranks: reading their environment, deciding jointly, and cross-checking."""
