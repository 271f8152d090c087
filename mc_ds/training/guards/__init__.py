"""Keeps runs from hanging or dying silently: launchers, the watchdog, exit codes."""
