"""The quick check, on plain directories: it passes where bytes hold, and says where they do not."""

import os
from pathlib import Path

import pytest

from benchfs_fuse import quickcheck
from benchfs_fuse.bench import tools
from benchfs_fuse.errors import UserError
from benchfs_fuse.limits import MIB


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the check quick: a few files, 2 MiB in a large one, a little for fio."""

    def stage(target: Path) -> None:
        (target / "sub").mkdir(parents=True)
        (target / "sub" / "empty").touch()
        (target / "text").write_text("some text")
        (target / "link").symlink_to("text")

    monkeypatch.setattr(quickcheck, "stage_tree", stage)
    monkeypatch.setattr(quickcheck, "LARGE_BYTES_MAX", 2 * MIB)
    monkeypatch.setattr(quickcheck, "FIO_BYTES", MIB // 4)


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    target, baseline = tmp_path / "target", tmp_path / "baseline"
    target.mkdir()
    baseline.mkdir()
    return target, baseline


@pytest.mark.usefixtures("small")
def test_a_sound_directory_passes_and_is_left_empty(
    places: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    target, baseline = places
    assert quickcheck.main([str(target), "--baseline", str(baseline)]) == 0
    shown = capsys.readouterr().out
    assert all(
        word in shown
        for word in (
            *("tree in", "tree remove", "large out, cold", "dd write 1M", "dd read 1M, cold", "fio randread"),
            "every byte checked (5 names",
        )
    )
    assert list(target.iterdir()) == list(baseline.iterdir()) == []


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("part", ["content", "mode", "mtime", "missing", "additional", "link"])
def test_a_difference_is_found_and_named(tmp_path: Path, part: str) -> None:
    quickcheck.stage_tree(tmp_path)
    before = tools.snapshot(tmp_path)
    text, link, times = tmp_path / "text", tmp_path / "link", (tmp_path.stat().st_atime_ns, tmp_path.stat().st_mtime_ns)
    culprit = "text"
    match part:
        case "content":
            kept = text.stat()
            text.write_text("SOME TEXT")
            os.utime(text, ns=(kept.st_atime_ns, kept.st_mtime_ns))
        case "mode":
            text.chmod(0o600)
        case "mtime":
            os.utime(text, ns=(0, 1))
        case "missing":
            text.unlink()
        case "additional":
            culprit = "more"
            (tmp_path / "more").touch()
        case "link":
            culprit = "link"
            link.unlink()
            link.symlink_to("else")
    os.utime(tmp_path, ns=times)
    with pytest.raises(UserError, match=f"{culprit} is not what was written"):
        tools.refuse_difference(before, tools.snapshot(tmp_path), tmp_path)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("victim", ["large", "dd"])
def test_bytes_that_change_on_the_way_out_fail_the_check(
    places: tuple[Path, Path], victim: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def corrupt(*files: Path) -> None:
        for file in files:
            if file.name == victim:
                with file.open("r+b") as opened:
                    opened.seek(12345)
                    opened.write(b"\0" * 64)

    monkeypatch.setattr(tools, "drop_cached", corrupt)
    target, baseline = places
    assert quickcheck.main([str(target), "--baseline", str(baseline)]) == 1
    assert capsys.readouterr().err.startswith("quickcheck: cmp failed: ")
    assert list(target.iterdir()) == list(baseline.iterdir()) == []


def test_a_directory_that_cannot_be_used_gives_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quickcheck.main([str(tmp_path / "missing"), "--baseline", str(tmp_path)]) == 1
    assert (
        capsys.readouterr().err
        == f"quickcheck: {tmp_path}/missing: cannot make a directory there: No such file or directory\n"
    )


@pytest.mark.usefixtures("small")
def test_too_little_room_is_refused_before_anything_is_written(
    places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quickcheck, "LARGE_BYTES_MIN", 1 << 60)
    target, baseline = places
    assert quickcheck.main([str(target), "--baseline", str(baseline)]) == 1
    assert "MiB are free, the check needs" in capsys.readouterr().err


def test_a_failing_tool_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cp failed: .*No such file"):
        tools.run_tool(["cp", tmp_path / "a", tmp_path / "b"], 60)
    with pytest.raises(UserError, match="no-such-tool is not installed"):
        tools.run_tool(["no-such-tool"], 60)
