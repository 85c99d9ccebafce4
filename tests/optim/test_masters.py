"""``master="remainder"``: bfloat16 parameters that are trained as their fp32 masters are; and ``state_dtype``."""

import copy
import io

import pytest
import torch

from hf_cwd import CWDAdamW, CWDOptimizer
from hf_cwd.kernels.interface import joined, split
from hf_cwd.rules import RULES
from tests.support.comparison import every_variant

SHAPES = [(33, 17), (5, 64), (1, 3)]
KERNELS = pytest.mark.parametrize("kernel", ["eager", "c"])
# Nothing coarser than fp32 between momentum and mask.
EXACT = {"muon": {"ns_dtype": "float32"}}


def half_up(master):
    """fp32 rounded to bfloat16, ties away from zero, by arithmetic instead of by bits."""
    fraction, exponent = torch.frexp(master.double())
    rounded = (fraction.abs() * 256 + 0.5).floor() * fraction.sign()
    return torch.ldexp(rounded / 256, exponent).to(torch.bfloat16)


def gradients(step):
    generator = torch.Generator().manual_seed(100 + step)
    return [
        torch.randn(shape, generator=generator).mul(10.0 ** -(i + step % 3)).bfloat16()
        for i, shape in enumerate(SHAPES)
    ]


def parameters():
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).bfloat16()) for shape in SHAPES]


def make(params, rule, hyper, **options):
    options = {"lr": 1e-3, "weight_decay": 0.3, **EXACT.get(rule, {}), **hyper, **options}
    return CWDOptimizer(params, algorithm=rule, **options)


def step(optimizer, params, number):
    for p, g in zip(params, gradients(number), strict=True):
        p.grad = g.to(p.dtype)
    optimizer.step()


def masters(optimizer, params):
    return [joined(p.detach(), optimizer.state[p]["remainder"].view(torch.int16)) for p in params]


@KERNELS
@pytest.mark.parametrize(("rule", "hyper"), every_variant(), ids=str)
@pytest.mark.parametrize("options", [{}, {"mask": "gt"}, {"cautious": False}, {"maximize": True}], ids=str)
def test_equal_to_an_fp32_master_bit_for_bit(rule, hyper, kernel, options):
    """After 60 steps of a size at which bfloat16 alone stands still: masters, states, and the weights, half up."""
    params = parameters()
    wide = [torch.nn.Parameter(p.detach().float()) for p in params]
    ours = make(params, rule, hyper, kernel=kernel, master="remainder", **options)
    theirs = make(wide, rule, hyper, kernel=kernel, **options)
    for number in range(60):
        step(ours, params, number)
        step(theirs, wide, number)
    for p, q, master in zip(params, wide, masters(ours, params), strict=True):
        assert torch.equal(master, q)
        assert torch.equal(p, half_up(q.detach()))
        assert not torch.equal(
            q.detach(), p.detach().float()
        )  # a master that is never between two bfloat16 proves nothing
        for key in RULES[rule].state_keys(ours.param_groups[0]):
            assert ours.state[p][key].dtype == torch.float32
            assert torch.equal(ours.state[p][key], theirs.state[q][key])


def test_split_and_joined_are_inverse_for_every_upper_half():
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).bitwise_left_shift_(16)
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        master = bits.bitwise_or(lower).view(torch.float32)
        param, remainder = torch.empty_like(master, dtype=torch.bfloat16), torch.empty_like(master, dtype=torch.int16)
        split(master.clone(), param, remainder)
        back = joined(param, remainder)
        numbers = ~master.isnan()
        assert torch.equal(back[numbers].view(torch.int32), master[numbers].view(torch.int32))
        assert back[~numbers].isnan().all()
        finite = master.isfinite() & (master.abs() >= torch.finfo(torch.float32).tiny) & (master.abs() < 3e38)
        assert torch.equal(param[finite], half_up(master[finite]))


@pytest.mark.parametrize("rule", RULES)
def test_resumes_bit_for_bit_through_a_file(rule):
    params = parameters()
    optimizer = make(params, rule, {}, master="remainder")
    for number in range(4):
        step(optimizer, params, number)
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), [p.detach() for p in params]], file)
    file.seek(0)
    saved, weights = torch.load(file, weights_only=True)
    others = [torch.nn.Parameter(w) for w in weights]
    resumed = make(others, rule, {})  # the saved master= wins
    resumed.load_state_dict(saved)
    for number in range(4, 9):
        step(optimizer, params, number)
        step(resumed, others, number)
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        assert optimizer.state[p].keys() == resumed.state[q].keys()
        for key, value in optimizer.state[p].items():
            other = resumed.state[q][key]
            assert value.dtype == other.dtype
            # The bits of a remainder can be those of a NaN.
            value, other = (x.view(torch.int16) if key == "remainder" else x for x in (value, other))
            assert torch.equal(value, other), key


def test_a_checkpoint_without_masters_begins_with_the_weights_themselves():
    params = parameters()
    plain = torch.optim.AdamW(params, lr=1e-3, weight_decay=0.1)
    step(plain, params, 0)
    optimizer = CWDAdamW(params, master="remainder")
    optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert all(optimizer.state[p]["exp_avg"].dtype == torch.float32 for p in params)
    step(optimizer, params, 1)
    assert all(optimizer.state[p]["remainder"].view(torch.int16).any() for p in params)


def test_refused_without_a_bfloat16_parameter():
    with pytest.raises(
        ValueError, match=r"lack of their fp32 masters, and the optimizer's are float32.*leave master out"
    ):
        CWDAdamW([torch.nn.Parameter(torch.ones(3))], master="remainder")
    with pytest.raises(ValueError, match="some are float16"):
        CWDAdamW([torch.nn.Parameter(torch.ones(3).half())], master="remainder")


def test_refused_before_the_first_step_where_parameters_were_made_fp32_since():
    """As Accelerate's FSDP2 does under mixed precision, after the optimizer was made."""
    (p,) = params = parameters()[:1]
    optimizer = CWDAdamW(params, master="remainder")
    before = p.detach().float()
    p.data = before.clone()
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="mixed precision of FSDP2"):
        optimizer.step()
    assert torch.equal(p, before)


def test_fp32_parameters_beside_bfloat16_ones_need_no_master():
    """Some models keep norms and routers in fp32."""
    low, high = torch.nn.Parameter(torch.ones(4).bfloat16()), torch.nn.Parameter(torch.ones(4))
    optimizer = CWDAdamW([low, high], master="remainder")
    low.grad, high.grad = torch.ones_like(low), torch.ones_like(high)
    optimizer.step()
    assert "remainder" in optimizer.state[low]
    assert "remainder" not in optimizer.state[high]


@KERNELS
@pytest.mark.parametrize("param", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16], ids=str)
def test_state_dtype(wanted, param, kernel):
    """fp32 states under bfloat16 weights keep what beta2 = 0.999 adds; a checkpoint keeps their dtype too."""
    name = str(wanted).removeprefix("torch.")
    p = torch.nn.Parameter(torch.ones(40).to(param))
    optimizer = CWDAdamW([p], state_dtype=name, kernel=kernel)
    for _ in range(3):
        p.grad = torch.full_like(p, 0.5)
        optimizer.step()
    state = optimizer.state[p]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == wanted
    expected = (1 - 0.999**3) * 0.25
    assert state["exp_avg_sq"][0].item() == pytest.approx(expected, rel=1e-6 if wanted == torch.float32 else 2**-7)
    q = torch.nn.Parameter(p.detach().clone())
    resumed = CWDAdamW([q])
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for key in ("exp_avg", "exp_avg_sq"):
        assert resumed.state[q][key].dtype == wanted
        assert torch.equal(resumed.state[q][key], state[key])


def test_capturable_needs_a_gpu():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = CWDAdamW([p], capturable=True)
    p.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"capturable=True needs the triton kernel.*Leave capturable out"):
        optimizer.step()
    assert torch.equal(p, torch.ones(3))


@pytest.mark.parametrize("rule", [rule.name for rule in RULES.values() if rule.matrix is None])
@pytest.mark.parametrize("kernel", ["c", "eager"])
def test_channels_last_steps_as_contiguous(rule, kernel):
    weight = torch.randn(4, 3, 5, 5, generator=torch.manual_seed(0))
    plain = torch.nn.Parameter(weight.clone())
    last = torch.nn.Parameter(weight.clone(memory_format=torch.channels_last))
    optimizers = [CWDOptimizer([p], algorithm=rule, lr=0.1, weight_decay=0.5, kernel=kernel) for p in (plain, last)]
    for number in range(3):
        g = torch.randn(weight.shape, generator=torch.manual_seed(number))
        plain.grad = g.clone()
        last.grad = g.clone(memory_format=torch.channels_last if number else torch.contiguous_format)
        for optimizer in optimizers:
            optimizer.step()
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(plain, last)


def test_a_kernel_by_name_refuses_what_it_cannot_take():
    gaps = torch.nn.Parameter(torch.ones(4, 6)[:, ::2])
    gaps.grad = torch.ones(4, 3)
    with pytest.raises(ValueError, match=r"kernel='c' cannot step .* without gaps.*strides \(6, 2\)"):
        CWDAdamW([gaps], kernel="c").step()
    double = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    double.grad = torch.ones_like(double)
    with pytest.raises(ValueError, match="kernel='c' does not take float64 parameters"):
        CWDAdamW([double], kernel="c").step()
    with pytest.raises(ValueError, match="kernel='triton' cannot run on cpu"):
        CWDAdamW([gaps], kernel="triton").step()
    assert torch.equal(gaps, torch.ones(4, 3))
