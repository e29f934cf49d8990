"""Hold docs/security.md to the bounds in the code: the same names and values, none missing, each with a reason."""

import re
from pathlib import Path

from benchfs_fuse import limits

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "security.md").read_text()
ROWS = re.findall(r"^\| `([A-Z_]+)` \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", TEXT, re.MULTILINE)
#: What is a bound without being called one; what is called one and is the smallest rather than the largest.
ALSO = {"HANDSHAKE_TIMEOUT_S", "CONTROL_RECEIVES", "BULK_SLOTS"}


def test_the_bounds_of_the_table_are_those_of_the_code() -> None:
    assert len(ROWS) > 30
    for name, value, of_what, reached in ROWS:
        assert type(getattr(limits, name))(value) == getattr(limits, name), name
        assert of_what.strip() and reached.strip()


def test_what_all_connections_together_may_hold_is_the_product_of_bounds() -> None:
    products = re.findall(r"^\| [a-z ,]+ \| (`[^|]+) \| ([0-9]+) \| ([0-9]+) \|$", TEXT, re.MULTILINE)
    assert len(products) == 5
    for product, of_one, of_all in products:
        count, _, size = product.replace("`", "").strip("()").rpartition(" × ")
        sizes = [getattr(limits, name) for name in size.strip("()").split(" + ")]
        assert int(of_one) == (getattr(limits, count) if count else 1) * sum(sizes), product
        assert int(of_all) == int(of_one) * limits.CONNECTIONS_MAX, product


def test_no_bound_is_missing_from_the_table_or_there_twice() -> None:
    named = [name for name, *_ in ROWS]
    assert len(named) == len(set(named))
    assert set(named) == {name for name in vars(limits) if name.endswith("_MAX")} | ALSO


def test_every_bound_says_why() -> None:
    source = Path(limits.__file__).read_text()
    # One comment may stand over several that belong together, such as the sizes of chunks.
    for block in re.findall(r"^(.*\n)((?:[A-Z_]+ = .*\n)+)", source, re.MULTILINE):
        if "_MAX = " in block[1]:
            assert block[0].startswith("#:"), block


def test_what_peers_make_a_process_hold_is_bounded_in_one_module() -> None:
    """Nobody keeps such a bound for itself: what waits, is kept or is remembered per peer or for all of them."""
    for name in ("SESSIONS_MAX", "PENDING_MAX", "IDLE_BYTES_MAX", "RANGES_MAX", "COPIES_MAX", "KNOWN_MAX"):
        sources = (ROOT / "benchfs_fuse").rglob("*.py")
        own = [path for path in sources if re.search(rf"^{name} = ", path.read_text(), re.MULTILINE)]
        assert [path.name for path in own] == ["limits.py"]
