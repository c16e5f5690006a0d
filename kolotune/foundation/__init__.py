"""What every other package uses; imports nothing else of kolotune."""
