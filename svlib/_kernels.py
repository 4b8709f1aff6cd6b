"""Compiled loops for the processor: standard normal numbers, and sums over preactivations.

The numbers are words of a counter-based generator, made normal by pairs. Threefry4x32 with 13
rounds (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3") is a function of a
counter and a key, so that a stream needs no state and no set-up. Box and Muller (1958) make two
normal numbers of two words: up to 6.6 in float32, 8.6 in float64. All of it is written for vector
registers: no branch, no library call, every function inlined. Numba compiles what is called for the
first time, in some seconds, and keeps it on disk.
"""

import functools
import math

import numba
import numpy as np

_inlined = numba.njit(inline="always", error_model="numpy", fastmath={"contract"})


def _kept(*fastmath):
    """A decorator: compiled once for all processes, if there is a folder to keep it in.

    Of one dtype each, because processes that keep two at a time may mix them up.
    """
    compiled = functools.partial(
        numba.njit, nogil=True, error_model="numpy", fastmath=set(fastmath)
    )

    def decorated(function):
        try:
            return compiled(cache=True)(function)
        except RuntimeError:
            return compiled()(function)

    return decorated


@_inlined
def _mix(a, b, by):
    a = np.uint32(a + b)
    turned = np.uint32(b << np.uint32(by)) | np.uint32(b >> np.uint32(32 - by))
    return a, np.uint32(turned ^ a)


@_inlined
def _four_rounds(a, b, c, d, turns):
    a, b = _mix(a, b, turns[0])
    c, d = _mix(c, d, turns[1])
    a, d = _mix(a, d, turns[2])
    c, b = _mix(c, b, turns[3])
    a, b = _mix(a, b, turns[4])
    c, d = _mix(c, d, turns[5])
    a, d = _mix(a, d, turns[6])
    c, b = _mix(c, b, turns[7])
    return a, b, c, d


@_inlined
def _keyed(a, b, c, d, key, count):
    a, b, c = np.uint32(a + key[0]), np.uint32(b + key[1]), np.uint32(c + key[2])
    return a, b, c, np.uint32(d + key[3] + np.uint32(count))


_EVEN, _ODD = (10, 26, 11, 21, 13, 27, 23, 5), (6, 20, 17, 11, 25, 10, 18, 20)


@_inlined
def threefry(a, b, c, d, key):
    """Four random words (uint32) of the four of a counter and the four of a key."""
    k, l, m, n = key[0], key[1], key[2], key[3]  # noqa: E741
    o = np.uint32(np.uint32(0x1BD11BDA) ^ k ^ l ^ m ^ n)
    a, b, c, d = _keyed(a, b, c, d, (k, l, m, n), 0)
    a, b, c, d = _four_rounds(a, b, c, d, _EVEN)
    a, b, c, d = _keyed(a, b, c, d, (l, m, n, o), 1)
    a, b, c, d = _four_rounds(a, b, c, d, _ODD)
    a, b, c, d = _keyed(a, b, c, d, (m, n, o, k), 2)
    a, b, c, d = _four_rounds(a, b, c, d, _EVEN)
    a, b, c, d = _keyed(a, b, c, d, (n, o, k, l), 3)
    a, b = _mix(a, b, _ODD[0])
    c, d = _mix(c, d, _ODD[1])
    return a, b, c, d


def _series(number, terms):
    """ln 2, and the coefficients in x^2 of ln((1 + x)/(1 - x))/x, sin(x)/x and cos(x)."""
    logarithm = [2 / (2 * k + 1) for k in range(terms)]
    sine = [(-1) ** k / math.factorial(2 * k + 1) for k in range(terms)]
    cosine = [(-1) ** k / math.factorial(2 * k) for k in range(terms)]
    return number(math.log(2)), *(tuple(map(number, x)) for x in (logarithm, sine, cosine))


# rounding is reached at |x| = (sqrt(2) - 1)/(sqrt(2) + 1) and pi/4
_SINGLE, _DOUBLE = _series(np.float32, 6), _series(np.float64, 12)


@_inlined
def _horner(square, coefficients):
    total = coefficients[-1]
    for k in range(len(coefficients) - 2, -1, -1):
        total = total * square + coefficients[k]
    return total


@_inlined
def _pair(exponent, mantissa, angle, quadrant, series):
    """Two normal numbers: of length sqrt(-2 ln(2^exponent mantissa)), in the direction of an angle
    of at most pi/4, moved to one of four quadrants."""
    one = series[3][0]
    x = (mantissa - one) / (mantissa + one)
    logarithm = exponent * series[0] + x * _horner(x * x, series[1])
    length = np.sqrt(-(one + one) * logarithm)
    length = -length if quadrant & 2 else length
    square = angle * angle
    sine, cosine = angle * _horner(square, series[2]), _horner(square, series[3])
    x, y = (cosine, sine) if quadrant & 1 else (sine, cosine)
    return length * x, length * y


@_inlined
def _pair_single(p, q):
    half = np.int32(0x3F3504F3)  # sqrt(1/2): the mantissa lies between it and twice it
    uniform = (np.float32(np.int32(p >> np.uint32(1))) + np.float32(0.5)) * np.float32(2**-31)
    above = np.int32(np.float32(uniform).view(np.int32) - half)
    mantissa = np.int32(np.int32(above & np.int32(0x7FFFFF)) + half).view(np.float32)
    exponent = np.float32(np.int32(above >> np.int32(23)))
    angle = np.float32(np.int32(q) >> np.int32(2)) * np.float32(math.pi * 2**-31)
    return _pair(exponent, mantissa, angle, q, _SINGLE)


@_inlined
def _pair_double(p, q):
    half = np.int64(0x3FE6A09E667F3BCD)
    uniform = (np.float64(np.int64(p >> np.uint64(11))) + 0.5) * 2.0**-53
    above = np.float64(uniform).view(np.int64) - half
    mantissa = np.int64((above & np.int64(0xFFFFFFFFFFFFF)) + half).view(np.float64)
    angle = np.float64(np.int64(q) >> np.int64(2)) * (math.pi * 2.0**-63)
    return _pair(np.float64(above >> np.int64(52)), mantissa, angle, np.int64(q), _DOUBLE)


@_kept("contract")
def fill_single(out, key, first, start):
    """Fill ``out`` (streams, a multiple of 4), float32, with numbers of the counters from ``start``
    on, each row those of its stream: ``first``, first + 1, ..."""
    part = out.shape[1] // 4
    low, high = np.uint32(start), np.uint32(start >> 32)
    for k in range(len(out)):
        row, stream = out[k], np.uint64(first + k)
        c, d = np.uint32(stream), np.uint32(stream >> np.uint64(32))
        for i in range(part):
            words = threefry(np.uint32(low + np.uint32(i)), high, c, d, key)
            row[i], row[i + part] = _pair_single(words[0], words[1])
            row[i + 2 * part], row[i + 3 * part] = _pair_single(words[2], words[3])


@_kept("contract")
def fill_double(out, key, first, start):
    """The same in float64, with two numbers for every counter."""
    part = out.shape[1] // 2
    low, high = np.uint32(start), np.uint32(start >> 32)
    for k in range(len(out)):
        row, stream = out[k], np.uint64(first + k)
        c, d = np.uint32(stream), np.uint32(stream >> np.uint64(32))
        for i in range(part):
            words = threefry(np.uint32(low + np.uint32(i)), high, c, d, key)
            p = np.uint64(words[0]) << np.uint64(32) | np.uint64(words[1])
            q = np.uint64(words[2]) << np.uint64(32) | np.uint64(words[3])
            row[i], row[i + part] = _pair_double(p, q)


# sums in any order, as vector registers need
_summing = numba.njit(error_model="numpy", fastmath={"contract", "reassoc"})


@_summing
def _along_last(y, bits, sign, rest, found):
    held = np.empty(1, bits.dtype)
    largest = held.view(y.dtype)
    for k in range(len(y)):
        row = y[k]
        # so that digits survive where the mean is large
        shift, total, square = np.float64(row[0]), 0.0, 0.0
        for j in range(len(row)):
            z = np.float64(row[j]) - shift
            total += z
            square += z * z
        mean = total / len(row)
        found[0, k] = shift + mean
        # the shift is one of the entries, so the square subtracted is at most as many times what
        # is left as there are entries
        found[1, k] = max(square - total * mean, 0.0)
        # the largest by whole numbers, which vector registers compare: floats are in their order
        # once all bits but the sign are flipped where that is set
        number = bits[k]
        top = number[0] ^ ((number[0] >> sign) & rest)
        for j in range(len(number)):
            top = max(top, number[j] ^ ((number[j] >> sign) & rest))
        held[0] = top ^ ((top >> sign) & rest)
        found[2, k] = largest[0]


@_summing
def _along_middle(y, found):
    for k in range(len(y)):
        total, square = np.zeros(y.shape[2]), np.zeros(y.shape[2])
        shift, largest = y[k, 0], y[k, 0].copy()
        for p in range(y.shape[1]):
            row = y[k, p]
            for j in range(len(row)):
                z = np.float64(row[j]) - np.float64(shift[j])
                total[j] += z
                square[j] += z * z
                largest[j] = row[j] if row[j] > largest[j] else largest[j]
        for j in range(y.shape[2]):
            mean = total[j] / y.shape[1]
            found[0, k, j], found[2, k, j] = shift[j] + mean, largest[j]
            found[1, k, j] = max(square[j] - total[j] * mean, 0.0)


@_summing
def _split_along_ray(y, mean_square, squares):
    for k in range(len(y)):
        sums = np.zeros(y.shape[2])
        for a in range(y.shape[1]):
            for j in range(y.shape[2]):
                sums[j] += y[k, a, j]
        sums /= y.shape[1]
        mean_square[k] = np.sum(sums * sums)
        mean = sums.astype(y.dtype)
        ray = (sums / np.sqrt(mean_square[k]) if mean_square[k] > 0 else sums).astype(y.dtype)
        for a in range(y.shape[1]):
            along, across = y.dtype.type(0), y.dtype.type(0)
            for j in range(y.shape[2]):
                along += (y[k, a, j] - mean[j]) * ray[j]
            for j in range(y.shape[2]):
                beside = (y[k, a, j] - mean[j]) - along * ray[j]
                across += beside * beside
            squares[k, 0, a] = np.float64(along) ** 2
            squares[k, 1, a] = np.float64(across)


@_kept("contract", "reassoc")
def along_last_single(y, found):
    """Write into ``found`` (3, rows) for every row of ``y`` (rows, entries), float32, the mean, the
    sum of squares about it, and the largest entry."""
    _along_last(y, y.view(np.int32), 31, np.int32(2**31 - 1), found)


@_kept("contract", "reassoc")
def along_last_double(y, found):
    """The same of float64."""
    _along_last(y, y.view(np.int64), 63, np.int64(2**63 - 1), found)


@_kept("contract", "reassoc")
def along_middle_single(y, found):
    """The same over the middle of ``y`` (rows, entries, columns), ``found`` (3, rows, columns)."""
    _along_middle(y, found)


@_kept("contract", "reassoc")
def along_middle_double(y, found):
    """The same of float64."""
    _along_middle(y, found)


@_kept("contract", "reassoc")
def split_along_ray_single(y, mean_square, squares):
    """Write for every network of ``y`` (networks, inputs, units), float32, the squared length of
    the mean over inputs into ``mean_square`` (networks,), and for every input the squares along its
    direction and across it, of what is beside the mean, into ``squares`` (networks, 2, inputs)."""
    _split_along_ray(y, mean_square, squares)


@_kept("contract", "reassoc")
def split_along_ray_double(y, mean_square, squares):
    """The same of float64."""
    _split_along_ray(y, mean_square, squares)
