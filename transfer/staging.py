"""Engine blocks <-> arena, through the kernels: what all ways have in common, and those for KV on a device.

A worker's pages hold `shard_count` shards of every chunk, from `first_shard` on. `store` and `load` submit one chunk and give
back a Copy; on a device several are under way at once. Stores belong to one thread and loads to one other; `mark` and
`settle` may come from any. A mark is a point in the engine's own work that a copy must not overtake.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pdserve import kernels
from pdserve.kernels import build, gpu, rounded
from pdserve.kernels.paged import Geometry
from pdserve.transfer.allocator import align
from pdserve.transfer.arena import Arena

if TYPE_CHECKING:
    import torch


def stride_of(shard_bytes: int) -> int:
    """From one shard of a chunk to the next in the arena."""
    return align(shard_bytes)


#: blocks, tokens, bytes of the arena, from one shard to the next
Part = tuple[Sequence[int | None], int, np.ndarray, int]


class Copy(Protocol):
    def done(self) -> bool:
        """Whether it has ended. Never waits."""

    def digests(self) -> list[int]:
        """Waits for the end; one digest per shard, of the bytes that are in the arena (store) or were read from it (load)."""


class Pages(Protocol):
    layers: int
    num_blocks: int
    first_shard: int
    shard_count: int
    #: False on a worker whose shards another worker stores
    stores: bool
    #: how many chunks are best submitted together
    together: int
    #: attach() must be called before the engine captures graphs: no other thread may allocate then
    on_device: bool

    def describe(self) -> str: ...

    def shard_bytes(self, tokens: int, blocks: int) -> int:
        """Bytes of one shard of a chunk of `tokens` tokens, in `blocks` of the engine's blocks."""

    def attach(self, arena: Arena, chunk_tokens: int) -> None:
        """Prepares for copies to and from this arena; cheap when it is the same one as before."""

    def mark(self) -> Any:
        """What the engine has submitted so far. Called on the engine's thread."""

    def store(self, mark: Any, block_ids: Sequence[int], tokens: int, to: np.ndarray, stride: int) -> Copy:
        """Blocks -> `to` (uint8, shard_count * stride bytes of the arena)."""

    def load(self, mark: Any, source: np.ndarray, block_ids: Sequence[int | None], tokens: int, stride: int) -> Copy:
        """`source` -> blocks; None leaves that block alone."""

    def store_all(self, mark: Any, parts: Sequence[Part], piece: int = 0) -> list[Copy]:
        """store() of several chunks, at most `together` of them. `piece`: the engine's own copies to the host are let in after so many
        bytes; 0: after a chunk. (Those to the device never wait.)"""

    def load_all(self, mark: Any, parts: Sequence[Part], share: int = 100) -> list[Copy]:
        """load() of several, at most `together` of them. `share`: percent of the way to the device that they may take."""

    def settle(self) -> None:
        """When it returns, no submitted store reads blocks any more."""

    def close(self) -> None: ...


class OneByOne:
    """store_all and load_all for pages that copy one chunk at a time."""

    together = 1

    def store_all(self: Any, mark: Any, parts: Sequence[Part], piece: int = 0) -> list[Copy]:
        return [self.store(mark, ids, tokens, area, stride) for ids, tokens, area, stride in parts]

    def load_all(self: Any, mark: Any, parts: Sequence[Part], share: int = 100) -> list[Copy]:
        return [self.load(mark, area, ids, tokens, stride) for ids, tokens, area, stride in parts]


class Done:
    """A copy that had ended when it was returned."""

    def __init__(self, digests: list[int]) -> None:
        self._digests = digests

    def done(self) -> bool:
        return True

    def digests(self) -> list[int]:
        return self._digests


class _Ticket:
    def __init__(self, device: gpu.Gpu, lane: int, ticket: int, tokens: int) -> None:
        self._gpu, self._lane, self._ticket, self._tokens = device, lane, ticket, tokens
        self._digests: list[int] | None = None

    def done(self) -> bool:
        return self._digests is not None or self._gpu.done(self._lane) > self._ticket

    def digests(self) -> list[int]:
        if self._digests is None:
            self._gpu.wait(self._lane, self._ticket)
            self._digests = self._gpu.digests(self._lane, self._ticket, self._tokens)
        return self._digests


class Pinned:
    """Arenas that a process has pinned for its device, each once, whoever of several pages uses it."""

    def __init__(self) -> None:
        self._users: dict[int, int] = {}  # by address
        self._lock = threading.Lock()

    def pin(self, device: gpu.Gpu, arena: Arena) -> None:
        address = arena.bytes.ctypes.data
        with self._lock:
            if address not in self._users:
                device.register(address, arena.size)
            self._users[address] = self._users.get(address, 0) + 1

    def unpin(self, device: gpu.Gpu, arena: Arena) -> None:
        address = arena.bytes.ctypes.data
        with self._lock:
            self._users[address] -= 1
            if not self._users[address]:
                del self._users[address]
                device.unregister(address)


class DevicePages:
    """KV on a GPU, in canonical chunks, through the compiled kernels and staging buffers on the device.

    `split`: the engine's blocks are each that many blocks of the geometry. `current_stream` gives the handle of the stream on
    which the engine submits. `pinned` is shared by pages of one process. Raises build.BuildError when there is no compiler.
    """

    on_device = True
    together = 8

    def __init__(
        self,
        geometry: Geometry,
        *,
        arch: str,
        device: int,
        first_shard: int,
        stores: bool,
        current_stream: Callable[[], int],
        split: int = 1,
        pinned: Pinned | None = None,
    ) -> None:
        geometry.check()
        self._how = gpu.library(arch).how
        self._geometry, self._arch, self._device, self._split = geometry, arch, device, split
        self.layers, self.num_blocks = geometry.layers, geometry.num_blocks // split
        self.first_shard, self.shard_count, self.stores = first_shard, geometry.heads, stores
        self._current_stream, self._pinned = current_stream, pinned or Pinned()
        self._gpu: gpu.Gpu | None = None
        self._staging_bytes = 0
        self._arena: Arena | None = None
        self._lock = threading.Lock()

    def describe(self) -> str:
        g = self._geometry
        blocks = f"{g.num_blocks} blocks of {g.block_tokens} tokens"
        stored = f", stored as {g.payload}" if g.payload else ""
        return f"{self._arch}, {self._how}; {g.layers} layers, {blocks}, {g.heads} heads of {g.token_bytes} bytes a token{stored}"

    def shard_bytes(self, tokens: int, blocks: int = 0) -> int:
        return self._geometry.shard_bytes(tokens)

    def attach(self, arena: Arena, chunk_tokens: int) -> None:
        with self._lock:
            if arena is self._arena:
                return
            need = self.shard_count * align(self.shard_bytes(chunk_tokens))
            if self._gpu is None:
                self._gpu = gpu.Gpu(self._arch, self._device, self._geometry, need)
                self._staging_bytes = need
            elif need > self._staging_bytes:
                raise gpu.GpuError("the cache daemon came back with larger chunks; restart the engine")
            if self._arena is not None:
                self._pinned.unpin(self._gpu, self._arena)
                self._arena = None
            self._pinned.pin(self._gpu, arena)
            self._arena = arena  # kept: what is registered must stay mapped

    def mark(self) -> gpu.Mark | None:
        return self._gpu.mark(self._current_stream()) if self._gpu else None

    def store(self, mark: Any, block_ids: Sequence[int], tokens: int, to: np.ndarray, stride: int) -> Copy:
        device = self._ready(to, stride)
        ids = self._expand(block_ids, tokens)
        ticket = device.save(mark, ids, tokens, stride, to.ctypes.data)
        return _Ticket(device, gpu.SAVE, ticket, tokens)

    def load(self, mark: Any, source: np.ndarray, block_ids: Sequence[int | None], tokens: int, stride: int) -> Copy:
        device = self._ready(source, stride)
        ids = self._expand(block_ids, tokens)
        return _Ticket(device, gpu.LOAD, device.load(mark, ids, tokens, stride, source.ctypes.data), tokens)

    def store_all(self, mark: Any, parts: Sequence[Part], piece: int = 0) -> list[Copy]:
        return self._all(gpu.SAVE, mark, parts, piece=piece)

    def load_all(self, mark: Any, parts: Sequence[Part], share: int = 100) -> list[Copy]:
        return self._all(gpu.LOAD, mark, parts, share=share)

    def _all(self, lane: int, mark: Any, parts: Sequence[Part], piece: int = 0, share: int = 100) -> list[Copy]:
        device: gpu.Gpu | None = None
        chunks = []
        for ids, tokens, area, stride in parts:
            device = self._ready(area, stride)
            chunks.append((self._expand(ids, tokens), tokens, stride, area.ctypes.data))
        if device is None:
            return []
        tickets = device.submit(lane, mark, chunks, piece, share)
        return [_Ticket(device, lane, t, c[1]) for t, c in zip(tickets, chunks, strict=False)]

    def _ready(self, area: np.ndarray, stride: int) -> gpu.Gpu:
        if self._gpu is None:
            raise gpu.GpuError("no arena is attached")
        if area.size < self.shard_count * stride:
            raise ValueError(f"{area.size} bytes of arena for {self.shard_count} shards of {stride}")
        return self._gpu

    def _expand(self, block_ids: Sequence[Any], tokens: int) -> list[Any]:
        """The engine's blocks as blocks of the geometry, as many as the tokens need."""
        if self._split > 1:
            block_ids = [None if b is None else b * self._split + i for b in block_ids for i in range(self._split)]
        return list(block_ids[: -(-tokens // self._geometry.block_tokens)])

    def settle(self) -> None:
        if self._gpu:
            self._gpu.settle()

    def close(self) -> None:
        """The threads that submit must have stopped."""
        with self._lock:
            if self._gpu and self._arena is not None:
                self._gpu.settle()
                self._pinned.unpin(self._gpu, self._arena)
            if self._gpu:
                self._gpu.close()
            self._gpu = self._arena = None


class TorchPages(OneByOne):
    """The same where no compiler is: plain torch operations, one chunk at a time. Several times slower.

    layers: per layer a uint8 view [block, token, head, K or V, bytes]; rounding: (payload, type of the values).
    """

    on_device = True

    def __init__(
        self,
        layers: Sequence[torch.Tensor],
        *,
        first_shard: int,
        stores: bool,
        split: int = 1,
        why: str = "",
        rounding: tuple[str, str] | None = None,
    ) -> None:
        self._views, self._split, self._why, self._rounding = list(layers), split, why, rounding
        self.layers, self.num_blocks = len(self._views), self._views[0].shape[0] // split
        self.first_shard, self.shard_count, self.stores = first_shard, self._views[0].shape[2], stores

    def describe(self) -> str:
        return f"torch ({self._why}); {self.layers} layers, {self.num_blocks} blocks"

    def shard_bytes(self, tokens: int, blocks: int = 0) -> int:
        token_bytes = int(self._views[0].shape[3] * self._views[0].shape[4])
        if self._rounding:
            token_bytes = rounded.row_bytes(token_bytes // rounded.value_bytes(self._rounding[1]))
        return self.layers * tokens * token_bytes

    def attach(self, arena: Arena, chunk_tokens: int) -> None:
        pass

    def mark(self) -> Any:
        import torch

        if self._views[0].device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def store(self, mark: Any, block_ids: Sequence[int], tokens: int, to: np.ndarray, stride: int) -> Copy:
        import torch

        from pdserve.kernels import torch_path

        if mark is not None:
            mark.synchronize()
        chunk = torch_path.gather(self._views, self._expand(block_ids, tokens), tokens)
        if self._rounding:
            chunk = torch_path.shrink(chunk, *self._rounding)
        size = self.shard_bytes(tokens)
        for i in range(self.shard_count):
            torch.from_numpy(to[i * stride : i * stride + size]).copy_(chunk[i].reshape(-1))
        # Over what has arrived in the arena.
        return Done([kernels.digest(to[i * stride : i * stride + size]) for i in range(self.shard_count)])

    def load(self, mark: Any, source: np.ndarray, block_ids: Sequence[int | None], tokens: int, stride: int) -> Copy:
        import torch

        from pdserve.kernels import torch_path

        size = self.shard_bytes(tokens)
        # A copy of its own: what is digested is what is scattered, whatever happens to the arena meanwhile.
        shards = [source[i * stride : i * stride + size].copy() for i in range(self.shard_count)]
        digests = [kernels.digest(s) for s in shards]
        chunk = torch.from_numpy(np.stack(shards)).to(self._views[0].device)
        if mark is not None:
            mark.synchronize()
        chunk = chunk.view(self.shard_count, self.layers, tokens, -1)
        if self._rounding:
            chunk = torch_path.grow(chunk, *self._rounding)
        torch_path.scatter(chunk, self._views, self._expand(block_ids, tokens))
        if chunk.device.type == "cuda":
            torch.cuda.current_stream(chunk.device).synchronize()
        return Done(digests)

    def _expand(self, block_ids: Sequence[Any], tokens: int) -> list[Any]:
        if self._split > 1:
            block_ids = [None if b is None else b * self._split + i for b in block_ids for i in range(self._split)]
        return list(block_ids[: -(-tokens // self._views[0].shape[1])])

    def settle(self) -> None:
        pass  # a store has ended when store() returns

    def close(self) -> None:
        pass


def pages_on_device(
    geometry: Geometry, views: Callable[[], Sequence[torch.Tensor]], arch: str, device: int, **options: Any
) -> Pages:
    """The compiled path where there is a compiler, plain torch where not."""
    current_stream, pinned = options.pop("current_stream"), options.pop("pinned", None)
    try:
        return DevicePages(geometry, arch=arch, device=device, current_stream=current_stream, pinned=pinned, **options)
    except build.BuildError as e:
        rounding = (geometry.payload, geometry.dtype) if geometry.payload else None
        return TorchPages(views(), why=str(e), rounding=rounding, **options)
