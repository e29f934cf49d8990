"""Settings: four sources in order, and one sentence for whatever is not good."""

import argparse
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchfs_fuse import config
from benchfs_fuse.errors import ConfigError

NOTHING: dict[str, str] = {}


def parse(*command_line: str) -> dict[str, object]:
    parser = argparse.ArgumentParser()
    config.add_options(parser, "mount", "cluster", "ucx")
    return vars(parser.parse_args(command_line))


def write(directory: Path, text: str) -> Path:
    file = directory / "benchfs.toml"
    file.write_text(text)
    return file


def test_defaults_hold_where_nothing_is_given() -> None:
    settings = config.load({}, NOTHING)
    assert settings.mount.attr_timeout_s == 1.0
    assert settings.mount.op_timeout_s == 30.0
    assert settings.cluster.chunk_size == 4 << 20
    assert settings.daemon.lease_s == 60.0


@pytest.mark.parametrize(("euid", "expected"), [(0, True), (1000, False)])
def test_allow_other_is_for_root_by_default(monkeypatch: pytest.MonkeyPatch, euid: int, expected: bool) -> None:
    monkeypatch.setattr("os.geteuid", lambda: euid)
    assert config.load({}, NOTHING).mount.allow_other is expected
    assert config.keys()["mount.allow_other"].default is expected


def test_command_line_goes_before_environment_before_file_before_default(tmp_path: Path) -> None:
    file = write(tmp_path, "[mount]\nattr_timeout_s = 2\nop_timeout_s = 2\nspin_us = 2\n")
    environ = {"BENCHFS_MOUNT_ATTR_TIMEOUT_S": "3", "BENCHFS_MOUNT_OP_TIMEOUT_S": "3"}
    mount = config.load(parse("--config", str(file), "--attr-timeout", "4"), environ).mount
    assert (mount.attr_timeout_s, mount.op_timeout_s, mount.spin_us) == (4.0, 3.0, 2)
    assert mount.gather_time_s == config.keys()["mount.gather_time_s"].default


def test_environment_names_the_file_unless_the_command_line_does(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    file, other = write(tmp_path, "[mount]\nspin_us = 1"), write(tmp_path / "other", "[mount]\nspin_us = 2")
    assert config.load({}, {"BENCHFS_CONFIG": str(file)}).mount.spin_us == 1
    assert config.load(parse("--config", str(other)), {"BENCHFS_CONFIG": str(file)}).mount.spin_us == 2


@pytest.mark.parametrize(
    ("text", "value"), [("65536", 65536), ("64K", 65536), ("4M", 4 << 20), ("1G", 1 << 30), ("1024K", 1 << 20)]
)
def test_sizes_take_suffixes_everywhere(tmp_path: Path, text: str, value: int) -> None:
    file = write(tmp_path, f'[cluster]\nchunk_size = "{text}"')
    assert config.load({"config": file}, NOTHING).cluster.chunk_size == value
    assert config.load({}, {"BENCHFS_CLUSTER_CHUNK_SIZE": text}).cluster.chunk_size == value
    assert config.load(parse("--chunk-size", text), NOTHING).cluster.chunk_size == value


def test_switches_go_both_ways() -> None:
    assert config.load(parse("--no-xattr", "--noatime"), NOTHING).mount.xattr is False
    assert config.load(parse("--no-xattr", "--noatime"), NOTHING).mount.noatime is True
    assert config.load(parse("--xattr"), {"BENCHFS_MOUNT_XATTR": "off"}).mount.xattr is True
    assert config.load({}, {"BENCHFS_MOUNT_XATTR": "off"}).mount.xattr is False


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[mount]\nattr_timeout = 1", "unknown key mount.attr_timeout: [mount] has attr_timeout_s, "),
        ("[mounts]\nspin_us = 1", "unknown section [mounts]: known are mount, daemon, cluster, ucx"),
        ("mount = 1", "mount must be a section"),
        ("[mount]\nattr_timeout_s = -1", "mount.attr_timeout_s cannot be -1: a number from 0 to 3600 s"),
        ("[mount]\nattr_timeout_s = nan", "mount.attr_timeout_s cannot be nan"),
        ("[mount]\nattr_timeout_s = true", "mount.attr_timeout_s cannot be True"),
        ("[mount]\nattr_timeout_s = '1'", "mount.attr_timeout_s cannot be '1'"),
        ("[mount]\nspin_us = 1.5", "mount.spin_us cannot be 1.5: a whole number from 0 to 2000 µs"),
        ("[mount]\nxattr = 'yes'", "mount.xattr cannot be 'yes': true or false"),
        ("[mount]\nxattr = 1", "mount.xattr cannot be 1: true or false"),
        (
            "[cluster]\nchunk_size = 3000000",
            "cluster.chunk_size cannot be 3000000: a power of two from 64K to 1G bytes",
        ),
        ("[cluster]\nchunk_size = '32K'", "cluster.chunk_size cannot be '32K'"),
        ("[cluster]\nchunk_size = '2G'", "cluster.chunk_size cannot be '2G'"),
        ("[cluster]\nchunk_size = '4MB'", "cluster.chunk_size cannot be '4MB'"),
        ("[ucx]\ntls = 'tcp sm'", "ucx.tls cannot be 'tcp sm'"),
        ("[daemon]\nlease_s = 0", "daemon.lease_s cannot be 0: a number from 1 to 86400 s"),
        (
            "[mount]\ngather_bytes_max = 0\ngather_time_s = 1",
            "mount.gather_bytes_max = 0 contradicts mount.gather_time_s",
        ),
        ("[ucx]\ntls = 'sm,self'\nnet_devices = 'eth0'", "ucx.tls = 'sm,self' contradicts ucx.net_devices"),
        ("[mount", "not a TOML file"),
    ],
)
def test_a_bad_file_is_refused_with_one_sentence(tmp_path: Path, text: str, complaint: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        config.load({"config": file}, NOTHING)
    assert str(caught.value).startswith(f"{file}: {complaint}")
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the settings: No such file or directory"):
        config.load({"config": tmp_path / "missing"}, NOTHING)


@pytest.mark.parametrize(
    ("variable", "text", "complaint"),
    [
        ("BENCHFS_MOUNT_SPIN", "1", "environment: BENCHFS_MOUNT_SPIN is not a setting"),
        ("BENCHFS_MOUNT_SPIN_US", "fast", "environment, BENCHFS_MOUNT_SPIN_US: mount.spin_us cannot be 'fast'"),
        ("BENCHFS_MOUNT_XATTR", "maybe", "environment, BENCHFS_MOUNT_XATTR: mount.xattr cannot be 'maybe'"),
    ],
)
def test_a_bad_environment_is_refused(variable: str, text: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load({}, {variable: text})
    assert str(caught.value).startswith(complaint)


def test_other_variables_are_not_ours() -> None:
    assert config.load({}, {"BENCHFS_REQUIRE_DEVICES": "1", "HOME": "/"}) == config.Settings()


def test_a_bad_option_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--attr-timeout: mount.attr_timeout_s cannot be 'soon': a number from 0 to"):
        config.load(parse("--attr-timeout", "soon"), NOTHING)


def test_one_source_may_override_what_another_would_contradict(tmp_path: Path) -> None:
    file = write(tmp_path, "[mount]\ngather_time_s = 2")
    assert config.load(parse("--config", str(file), "--gather-bytes-max", "0"), NOTHING).mount.gather_bytes_max == 0


def test_every_key_is_documented_and_its_default_is_allowed() -> None:
    for name, key in config.keys().items():
        assert key.rule.doc, name
        assert key.check(key.default) == key.default, name


@pytest.mark.parametrize("section", ["mount", "daemon", "cluster", "ucx"])
def test_options_show_their_defaults(section: str) -> None:
    parser = argparse.ArgumentParser(prog="x", formatter_class=lambda prog: argparse.HelpFormatter(prog, width=1000))
    config.add_options(parser, section)
    text = parser.format_help()
    for key in config.keys().values():
        assert (key.rule.doc in text) == (key.name.startswith(section + "."))


@given(st.sampled_from(sorted(config.keys())), st.text(st.characters(codec="utf-8"), max_size=12))
def test_any_text_is_a_good_value_or_a_config_error(name: str, text: str) -> None:
    key = config.keys()[name]
    try:
        settings = config.load({name: text}, NOTHING)
    except ConfigError:
        return
    section, _, field = name.partition(".")
    value = getattr(getattr(settings, section), field)
    assert key.check(value) == value
