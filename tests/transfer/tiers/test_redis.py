"""The Redis tier against a real redis-server: the suite, and passwords, TLS, eviction, a full server, restarts."""

import contextlib
import time
from contextlib import contextmanager

import msgspec
import pytest
from tier_servers import Redis

from pdserve.errors import ConfigError
from pdserve.transfer.tiers import conformance
from pdserve.transfer.tiers import redis as tier_module
from pdserve.transfer.tiers.base import CorruptChunk, TierError
from pdserve.transfer.tiers.conformance import Subject, is_whole, make_chunk, read, soon
from pdserve.transfer.tiers.redis import RedisOptions, RedisTier

redis = pytest.importorskip("redis", reason="pip install 'pdserve[redis]'")


class OverRedis(Subject):
    def __init__(self, server, relay, **options):
        self.relay = relay(server.port)
        self.options = RedisOptions(port=self.relay.port, password=server.password, timeout=20.0, **options)
        self.client = redis.Redis(
            port=server.port,
            password=server.password,
            ssl=self.options.tls,
            ssl_ca_certs=self.options.ca or None,
        )

    def open(self):
        return RedisTier(self.options)

    def break_put(self, tier, record, payload):
        self.relay.cut_after = record.payload_bytes * 2 // 3
        try:
            with pytest.raises(TierError):
                tier.put(record, payload, soon())
        finally:
            self.relay.cut_after = None

    def flip(self, record, position):
        shard, at = divmod(position, record.shard_bytes)
        name = f"pdserve:{{{record.key.hex()}}}:{shard}"
        (old,) = self.client.getrange(name, at, at)
        self.client.setrange(name, at, bytes([old ^ 1]))

    @contextmanager
    def stalled(self, tier):
        tier._options = msgspec.structs.replace(self.options, timeout=0.5)
        self.relay.silence()
        try:
            yield
        finally:
            self.relay.go_on()
            tier._options = self.options


@pytest.fixture
def subject(redis_server, relay):
    made = OverRedis(redis_server, relay)
    yield made
    made.client.close()


@pytest.mark.parametrize("rule", conformance.RULES, ids=conformance.name_of)
def test_conformance(rule, subject):
    rule(subject)


@pytest.mark.parametrize(
    "rule",
    [
        conformance.storing.bytes_in_are_bytes_out,
        conformance.failing.half_a_chunk_is_never_seen,
        conformance.failing.a_silent_backend_costs_the_deadline_and_no_more,
        conformance.ending.closing_ends_threads_and_files,
    ],
    ids=conformance.name_of,
)
def test_conformance_over_tls(rule, tls_redis_server, tls_files, relay):
    subject = OverRedis(tls_redis_server, relay, tls=True, ca=str(tls_files[0]))
    rule(subject)
    subject.client.close()


def opened(**options):
    return contextlib.closing(RedisTier(RedisOptions(timeout=20.0, **options)))


def test_a_stopped_server_costs_the_deadline(redis_server):
    record, payload = make_chunk(1000)
    with opened(port=redis_server.port, password=redis_server.password) as tier:
        assert tier.put(record, payload, soon())
        redis_server.stop()
        try:
            with pytest.raises(TierError, match="deadline"):
                tier.get(record, payload, time.monotonic() + 0.2)
        finally:
            redis_server.go_on()
        assert tier.get(record, payload, soon())


def test_an_unknown_authority_is_refused(tls_redis_server):
    with (
        opened(port=tls_redis_server.port, password=tls_redis_server.password, tls=True) as tier,
        pytest.raises(TierError, match=r"(?i)certificate"),
    ):
        tier.contains([bytes(32)])


def test_a_wrong_password_is_named_and_not_shown(redis_server):
    with (
        opened(port=redis_server.port, password="not-the-password") as tier,
        pytest.raises(TierError, match=r"(?i)password") as e,
    ):
        tier.contains([bytes(32)])
    assert "not-the-password" not in str(e.value) + str(tier.stats())


def test_nobody_there():
    assert "refused" in conformance.failing.nobody_there_is_an_error(RedisTier(RedisOptions(port=1, timeout=20.0)))


def test_everything_has_a_time_to_live_and_the_record_ends_first(subject, tier):
    record, payload = make_chunk(1000, 2)
    tier.put(record, payload, soon())
    stem = f"pdserve:{{{record.key.hex()}}}"
    record_ttl, *shard_ttls = [subject.client.ttl(f"{stem}:{part}") for part in ("record", 0, 1)]
    assert 86000 < record_ttl <= 86400
    assert all(ttl > record_ttl for ttl in shard_ttls)


def test_an_evicted_shard_makes_a_miss_and_its_record_goes(subject, tier):
    record, payload = make_chunk(1000, 3)
    tier.put(record, payload, soon())
    subject.client.delete(f"pdserve:{{{record.key.hex()}}}:1")
    assert read(tier, record) is None
    assert tier.contains([record.key]) == [None]


def test_a_shard_of_another_length_is_corrupt_and_goes(subject, tier):
    record, payload = make_chunk(1000, 3)
    tier.put(record, payload, soon())
    subject.client.append(f"pdserve:{{{record.key.hex()}}}:1", b"x")
    with pytest.raises(CorruptChunk):
        read(tier, record)
    assert tier.contains([record.key]) == [None]


@pytest.mark.parametrize("value", [b"", b"x", b"PDKV" + bytes(8), b"PDKV\x01\0\0\0\xff\xff\xff\xff" + bytes(50)])
def test_a_record_that_is_none_is_a_miss(subject, tier, value):
    record, payload = make_chunk(1000)
    tier.put(record, payload, soon())
    subject.client.set(f"pdserve:{{{record.key.hex()}}}:record", value)
    assert tier.contains([record.key]) == [None]
    assert read(tier, record) is None
    assert tier.put(record, payload, soon())
    assert read(tier, record) is not None


def test_a_full_server_refuses_and_still_serves(redis_server):
    server = Redis()
    client = redis.Redis(port=server.port, password=server.password)
    try:
        with opened(port=server.port, password=server.password) as tier:
            kept, payload = make_chunk(1000, 2)
            assert tier.put(kept, payload, soon())
            client.config_set("maxmemory-policy", "noeviction")
            client.config_set("maxmemory", 1)
            more, more_payload = make_chunk(1000, 2)
            assert tier.put(more, more_payload, soon()) is False
            assert "full" in tier.stats()["state"]
            assert tier.contains([kept.key, more.key]) == [kept, None]
            assert is_whole(kept, read(tier, kept))
    finally:
        client.close()
        server.kill()


def test_a_restarted_server_is_found_again(redis_server):
    server = Redis()
    with opened(port=server.port, password=server.password) as tier:
        record, payload = make_chunk(1000)
        assert tier.put(record, payload, soon())
        server.kill()
        with pytest.raises(TierError):
            tier.contains([record.key])
        server = Redis(port=server.port, password=server.password)
        try:
            assert tier.contains([record.key]) == [None]
            assert tier.put(record, payload, soon())
        finally:
            server.kill()


def test_connections_that_the_server_closed_are_replaced_without_an_error(subject, tier):
    record, payload = make_chunk(1000)
    for _ in range(8):
        assert tier.put(record, payload, soon())
    subject.relay.reset_all()
    for _ in range(8):
        assert tier.contains([record.key]) == [record]


def test_what_the_server_cannot_hold_is_refused(tier, monkeypatch):
    monkeypatch.setattr(tier_module, "MAX_VALUE", 999)
    record, payload = make_chunk(1000)
    assert tier.put(record, payload, soon()) is False


def test_without_the_library_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "redis", None)
    with pytest.raises(ConfigError, match=r"pip install 'pdserve\[redis\]'"):
        RedisTier(RedisOptions())
