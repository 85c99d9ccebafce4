"""The definition of the mask and of one step, in hf_cwd/decay.py."""

import itertools
import math

import pytest
import torch

from hf_cwd import cautious_mask
from hf_cwd.decay import step_, sum_dtype

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
MASKS = pytest.mark.parametrize("mask", ["ge", "gt"])


def awkward(dtype: torch.dtype) -> list[tuple[float, str]]:
    """Numbers and the sign that the mask has to see in them; the squares of the tiny ones underflow."""
    info = torch.finfo(dtype)
    denormal = info.smallest_normal * info.eps
    tiny = 2.0 ** (math.log2(denormal) // 2 - 1)
    assert torch.tensor(denormal, dtype=dtype) > 0
    assert torch.tensor(tiny, dtype=dtype) ** 2 == 0
    sizes = (denormal, info.smallest_normal, tiny, 1.0, info.max, math.inf)
    return [(0.0, "0"), (-0.0, "0"), (math.nan, "0"), *[(x, "+") for x in sizes], *[(-x, "-") for x in sizes]]


# u pulls x towards zero, and so is helped by the decay, where they have the same sign. Zeros: the paper's >= counts
# them, > does not.
TRUTH = {
    ("+", "+"): {"ge": 1, "gt": 1},
    ("-", "-"): {"ge": 1, "gt": 1},
    ("+", "-"): {"ge": 0, "gt": 0},
    ("-", "+"): {"ge": 0, "gt": 0},
    ("0", "+"): {"ge": 1, "gt": 0},
    ("0", "-"): {"ge": 1, "gt": 0},
    ("+", "0"): {"ge": 1, "gt": 0},
    ("-", "0"): {"ge": 1, "gt": 0},
    ("0", "0"): {"ge": 1, "gt": 0},
}


@DTYPES
@MASKS
@pytest.mark.parametrize("copies", [1, 37], ids=["one", "many"])
def test_truth_table(dtype, mask, copies):
    """``copies``: one number takes torch's scalar code, many its vector code with a rest."""
    for (u, sign_u), (x, sign_x) in itertools.product(awkward(dtype), repeat=2):
        found = cautious_mask(torch.full((copies,), u, dtype=dtype), torch.full((copies,), x, dtype=dtype), mask=mask)
        assert found.tolist() == [TRUTH[sign_u, sign_x][mask]] * copies, (u, x)


@DTYPES
def test_mask_is_new_and_of_the_same_kind(dtype):
    u, x = torch.randn(3, 4).to(dtype), torch.randn(3, 4).to(dtype).t().contiguous().t()
    before = u.clone(), x.clone()
    found = cautious_mask(u, x)
    assert (found.dtype, found.shape) == (dtype, u.shape)
    assert torch.equal(u, before[0])
    assert torch.equal(x, before[1])


@DTYPES
@MASKS
@pytest.mark.parametrize("factor", [2.0**-9, 3.0, 200.0])
def test_mask_ignores_positive_scales(dtype, mask, factor):
    """Bias correction, eps and shape factors are positive: they cannot change what is decayed."""
    u = torch.randn(500, generator=torch.manual_seed(0)).to(dtype)
    x = torch.randn(500, generator=torch.manual_seed(1)).to(dtype)
    u[:50] = 0
    expected = cautious_mask(u, x, mask=mask)
    assert torch.equal(cautious_mask(factor * u, x, mask=mask), expected)
    assert torch.equal(cautious_mask(u, factor * x, mask=mask), expected)
    assert torch.equal(cautious_mask(-u, -x, mask=mask), expected)


def test_default_mask_is_the_papers():
    assert cautious_mask(torch.zeros(1), torch.ones(1)).item() == 1


@pytest.mark.parametrize("mask", ["", "GE", "lt", None])
def test_unknown_mask_is_refused(mask):
    with pytest.raises(ValueError, match=r"'ge'.*'gt'"):
        cautious_mask(torch.ones(1), torch.ones(1), mask=mask)


@pytest.mark.parametrize("scale", [1.0, 0.2, 7.0])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1, 3.0])
@pytest.mark.parametrize(("cautious", "mask"), [(True, "ge"), (True, "gt"), (False, "ge")])
def test_step_is_the_formula(scale, weight_decay, cautious, mask):
    lr = 0.03
    u = torch.randn(400, dtype=torch.float64, generator=torch.manual_seed(0))
    x = torch.randn(400, dtype=torch.float64, generator=torch.manual_seed(1))
    u[:40] = 0
    before = x.clone()
    step_(x, u, lr=lr, weight_decay=weight_decay, scale=scale, cautious=cautious, mask=mask)
    for found, x_i, u_i in zip(x.tolist(), before.tolist(), u.tolist(), strict=True):
        decayed = not cautious or u_i * x_i > 0 or (u_i == 0 and mask == "ge")
        # lr * weight_decay, without the scale, of the parameter before the step.
        expected = x_i - lr * scale * u_i - (lr * weight_decay * x_i if decayed else 0.0)
        assert found == pytest.approx(expected, rel=1e-14, abs=1e-15)


@pytest.mark.parametrize("cautious", [True, False])
def test_no_decay_is_not_computed(cautious):
    """0 * inf would be NaN."""
    x = torch.tensor([math.inf, -math.inf, 1.0])
    sums = torch.zeros(4, dtype=torch.float64)
    step_(x, torch.zeros(3), lr=1.0, weight_decay=0.0, cautious=cautious, sums=sums)
    assert x.tolist() == [math.inf, -math.inf, 1.0]
    assert sums.tolist() == [0, 0, math.inf, 0]


@pytest.mark.parametrize("cautious", [True, False])
def test_small_decay_is_right_on_average(cautious):
    """The factor 1 - lr * weight_decay, rounded to fp32 before it is used, would decay every element by 1.3 % more."""
    x = 1 + torch.rand(100_000, generator=torch.manual_seed(0))
    before = x.double().mean()
    step_(x, torch.zeros_like(x), lr=1e-5, weight_decay=0.1, cautious=cautious)
    # Each element is rounded by up to half an ulp, 6 % of its decay; the mean of 100 000 of them by 0.02 %.
    assert ((before - x.double().mean()) / before).item() == pytest.approx(1e-6, rel=2e-3)


@MASKS
def test_sums(mask):
    u = torch.tensor([1.0, 1.0, -1.0, 0.0, 2.0])
    x = torch.tensor([1.0, -2.0, -3.0, 4.0, 0.0])
    sums = torch.zeros(4, dtype=torch.float64)
    step_(x.clone(), u, lr=0.1, weight_decay=0.1, scale=3.0, mask=mask, sums=sums)
    decayed, among = {"ge": (4, 26), "gt": (2, 10)}[mask]  # the same sign: elements 0 and 2; a zero: elements 3 and 4
    assert sums.tolist() == [decayed, 7, 30, among]
    step_(x.clone(), u, lr=0.1, weight_decay=0.1, cautious=False, sums=sums)  # added; all five
    assert sums.tolist() == [decayed + 5, 14, 60, among + 30]


@pytest.mark.parametrize("cautious", [True, False])
def test_count_is_exact_for_large_models(cautious):
    """float32 holds no odd number above 2^24 = 16.8 million, the size of a small model."""
    sums = torch.full((4,), 2.0**24, dtype=torch.float64)
    for _ in range(3):
        step_(torch.ones(1), torch.ones(1), lr=0.1, weight_decay=0.1, cautious=cautious, sums=sums)
    assert sums.tolist() == [2**24 + 3] * 4


def test_sums_are_of_a_dtype_that_the_device_has():
    kinds = {kind: sum_dtype(torch.device(kind)) for kind in ("cpu", "cuda", "mps", "xpu")}
    assert kinds == {"cpu": torch.float64, "cuda": torch.float64, "mps": torch.float32, "xpu": torch.float32}
