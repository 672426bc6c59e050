import json
import os

import pytest

from pdserve.errors import ConfigError
from pdserve.transfer.tiers import registry


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://h", {"host": "h", "port": 6379, "db": 0, "tls": False, "password": "", "ttl": 86400}),
        ("redis://:p%40ss@h:1234/3?ttl=60", {"port": 1234, "db": 3, "password": "p@ss", "ttl": 60}),
        (
            "rediss://me:pw@h?timeout=0.25&connections=2",
            {"tls": True, "username": "me", "timeout": 0.25, "connections": 2},
        ),
        ("valkey://h?prefix=a", {"tls": False, "prefix": "a"}),
        ("valkeys://h", {"tls": True}),
    ],
)
def test_redis_urls(url, expected):
    pytest.importorskip("redis")
    tier = registry.build(url)
    options = tier.tier._options
    assert {name: getattr(options, name) for name in expected} == expected
    assert tier.name == "redis"
    tier.close()


def test_a_directory(tmp_path):
    tier = registry.build(f"file://{tmp_path}?ttl=3600&min_free=0.5")
    assert (tier.name, tier.tier._ttl, tier.tier._min_free) == ("fs", 3600.0, 0.5)
    tier.close()


def test_every_tier_comes_behind_a_breaker():
    tier = registry.build("memory:")
    assert (tier.name, tier.stats()["circuit"]) == ("memory", "closed")


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("disk", r"'disk' is not a kind of tier\. Use one of: redis://"),
        ("http://h", "'http' is not a kind of tier"),
        ("redis://h:port", "not a URL"),
        ("redis:///0", "no host"),
        ("redis://h/zero", "'zero' is not a number"),
        ("redis://h?tll=60", r"unknown option 'tll' in redis://h\?tll=60\. Did you mean ttl\?"),
        ("redis://h?color=red", r"unknown option 'color'.*Known are: ca, cert"),
        ("redis://h?ttl=soon", r"ttl='soon' does not fit.*whole number"),
        ("redis://h?ttl=-1", r"ttl='-1' does not fit"),
        ("redis://h?connections=0", "connections"),
        ("redis://h?timeout=x", "a number"),
        ("redis://h?port=1", "unknown option 'port'"),
        ("rediss://h?ca=/no/such/file", "no such file"),
        ("file://host/dir", "three slashes"),
        ("file:///no/such/directory", "Make or mount it first"),
        ("s3://", "no bucket"),
        ("s3://key:secret@bucket", "AWS_ACCESS_KEY_ID"),
        ("s3://bucket?endpoint=h:9000", "endpoint=https://host:port"),
        ("s3://bucket?part=big", "such as 512MiB"),
        ("mooncake://", "no master"),
    ],
)
def test_an_error_names_the_key_the_value_and_what_would_be_right(url, says):
    with pytest.raises(ConfigError, match=says) as e:
        registry.build(url, "cache.tiers[2]")
    assert e.value.key == "cache.tiers[2]"
    assert e.value.fix


@pytest.mark.parametrize("url", ["redis://:secret@h?x=1", "redis://me:secret@h:port", "redis://me:secret@h/zero"])
def test_passwords_are_not_shown(url):
    with pytest.raises(ConfigError) as e:
        registry.build(url)
    assert "secret" not in str(e.value)


def test_a_password_may_come_from_the_environment_or_from_a_file(monkeypatch, tmp_path):
    pytest.importorskip("redis")
    monkeypatch.setenv("KV_PASSWORD", "p@s:s/%41")
    tier = registry.bare("redis://me:${KV_PASSWORD}@h")
    assert (tier._options.username, tier._password()) == ("me", "p@s:s/%41")
    tier.close()
    file = tmp_path / "password"
    file.write_text("first\n")
    tier = registry.bare(f"redis://h?password_file={file}")
    assert tier._password() == "first"
    file.write_text("second\n")
    assert tier._password() == "second"
    tier.close()


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("redis://:${NOT_SET_ANYWHERE}@h", "the environment variable NOT_SET_ANYWHERE is not set.*export"),
        ("redis://h?password_file=/no/such/file", "no such file"),
        ("redis://:secret@h?password_file=/dev/null", "Give one of them"),
    ],
)
def test_a_password_that_cannot_be_had_is_said_at_start(url, says):
    pytest.importorskip("redis")
    with pytest.raises(ConfigError, match=says) as e:
        registry.build(url)
    assert "secret" not in str(e.value)


def test_a_daemon_shows_no_password_anywhere(tmp_path, start_cache, monkeypatch):
    """Command line, configuration, status, log, metrics: of a tier that is there and of one with its password written out."""
    pytest.importorskip("redis")
    monkeypatch.setenv("KV_PASSWORD", "hush1")
    words = ("--tier", "redis://me:${KV_PASSWORD}@127.0.0.1:1/0", "--tier", "redis://:hush2@127.0.0.1:1/0")
    daemon = start_cache(tmp_path, f"test-{os.getpid()}-hush", 64 << 20, *words)
    assert json.loads(daemon.get("/config"))["tiers"]["redis"]["url"] == "redis://...@127.0.0.1:1/0"
    shown = [daemon.get(path) for path in ("/config", "/status", "/metrics", "/cache/stats")]
    log = daemon.stop()
    assert "the password in redis://...@127.0.0.1:1/0 can be read in the list of processes" in log
    assert log.count("can be read in the list") == 1  # of the one that is written out
    assert not any(word in text for text in [*shown, log] for word in ("hush1", "hush2"))
