"""Wires in the C core. Everything else is in pyproject.toml; the switches of the build are in pyblock/_native_build.py."""

from setuptools import setup

setup(cffi_modules=["pyblock/_native_build.py:ffibuilder"])
