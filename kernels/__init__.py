"""Triton kernels and their launchers: one file per job, plain tensors in and out, no checks, no autograd.

Nothing here imports the rest of the package. The ops (``flashpointer.ops``) check, register and differentiate.
"""
