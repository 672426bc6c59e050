"""GPU kernels against plain indexing written here, bit for bit, on fresh random data and poisoned outputs.

PDSERVE_KERNELS=nvcc or nvrtc says who compiles them; the report begins with who did.
"""

import numpy as np
import pytest
import torch

from pdserve import kernels
from pdserve.engines.vllm import device_layout
from pdserve.kernels import gpu, rounded, torch_path

GENERATOR = np.random.default_rng()
#: name -> (shape of the logical tensor from its sizes, order in which its dimensions lie in memory, what each dimension is)
LAYOUTS = {
    "packed NHD": (lambda b, t, h, d: (b, h, t, 2 * d), (0, 2, 1, 3), ("block", "head", "token", "content")),
    "packed HND": (lambda b, t, h, d: (b, h, t, 2 * d), (0, 1, 2, 3), ("block", "head", "token", "content")),
    "K and V apart": (
        lambda b, t, h, d: (2, b, t, h, d),
        (0, 1, 2, 3, 4),
        ("part", "block", "token", "head", "content"),
    ),
    "K and V in block": (
        lambda b, t, h, d: (b, 2, t, h, d),
        (0, 1, 3, 2, 4),
        ("block", "part", "token", "head", "content"),
    ),
    "MLA": (lambda b, t, h, d: (b, t, d), (0, 1, 2), ("block", "token", "content")),
}
#: block tokens, heads, head size, dtype, tokens of the chunk
SIZES = [
    (16, 8, 128, torch.bfloat16, 256),
    (16, 8, 128, torch.bfloat16, 77),
    (32, 3, 64, torch.bfloat16, 129),
    (128, 2, 80, torch.float16, 200),
    (64, 1, 576, torch.bfloat16, 65),
    (16, 2, 128, torch.float8_e4m3fn, 31),
    (48, 5, 20, torch.float16, 100),  # only 8 bytes at a time
    (16, 4, 64, torch.float32, 1),
    (256, 1, 64, torch.float32, 16),
]
NUM_BLOCKS, NUM_LAYERS = 60, 5


def random_bytes(*shape):
    return torch.from_numpy(GENERATOR.integers(0, 256, shape, dtype=np.uint8)).cuda()


def make(layout, block_tokens, heads, head_size, dtype):
    """(layers of random KV in that layout, what their dimensions are)."""
    shape_of, order, names = LAYOUTS[layout]
    shape = shape_of(NUM_BLOCKS, block_tokens, heads, head_size)
    layers = []
    for _ in range(NUM_LAYERS):
        physical = [shape[i] for i in order]
        flat = random_bytes(int(np.prod(shape)) * dtype.itemsize).view(dtype)
        layers.append(flat.view(physical).permute([order.index(i) for i in range(len(order))]))
    return layers, {name: i for i, name in enumerate(names)}


def plain_gather(layers, names, blocks, tokens):
    """What the chunk must be, element by element of the definition: [head][layer][token][K then V]."""
    heads = layers[0].shape[names["head"]] if "head" in names else 1
    shards = []
    for h in range(heads):
        for layer in layers:
            t = layer.view(torch.uint8)
            t = t.select(names["head"], h) if "head" in names else t
            left = [n for n in sorted(names, key=names.get) if n != "head"]
            wanted = [n for n in ("block", "token", "part", "content") if n in left]
            t = t.permute([left.index(n) for n in wanted])[blocks]
            shards.append(t.reshape(t.shape[0] * t.shape[1], -1)[:tokens].flatten())
    return torch.stack([torch.cat(shards[h * len(layers) : (h + 1) * len(layers)]) for h in range(heads)])


def case(layout, block_tokens, heads, head_size, dtype):
    if layout == "MLA":
        heads = 1
    layers, names = make(layout, block_tokens, heads, head_size, dtype)
    content = layers[0].shape[names["content"]] * (2 if "part" in names else 1) * dtype.itemsize

    class Spec:
        block_size, real_page_size_bytes = block_tokens, block_tokens * heads * content

    geometry, split = device_layout.geometry_of(layers, names, Spec, NUM_BLOCKS, heads)
    assert split == 1
    return layers, names, geometry


@pytest.fixture(scope="module")
def arch(pytestconfig):
    name = device_layout.arch_of(0)
    how = gpu.library(name).how
    with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"{name}: {how}", flush=True)
    return name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gather_and_scatter_equal_plain_indexing(layout, size, arch):
    *shape, tokens = size
    layers, names, geometry = case(layout, *shape)
    count = -(-tokens // geometry.block_tokens)
    blocks = GENERATOR.permutation(NUM_BLOCKS)[:count].tolist()
    shard = geometry.shard_bytes(tokens)
    stride = -(-shard // 4096) * 4096
    want = plain_gather(layers, names, blocks, tokens)
    device = gpu.Gpu(arch, 0, geometry, geometry.heads * stride)
    chunk = random_bytes(geometry.heads, stride)
    poison = chunk.clone()
    digests = device.move(gpu.SAVE, blocks, tokens, stride, chunk.data_ptr(), grid=int(GENERATOR.integers(1, 300)))
    assert torch.equal(chunk[:, :shard], want)
    assert torch.equal(chunk[:, shard:], poison[:, shard:])
    assert digests == [kernels.digest(want[h].cpu().numpy()) for h in range(geometry.heads)]
    assert digests == [torch_path.digest(want[h]) for h in range(geometry.heads)]

    # Back, into other blocks, some of them left out; everything else must stay as it was.
    views = [device_layout.view_of(t, names) for t in layers]
    expected = [v.clone() for v in views]
    targets = [int(b) if GENERATOR.random() < 0.7 else None for b in GENERATOR.permutation(NUM_BLOCKS)[:count]]
    fresh = random_bytes(geometry.heads, stride)
    torch_path.scatter(fresh[:, :shard].reshape(geometry.heads, NUM_LAYERS, tokens, -1), expected, targets)
    digests = device.move(gpu.LOAD, targets, tokens, stride, fresh.data_ptr(), grid=int(GENERATOR.integers(1, 300)))
    for got, wanted in zip(views, expected, strict=True):
        assert torch.equal(got, wanted)
    assert digests == [torch_path.digest(fresh[h, :shard].clone()) for h in range(geometry.heads)]
    device.close()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_plain_torch_path_is_the_definition(layout):
    layers, names, _ = case(layout, 16, 3, 64, torch.bfloat16)
    blocks = [7, 3, 11]
    views = [device_layout.view_of(t, names) for t in layers]
    got = torch_path.gather(views, blocks, 40)
    assert torch.equal(got.flatten(1), plain_gather(layers, names, blocks, 40))


@pytest.mark.parametrize("piece", [0, 100_000, 1 << 20])
def test_many_chunks_through_the_lanes_with_marks(arch, piece):
    """More chunks than staging buffers, both directions at once, after work on another stream that they must wait for."""
    layers, names, geometry = case("packed NHD", 16, 8, 128, torch.bfloat16)
    tokens, chunks = 48, 40
    stride = -(-geometry.shard_bytes(tokens) // 4096) * 4096
    device = gpu.Gpu(arch, 0, geometry, geometry.heads * stride)
    arena = np.zeros(chunks * geometry.heads * stride, np.uint8)
    device.register(arena.ctypes.data, arena.nbytes)
    stream = torch.cuda.Stream()
    new = [torch.randn_like(layer) for layer in layers]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for layer, values in zip(layers, new, strict=True):
            layer.copy_(values)
        mark = device.mark(stream.cuda_stream)
    plan = [GENERATOR.permutation(NUM_BLOCKS)[:3].tolist() for _ in range(chunks)]
    size = geometry.heads * stride
    tickets = device.submit(
        gpu.SAVE, mark, [(p, tokens, stride, arena.ctypes.data + i * size) for i, p in enumerate(plan)], piece
    )
    device.settle()
    device.wait(gpu.SAVE, tickets[-1])
    assert device.done(gpu.SAVE) == chunks
    shard = geometry.shard_bytes(tokens)
    for i, p in enumerate(plan):
        want = plain_gather(new, names, p, tokens).cpu().numpy()
        rows = arena[i * size : (i + 1) * size].reshape(geometry.heads, stride)
        assert (rows[:, :shard] == want).all()
        assert device.digests(gpu.SAVE, tickets[i], tokens) == [kernels.digest(r) for r in want]
    for layer in layers:
        layer.zero_()
    torch.cuda.synchronize()
    spread = GENERATOR.permutation(NUM_BLOCKS)[:3].tolist()
    for i in range(chunks):
        ticket = device.load(None, spread, tokens, stride, arena.ctypes.data + i * size, share=100 - 40 * (i % 2))
    device.wait(gpu.LOAD, ticket)
    assert torch.equal(plain_gather(layers, names, spread, tokens), plain_gather(new, names, plan[-1], tokens))
    device.unregister(arena.ctypes.data)
    device.close()


def test_a_flipped_bit_in_the_arena_changes_the_digest(arch):
    _, _, geometry = case("packed NHD", 16, 2, 128, torch.bfloat16)
    stride = 4096 * 10
    tokens = 16
    device = gpu.Gpu(arch, 0, geometry, 2 * stride)
    arena = GENERATOR.integers(0, 256, 2 * stride, dtype=np.uint8)
    first = device.digests(gpu.LOAD, device.load(None, [1], tokens, stride, arena.ctypes.data), tokens)
    device.wait(gpu.LOAD, 0)
    first = device.digests(gpu.LOAD, 0, tokens)
    for _ in range(50):
        shard, at = int(GENERATOR.integers(2)), int(GENERATOR.integers(geometry.shard_bytes(tokens)))
        arena[shard * stride + at] ^= 1 << int(GENERATOR.integers(8))
        ticket = device.load(None, [1], tokens, stride, arena.ctypes.data)
        device.wait(gpu.LOAD, ticket)
        got = device.digests(gpu.LOAD, ticket, tokens)
        assert got[shard] != first[shard]
        assert got[1 - shard] == first[1 - shard]
        first = got
    device.close()


def test_what_would_read_or_write_elsewhere_is_refused(arch):
    _, _, geometry = case("packed NHD", 16, 2, 128, torch.bfloat16)
    device = gpu.Gpu(arch, 0, geometry, 2 * 40960)
    arena = np.zeros(2 * 40960, np.uint8)
    for blocks, tokens, stride in (([NUM_BLOCKS], 16, 40960), ([-2], 16, 40960)):
        with pytest.raises(ValueError, match="blocks"):
            device.save(None, blocks, tokens, stride, arena.ctypes.data)
    for blocks, tokens, stride in (([1], 17, 40960), ([1], 16, 4096), ([1], 16, 81920), ([None], 16, 40960)):
        with pytest.raises(gpu.GpuError):
            device.save(None, blocks, tokens, stride, arena.ctypes.data)
    device.close()


@pytest.mark.parametrize("payload", rounded.PAYLOADS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("heads", "head_size", "dtype", "tokens"),
    [(8, 128, torch.bfloat16, 256), (3, 80, torch.float16, 45), (2, 64, torch.float32, 45)],
    ids=str,
)
def test_rounded_payloads_equal_plain_torch(layout, heads, head_size, dtype, tokens, payload, arch):
    layers, names, geometry = case(layout, 16, heads, head_size, dtype)
    name = str(dtype).removeprefix("torch.")
    geometry = device_layout.rounded(geometry, payload, name)
    count, shard = -(-tokens // 16), geometry.shard_bytes(tokens)
    blocks = GENERATOR.permutation(NUM_BLOCKS)[:count].tolist()
    stride = -(-shard // 4096) * 4096
    views = [device_layout.view_of(t, names) for t in layers]
    want = torch_path.shrink(torch_path.gather(views, blocks, tokens), payload, name).flatten(1)
    device = gpu.Gpu(arch, 0, geometry, geometry.heads * stride)
    chunk = random_bytes(geometry.heads, stride)
    poison = chunk.clone()
    digests = device.move(gpu.SAVE, blocks, tokens, stride, chunk.data_ptr(), grid=int(GENERATOR.integers(1, 300)))
    assert torch.equal(chunk[:, :shard], want)
    assert torch.equal(chunk[:, shard:], poison[:, shard:])
    assert digests == [torch_path.digest(w) for w in want]

    expected = [v.clone() for v in views]
    targets = [int(b) if GENERATOR.random() < 0.7 else None for b in GENERATOR.permutation(NUM_BLOCKS)[:count]]
    source = want.view(geometry.heads, NUM_LAYERS, tokens, -1)
    torch_path.scatter(torch_path.grow(source, payload, name), expected, targets)
    assert device.move(gpu.LOAD, targets, tokens, stride, chunk.data_ptr()) == digests
    for got, wanted in zip(views, expected, strict=True):
        assert torch.equal(got, wanted)
    device.close()
