"""Two folders, one package: ``kernels/`` installs as ``flashpointer.kernels``. Metadata stands in pyproject.toml."""

from setuptools import setup

setup(
    packages=["flashpointer", "flashpointer.kernels", "flashpointer.ops", "flashpointer.spans", "flashpointer.tiled"],
    package_dir={"flashpointer": "python/flashpointer", "flashpointer.kernels": "kernels"},
    package_data={"flashpointer": ["py.typed"]},
)
