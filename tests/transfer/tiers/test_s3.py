"""The S3 tier against real servers of that protocol: the suite, parts, conditions, odd answers, deadlines."""

import contextlib
import functools
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pdserve.errors import ConfigError
from pdserve.transfer.tiers import conformance, envelope
from pdserve.transfer.tiers.base import CorruptChunk, TierError
from pdserve.transfer.tiers.conformance import Subject, is_whole, make_chunk, read, soon
from pdserve.transfer.tiers.s3 import S3Options, S3Tier

boto3 = pytest.importorskip("boto3", reason="pip install 'pdserve[s3]'")
BUCKET = "chunks"
PART = 5 << 20


@pytest.fixture(autouse=True)
def _credentials(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setattr(boto3.session, "Session", session_of)


_Session = boto3.session.Session


@functools.cache  # a session reads all that AWS has from JSON, which takes longer than most tests
def session_of(profile_name=None):
    return _Session(profile_name=profile_name)


@functools.cache  # making one takes longer than most tests
def client_of(endpoint):
    config = boto3.session.Config(s3={"addressing_style": "path"})
    return session_of().client("s3", endpoint_url=endpoint, region_name="us-east-1", config=config)


def options_for(endpoint, **more):
    return S3Options(**{"bucket": BUCKET, "prefix": "kv", "endpoint": endpoint, "part": PART, "timeout": 20.0, **more})


class OverS3(Subject):
    shard_sizes = (65536, 1, 70001, 3 << 20)
    many_keys = 40

    def __init__(self, server, relay):
        self.relay = relay(server.port)
        self.client = client_of(server.endpoint)
        with contextlib.suppress(self.client.exceptions.ClientError):
            self.client.create_bucket(Bucket=BUCKET)

    def open(self):
        return S3Tier(options_for(f"http://127.0.0.1:{self.relay.port}", io_timeout=1.0))

    def name(self, record):
        return f"kv/{record.key.hex()[:2]}/{record.key.hex()}"

    def break_put(self, tier, record, payload):
        self.relay.cut_after = record.payload_bytes * 2 // 3
        try:
            with pytest.raises(TierError):
                tier.put(record, payload, time.monotonic() + 0.5)
        finally:
            self.relay.cut_after = None

    def flip(self, record, position):
        data = bytearray(self.object(record))
        data[len(envelope.header(record)) + position] ^= 1
        self.client.put_object(Bucket=BUCKET, Key=self.name(record), Body=bytes(data))

    def object(self, record):
        return self.client.get_object(Bucket=BUCKET, Key=self.name(record))["Body"].read()

    @contextmanager
    def stalled(self, tier):
        usual = tier._options
        tier._options = options_for("", timeout=0.5)
        self.relay.silence()
        try:
            yield
        finally:
            self.relay.go_on()
            tier._options = usual


@pytest.fixture
def subject(s3_server, relay):
    made = OverS3(s3_server, relay)
    return made


@pytest.fixture
def moto(moto_server, relay):
    made = OverS3(moto_server, relay)
    return made


@pytest.mark.parametrize("rule", conformance.RULES, ids=conformance.name_of)
def test_conformance(rule, subject):
    rule(subject)


@pytest.mark.parametrize(
    "rule",
    [
        conformance.storing.bytes_in_are_bytes_out,
        conformance.storing.of_two_writers_of_a_key_one_is_whole,
        conformance.failing.a_corrupt_chunk_can_be_replaced,
    ],
    ids=conformance.name_of,
)
def test_conformance_with_another_server(rule, moto):
    rule(moto)


def test_a_large_chunk_goes_and_comes_in_parts_whose_borders_are_not_the_shards(moto):
    record, payload = make_chunk(4_000_003, 3)
    with conformance.opened(moto) as tier:
        assert tier.put(record, payload, soon())
        assert moto.client.head_object(Bucket=BUCKET, Key=moto.name(record))["ETag"].endswith('-3"')
        assert is_whole(record, read(tier, record))


def test_parts_of_an_upload_that_failed_are_removed(moto):
    record, payload = make_chunk(4_000_003, 3)
    with conformance.opened(moto) as tier:
        moto.break_put(tier, record, payload)
        uploads = lambda: moto.client.list_multipart_uploads(Bucket=BUCKET).get("Uploads")  # noqa: E731
        assert conformance.eventually(lambda: not uploads(), 20)


def test_an_object_of_another_length_is_corrupt_and_goes(subject, tier):
    record, payload = make_chunk(5000)
    tier.put(record, payload, soon())
    subject.client.put_object(Bucket=BUCKET, Key=subject.name(record), Body=subject.object(record) + b"x")
    with pytest.raises(CorruptChunk):
        read(tier, record)
    assert tier.contains([record.key]) == [None]


def test_a_body_that_broke_off_and_was_kept_is_a_miss_and_is_replaced(subject, tier):
    record, payload = make_chunk(5000)
    tier.put(record, payload, soon())
    subject.client.put_object(Bucket=BUCKET, Key=subject.name(record), Body=subject.object(record)[:-100])
    assert tier.contains([record.key]) == [None]
    assert tier.put(record, payload, soon())
    assert is_whole(record, read(tier, record))


@pytest.mark.parametrize("junk", [b"", b"x" * 10, b"PDKV" + bytes(5000)])
def test_what_is_no_chunk_is_a_miss_and_is_replaced(subject, tier, junk):
    record, payload = make_chunk(5000)
    subject.client.put_object(Bucket=BUCKET, Key=subject.name(record), Body=junk)
    assert tier.contains([record.key]) == [None]
    assert read(tier, record) is None
    assert tier.put(record, payload, soon())
    assert is_whole(record, read(tier, record))


def test_a_record_longer_than_a_page(tier):
    record, payload = make_chunk(3, 900)
    assert tier.put(record, payload, soon())
    assert tier.contains([record.key]) == [record]
    assert is_whole(record, read(tier, record))


def test_no_bucket_is_an_error_and_no_miss(s3_server):
    with contextlib.closing(S3Tier(options_for(s3_server.endpoint, bucket="nowhere"))) as tier:
        with pytest.raises(TierError, match="NoSuchBucket"):
            tier.contains([bytes(32)])
        assert "NoSuchBucket" in tier.stats()["state"]


def test_nobody_there():
    state = conformance.failing.nobody_there_is_an_error(S3Tier(options_for("http://127.0.0.1:1", timeout=0.5)))
    assert "127.0.0.1:1" in state


# ---- odd answers, from a server that is told what to say ----


class Odd:
    """Answers with what is in `script`, one entry a request, then with 404. None: hangs up without a word."""

    def __init__(self):
        self.script, self.seen = [], []
        odd = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self):
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                odd.seen.append((self.command, self.headers.get("If-None-Match")))
                what = odd.script.pop(0) if odd.script else (404, "NoSuchKey")
                if what is None:
                    self.close_connection = True
                    self.connection.close()
                    return
                status, code = what
                body = f"<Error><Code>{code}</Code><Message>m</Message></Error>".encode() if status >= 300 else b""
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("ETag", '"e"')
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_PUT = do_POST = do_DELETE = answer

            def log_message(self, *args):
                pass

            def handle(self):
                with contextlib.suppress(OSError, ValueError):
                    super().handle()

            def finish(self):
                with contextlib.suppress(OSError, ValueError):
                    super().finish()

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))
        self.thread.start()

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self.server.server_port}"

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def odd():
    made = Odd()
    yield made
    made.close()


@pytest.fixture
def odd_tier(odd):
    made = S3Tier(options_for(odd.endpoint))
    yield made
    made.close()


@pytest.mark.parametrize("trouble", [(500, "InternalError"), (503, "SlowDown"), (429, "TooManyRequests"), None])
def test_what_may_pass_is_tried_again(odd, odd_tier, trouble):
    record, payload = make_chunk(100)
    odd.script = [trouble, trouble, (200, "")]
    assert odd_tier.put(record, payload, soon())
    assert len(odd.seen) == 3


def test_but_not_after_the_deadline(odd, odd_tier):
    record, payload = make_chunk(100)
    odd.script = [(503, "SlowDown")] * 1000
    with pytest.raises(TierError):
        odd_tier.put(record, payload, time.monotonic() + 0.5)
    assert 1 <= len(odd.seen) < 20
    assert "SlowDown" in odd_tier.stats()["state"]


def test_what_will_not_pass_is_not_tried_again(odd, odd_tier):
    record, payload = make_chunk(100)
    odd.script = [(403, "AccessDenied")] * 10
    with pytest.raises(TierError, match="AccessDenied"):
        odd_tier.put(record, payload, soon())
    assert len(odd.seen) == 1


def test_a_store_that_knows_no_conditions_is_asked_once(odd, odd_tier):
    record, payload = make_chunk(100)
    odd.script = [(501, "NotImplemented"), (200, ""), (200, "")]
    assert odd_tier.put(record, payload, soon())
    assert odd_tier.put(record, payload, soon())
    assert [condition for _, condition in odd.seen] == ["*", None, None]


def test_without_the_library_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "boto3", None)
    with pytest.raises(ConfigError, match=r"pip install 'pdserve\[s3\]'"):
        S3Tier(options_for("http://h"))
