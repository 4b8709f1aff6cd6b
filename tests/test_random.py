"""The compiled numbers: published words, the normal distribution, streams that share nothing."""

from collections.abc import Iterator

import numba
import numpy as np
import pytest
import torch
from scipy import stats

from svlib import _kernels
from svlib._random import Normals, stream

PI = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0, 0x082EFA98]
PI.append(0xEC4E6C89)
TYPES = (torch.float32, torch.float64)


@numba.njit
def words(numbers):  # type: ignore[no-untyped-def]
    return _kernels.threefry(numbers[0], numbers[1], numbers[2], numbers[3], numbers[4:])


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ([0] * 8, "531c7e4f 39491ee5 2c855a92 3d6abf9a"),
        ([0xFFFFFFFF] * 8, "c4189358 1c9cc83a d5881c67 6a0a89e0"),
        (PI, "4aa71d8f 734738c2 431fc6a8 ae6debf1"),
    ],
)
def test_words_are_the_published_ones(numbers: list[int], expected: str) -> None:
    """Counter and key, as in the known answers that the authors of Threefry publish."""
    found = words(np.array(numbers, np.uint32))
    assert " ".join(f"{int(word):08x}" for word in found) == expected


@pytest.mark.parametrize("dtype", TYPES)
def test_pairs_are_those_of_box_and_muller(dtype: torch.dtype) -> None:
    """Length and direction from the words, by a library's logarithm, sine and cosine."""
    found = Normals(5, "test", range(7, 8), "cpu").fill(torch.empty(1, 4000, dtype=dtype))[0]
    key = Normals(5, "test", range(1), "cpu")._key
    single = dtype == torch.float32
    count = 1000 if single else 2000
    drawn = np.array(
        [words(np.array([i, 0, 7, 0, *key], np.uint32)) for i in range(count)], np.uint64
    )
    if single:
        p, q, bits = drawn[:, [0, 2]].T.ravel() >> np.uint64(1), drawn[:, [1, 3]].T.ravel(), 32
    else:
        joined = drawn[:, [0, 2]] << np.uint64(32) | drawn[:, [1, 3]]
        p, q, bits = joined[:, 0] >> np.uint64(11), joined[:, 1], 64
    uniform = (p + 0.5) / 2.0 ** (31 if single else 53)
    signed = q.astype(np.int64) if bits == 64 else q.astype(np.uint32).astype(np.int32)
    angle = (signed >> 2).astype(np.float64) * np.pi / 2.0 ** (bits - 1)
    length = np.sqrt(-2 * np.log(uniform)) * np.where(signed & 2, -1, 1)
    pair = np.array([length * np.sin(angle), length * np.cos(angle)])
    pair = np.where(signed & 1, pair[::-1], pair)
    rows = found.numpy().reshape(-1, 2, count)
    np.testing.assert_allclose(
        rows.swapaxes(0, 1).reshape(2, -1), pair, rtol=0, atol=16 * torch.finfo(dtype).eps
    )


@pytest.mark.parametrize("dtype", TYPES)
def test_numbers_are_normal_and_independent(dtype: torch.dtype) -> None:
    numbers = Normals(0, "test", range(1000), "cpu").fill(torch.empty(1000, 5000, dtype=dtype))
    x = numbers.double().numpy()
    assert stats.kstest(x[::7].ravel(), "norm").pvalue > 1e-3
    size = np.sqrt(x.size)
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs((x**power).mean() - moment) < 4 * np.sqrt(variance) / size
    beyond = np.mean(np.abs(x) > 4)
    assert abs(beyond - 2 * stats.norm.sf(4)) < 4 * np.sqrt(2 * stats.norm.sf(4)) / size
    # the parts of one pair and one counter, neighbouring counters, neighbouring streams
    for one, other in _neighbours(x):
        for power in (1, 2):
            a, b = (y**power - np.mean(y**power) for y in (one, other))
            assert abs(np.mean(a * b)) < 4 * power * np.sqrt(1 / a.size)


def _neighbours(x: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for part in (1250, 2500, 3750, 1):
        yield x[:, :-part], x[:, part:]
    yield x[1:], x[:-1]


def test_a_stream_knows_nothing_of_the_others_and_of_pieces() -> None:
    together = Normals(3, "test", range(10, 15), "cpu").fill(
        torch.empty(5, 37, 8, dtype=torch.float64)
    )
    alone = Normals(3, "test", range(12, 13), "cpu")
    assert torch.equal(alone.fill(torch.empty(1, 37, 8, dtype=torch.float64))[0], together[2])
    assert len(np.unique(together)) == together.numel()
    later = alone.fill(torch.empty(1, 37, 8, dtype=torch.float64))
    assert not np.isin(later, together).any()
    for seed, purpose in ((4, "test"), (3, "other")):
        other = Normals(seed, purpose, range(10, 15), "cpu").fill(
            torch.empty(5, 37, 8, dtype=torch.float64)
        )
        assert not np.isin(other, together).any()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_any_count_is_filled(dtype: torch.dtype, count: int) -> None:
    normals = Normals(0, "test", range(6), "cpu")
    drawn = torch.cat([normals.fill(torch.full((6, count), torch.nan, dtype=dtype)) for _ in "ab"])
    assert torch.isfinite(drawn).all()
    assert len(torch.unique(drawn)) == drawn.numel()


def test_as_many_slots_as_streams() -> None:
    with pytest.raises(ValueError, match=r"out must have 2 slots, got 3"):
        Normals(0, "test", range(2), "cpu").fill(torch.empty(3, 8))


@numba.njit
def pair_of(p, q):  # type: ignore[no-untyped-def]
    single = _kernels._pair_single(np.uint32(p), np.uint32(q))
    return single, _kernels._pair_double(p, q)


def test_the_ends_of_the_words_are_finite() -> None:
    ends = np.uint64(0), np.uint64(2**64 - 1)
    for p in ends:
        for q in ends:
            assert np.isfinite(pair_of(p, q)).all()


def test_the_counter_goes_on_beyond_32_bits() -> None:
    normals, first = Normals(0, "test", range(1), "cpu"), Normals(0, "test", range(1), "cpu")
    start = first.fill(torch.empty(1, 64))
    normals._place = 2**32 - 3
    beyond = normals.fill(torch.empty(1, 64))
    assert normals._place == 2**32 + 16
    assert not np.isin(beyond, start).any()


def test_on_other_devices_numbers_are_torch_s() -> None:
    normals = Normals(3, "test", range(2), "cpu")
    normals._generators = [stream(3, "test", index) for index in range(2)]
    drawn = normals.fill(torch.empty(2, 5, 4))
    for index in range(2):
        expected = torch.empty(5, 4).normal_(generator=stream(3, "test", index))
        assert torch.equal(drawn[index], expected)
