"""Upload results to the hub, with a model card."""
