"""Build what is compiled of the package where there is a compiler; everything else stands in setup.cfg.

What is said here, pip shows with ``-v`` alone; `benchfs doctor` says it later.
"""

import hashlib
import importlib.util
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

COMPANION = "benchfs_fuse.companion._library"
WIRE = "benchfs_fuse.rpc._wire"
MISSING = {
    COMPANION: "the companion library was not built ({error}).\n"
    "Mounts will work without: fallocate, holes (SEEK_DATA, SEEK_HOLE), copy_file_range on the daemons,\n"
    "locks across mounts, default ACLs, kept caches, and interrupts of callers that wait for a daemon.\n"
    "Install gcc, pkg-config and libfuse3-dev, and install the package again, to have them.\n",
    WIRE: "the compiled wire was not built ({error}).\n"
    "Small requests will take half as long again. Install gcc, and install the package again, to have it.\n",
}


def compiled(name: str, source: str) -> Extension:
    """Describe a library: benchfs_fuse.compiled compares the source that it was built from."""
    digest = hashlib.sha256(Path(source).read_bytes()).hexdigest()
    return Extension(
        name,
        sources=[source],
        define_macros=[("BENCHFS_SOURCE", f'"{digest}"')],
        extra_compile_args=["-Wall", "-Wextra", "-fvisibility=hidden"],
        optional=True,
    )


class BuildCompiled(build_ext):
    """Build each library, or say what will be missing without it."""

    def build_extension(self, extension: Extension) -> None:
        """Build with what pkg-config says of libfuse, or with the headers that come with UCX."""
        try:
            if extension.name == COMPANION:
                flags = subprocess.run(
                    ["pkg-config", "--cflags", "--libs", "fuse3"], capture_output=True, text=True, check=True
                ).stdout.split()
                extension.extra_compile_args += [flag for flag in flags if not flag.startswith(("-l", "-L"))]
                extension.extra_link_args += [flag for flag in flags if flag.startswith(("-l", "-L"))]
            else:
                ucx = importlib.util.find_spec("libucx")
                if ucx is None or ucx.origin is None:
                    raise ModuleNotFoundError("libucx-cu12, which has the headers of UCX, is not there")
                # As headers of the system: what the compiler thinks of them is not for us to mend.
                extension.extra_compile_args += ["-isystem", str(Path(ucx.origin).with_name("include"))]
            super().build_extension(extension)
        except Exception as error:  # noqa: BLE001  whatever a compiler or its absence comes up with
            sys.stderr.write(f"benchfs-fuse: {MISSING[extension.name].format(error=error)}")


setup(
    ext_modules=[
        compiled(COMPANION, "benchfs_fuse/companion/companion.c"),
        compiled(WIRE, "benchfs_fuse/rpc/_wire.c"),
    ],
    cmdclass={"build_ext": BuildCompiled},
)
