"""Faults that are injected for real; `make faults` does the long part and writes docs/reliability.md."""
