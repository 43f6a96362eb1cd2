"""The program's counter-based random numbers (src/random.rs), in numpy: Philox4x32-10 and what is made of its numbers.

The numbers of a row of any width are a pure function of a key and three numbers that name the row.
"""

import numpy

MULTIPLIERS = numpy.array([0xD2511F53, 0xCD9E8D57], dtype=numpy.uint64)
WEYL = numpy.array([0x9E3779B9, 0xBB67AE85], dtype=numpy.uint64)
LOW = numpy.uint64(0xFFFFFFFF)
HALF = numpy.uint64(32)
ROUNDS = 10
# A group is so many blocks side by side: number j of a group is word j / LANES of its block j % LANES.
LANES = 16
GROUP = 4 * LANES

# What a stream of numbers is for.
DROPOUT, HEAD, NOISE, MIXOUT, SECOND_DROPOUT = 2, 4, 11, 12, 13


def philox(counters, key):
    """Returns the blocks `[..., 4]` of counters `[..., 4]` and one key of two numbers."""
    words = [numpy.asarray(counters, dtype=numpy.uint64)[..., word] for word in range(4)]
    key = numpy.array(key, dtype=numpy.uint64)
    for _ in range(ROUNDS):
        first, second = words[0] * MULTIPLIERS[0], words[2] * MULTIPLIERS[1]
        words = [
            (second >> HALF) ^ words[1] ^ key[0],
            second & LOW,
            (first >> HALF) ^ words[3] ^ key[1],
            first & LOW,
        ]
        key = (key + WEYL) & LOW
    return numpy.stack(words, axis=-1).astype(numpy.uint32)


def halves(number):
    """Returns the lower and the upper 32 bits of a number."""
    return number & 0xFFFFFFFF, number >> 32


def derive(seed, purpose, index):
    """Returns the key of the stream of a run's seed, a purpose, and an index such as the step (`Key::derive`)."""
    return tuple(int(word) for word in philox([*halves(index), purpose, 0], halves(seed))[:2])


def of_part(key, part):
    """Returns the key of one part of what a stream is for (`Key::of_part`)."""
    return tuple(int(word) for word in philox([*halves(part), 0, 1], key)[:2])


def row_numbers(key, rows, width):
    """Returns the uint32 numbers `[rows, width]` of rows that are named by `[rows, 3]`."""
    rows = numpy.asarray(rows, dtype=numpy.uint64)
    element = numpy.arange(width)
    block, word = element // GROUP * LANES + element % LANES, element % GROUP // LANES
    counters = numpy.zeros((len(rows), block.max() + 1, 4), dtype=numpy.uint64)
    counters[:, :, 0] = numpy.arange(block.max() + 1)
    counters[:, :, 1:] = rows[:, None, :]
    return philox(counters, key)[:, block, word]


def kept(key, rows, width, probability):
    """Returns which elements `[rows, width]` of rows are kept, each with a probability (`Bernoulli`)."""
    limit = min(max(round(probability * 2**32), 1), 2**32) - 1
    return row_numbers(key, rows, width) <= numpy.uint32(limit)


def uniform(key, rows, width, bound):
    """Returns float32 numbers `[rows, width]`, uniform in (-bound, bound)."""
    numbers = (row_numbers(key, rows, width) >> numpy.uint32(9)).astype(numpy.float32)
    return ((numbers + numpy.float32(0.5)) * numpy.float32(2**-22) - numpy.float32(1)) * numpy.float32(bound)


def normal(key, rows, width, deviation):
    """Returns float32 numbers `[rows, width]` from N(0, deviation^2) (Box-Muller).

    A row has m = ceil(width / 2) pairs of numbers, j and m + j, which make the elements j and m + j. The functions are
    taken in float64 and rounded, so that the last bits do not depend on the machine.
    """
    pairs = (width + 1) // 2
    numbers = (row_numbers(key, rows, 2 * pairs) >> numpy.uint32(8)).astype(numpy.float32)
    first = (numbers[:, :pairs] + numpy.float32(1)) * numpy.float32(2**-24)
    angle = (numbers[:, pairs:] * numpy.float32(2**-24) * numpy.float32(2 * numpy.pi)).astype(numpy.float64)
    radius = numpy.sqrt(-2 * numpy.log(first.astype(numpy.float64))).astype(numpy.float32)
    deviates = [radius * function(angle).astype(numpy.float32) for function in (numpy.cos, numpy.sin)]
    return numpy.concatenate(deviates, axis=1)[:, :width] * numpy.float32(deviation)


def check():
    """Holds the generator to the known answers published with Random123, and rows to their definition."""
    ones = 0xFFFFFFFF
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0]
    answers = [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([ones] * 4, [ones] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (*pi, [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ]
    for counter, key, expected in answers:
        assert philox(counter, key).tolist() == expected
    numbers = row_numbers((7, 9), [[3, 1, 4]], 6 * GROUP)[0]
    for element in (0, 17, 63, 64, 5 * GROUP + 40):
        group, place = divmod(element, GROUP)
        assert numbers[element] == philox([LANES * group + place % LANES, 3, 1, 4], (7, 9))[place // LANES]


check()
