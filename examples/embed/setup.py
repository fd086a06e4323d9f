# SPDX-License-Identifier: BSD-3-Clause
"""Builds the two extension modules: python setup.py build_ext --inplace."""

from Cython.Build import cythonize
from setuptools import Extension, setup

import fastbn

WHERE = {"include_dirs": [fastbn.get_include()]}
MODULES = [
    Extension("c_extension", ["c_extension.c"], **WHERE),
    Extension("cython_module", ["cython_module.pyx"], **WHERE),
]

setup(name="fastbn-embedded", ext_modules=cythonize(MODULES))
