"""Read chat files: file formats, shapes of records, messages, and faults with file and line."""
