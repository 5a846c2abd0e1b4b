"""Time and memory of each op, beside the eager formula, its ``torch.compile`` and what users write today.

    python -m benchmarks --quick     a few shapes, some minutes
    python -m benchmarks             the full sweep
    python -m benchmarks growth      the span loss over heads and over tokens
    python -m benchmarks overhead    what wrapping a Python function as an op costs a call
    python -m benchmarks products    linear_zlpr_loss beside the bare products of its layer
    python -m benchmarks company     on a CPU, alone and beside one busy process per core
    python -m benchmarks model       what the kernels would take on a GPU, read from their machine code
    python -m benchmarks gpu         everything that only a GPU can show, in one pass
    python -m benchmarks readme      writes the tables of README.md from the committed results
    pytest benchmarks                the quick cases under pytest-benchmark

Each op is declared as ``OP`` in a file of its name: see ``suite.Op``.
"""
