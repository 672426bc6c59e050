"""Chunks as objects in any S3-compatible store, one object each: a header page, then the shards.

An object appears when it is complete, whether it was sent in one request or in parts, so half a chunk is never seen. Large
ones go and come in parts, side by side; the parts of a read are tied to one version of the object by its ETag. Objects are
written with If-None-Match, so that of two hosts with the same chunk one sends it for nothing and neither replaces it.

Requests that failed on the way or in the server (5xx, 429) are made again, with growing pauses, until the call's deadline:
boto3's own retries know no deadline and are switched off. How long objects live is up to the bucket's lifecycle rules.
"""

from __future__ import annotations

import contextlib
import importlib
import random
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np

from pdserve.errors import ConfigError
from pdserve.transfer.tiers import envelope
from pdserve.transfer.tiers.base import ChunkRecord, CorruptChunk, TierError
from pdserve.transfer.tiers.offload import DeadlinePassed, Offload, Operation

T = TypeVar("T")
_CONNECT_S = 2.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 2.0
_AGAIN = {"SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "ConditionalRequestConflict"}
_ABSENT = {"NoSuchKey", "InvalidRange"}
#: the smallest part that the original takes, but for the last
_MIN_PART = 5 << 20
#: threads for small requests: their time is Python's own, and more only stand in each other's way (measured: 3 ms a key
#: with 4, 17 with 8)
_LOOKERS = 4


class S3Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What can be set; registry.py fills it from a URL's query. Credentials come from where boto3 looks for them."""

    bucket: str
    prefix: str = ""
    #: another store than the original: http://host:9000
    endpoint: str = ""
    region: str = ""
    profile: str = ""
    #: PEM file of the authority that signed the endpoint's certificate (default: the system's)
    ca: str = ""
    #: objects larger than this are sent and fetched in parts of this size, side by side
    part: Annotated[int, msgspec.Meta(ge=_MIN_PART)] = 16 << 20
    connections: Annotated[int, msgspec.Meta(ge=1, le=64)] = 8
    #: seconds that contains() and delete() may take
    timeout: float = 5.0
    #: seconds without a byte after which a connection is given up
    io_timeout: float = 5.0


class S3Tier:
    """See the module's head."""

    def __init__(self, options: S3Options) -> None:
        self.name = "s3"
        self._options = options
        self._errors = _library("botocore.exceptions")
        self._client = _client(options)
        self._state = "ok"
        self._conditional = True
        self._io = Offload(self.name, options.connections)

    def contains(self, keys: list[bytes]) -> list[ChunkRecord | None]:
        deadline = self._soon()

        def look(mine: list[bytes], operation: Operation) -> list[ChunkRecord | None]:
            return [self._again(partial(self._read_record, key), operation, deadline) for key in mine]

        return self._spread(keys, look, deadline)

    def get(self, record: ChunkRecord, into: list[np.ndarray], deadline: float) -> bool:
        head = envelope.header(record)
        total = len(head) + record.payload_bytes
        name = self._name(record.key)

        def first(operation: Operation) -> str | None:
            """The ETag of the object, None when it is another or gone."""
            found = self._again(lambda: self._fetch(name, 0, self._options.part, operation), operation, deadline)
            if found is None or found[0][: len(head)] != head:
                return None
            data, size, etag = found
            if size != total:
                self._delete(name)
                raise CorruptChunk(f"s3: {name} has {size} bytes, not {total}; removed")
            _copy(memoryview(data)[len(head) :], 0, into, operation)
            return etag

        def rest(start: int, etag: str, operation: Operation) -> bool:
            found = self._again(
                lambda: self._fetch(name, start, self._options.part, operation, etag), operation, deadline
            )
            if found is None or len(found[0]) != min(self._options.part, total - start):
                return False  # replaced meanwhile
            _copy(memoryview(found[0]), start - len(head), into, operation)
            return True

        etag = self._io.call(first, deadline)
        if etag is None:
            return False
        starts = range(self._options.part, total, self._options.part)
        done = self._io.run([partial(rest, start, etag) for start in starts], deadline)
        self._state = "ok"
        return all(done)

    def put(self, record: ChunkRecord, payload: list[np.ndarray], deadline: float) -> bool:
        head = envelope.header(record)
        total, part = len(head) + record.payload_bytes, self._options.part
        send = self._put_whole if total <= part else self._put_parts
        send(record, head, payload, deadline)
        self._state = "ok"
        return True

    def delete(self, keys: list[bytes]) -> int:
        deadline = self._soon()

        def forget(key: bytes) -> bool:
            there = self._fetch(self._name(key), 0, 1, None) is not None
            self._delete(self._name(key))
            return there

        def job(mine: list[bytes], operation: Operation) -> list[bool]:
            return [self._again(partial(forget, key), operation, deadline) for key in mine]

        return sum(self._spread(keys, job, deadline))

    def listing(self, deadline: float) -> Iterator[ChunkRecord]:
        """Lists the prefix, then asks for the beginning of each object: a request for each chunk."""
        start = f"{self._options.prefix}/" if self._options.prefix else ""

        def page(after: str, operation: Operation) -> tuple[str, list[bytes]]:
            words = {"Prefix": start} | ({"ContinuationToken": after} if after else {})
            answer = self._again(lambda: self._ask("list_objects_v2", "", **words), operation, deadline)
            names = [item["Key"].rpartition("/")[2] for item in answer.get("Contents", ())]
            keys = [bytes.fromhex(n) for n in names if re.fullmatch("[0-9a-f]{64}", n)]
            return answer.get("NextContinuationToken", ""), keys

        def look(mine: list[bytes], operation: Operation) -> list[ChunkRecord | None]:
            return [self._again(partial(self._read_record, key), operation, deadline) for key in mine]

        after = ""
        while True:
            after, keys = self._io.call(partial(page, after), deadline)
            yield from (record for record in self._spread(keys, look, deadline) if record is not None)
            if not after:
                return

    def stats(self) -> dict[str, int | float | str]:
        # How many objects there are is not known without listing a bucket that others write to as well.
        where = f"{self._options.bucket}/{self._options.prefix}"
        return {"chunks": 0, "used_bytes": 0, "capacity_bytes": 0, "state": self._state, "bucket": where}

    def close(self) -> None:
        self._io.close(2.0)
        self._client.close()

    # ---- sending ----

    def _put_whole(self, record: ChunkRecord, head: bytes, payload: list[np.ndarray], deadline: float) -> None:
        def job(operation: Operation) -> None:
            body = _assemble(head, payload, 0, len(head) + record.payload_bytes, operation)
            self._unless_there(
                record, lambda condition: self._ask("put_object", name, Body=body, **condition), operation, deadline
            )

        name = self._name(record.key)
        self._io.call(job, deadline)

    def _put_parts(self, record: ChunkRecord, head: bytes, payload: list[np.ndarray], deadline: float) -> None:
        name, part, total = self._name(record.key), self._options.part, len(head) + record.payload_bytes

        def begin(operation: Operation) -> str | None:
            if self._again(lambda: self._read_record(record.key), operation, deadline) == record:
                return None
            made = self._again(lambda: self._ask("create_multipart_upload", name), operation, deadline)
            if operation.over:  # nobody would end it
                self._ask("abort_multipart_upload", name, UploadId=made["UploadId"])
            upload: str = made["UploadId"]
            return upload

        def send(number: int, start: int, operation: Operation) -> dict[str, Any]:
            body = _assemble(head, payload, start, min(start + part, total), operation)
            words = {"UploadId": upload, "PartNumber": number, "Body": body}
            done = self._again(lambda: self._ask("upload_part", name, **words), operation, deadline)
            return {"PartNumber": number, "ETag": done["ETag"]}

        def finish(operation: Operation) -> None:
            words = {"UploadId": upload, "MultipartUpload": {"Parts": sent}}
            self._unless_there(
                record,
                lambda condition: self._ask("complete_multipart_upload", name, **words, **condition),
                operation,
                deadline,
            )

        upload = self._io.call(begin, deadline)
        if upload is None:
            return
        try:
            jobs = [partial(send, i + 1, start) for i, start in enumerate(range(0, total, part))]
            sent = self._io.run(jobs, deadline)
            self._io.call(finish, deadline)
        except TierError:
            # Parts of an upload that is never ended cost money until a lifecycle rule removes them.
            self._io.start(lambda _: self._ask("abort_multipart_upload", name, UploadId=upload))
            raise

    def _unless_there(
        self, record: ChunkRecord, send: Callable[[dict[str, str]], object], operation: Operation, deadline: float
    ) -> None:
        """Sends with If-None-Match where the store knows it. What is there already stays, unless it is no chunk."""
        condition = {"IfNoneMatch": "*"} if self._conditional else {}
        try:
            self._again(lambda: send(condition), operation, deadline)
        except _Refused as e:
            if e.status == 501 and condition:
                self._conditional = False
            elif e.status != 412 or self._again(lambda: self._read_record(record.key), operation, deadline):
                if e.status == 412:
                    return
                raise
            self._again(lambda: send({}), operation, deadline)

    # ---- single requests, on the tier's threads ----

    def _read_record(self, key: bytes) -> ChunkRecord | None:
        name = self._name(key)
        found = self._fetch(name, 0, envelope.PAGE, None)
        needed = envelope.header_bytes(found[0]) if found else 0
        if needed > envelope.PAGE:
            found = self._fetch(name, 0, needed, None)
        record = envelope.read_header(found[0], key) if found else None
        # A store must not keep a body that broke off, but there are small ones that do.
        if found is None or record is None or found[1] != needed + record.payload_bytes:
            return None
        return record

    def _fetch(
        self, name: str, start: int, length: int, operation: Operation | None, etag: str = ""
    ) -> tuple[bytes, int, str] | None:
        """(bytes of the range, size of the whole object, its ETag); None when it is gone or, with `etag`, another."""
        words = {"Range": f"bytes={start}-{start + length - 1}"} | ({"IfMatch": etag} if etag else {})
        try:
            answer = self._ask("get_object", name, **words)
        except _Refused as e:
            if e.code in _ABSENT or e.status == 412:
                return None
            raise
        body = answer["Body"]
        wake = operation.woken_by(partial(_shut, body)) if operation else contextlib.nullcontext()
        with self._mapped(name), contextlib.closing(body), wake:
            data = body.read()
        size = int(answer.get("ContentRange", f"/{len(data)}").rpartition("/")[2])
        return data, size, answer.get("ETag", "")

    def _delete(self, name: str) -> None:
        self._ask("delete_object", name)

    def _ask(self, method: str, name: str, **words: Any) -> dict[str, Any]:
        with self._mapped(name):
            key = {"Key": name} if name else {}
            answer: dict[str, Any] = getattr(self._client, method)(Bucket=self._options.bucket, **key, **words)
            return answer

    def _again(self, request: Callable[[], T], operation: Operation, deadline: float) -> T:
        """Until it works, fails for good, or the deadline is near."""
        pause = _FIRST_PAUSE_S
        while True:
            if operation.over:
                raise DeadlinePassed("s3: the caller has left")
            try:
                return request()
            except _Refused as e:
                if not e.again or time.monotonic() + pause >= deadline:
                    raise
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(pause * 2, _LONGEST_PAUSE_S)

    @contextlib.contextmanager
    def _mapped(self, name: str) -> Iterator[None]:
        """Turns everything that boto3 raises into _Refused."""
        errors = self._errors
        try:
            yield
        except errors.ClientError as e:
            status = int(e.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
            code = str(e.response.get("Error", {}).get("Code", ""))
            again = (status >= 500 and status != 501) or status == 429 or code in _AGAIN
            if code not in _ABSENT and status != 412:
                self._state = f"{code or status} from {self._options.bucket}"
            raise _Refused(f"s3 {name}: {e}", status, code, again) from e
        except (errors.BotoCoreError, OSError, ValueError, AttributeError) as e:
            # The last two: urllib3, when its socket is shut down or its connection closed under its hands.
            self._state = f"{type(e).__name__}: {e}"
            again = isinstance(e, (errors.HTTPClientError, OSError, errors.IncompleteReadError))
            raise _Refused(f"s3 {name}: {e}", 0, "", again) from e

    # ---- small things ----

    def _spread(self, keys: list[bytes], job: Callable[[list[bytes], Operation], list[T]], deadline: float) -> list[T]:
        """A few jobs, each with its share of the keys; the answers in the keys' order."""
        share = -(-len(keys) // min(self._options.connections, _LOOKERS)) or 1
        jobs = [partial(job, keys[i : i + share]) for i in range(0, len(keys), share)]
        return [answer for part in self._io.run(jobs, deadline) for answer in part]

    def _name(self, key: bytes) -> str:
        # Stores spread load by the beginning of the name, and a key is as random as can be.
        text = key.hex()
        return "/".join(p for p in (self._options.prefix, text[:2], text) if p)

    def _soon(self) -> float:
        return time.monotonic() + self._options.timeout


class _Refused(TierError):
    """A request failed: HTTP status and S3's code where there are, and whether trying again may help."""

    def __init__(self, text: str, status: int, code: str, again: bool) -> None:
        super().__init__(text)
        self.status, self.code, self.again = status, code, again


def _assemble(head: bytes, payload: list[np.ndarray], start: int, end: int, operation: Operation) -> bytearray:
    """Bytes start..end of the object, copied: the caller's arrays are not read after its deadline."""
    body = bytearray(end - start)
    view = np.frombuffer(body, np.uint8)
    at = 0
    for piece in (np.frombuffer(head, np.uint8), *payload):
        a, b = max(start, at), min(end, at + piece.nbytes)
        if a < b:
            operation.copy(view[a - start : b - start], piece[a - at : b - at])
        at += piece.nbytes
    return body


def _copy(data: memoryview, at: int, into: list[np.ndarray], operation: Operation) -> None:
    """Bytes of the payload from position `at` on, to the shards that they belong to."""
    size = into[0].nbytes
    while data:
        shard, inside = divmod(at, size)
        count = min(len(data), size - inside)
        operation.copy(into[shard][inside : inside + count], data[:count])
        data, at = data[count:], at + count


def _shut(body: Any) -> None:
    """Wakes the thread that reads this body."""
    with contextlib.suppress(AttributeError, OSError, RuntimeError, ValueError):  # ended already; an older urllib3
        body._raw_stream.shutdown()


def _client(options: S3Options) -> Any:
    boto3, config = _library("boto3"), _library("botocore.config")
    settings = config.Config(
        connect_timeout=_CONNECT_S,
        read_timeout=options.io_timeout,
        retries={"total_max_attempts": 1},
        max_pool_connections=options.connections,
        s3={"addressing_style": "path" if options.endpoint else "auto"},
        # Every shard has its digest; a second checksum of the same bytes only costs time.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    try:
        session = boto3.session.Session(profile_name=options.profile or None)
        return session.client(
            "s3",
            endpoint_url=options.endpoint or None,
            region_name=options.region or session.region_name or "us-east-1",
            verify=options.ca or None,
            config=settings,
        )
    except (_library("botocore.exceptions").BotoCoreError, ValueError) as e:
        raise ConfigError("cache.tiers", f"boto3 refuses the s3:// tier: {e}", "Change the URL or the profile.") from e


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise ConfigError(
            "cache.tiers", f"an s3:// tier needs the Python package boto3 ({e})", "Run: pip install 'pdserve[s3]'"
        ) from e
