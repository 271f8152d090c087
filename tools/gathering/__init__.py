"""The parts of gather_text.py: `packages` downloads packages, `pages` extracts documents."""
