"""Training engines, found by `get_engine`. They meet the rest of kolotune through a `TrainJob`, events and files."""
