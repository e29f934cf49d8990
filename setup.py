"""Build the companion library where there is a compiler; everything else stands in setup.cfg.

What is said here, pip shows with ``-v`` alone; `benchfs doctor` says it later.
"""

import hashlib
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCE = "benchfs_fuse/companion/companion.c"


class BuildCompanion(build_ext):
    """Build the library, or say what will be missing without it."""

    def run(self) -> None:
        """Build with what pkg-config says of libfuse."""
        try:
            flags = subprocess.run(
                ["pkg-config", "--cflags", "--libs", "fuse3"], capture_output=True, text=True, check=True
            ).stdout.split()
            for extension in self.extensions:
                extension.extra_compile_args += [flag for flag in flags if not flag.startswith(("-l", "-L"))]
                extension.extra_link_args += [flag for flag in flags if flag.startswith(("-l", "-L"))]
            super().run()
        except Exception as error:  # noqa: BLE001  whatever a compiler or its absence comes up with
            sys.stderr.write(
                f"benchfs-fuse: the companion library was not built ({error}).\n"
                "Mounts will work without: fallocate, holes (SEEK_DATA, SEEK_HOLE), copy_file_range on the daemons,\n"
                "locks across mounts, default ACLs, kept caches, and interrupts of callers that wait for a daemon.\n"
                "Install gcc, pkg-config and libfuse3-dev, and install the package again, to have them.\n"
            )


setup(
    ext_modules=[
        Extension(
            "benchfs_fuse.companion._library",
            sources=[SOURCE],
            # What benchfs_fuse.companion compares: a library of another version has other structures.
            define_macros=[("BENCHFS_SOURCE", f'"{hashlib.sha256(Path(SOURCE).read_bytes()).hexdigest()}"')],
            extra_compile_args=["-Wall", "-Wextra", "-fvisibility=hidden"],
        )
    ],
    cmdclass={"build_ext": BuildCompanion},
)
