"""Compiled kernels: the elementwise parts of a training step in C++, see `kernels.cpp`.

`build` compiles the library for this machine's processor, `compiled_operations` calls it with tensors, and
`onednn_layout` keeps frozen matrices in the processor's own layout.
"""
