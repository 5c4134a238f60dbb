"""Wires in the C core. Everything else is in pyproject.toml; the switches of the build are in
pyblock/core/_native_build.py."""

from setuptools import setup

setup(cffi_modules=["pyblock/core/_native_build.py:ffibuilder"])
