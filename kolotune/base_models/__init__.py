"""Base models: the catalog, the hub, the packaged model, and downloads."""
