"""The ops in plain PyTorch, tile by tile: what a CPU runs, and any device or dtype that the kernels do not serve.

A tile is small enough to stay in cache between the operations on it. Module and function names are those of the kernels.
"""
