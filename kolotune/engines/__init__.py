"""What trains. Engines meet the rest of kolotune only through a `TrainJob` and files."""
