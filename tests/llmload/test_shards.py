"""Codecs within their error bounds, the wire format to the byte, and hostile bytes."""

from __future__ import annotations

import math
import zlib

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from llmload.learn.codecs import Codec, decode_values_untrusted
from llmload.learn.shards import (
    EXPONENT_MAX,
    EXPONENT_MIN,
    MAGNITUDE_MAX,
    SHARD_VALUE_COUNT_MAX,
    ParameterSpace,
    ShardHeader,
    ShardLayout,
    decode_shard_untrusted,
    encode_shard,
)
from natswarm.errors import DecodeError
from natswarm.message import decode_message_untrusted, encode_message

# 700 values: two full shards of 300, and a rest of 100 that ends within a block.
SPACE = ParameterSpace.of({"b": (20, 30), "a": (100,)})
LAYOUT = ShardLayout(SPACE, 300)

codecs = st.sampled_from(list(Codec))
values_300 = hnp.arrays(
    np.float32,
    300,
    elements=st.floats(-(2.0**96), 2.0**96, width=32, allow_subnormal=True),
)


def encode(values, codec, shard=0, layout=LAYOUT):
    return encode_shard(layout, shard, values, codec=codec, version=7)


def decode(encoded, layout=LAYOUT):
    return decode_shard_untrusted(layout, encoded.header, encoded.payload)


# --- The parameter space and its layout --------------------------------------------------------


def test_parameters_lie_in_the_order_of_their_names():
    parameters = {"b": np.arange(600.0).reshape(20, 30), "a": -np.arange(100.0)}
    flat = SPACE.flatten(parameters)
    assert SPACE.size == 700
    assert flat.dtype == np.float32
    assert np.array_equal(flat[:100], parameters["a"])
    assert np.array_equal(flat[100:], parameters["b"].reshape(-1))
    assert ParameterSpace.of({"a": [100], "b": [20, 30]}) == SPACE


def test_views_write_through():
    flat = np.zeros(700, dtype=np.float32)
    SPACE.views(flat)["b"][0, 1] = 5
    assert flat[101] == 5
    with pytest.raises(ValueError, match="expected"):
        SPACE.views(flat[1:])


@pytest.mark.parametrize(
    "parameters",
    [
        {"a": np.zeros(100)},
        {"a": np.zeros(100), "b": np.zeros((30, 20))},
        {"a": np.zeros(100), "b": np.zeros((20, 30)), "c": np.zeros(1)},
    ],
)
def test_other_parameters_are_refused(parameters):
    with pytest.raises(ValueError, match="do not fit"):
        SPACE.flatten(parameters)


def test_shards_cover_the_vector_once():
    assert LAYOUT.shard_count == 3
    assert [LAYOUT.bounds(shard) for shard in range(3)] == [
        slice(0, 300),
        slice(300, 600),
        slice(600, 700),
    ]
    assert [LAYOUT.value_count(shard) for shard in range(3)] == [300, 300, 100]
    for shard in (-1, 3):
        with pytest.raises(ValueError, match=r"not in 0\.\.2"):
            LAYOUT.bounds(shard)


def test_the_hash_tells_models_and_layouts_apart():
    # Pinned: peers of different versions compare it.
    assert LAYOUT.hash.hex() == "ec793966f65d35f0666d5305bf024e7d"
    others = [
        ShardLayout(SPACE, 301),
        ShardLayout(ParameterSpace.of({"b": (30, 20), "a": (100,)}), 300),
        ShardLayout(ParameterSpace.of({"c": (20, 30), "a": (100,)}), 300),
    ]
    assert len({LAYOUT.hash, *(other.hash for other in others)}) == 4


@pytest.mark.parametrize("count", [0, SHARD_VALUE_COUNT_MAX + 1])
def test_shard_sizes_are_bounded(count):
    with pytest.raises(ValueError, match="shard_value_count"):
        ShardLayout(SPACE, count)


# --- Codecs ------------------------------------------------------------------------------------


def error_bound(values, codec):
    """Return the largest error of each value, as the docstring of `encode_shard` promises it."""
    magnitudes = np.abs(values.astype(np.float64))
    floor = magnitudes.max() * 2.0**-39 + 2.0**-149  # and float32 itself ends there
    if codec is Codec.TOPK:
        peaks = [part.max() for part in np.split(magnitudes, range(128, len(values), 128))]
        return np.repeat(peaks, 128)[: len(values)] * 1.001 + floor
    if codec is Codec.FP32:
        return np.zeros_like(magnitudes)
    if codec is Codec.FP16:
        return magnitudes * 2.0**-11 + floor
    padded = np.concatenate([magnitudes, np.zeros(-len(values) % codec.block_size)])
    peaks = padded.reshape(-1, codec.block_size).max(axis=1).repeat(codec.block_size)
    largest = 7 if codec is Codec.INT4X64 else 127
    return peaks[: len(values)] * 0.501 / largest + floor


@given(values_300, codecs)
def test_round_trip_stays_within_the_bound(values, codec):
    encoded = encode(values, codec)
    decoded = decode(encoded)
    assert decoded.dtype == np.float32
    if codec is not Codec.TOPK:
        assert len(encoded.payload) == codec.payload_bytes(300)
    assert np.all(np.abs(decoded.astype(np.float64) - values) <= error_bound(values, codec))


@pytest.mark.parametrize("codec", list(Codec))
@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1.0, 1e20])
def test_real_looking_gradients_of_any_size(codec, scale):
    rng = np.random.default_rng(1)
    # Heavy tails, and a few rows far above the rest, as in GPT-2.
    values = rng.standard_t(3, 300) * scale
    values[:10] *= 1e4
    values = values.astype(np.float32)
    decoded = decode(encode(values, codec)).astype(np.float64)
    values = values.astype(np.float64)
    assert np.all(np.abs(decoded - values) <= error_bound(values, codec))
    relative = np.linalg.norm(decoded - values) / np.linalg.norm(values)
    rough = {Codec.FP32: 1e-9, Codec.FP16: 2**-11, Codec.INT4X64: 0.2, Codec.TOPK: 0.6}
    assert relative < rough.get(codec, 1e-2)
    # Not even float16 loses what is small beside the largest.
    if codec is Codec.FP16:
        small = slice(10, None)
        assert np.linalg.norm(decoded[small] - values[small]) < 2**-11 * np.linalg.norm(
            values[small]
        )


@pytest.mark.parametrize("codec", list(Codec))
def test_zeros_stay_zeros(codec):
    assert not decode(encode(np.zeros(300, dtype=np.float32), codec)).any()


@pytest.mark.parametrize("codec", list(Codec))
def test_the_last_shard_is_shorter(codec):
    values = np.linspace(-1, 1, 100, dtype=np.float32)
    encoded = encode(values, codec, shard=2)
    if codec is not Codec.TOPK:
        assert len(encoded.payload) == codec.payload_bytes(100)
    assert np.all(np.abs(decode(encoded) - values) <= error_bound(values, codec))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 2.0**97])
@pytest.mark.parametrize("codec", list(Codec))
def test_what_is_no_gradient_is_not_sent(codec, value):
    values = np.zeros(300, dtype=np.float32)
    values[299] = value
    with pytest.raises(ValueError, match="NaN, infinity"):
        encode(values, codec)


@pytest.mark.parametrize("density", [0.001, 0.01, 0.03, 0.1])
def test_the_largest_values_are_kept_and_their_names_cost_little(density):
    rng = np.random.default_rng(2)
    layout = ShardLayout(ParameterSpace.of({"w": (20_000,)}), 20_000)
    values = rng.standard_t(3, 20_000).astype(np.float32)
    encoded = encode_shard(layout, 0, values, codec=Codec.TOPK, version=1, density=density)
    decoded = decode(encoded, layout)
    kept_count = round(20_000 * density)
    largest = np.argsort(-np.abs(values))[:kept_count]
    assert set(np.flatnonzero(decoded)) <= set(largest.tolist())
    assert np.count_nonzero(decoded) == kept_count
    signs = np.sign(values[largest])
    assert np.array_equal(np.sign(decoded[largest]), signs)
    # Each block of 128 has two magnitudes, the means of those that are rounded to them.
    kept, truth = np.abs(decoded[decoded != 0]), np.abs(values[decoded != 0])
    assert len(np.unique(kept[:128])) == 2
    for level in np.unique(kept[:128]):
        assert truth[:128][kept[:128] == level].mean() == pytest.approx(level, rel=1e-3)
    error = np.linalg.norm(kept - truth) / np.linalg.norm(truth)
    assert error < 0.5
    # The index within 0.2 bits a kept value of the entropy of which those are, and the description
    # of the code. Gaps of more than an octet take a little more.
    entropy = -math.log2(density) - (1 - density) / density * math.log2(1 - density)
    value_bytes = 4 * math.ceil(kept_count / 128) + math.ceil(kept_count / 4)
    index_bits = 8 * (len(encoded.payload) - value_bytes) / kept_count
    assert index_bits < entropy + 0.2 + 8 * 80 / kept_count


def test_kept_values_that_lie_together_are_named_in_fewer_bits():
    rng = np.random.default_rng(3)
    layout = ShardLayout(ParameterSpace.of({"w": (20_000,)}), 20_000)
    values = rng.standard_t(3, 20_000).astype(np.float32)
    even = encode_shard(layout, 0, values, codec=Codec.TOPK, version=1, density=0.07)
    values[:5_000] *= 8
    uneven = encode_shard(layout, 0, values, codec=Codec.TOPK, version=1, density=0.07)
    assert len(uneven.payload) < 0.85 * len(even.payload)


@pytest.mark.parametrize("octet", range(24))
def test_spoilt_names_of_values_are_refused_or_name_as_many_others(octet):
    encoded = encode_shard(
        LAYOUT, 0, np.arange(300, dtype=np.float32), codec=Codec.TOPK, version=1, density=0.1
    )
    payload = bytearray(encoded.payload)
    payload[octet] ^= 0xFF
    try:
        decoded = decode_shard_untrusted(LAYOUT, encoded.header, bytes(payload))
    except DecodeError:
        return
    assert octet >= 4
    assert np.count_nonzero(decoded) <= 30


def topk(kept, gaps):
    """Return a payload that names values by these octets, and their levels, as a stranger could."""
    deflate = zlib.compressobj(wbits=-15)
    names = deflate.compress(bytes(gaps)) + deflate.flush()
    levels = b"\x00\x70" * 2 * math.ceil(kept / 128) + bytes(math.ceil(kept / 4))
    return kept.to_bytes(4, "little") + names + levels


def read_topk(payload, count=300):
    return decode_values_untrusted(payload, Codec.TOPK, count)


def test_gaps_longer_than_an_octet():
    layout = ShardLayout(ParameterSpace.of({"w": (3000,)}), 3000)
    indices = [0, 1, 256, 257 + 255, 513 + 510, 2999]
    values = np.zeros(3000, dtype=np.float32)
    values[indices] = 1 + np.arange(6)
    encoded = encode_shard(layout, 0, values, codec=Codec.TOPK, version=1, density=6 / 3000)
    assert np.flatnonzero(decode(encoded, layout)).tolist() == indices
    gaps = [0, 0, 254, 255, 0, 255, 255, 0, *[255] * 7, 190]
    assert read_topk(topk(6, gaps), 3000).nonzero()[0].tolist() == indices


@pytest.mark.parametrize(
    ("kept", "gaps", "why"),
    [
        (2, [0, 255], "do not name 2"),  # the last gap does not end
        (2, [255, 44, 0], "do not name 2"),  # 299, and 300
        (2, [0], "do not name 2"),
        (1, [0, 0], "do not name 1"),
        (1, [], "do not name 1"),
        (2, [0] * 300, "not a whole"),  # a few bytes that would grow
        (2, [0] * 1_000_000, "too many"),
    ],
)
def test_names_that_do_not_fit_are_refused(kept, gaps, why):
    with pytest.raises(DecodeError, match=why):
        read_topk(topk(kept, gaps))


@pytest.mark.parametrize("kept", [0, 301, 2**32 - 1])
def test_more_or_fewer_values_than_there_can_be_are_refused(kept):
    payload = kept.to_bytes(4, "little") + topk(1, [0])[4:]
    with pytest.raises(DecodeError, match="bytes are not"):
        read_topk(payload)


def test_a_stream_of_empty_blocks_is_not_read():
    payload = topk(1, [0])
    payload = payload[:4] + b"\0\0\0\xff\xff" * 1000 + payload[4:]
    with pytest.raises(DecodeError, match="too many"):
        read_topk(payload)


def test_names_that_are_no_deflate_stream_are_refused():
    with pytest.raises(DecodeError, match="inflated"):
        read_topk(b"\x01\0\0\0" + b"\xff" * 20)


def test_a_vector_of_another_size_is_not_sent():
    with pytest.raises(ValueError, match="300 values"):
        encode(np.zeros(301, dtype=np.float32), Codec.FP32)


# --- The wire ----------------------------------------------------------------------------------

WIRE_LAYOUT = ShardLayout(ParameterSpace.of({"w": (3,)}), 3)
WIRE_VALUES = np.array([1.0, -0.5, 0.001], dtype=np.float32)


@pytest.mark.parametrize(
    ("codec", "header", "payload"),
    [
        (
            Codec.FP32,
            (
                "88a474797065ab5368617264486561646572a776657273696f6e07a5736861726400a5636f64"
                "6563a466703332a66c61796f7574c41032bf2b439606ae57b148bff082421bbaa5636f756e74"
                "03a86578706f6e656e7400a47365656e00"
            ),
            "0000803f000000bf6f12833a",
        ),
        (
            Codec.FP16,
            (
                "88a474797065ab5368617264486561646572a776657273696f6e07a5736861726400a5636f64"
                "6563a466703136a66c61796f7574c41032bf2b439606ae57b148bff082421bbaa5636f756e74"
                "03a86578706f6e656e74f2a47365656e00"
            ),
            "007400f0194c",
        ),
        (
            Codec.INT8X64,
            (
                "88a474797065ab5368617264486561646572a776657273696f6e07a5736861726400a5636f64"
                "6563a7696e7438783634a66c61796f7574c41032bf2b439606ae57b148bff082421bbaa5636f"
                "756e7403a86578706f6e656e74f2a47365656e00"
            ),
            "09587fc100",
        ),
        (
            Codec.INT8X256,
            (
                "88a474797065ab5368617264486561646572a776657273696f6e07a5736861726400a5636f64"
                "6563a8696e743878323536a66c61796f7574c41032bf2b439606ae57b148bff082421bbaa563"
                "6f756e7403a86578706f6e656e74f2a47365656e00"
            ),
            "09587fc100",
        ),
        (
            Codec.INT4X64,
            (
                "88a474797065ab5368617264486561646572a776657273696f6e07a5736861726400a5636f64"
                "6563a7696e7434783634a66c61796f7574c41032bf2b439606ae57b148bff082421bbaa5636f"
                "756e7403a86578706f6e656e74f2a47365656e00"
            ),
            "93685f08",
        ),
        (
            Codec.TOPK,
            (
                "88a474797065ab5368617264486561646572a776657273696f6e07a5736861726400a5636f64"
                "6563a5746f706b33a66c61796f7574c41032bf2b439606ae57b148bff082421bbaa5636f756e"
                "7403a86578706f6e656e74f2a47365656e00"
            ),
            "030000006360600000026c007406",
        ),
    ],
)
def test_wire_format(codec, header, payload):
    encoded = encode(WIRE_VALUES, codec, layout=WIRE_LAYOUT)
    assert encode_message(encoded.header).hex() == header
    # Deflate leaves it open how something is written: other versions of zlib may do it otherwise.
    if codec is not Codec.TOPK:
        assert encoded.payload.hex() == payload
    written = decode_shard_untrusted(WIRE_LAYOUT, encoded.header, bytes.fromhex(payload))
    assert np.array_equal(written, decode(encoded, WIRE_LAYOUT))
    read = decode_message_untrusted(bytes.fromhex(header), ShardHeader)
    assert read == encoded.header


@pytest.mark.parametrize(
    "change",
    [
        {"layout": bytes(16)},
        {"layout": b""},
        {"shard": -1},
        {"shard": 3},
        {"shard": 2},  # exists, but is shorter
        {"count": 299},
        {"codec": "fp8"},
        {"codec": "fp32"},  # exists, but is longer
        {"exponent": EXPONENT_MIN - 1},
        {"exponent": EXPONENT_MAX + 1},
    ],
)
def test_a_header_that_does_not_fit_is_refused(change):
    encoded = encode(np.ones(300, dtype=np.float32) * 2, Codec.INT8X256)
    decode(encoded)
    header = msgspec.structs.replace(encoded.header, **change)
    with pytest.raises(DecodeError):
        decode_shard_untrusted(LAYOUT, header, encoded.payload)


@pytest.mark.parametrize("codec", list(Codec))
@pytest.mark.parametrize("change", [-1, 1, None])
def test_a_payload_of_another_size_is_refused(codec, change):
    encoded = encode(np.ones(300, dtype=np.float32), codec)
    payload = b"" if change is None else (encoded.payload + b"\0")[: len(encoded.payload) + change]
    with pytest.raises(DecodeError, match="bytes"):
        decode_shard_untrusted(LAYOUT, encoded.header, payload)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("codec", "dtype"), [("fp32", "<f4"), ("fp16", "<f2"), ("int8x64", "<f2")])
def test_numbers_that_are_not_finite_are_refused(codec, dtype, value):
    encoded = encode(np.ones(300, dtype=np.float32), Codec(codec))
    spoilt = np.array([value], dtype=dtype).tobytes()  # the first value, or the first scale
    with pytest.raises(DecodeError, match="NaN"):
        decode_shard_untrusted(LAYOUT, encoded.header, spoilt + encoded.payload[len(spoilt) :])


def test_numbers_beyond_the_bound_are_refused():
    encoded = encode(np.ones(300, dtype=np.float32), Codec.FP16)
    payload = np.full(300, 65504, dtype="<f2").tobytes()
    header = msgspec.structs.replace(encoded.header, exponent=EXPONENT_MAX)
    with pytest.raises(DecodeError, match="beyond"):
        decode_shard_untrusted(LAYOUT, header, payload)


@given(values_300, codecs, st.data())
def test_flipped_bits_give_other_numbers_or_a_decode_error(values, codec, data):
    encoded = encode(values, codec)
    header, payload = bytearray(encode_message(encoded.header)), bytearray(encoded.payload)
    for _ in range(data.draw(st.integers(1, 4))):
        target = data.draw(st.sampled_from([header, payload]))
        target[data.draw(st.integers(0, len(target) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        read = decode_message_untrusted(bytes(header), ShardHeader)
        decoded = decode_shard_untrusted(LAYOUT, read, bytes(payload))
    except DecodeError:
        return
    assert decoded.size == LAYOUT.value_count(read.shard)
    assert np.all(np.abs(decoded) <= 2 * MAGNITUDE_MAX)


@given(st.binary(max_size=80), st.binary(max_size=700))
@settings(max_examples=200)
def test_random_bytes_give_a_decode_error(header, payload):
    with pytest.raises(DecodeError):
        decode_shard_untrusted(LAYOUT, decode_message_untrusted(header, ShardHeader), payload)


@given(st.binary(min_size=1208, max_size=1208), codecs, st.integers(EXPONENT_MIN, EXPONENT_MAX))
def test_any_payload_of_the_right_size_is_decoded_or_refused(payload, codec, exponent):
    header = ShardHeader(
        version=0, shard=0, codec=codec.value, layout=LAYOUT.hash, count=300, exponent=exponent
    )
    fitting = payload if codec is Codec.TOPK else payload[: codec.payload_bytes(300)]
    try:
        decoded = decode_shard_untrusted(LAYOUT, header, fitting)
    except DecodeError:
        return
    assert np.all(np.abs(decoded) <= 2 * MAGNITUDE_MAX)
