"""torchtune's LoRA recipe, fed with prepared tokens. Started by the driver as ``python -m kolotune_recipe TASK``."""
