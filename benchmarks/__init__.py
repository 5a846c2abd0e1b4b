"""How fast, in how much memory: each op beside the eager formula, its ``torch.compile`` and what users write today.

    python -m benchmarks --quick     a few shapes, under two minutes
    python -m benchmarks             the full sweep
    python -m benchmarks growth      the span loss over heads and over tokens
    python -m benchmarks overhead    what wrapping a Python function as an op costs a call
    python -m benchmarks model       what the kernels would take on a GPU, read from their machine code
    python -m benchmarks gpu         everything that only a GPU can show, in one pass
    python -m benchmarks readme      writes the tables of README.md from the committed results
    pytest benchmarks                the quick cases under pytest-benchmark

An op takes part by a file of its name that declares ``OP``: see ``suite.Op``.
"""
