"""What keeps a run from hanging or dying silently: signals, launchers, the watchdog, exit codes."""
