"""GGUF files: converted from a model folder, quantized, and their headers read."""
