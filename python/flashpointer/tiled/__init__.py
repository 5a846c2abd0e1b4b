"""The ops in plain PyTorch, tile by tile: what a CPU runs, and any device or dtype that the kernels do not serve.

A tile is small enough to stay in cache between the operations on it. Modules and functions are named as the kernels.
"""
