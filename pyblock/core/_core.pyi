# The functions of lib are declared in csrc/pyblock.h and nowhere else; _native gives each its
# Python type.
from typing import Any

ffi: Any
lib: Any
