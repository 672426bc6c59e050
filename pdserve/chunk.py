"""What a chunk is called and what it looks like: keys (a hash chain over tokens) and layouts. Pure; no I/O.

A prompt is cut into chunks of `chunk_tokens` tokens; what remains is the tail, a chunk with fewer tokens. The key of a
chunk stands for the whole prefix up to its end, so equal keys mean: same model, same layout, same tokens from the start.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Sequence

import msgspec
from blake3 import blake3

FORMAT_VERSION = 1
KEY_BYTES = 32
OPAQUE, CANONICAL = "opaque-block", "canonical"
#: what a chunk's bytes are: those of the engine's cache, or fewer (kernels/csrc/rounded.h)
AS_IS, FP8, INT8 = "", "fp8", "int8"
ROUNDED_VALUE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}

#: (identifier of the image or audio, its first token, how many tokens it covers)
MediaSpan = tuple[str, int, int]


class ChunkLayout(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a chunk's bytes are arranged. Two engines share chunks only if every field is equal.

    Both have one shard per KV head of the whole model, so that engines of any tensor parallel size share them. With several
    layer groups each of these is cut again, into equal runs of layers: [group][head]. A pipeline stage then has whole shards,
    and engines of any pipeline parallel size share chunks whose groups are at least as fine as their stages.
    `opaque-block`: whole blocks of a head, in the engine's own packing: [shard][layer][block]. The inside of a block is not
    interpreted (CPU vLLM packs K and V for its matrix unit), so block size and instruction set are part of it.
    `canonical`: [shard][layer][token][K then V]: the same bytes whatever block size the engine has, so `block_tokens` is only
    this engine's and not part of the identity.
    """

    kind: str
    kv_dtype: str
    layers: int
    block_tokens: int
    #: bytes of one block of one layer on one shard
    block_bytes: int
    #: KV heads of the model x layer groups
    shards: int
    #: what else must match for the bytes to mean the same: instruction set, backend
    detail: str = ""
    #: AS_IS, FP8 or INT8
    payload: str = AS_IS
    #: `layers` is a multiple of it
    layer_groups: int = 1

    def stored_as(self, payload: str) -> ChunkLayout:
        return msgspec.structs.replace(self, payload=payload)

    def grouped(self, layer_groups: int) -> ChunkLayout:
        """The same in so many groups of layers."""
        return msgspec.structs.replace(self, shards=self.heads * layer_groups, layer_groups=layer_groups)

    @property
    def heads(self) -> int:
        return self.shards // self.layer_groups

    @property
    def row_values(self) -> int:
        """Values of one token of one head (in an opaque block: as many): a row of a rounded payload."""
        return self.block_bytes // self.block_tokens // ROUNDED_VALUE_BYTES[self.kv_dtype]

    def shard_bytes(self, tokens: int) -> int:
        """Bytes of one shard of a chunk of `tokens` tokens."""
        token_bytes = 8 + self.row_values if self.payload else self.block_bytes // self.block_tokens
        if self.kind == OPAQUE:
            tokens = -(-tokens // self.block_tokens) * self.block_tokens
        return tokens * (self.layers // self.layer_groups) * token_bytes

    def identity(self) -> bytes:
        if self.kind == CANONICAL:
            token_bytes = self.block_bytes // self.block_tokens
            return msgspec.msgpack.encode(msgspec.structs.replace(self, block_tokens=1, block_bytes=token_bytes))
        return msgspec.msgpack.encode(self)


def root_key(model_fingerprint: str, layout: ChunkLayout, lora: str = "", cache_salt: str = "") -> bytes:
    """The start of every chain: what must be equal before any token is looked at."""
    h = blake3(b"pdserve chunk %d\0" % FORMAT_VERSION)
    for part in (model_fingerprint.encode(), layout.identity(), lora.encode(), cache_salt.encode()):
        h.update(len(part).to_bytes(8, "little"))
        h.update(part)
    return h.digest()


def tenant_tag(cache_salt: str) -> bytes:
    """Stands for a salt where the salt itself must not be known: what is stored of one tenant can be found by it."""
    return blake3(b"pdserve tenant\0" + cache_salt.encode()).digest(length=16) if cache_salt else b""


class KeyChain:
    """Keys of one token sequence, computed once and extended as the sequence grows.

    `media` are spans of tokens that stand for an image or audio: their token ids say nothing of the content, so the
    identifier (a hash of the content) goes into the key of each chunk that they touch.
    """

    def __init__(self, root: bytes, chunk_tokens: int, media: Iterable[MediaSpan] = ()) -> None:
        if chunk_tokens < 1:
            raise ValueError(f"chunk_tokens must be positive, got {chunk_tokens}")
        self._root = root
        self._chunk_tokens = chunk_tokens
        self._media = sorted(media, key=lambda m: m[1])
        self._keys: list[bytes] = []
        self._tail = (0, b"")  # how many tokens the last tail ended, and its key

    @property
    def chunk_tokens(self) -> int:
        return self._chunk_tokens

    @property
    def media(self) -> list[MediaSpan]:
        return self._media

    def full(self, tokens: Sequence[int]) -> list[bytes]:
        """Keys of all full chunks of `tokens`. The sequence may only have grown since the last call."""
        count = len(tokens) // self._chunk_tokens
        done = len(self._keys)
        if count > done:
            size = self._chunk_tokens
            fresh = _words(tokens[done * size : count * size])
            parent = self._keys[-1] if self._keys else self._root
            for i in range(done, count):
                start = (i - done) * 4 * size
                parent = self._link(parent, fresh[start : start + 4 * size], i * size)
                self._keys.append(parent)
        return self._keys[:count]

    def tail(self, tokens: Sequence[int]) -> bytes | None:
        """Key of the remainder after the full chunks; None when there is none."""
        length = len(tokens)
        start = length - length % self._chunk_tokens
        if start == length:
            return None
        if self._tail[0] != length:
            keys = self.full(tokens)
            self._tail = (length, self._link(keys[-1] if keys else self._root, _words(tokens[start:]), start))
        return self._tail[1]

    def _link(self, parent: bytes, tokens: bytes, start: int) -> bytes:
        count = len(tokens) // 4
        # The token count is hashed with the tokens, so a tail never equals a full chunk or a longer tail.
        h = blake3(parent + count.to_bytes(4, "little") + tokens)
        for identifier, first, length in self._media:
            if first < start + count and first + length > start:
                h.update(msgspec.msgpack.encode((identifier, first - start)))
        return h.digest()


def _words(tokens: Sequence[int]) -> bytes:
    """Four bytes a token. (numpy takes four times as long to read a list.)"""
    words = array("I", tokens)
    if sys.byteorder == "big":
        words.byteswap()
    return words.tobytes()
