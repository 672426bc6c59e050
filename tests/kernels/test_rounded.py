"""The rounded payloads: compiled code, plain numpy and torch's own types agree bit for bit, and what it loses is bounded."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve import kernels
from pdserve.kernels import reference, rounded

torch = pytest.importorskip("torch", reason="the oracle is torch's float8 type")

rng = np.random.default_rng()
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
PAYLOADS = pytest.mark.parametrize("payload", rounded.PAYLOADS)
VALUES = [8, 64, 128, 160, 256, 1152]  # of a row; 160 = 5 * 32 has four groups


def raw_rows(rows, values, dtype, kind):
    """Rows of a cache as bytes: any bits at all (with NaN and infinities), or numbers like real KV, with outliers."""
    if kind == "bits":
        return rng.integers(0, 256, (rows, values * rounded.value_bytes(dtype)), dtype=np.uint8)
    x = torch.from_numpy(rng.standard_normal((rows, values)) * rng.choice([1e-6, 0.01, 1, 50], (rows, 1)))
    x[torch.rand(rows, values) < 0.02] *= 100
    return x.clamp(-60000, 60000).to(DTYPES[dtype]).view(torch.uint8).numpy()


def oracle(raw, payload, dtype):
    """The definition in torch: (stored rows, the values that they stand for)."""
    x = torch.from_numpy(raw.copy()).view(DTYPES[dtype]).float()
    rows, values = x.shape
    count = rounded.groups(values)
    grouped = x.view(rows, count, -1)
    largest = torch.where(grouped.isfinite(), grouped.abs(), 0).amax(2)
    # The smallest power of two that makes the largest value fit.
    most = 448 if payload == "fp8" else 127
    exponent = torch.where(largest > 0, torch.ceil(torch.log2(largest.double() / most)), -117.0).clamp(-117, 127).int()
    scaled = torch.ldexp(grouped, -exponent[:, :, None])
    # Versions of torch and devices differ in what they make of infinity and of the sign of NaN.
    if payload == "fp8":
        codes = torch.where(scaled.isfinite(), scaled, torch.nan).to(torch.float8_e4m3fn)
        values_of = codes.float()
    else:
        codes = torch.where(scaled.isfinite(), scaled.round(), -128).to(torch.int8)
        values_of = torch.where(codes == -128, torch.nan, codes.float())
    back = torch.ldexp(values_of, exponent[:, :, None]).view(rows, values)
    if dtype == "float16":
        back = torch.where(back.isfinite(), back.clamp(-65504, 65504), back)
    stored = torch.zeros(rows, 8 + values, dtype=torch.uint8)
    stored[:, :count] = (exponent + 127).to(torch.uint8)
    stored[:, 8:] = codes.view(torch.uint8).view(rows, values)
    return stored.numpy(), back.to(DTYPES[dtype])


@PAYLOADS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("kind", ["bits", "numbers"])
def test_numpy_is_the_definition_in_torch(payload, dtype, values, kind):
    raw = raw_rows(40, values, dtype, kind)
    want, back = oracle(raw, payload, dtype)
    got = rounded.shrink(raw, payload, dtype)
    assert (got == want).all()
    grown = torch.from_numpy(rounded.grow(got, payload, dtype)).view(DTYPES[dtype])
    assert torch.equal(grown.nan_to_num(7), back.nan_to_num(7))
    assert torch.equal(grown.isnan(), back.isnan())


@given(
    st.integers(1, 6), st.integers(1, 40), st.sampled_from(VALUES), st.sampled_from(sorted(DTYPES)),
    st.sampled_from(["bits", "numbers"]), st.integers(0, 7), st.sampled_from(rounded.PAYLOADS),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_compiled_code_is_the_numpy_path_bit_for_bit(count, rows, values, dtype, kind, shift, payload):
    assert kernels.path() == ("native", "")
    piece = rows * values * rounded.value_bytes(dtype)
    pool = np.zeros(shift + 2 * count * piece, np.uint8)  # blocks need not be aligned
    pool[shift:] = raw_rows(2 * count * rows, values, dtype, kind).reshape(-1)
    order = rng.permutation(2 * count)[:count]
    addresses = (pool.ctypes.data + shift + order * piece).astype(np.uint64)
    size = count * rows * rounded.row_bytes(values)
    got, want = np.full(size + 64, 0xAB, np.uint8), np.full(size + 64, 0xAB, np.uint8)
    d = kernels.gather_rounded(addresses, rows, values, payload, dtype, got)
    assert d == reference.gather_rounded(addresses, rows, values, payload, dtype, want) == kernels.digest(got[:size])
    assert (got == want).all()

    targets = [np.full(pool.size, 0xCD, np.uint8) for _ in range(2)]
    skipped = rng.random(count) < 0.3
    for target, scatter in zip(targets, (kernels.scatter_rounded, reference.scatter_rounded), strict=True):
        back = (target.ctypes.data + shift + order * piece).astype(np.uint64)
        back[skipped] = 0
        assert scatter(got, back, rows, values, payload, dtype) == d
    assert (targets[0] == targets[1]).all()
    for i in order[skipped]:
        assert (targets[0][shift + i * piece : shift + (i + 1) * piece] == 0xCD).all()


@PAYLOADS
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_came_out_stays_as_it_is_when_stored_again(payload, dtype):
    once = rounded.grow(rounded.shrink(raw_rows(200, 256, dtype, "numbers"), payload, dtype), payload, dtype)
    again = rounded.grow(rounded.shrink(once, payload, dtype), payload, dtype)
    assert (again == once).all()


@PAYLOADS
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_value_is_off_by_more_than_half_a_step(payload, dtype):
    raw = raw_rows(300, 256, dtype, "numbers")
    x = torch.from_numpy(raw.copy()).view(DTYPES[dtype]).double()
    stored = rounded.shrink(raw, payload, dtype)
    y = torch.from_numpy(rounded.grow(stored, payload, dtype)).view(DTYPES[dtype]).double()
    scale = torch.exp2(torch.from_numpy(stored[:, :8].astype(np.float64)) - 127).repeat_interleave(32, 1)
    # fp8: a sixteenth of the value, or half of its smallest number; int8: half of one.
    half = torch.maximum(x.abs() / 16, scale / 1024) if payload == "fp8" else scale / 2
    assert ((x - y).abs() <= half).all()


@pytest.mark.parametrize("values", [0, 12, 4104])
def test_rows_that_do_not_fit_are_refused_before_memory_is_touched(values):
    with pytest.raises(ValueError, match=r"multiple of 8|must be"):
        kernels.gather_rounded(np.zeros(1, np.uint64), 1, values, "int8", "bfloat16", np.zeros(8192, np.uint8))
