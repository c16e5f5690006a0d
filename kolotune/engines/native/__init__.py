"""The native engine: LoRA on any causal language model of transformers, in plain PyTorch."""
