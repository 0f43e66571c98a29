"""Functions of a scan's inputs and decays in Triton, written to be few instructions: a scan is made of them.

Triton's log2 is some twenty instructions and its division eight; these are held to a few units of float32's last place.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# Added to a small float32, this leaves it, rounded to an integer, in the low bits of the mantissa.
_ROUND_TO_1 = tl.constexpr(1.5 * 2.0**23)


@triton.jit
def softplus(x):
    """log(1 + exp(x)), to 1e-6 of itself also where it is small."""
    e = tl.exp2(-LOG2E * tl.abs(x))
    # log(1 + e) / e, minimax over 0 .. 1
    p = -0.008539174683392048 * e + 0.04408952221274376
    p = p * e - 0.10768157988786697
    p = p * e + 0.17745234072208405
    p = p * e - 0.24495461583137512
    p = p * e + 0.33275479078292847
    p = p * e - 0.4999740421772003
    p = p * e + 0.9999998211860657
    return p * e + tl.maximum(x, 0.0)


@triton.jit
def silu(x):
    """x / (1 + exp(-x))."""
    root = tl.rsqrt(1.0 + tl.exp2(-LOG2E * x))
    return x * root * root


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    root = tl.rsqrt(1.0 + tl.exp2(-LOG2E * x))
    return root * root


@triton.jit
def polynomial_exp2(x, FINE: tl.constexpr):
    """2^x for x <= 0 by multiply-adds alone, to 3e-6 of itself, FINE: by one more to 2e-7, and exact at 0; 2^-126 for
    what is below."""
    x = tl.maximum(x, -126.0)
    whole = x + _ROUND_TO_1
    r = x - (whole - _ROUND_TO_1)
    # minimax over -0.5 .. 0.5
    if FINE:
        p = 0.001326472731307149 * r + 0.009671512991189957
        p = p * r + 0.05550733581185341
        p = p * r + 0.24022242426872253
        p = p * r + 0.6931470036506653
    else:
        p = 0.00958285 * r + 0.05590643
        p = p * r + 0.24024099
        p = p * r + 0.69312419
    p = p * r + 1.0
    return (p.to(tl.int32, bitcast=True) + (whole.to(tl.int32, bitcast=True) << 23)).to(tl.float32, bitcast=True)


@triton.jit
def exp2_rows(x, rows, POLYNOMIAL: tl.constexpr, FINE: tl.constexpr):
    """2^x for x <= 0: of every 16 rows POLYNOMIAL by multiply-adds, see polynomial_exp2, the others by the
    special-function units.

    x: float32 [N, LANES]. rows: int32 [N], their numbers. A thread that holds whole columns computes each value once:
    the compiler knows the numbers of its rows and drops what is not selected.
    """
    if POLYNOMIAL == 0:
        return tl.exp2(x)
    else:
        return tl.where((rows * POLYNOMIAL % 16 < POLYNOMIAL)[:, None], polynomial_exp2(x, FINE), tl.exp2(x))
