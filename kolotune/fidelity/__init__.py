"""Is what is served still the model that was trained? Measured in processes of their own, judged here."""
