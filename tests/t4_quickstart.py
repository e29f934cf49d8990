"""`scripts/quickstart` from a fresh clone, twice: the table, what it says, and what it leaves mounted."""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_help import processes_below, take_away
from cluster import end_with_parent

ROOT = Path(__file__).parent.parent
#: Where root's clusters lie. The test puts a directory of its own over it, which nobody else sees.
DATA = Path("/var/lib/benchfs")
#: A new environment, with what pip downloads, and two checks, on a loaded machine.
PATIENCE_S = 1500.0

TWICE = f"""
mount --bind "$1/data" {DATA} && cd "$1/clone" || exit
scripts/quickstart "$1/mnt" >"$1/first" || exit
echo text >"$1/mnt/kept"
scripts/quickstart "$1/mnt" >"$1/second" || exit
ls "$1/mnt" && cat "$1/mnt/kept" && .venv/bin/benchfs down "$1/mnt" && ls "$1/mnt"
"""


@pytest.fixture
def place() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="benchfs-quickstart-"))
    (directory / "data").mkdir()
    made = not DATA.exists()
    DATA.mkdir(exist_ok=True)
    yield directory
    take_away(directory)
    if made:
        DATA.rmdir()
    shutil.rmtree(directory)


@pytest.mark.slow
def test_quickstart_from_a_fresh_clone_twice(place: Path) -> None:
    subprocess.run(["git", "clone", "-q", ROOT, place / "clone"], check=True, timeout=PATIENCE_S)
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", TWICE, "sh", place],
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        preexec_fn=end_with_parent,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "kept\ntext\n"  # nothing else was left there, and nothing is there after down
    origins = (f"two daemons, data in {DATA}/quickstart", "mounted before")
    for said, origin in zip(((place / "first").read_text(), (place / "second").read_text()), origins, strict=True):
        assert "every byte checked (" in said
        for step in ("tree in", "large out, cold", "dd write 1M", "dd read 1M, cold", "fio randread 4K depth 16, cold"):
            assert re.search(rf"^  {re.escape(step)} .+/s .+/s .+ ×", said, re.MULTILINE), step
        assert f"mounted at {place}/mnt ({origin})" in said
        assert f"{place}/clone/.venv/bin/benchfs down {place}/mnt" in said
    assert processes_below(place) == []
