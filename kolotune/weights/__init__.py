"""Model weights: safetensors files, LoRA adapters, and their merge."""
