"""The step's elementwise parts in C++, compiled once on the machine that trains: see `kernels.cpp`.

`build.py` compiles and keeps the library; `operations.py` calls it with tensors.
"""
