"""Finished runs: list, clean, verify, rebuild."""
