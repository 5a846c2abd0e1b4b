"""How fast, in how much memory: each op beside the eager formula, its ``torch.compile`` and what users write today.

    python -m benchmarks --quick     a few shapes, under two minutes
    python -m benchmarks             the full sweep
    python -m benchmarks overhead    what wrapping a Python function as an op costs a call
    pytest benchmarks                the quick cases under pytest-benchmark

An op takes part by a file of its name that declares ``OP``: see ``suite.Op``.
"""
