"""A run folder: its files, the records of its stages, why they run again, its manifest and results."""
