"""What instructions do with registers: those of a warpgroup are arrays [128] of unsigned integers, or of bool."""

from functools import cache, partial

import numpy as np

THREADS, WARP = 128, 32
LANE = np.arange(THREADS)
FIRST = LANE // WARP * WARP  # of a lane's warp
PAIR = "bf16x2"
TYPES = {f"{kind}{bits}": np.dtype(f"{of}{bits // 8}") for kind, of in zip("busf", "uuif", strict=True) for bits in (16, 32, 64)}
TYPES |= {"pred": np.dtype(bool), "bf16": np.dtype("u2"), PAIR: np.dtype("u4")}
UNSIGNED = {1: np.dtype(bool), 2: np.dtype("u2"), 4: np.dtype("u4"), 8: np.dtype("u8")}
MODIFIERS = {"rn", "ftz", "approx", "full", "sync", "wrap"}


def widened(x):
    """bfloat16, as unsigned integers, in float32."""
    return (x.astype(np.uint32) << 16).view(np.float32)


def rounded(x):
    """float32 to bfloat16, to the nearest even, as unsigned integers."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    nearest = (bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16
    return np.where(np.isnan(x), 0x7FFF, nearest).astype(np.uint16)


def joined(low, high, dtype=np.uint32):
    return low.astype(dtype) | (high.astype(dtype) << dtype(low.itemsize * 8))


def halves(x):
    half = UNSIGNED[x.itemsize // 2]
    return x.astype(half), (x >> x.dtype.type(half.itemsize * 8)).astype(half)


def _no_subnormals(x):
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, 0, x).astype(np.float32)


def _shift_left(x, n):
    return np.where(n < x.itemsize * 8, x << (n % (x.itemsize * 8)).astype(x.dtype), 0).astype(x.dtype)


def _shift_right(x, n):
    most = np.minimum(n, x.itemsize * 8 - 1).astype(x.dtype)
    return np.where((n < x.itemsize * 8) | (x.dtype.kind == "i"), x >> most, 0).astype(x.dtype)


def _bits(x, first, count):
    """Of ``x``, as a number of its type."""
    up = x.dtype.type(x.itemsize * 8 - int(count) - int(first))
    return (x << up) >> x.dtype.type(x.itemsize * 8 - int(count))


def _funnel(low, high, n):
    return (joined(low, high, np.uint64) << (n % 32).astype(np.uint64) >> np.uint64(32)).astype(np.uint32)


def _permute(low, high, selectors):
    out, both = np.zeros(THREADS, np.uint32), joined(low, high, np.uint64)
    for i in range(4):
        byte = (selectors >> np.uint32(4 * i)) & np.uint32(0xF)
        assert np.all(byte < 8), "prmt with signs"
        out |= ((both >> (byte * 8).astype(np.uint64)) & np.uint64(0xFF)).astype(np.uint32) << np.uint32(8 * i)
    return out


def _multiply_add(x, y, z):
    return (np.float64(x) * np.float64(y) + np.float64(z)).astype(x.dtype)


def _wide(x, y):
    return x.astype(np.dtype(f"{x.dtype.kind}8")) * y.astype(np.dtype(f"{x.dtype.kind}8"))


def _high(x, y):
    """The upper half of a product."""
    return np.array([int(a) * int(b) >> 8 * x.itemsize for a, b in np.broadcast(x, y)], x.dtype)


FUNCTIONS = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "mul.lo": np.multiply, "mul.wide": _wide,
    "mul.hi": _high, "mad.lo": lambda x, y, z: x * y + z, "fma": _multiply_add,
    "div": np.divide, "neg": np.negative, "abs": np.abs, "rcp": np.reciprocal,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
    "min": np.fmin, "max": np.fmax, "min.NaN": np.minimum, "max.NaN": np.maximum,
    "ex2": lambda x: _no_subnormals(np.exp2(x)), "lg2": np.log2, "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x), "tanh": np.tanh,
    "shl": _shift_left, "shr": _shift_right, "bfe": _bits, "shf.l": _funnel, "prmt": _permute,
    "setp.eq": np.equal, "setp.lt": np.less, "setp.le": np.less_equal, "setp.gt": np.greater, "setp.ge": np.greater_equal,
    "setp.ne": lambda x, y: (x < y) | (x > y) if x.dtype.kind == "f" else x != y, "setp.neu": np.not_equal,
    "shfl.idx": lambda x, lane, *_: x[FIRST + lane % WARP], "shfl.bfly": lambda x, lane, *_: x[FIRST + (LANE % WARP ^ lane)],
}  # fmt: skip
OTHER_TYPES = {"shl": {1: "u32"}, "shr": {1: "u32"}, "bfe": {1: "u32", 2: "u32"}}  # of operands, than the name's
CONVERSIONS = {
    ("bf16x2", "f32"): lambda high, low: joined(rounded(low), rounded(high)),
    ("bf16", "f32"): rounded,
    ("f32", "bf16"): widened,
}


def _of_pairs(function, *pairs):
    """A function of float32 of pairs of bfloat16."""
    low, high = (function(*map(widened, half)) for half in zip(*map(halves, pairs), strict=True))
    return joined(rounded(low), rounded(high))


def _select(x, y, which):
    return np.where(which, x, y)


@cache
def operation(name: str):
    """(a function of arrays, the types of its operands, of which the last is that of any others too), or None for other instructions."""
    parts = name.split(".")
    if parts[0] == "cvt":
        to, of = parts[-2:]
        return CONVERSIONS.get((to, of), lambda x: x.astype(TYPES[to])), [TYPES[of]]
    if parts[0] == "selp":
        return _select, [TYPES[parts[-1]], TYPES[parts[-1]], TYPES["pred"]]
    key = ".".join(part for part in parts[:-1] if part not in MODIFIERS)
    if key not in FUNCTIONS:
        return None
    types = [OTHER_TYPES.get(key, {}).get(i, parts[-1]) for i in range(3)]
    function = FUNCTIONS[key]
    return partial(_of_pairs, function) if parts[-1] == PAIR else function, [TYPES[t] for t in types]
