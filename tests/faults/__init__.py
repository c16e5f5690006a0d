"""Real fault injection; `make faults` runs the long part and writes docs/reliability.md."""
