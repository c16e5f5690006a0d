"""Read chat files: containers, record shapes, messages, and faults with file and line."""
