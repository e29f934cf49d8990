"""What -o means: every usual option of mount(8) is understood, everything else is refused."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchfs_fuse import config
from benchfs_fuse.commands.options import parse_options
from benchfs_fuse.errors import ConfigError


def test_advice_for_others_is_passed_over() -> None:
    advice = (
        "defaults,rw,auto,noauto,nofail,_netdev,user,users,nouser,relatime,x-systemd.automount,X-mount.mkdir,comment=a"
    )
    assert parse_options(advice) == ((), ())
    assert parse_options("") == parse_options(",,") == ((), ())


@pytest.mark.parametrize("option", ["ro", "suid", "nosuid", "dev", "nodev", "exec", "noexec", "sync", "dirsync"])
def test_options_of_the_kernel_reach_it(option: str) -> None:
    assert parse_options(f"{option},nofail").words == [f"-o{option}"]


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("noatime", "mount.noatime", True),
        ("noxattr", "mount.xattr", False),
        ("noxattr,xattr", "mount.xattr", True),
        ("allow_other", "mount.allow_other", True),
        ("attr_timeout=0", "mount.attr_timeout_s", 0.0),
        ("op_timeout=5", "mount.op_timeout_s", 5.0),
        ("gather_bytes_max=1M", "mount.gather_bytes_max", 1 << 20),
        ("gather_time=2", "mount.gather_time_s", 2.0),
        ("spin=0", "mount.spin_us", 0),
        ("tls=tcp", "ucx.tls", "tcp"),
        ('tls="sm,tcp",ro', "ucx.tls", "sm,tcp"),
        ("net_devices=eth0", "ucx.net_devices", "eth0"),
        ("tls=^cuda", "ucx.tls", "^cuda"),
    ],
)
def test_options_set_our_settings(text: str, name: str, value: object) -> None:
    settings = config.load(parse_options(text).settings(), {})
    section, _, field = name.partition(".")
    assert getattr(getattr(settings, section), field) == value


def test_every_setting_of_a_mount_can_be_an_option() -> None:
    for key in config.keys().values():
        if not key.name.startswith(("mount.", "ucx.")):
            continue
        name = key.option.removeprefix("--").replace("-", "_")
        options = parse_options(name if key.type is bool else f"{name}={key.default}")
        assert key.name in options.settings()


def test_a_settings_file_is_found_from_anywhere() -> None:
    (argument,) = parse_options("config=/etc/benchfs.toml").arguments
    assert argument == "--config=/etc/benchfs.toml"
    (argument,) = parse_options("config=benchfs.toml").arguments
    assert argument.startswith("--config=/") and argument.endswith("/benchfs.toml")


@pytest.mark.parametrize(
    "text",
    [
        "nonsense",
        "ro,nonsense",
        "attr_timeout",
        "xattr=1",
        "config=",
        "lease=5",
        "chunk_size=4M",
        "ro=1",
        "=",
        "remount",
    ],
)
def test_what_is_unknown_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match="unknown mount option") as caught:
        parse_options(text)
    assert repr(text.rsplit(",", maxsplit=1)[-1]) in str(caught.value) and "noatime" in str(caught.value)


@given(st.text(max_size=30))
def test_any_text_is_understood_or_refused(text: str) -> None:
    with contextlib.suppress(ConfigError):
        assert all(word.startswith("-") for word in parse_options(text).words)
