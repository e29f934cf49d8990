"""This machine has what the tests of this level need, by the doctor's own checks."""

from benchfs_fuse import doctor


def test_fuse_can_be_opened() -> None:
    assert doctor.check_fuse_device().level == "ok"


def test_a_ring_can_be_set_up() -> None:
    doctor.set_up_ring()


def test_ucx_finds_tcp() -> None:
    assert "Transport: tcp" in doctor.list_ucx_transports()
