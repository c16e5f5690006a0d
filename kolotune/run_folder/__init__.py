"""A run folder: layout, records, manifest, and what is kept."""
