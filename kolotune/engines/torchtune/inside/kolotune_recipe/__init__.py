"""torchtune's LoRA recipe on prepared tokens; started by the driver as ``python -m kolotune_recipe TASK``.

It runs in torchtune's environment, without kolotune.
"""
