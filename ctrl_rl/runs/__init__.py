"""Runs: from a config to a finished folder, and back into Python."""
