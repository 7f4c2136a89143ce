"""The compiled short way (`_lane`, `_hop` and `_tail`); all else is in pyproject.toml.

Optional: where it cannot be compiled, the installation goes on without it, every message goes the long way, and `sidecar doctor`
says so.
"""

from Cython.Build import cythonize
from setuptools import Extension, setup

setup(
    ext_modules=cythonize(
        [
            Extension("sidecar.audit._tail", ["sidecar/audit/_tail.pyx"], optional=True),
            Extension("sidecar.session._lane", ["sidecar/session/_lane.pyx"], optional=True),
            Extension("sidecar.proxy._hop", ["sidecar/proxy/_hop.pyx"], optional=True),
        ],
        build_dir="build/cython",
    )
)
