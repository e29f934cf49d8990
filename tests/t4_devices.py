"""This machine has what the tests of this level need, by the doctor's own checks."""

import json
from pathlib import Path

import pytest

from benchfs_fuse import doctor


def test_fuse_can_be_opened() -> None:
    assert doctor.check_fuse_device().level == "ok"


def test_a_ring_can_be_set_up() -> None:
    doctor.set_up_ring()


def test_ucx_finds_tcp() -> None:
    assert "Transport: tcp" in doctor.list_ucx_transports()


def test_the_doctor_finds_nothing_that_stops_a_mount(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.run_doctor(tmp_path, True) == 0
    found = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    assert "µs through io_uring" in found[f"writes in {tmp_path}"]["found"]
