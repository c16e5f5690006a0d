"""The torchtune engine: torchtune's recipes in a separate environment, behind the same job and events.

Modules here run in kolotune's environment, without torchtune. `inside/` runs in torchtune's, without kolotune.
"""
