"""The torchtune engine: torchtune's own recipe, in an environment of its own, behind the same job and events.

What runs in kolotune's environment needs no torchtune; what runs in torchtune's stands in `inside/`.
"""
