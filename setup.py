"""What pyproject.toml cannot say: the C extension, and that nothing is built outside build/."""

from __future__ import annotations

import os

from setuptools import setup

os.makedirs("build/py", exist_ok=True)

setup(
    cffi_modules=["nodewrap/_build_core.py:ffi"],
    options={"build": {"build_base": "build/py"}, "egg_info": {"egg_base": "build/py"}},
)
