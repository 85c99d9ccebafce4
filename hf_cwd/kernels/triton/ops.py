"""The Triton kernels: one launch walks over the chunks of all tensors of one combination of dtypes.

Triton is imported here and nowhere else, so this module is imported when a kernel is launched. The arithmetic is that
of :class:`hf_cwd.kernels.interface.Row`, operation by operation: ``tl.fma`` where one rounding is meant. Launches pass
``enable_fp_fusion=False`` so that the compiler contracts nothing else.
"""
# ruff: noqa: N803 -- capital letters are compile-time constants

import triton
import triton.language as tl

# Words of int64 that describe a tensor: the addresses of x or the output, g, the states and the remainder from 0 on,
# then its number of elements and the number of its row.
WORDS = tl.constexpr(8)
LENGTH = tl.constexpr(6)
ROW = tl.constexpr(7)

# Places in a row, see hf_cwd.kernels.interface.Row.
FIELDS = tl.constexpr(16)
GRAD_SCALE, FIRST_WEIGHT, FIRST_FAR, SECOND_WEIGHT, SECOND_FAR, KEEP, TAKE, ROOT_SCALE = map(tl.constexpr, range(8))
EPS, DIRECTION_SCALE, OPPOSED, ALIGNED, NEITHER, DECAYS, RATE, FORM = map(tl.constexpr, range(8, 16))

# A tensor's sums have so many places, between which its chunks are spread: one alone would be waited for.
PLACES = tl.constexpr(64)
COLUMNS = tl.constexpr(4)

LEAST = tl.constexpr(2.0**-126)  # the smallest normal fp32

# Words that describe what a row takes from the device, see hf_cwd.kernels.triton.tables.
SOURCES = tl.constexpr(8)


@triton.jit
def _load(at, valid, MASKED: tl.constexpr):
    return tl.load(at, mask=valid, other=0) if MASKED else tl.load(at)


@triton.jit
def _store(at, value, valid, MASKED: tl.constexpr):
    if MASKED:
        tl.store(at, value, mask=valid)
    else:
        tl.store(at, value)


@triton.jit
def _lerp(row, WEIGHT: tl.constexpr, FAR: tl.constexpr, start, end):
    return tl.fma(tl.load(row + WEIGHT), end - start, tl.where(tl.load(row + FAR) != 0, end, start))


@triton.jit
def _adamw(row, g, m, v):
    m = _lerp(row, FIRST_WEIGHT, FIRST_FAR, m, g)
    v = tl.fma(tl.load(row + TAKE) * g, g, tl.load(row + KEEP) * v)
    denominator = tl.sqrt_rn(v) * tl.load(row + ROOT_SCALE) + tl.load(row + EPS)
    return tl.div_rn(m, denominator) * tl.load(row + DIRECTION_SCALE), m, v


@triton.jit
def _lion(row, g, m):
    c = _lerp(row, FIRST_WEIGHT, FIRST_FAR, m, g)
    u = tl.where(c > 0, 1.0, tl.where(c < 0, -1.0, 0.0))
    return u, _lerp(row, SECOND_WEIGHT, SECOND_FAR, m, g)


@triton.jit
def _momentum(row, g, m):
    form = tl.load(row + FORM).to(tl.int32)
    kind = form & 3
    keep = tl.load(row + KEEP)
    average = _lerp(row, FIRST_WEIGHT, FIRST_FAR, m, g)
    m = tl.where(kind == 3, average, tl.where(kind == 1, g, tl.fma(tl.load(row + TAKE), g, keep * m)))
    ahead = tl.where(kind == 3, _lerp(row, SECOND_WEIGHT, SECOND_FAR, g, m), tl.fma(keep, m, g))
    return tl.where(form >= 4, ahead, m), m


@triton.jit
def _decayed(row, x, u):
    """x after the cautious decay, and the coefficient of each element."""
    opposed = ((u < 0) & (x > 0)) | ((u > 0) & (x < 0))
    aligned = ((u < 0) & (x < 0)) | ((u > 0) & (x > 0))
    otherwise = tl.where(aligned, tl.load(row + ALIGNED), tl.load(row + NEITHER))
    coefficient = tl.where(opposed, tl.load(row + OPPOSED), otherwise)
    return tl.where(tl.load(row + DECAYS) != 0, tl.fma(coefficient, x, x), x), coefficient


@triton.jit
def _widened(at, remainder_at, valid, REMAINDER: tl.constexpr, MASKED: tl.constexpr):
    x = _load(at, valid, MASKED)
    if REMAINDER:
        x = (x.to(tl.int32) << 16) + _load(remainder_at, valid, MASKED).to(tl.int32)
        x = x.to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def _narrowed(at, remainder_at, x, valid, REMAINDER: tl.constexpr, MASKED: tl.constexpr):
    if REMAINDER:
        bits = tl.where(x != x, 0x7FC00000, x.to(tl.int32, bitcast=True))
        upper = (bits + 0x8000) >> 16
        _store(at, upper.to(tl.int16), valid, MASKED)
        _store(remainder_at, (bits - (upper << 16)).to(tl.int16), valid, MASKED)
    else:
        _store(at, x.to(at.dtype.element_ty), valid, MASKED)


@triton.jit
def _chunk(  # noqa: C901, PLR0912  every branch is decided at compile time
    x_at,
    g_at,
    m_at,
    v_at,
    remainder_at,
    row,
    valid,
    OP: tl.constexpr,
    STATES: tl.constexpr,
    REMAINDER: tl.constexpr,
    SUM: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One chunk's step; of its elements how many were decayed, u^2, x^2, and x^2 of the decayed ones, where SUM."""
    g = _load(g_at, valid, MASKED).to(tl.float32)
    if STATES > 0:
        m = _load(m_at, valid, MASKED).to(tl.float32)
    if STATES > 1:
        v = _load(v_at, valid, MASKED).to(tl.float32)
    if OP != "directions":
        x = _widened(x_at, remainder_at, valid, REMAINDER, MASKED)
    if OP != "apply":
        g = tl.load(row + GRAD_SCALE) * g

    u = g
    if OP == "adamw":
        u, m, v = _adamw(row, g, m, v)
        _store(v_at, v.to(v_at.dtype.element_ty), valid, MASKED)
    elif OP == "lion":
        u, m = _lion(row, g, m)
    elif STATES > 0:
        u, m = _momentum(row, g, m)
    if STATES > 0:
        _store(m_at, m.to(m_at.dtype.element_ty), valid, MASKED)

    sums = 0, 0.0, 0.0, 0.0
    if OP == "directions":
        _store(x_at, u.to(x_at.dtype.element_ty), valid, MASKED)
    else:
        decayed, coefficient = _decayed(row, x, u)
        _narrowed(x_at, remainder_at, tl.fma(tl.load(row + RATE), u, decayed), valid, REMAINDER, MASKED)
        if SUM:
            among = coefficient != 0
            if MASKED:  # what lies outside was loaded as 0, and could be decayed, or divided by
                among = among & valid
                u = tl.where(valid, u, 0.0)
            own = tl.where(among, x, 0.0)
            squares = u * u
            if STATES > 0:
                squares += m - m  # NaN where a state is not finite: u can be 0 there for ever
            if STATES > 1:
                squares += v - v
            sums = tl.sum(among.to(tl.int32), 0), tl.sum(squares, 0), tl.sum(x * x, 0), tl.sum(own * own, 0)
    return sums


@triton.jit
def _address(tensor, WORD: tl.constexpr, TYPE: tl.constexpr, VECTOR: tl.constexpr):
    at = tl.load(tensor + WORD).to(tl.pointer_type(TYPE))
    return tl.multiple_of(at, VECTOR * TYPE.primitive_bitwidth // 8)


@triton.jit
def walk(
    tensors,
    places,
    rows,
    sums,
    OP: tl.constexpr,
    X: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    STATES: tl.constexpr,
    REMAINDER: tl.constexpr,
    SUM: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One operation on all tensors of a launch, one chunk a program.

    Args:
        tensors: int64, WORDS for each tensor.
        places: int32, two for each chunk: its tensor, and its number within the tensor.
        rows: float32, FIELDS for each row.
        sums: float64, (tensors, PLACES, COLUMNS), to which each chunk's are added where SUM; else None.
        OP: adamw, lion, momentum, directions (the momentum's, into x) or apply (u is g).
        X, G, S: dtypes of x (int16 where there is a REMAINDER), g and the states.
        STATES: how many states there are.
        VECTOR: elements that a thread may access at a time: addresses are multiples of their size.
    """
    place = places + 2 * tl.program_id(0).to(tl.int64)
    tensor = tensors + tl.load(place) * WORDS
    start = tl.load(place + 1).to(tl.int64) * BLOCK
    x_at = _address(tensor, 0, X, VECTOR)
    g_at = _address(tensor, 1, G, VECTOR)
    m_at = x_at
    v_at = x_at
    remainder_at = x_at
    if STATES > 0:
        m_at = _address(tensor, 2, S, VECTOR)
    if STATES > 1:
        v_at = _address(tensor, 3, S, VECTOR)
    if REMAINDER:
        remainder_at = _address(tensor, 2 + STATES, tl.int16, VECTOR)
    length = tl.load(tensor + LENGTH)
    row = rows + tl.load(tensor + ROW) * FIELDS
    i = start + tl.arange(0, BLOCK)
    x_at += i
    g_at += i
    m_at += i
    v_at += i
    remainder_at += i
    # Without a mask where it can be: a mask would keep the compiler from 16 bytes at a time.
    if start + BLOCK <= length:
        decayed, update, weight, among = _chunk(
            x_at, g_at, m_at, v_at, remainder_at, row, i, OP, STATES, REMAINDER, SUM, False
        )
    else:
        decayed, update, weight, among = _chunk(
            x_at, g_at, m_at, v_at, remainder_at, row, i < length, OP, STATES, REMAINDER, SUM, True
        )
    if SUM:
        to = sums + (tl.load(place).to(tl.int64) * PLACES + tl.load(place + 1) % PLACES) * COLUMNS
        tl.atomic_add(to, decayed.to(tl.float64), sem="relaxed")
        tl.atomic_add(to + 1, update.to(tl.float64), sem="relaxed")
        tl.atomic_add(to + 2, weight.to(tl.float64), sem="relaxed")
        tl.atomic_add(to + 3, among.to(tl.float64), sem="relaxed")


@triton.jit
def _power(base, exponent):
    """base ** exponent in float64 for a whole exponent up to 2**24, where float32 stops counting, by squaring.

    Its error is at most about ``exponent`` units in the last place, and so that of 1 - b**t is below 1e-13 / (1 - b):
    after rounding to float32 it is as good as the host's.
    """
    power = base * 0 + 1
    for _ in range(25):
        power = tl.where(exponent & 1 != 0, power * base, power)
        base = base * base
        exponent = exponent >> 1
    return power


@triton.jit
def fill_rows(sources, numbers, templates, rows):
    """Computes the rows whose step or learning rate is on the device, one a program; others are copied.

    Args:
        sources: int64, SOURCES for each row: address of the step (float32) or 0; kind of learning rate: -1 the row is
            complete, 0 it is among the numbers, 1 and 2 a float32 and a float64 at an address; that address or 0. Then
            five float64: the learning rate, the direction's scale, weight_decay, beta1, beta2.
        numbers: the same memory as float64.
        templates: float32, the rows for step 2, a learning rate of 1 and a weight_decay of 1 or 0.
        rows: float32, receives the rows.
    """
    place = tl.program_id(0)
    source, number = sources + place * SOURCES, numbers + place * SOURCES
    fields = tl.arange(0, FIELDS)
    row = tl.load(templates + place * FIELDS + fields)
    kind = tl.load(source + 1)

    at = tl.load(source + 2)
    narrow = tl.load(at.to(tl.pointer_type(tl.float32)), mask=kind == 1, other=0).to(tl.float64)
    wide = tl.load(at.to(tl.pointer_type(tl.float64)), mask=kind == 2, other=0)
    lr = tl.where(kind == 1, narrow, tl.where(kind == 2, wide, tl.load(number + 3)))
    rate = (lr * -tl.load(number + 4)).to(tl.float32)  # Triton's -lr is 0 - lr: not -0 where lr is 0
    decay = (-tl.maximum(lr * tl.load(number + 5), LEAST)).to(tl.float32)  # decay_rate of decay.py
    is_decay = (fields == OPPOSED) | (fields == ALIGNED) | (fields == NEITHER)
    new = tl.where(fields == RATE, rate, tl.where(is_decay & (row != 0), decay, row))

    step_at = tl.load(source)
    step = tl.load(step_at.to(tl.pointer_type(tl.float32)), mask=step_at != 0, other=2).to(tl.int32)
    root_scale = (1 / tl.sqrt(1 - _power(tl.load(number + 7), step))).to(tl.float32)
    direction_scale = (1 / (1 - _power(tl.load(number + 6), step))).to(tl.float32)
    moves = (step_at != 0) & (row != 0)
    new = tl.where(moves & (fields == ROOT_SCALE), root_scale, new)
    new = tl.where(moves & (fields == DIRECTION_SCALE), direction_scale, new)
    # SGD's form 2 is 1 at the first step.
    first = (step_at != 0) & (step == 1) & (fields == FORM) & ((row.to(tl.int32) & 3) == 2)
    new = tl.where(first, row - 1, new)
    tl.store(rows + place * FIELDS + fields, tl.where(kind < 0, row, new))
