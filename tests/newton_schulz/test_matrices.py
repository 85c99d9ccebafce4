"""Matrices inside of parameters: where they lie, and that Muon treats them as if they were parameters of their own."""

import io
import itertools
import math

import pytest
import torch
from torch import nn

from hf_cwd import CWDMuon
from hf_cwd.newton_schulz.matrices import MatrixLayout
from tests.support.stepping import parameter, set_grads

# Stack, sizes, periods and in_features; each once with the output features first and once with them last.
PATTERNS = [
    ((), (3, 5), 1, 4),
    ((), (2, 1, 4), 3, 5),
    ((), (1, 1), 4, 6),
    ((2,), (4, 4), 1, 3),
    ((2, 3), (2, 3), 2, 2),
    ((2,), (), 1, 3),
]
CASES = [
    (
        (*stack, columns, rows) if transposed else (*stack, rows, columns),
        MatrixLayout(sizes, periods, transposed=transposed),
    )
    for stack, sizes, periods, columns in PATTERNS
    for transposed in (False, True)
    for rows in [periods * sum(sizes or (5,))]
]
CASES += [
    ((6, 4, 3, 2), MatrixLayout(flattened=True)),
    ((6, 2, 3), MatrixLayout((3, 3), flattened=True)),  # a convolution of two groups
    ((4, 2, 3), MatrixLayout(transposed=True, flattened=True)),
    ((64 + 8 + 8, 16), MatrixLayout((64, 8, 8))),  # grouped-query attention: q has another scale than k and v
]
every_case = pytest.mark.parametrize(("shape", "layout"), CASES, ids=str)


def positions(shape, layout):
    """Where each matrix of each member of the stack lies in the flat parameter, counted out element by element."""
    if layout.flattened:
        shape = (shape[0], math.prod(shape[1:]))
    *stack, first, second = shape
    rows, columns = (second, first) if layout.transposed else (first, second)
    sizes = layout.sizes or (rows,)
    found = []
    for part, size in enumerate(sizes):
        numbers = itertools.product(range(layout.periods), range(size))
        own = [period * sum(sizes) + sum(sizes[:part]) + row for period, row in numbers]
        for start in range(0, math.prod(stack) * rows * columns, rows * columns):
            at = [
                [start + (c * rows + r if layout.transposed else r * columns + c) for c in range(columns)] for r in own
            ]
            found.append(torch.tensor(at))
    return found


def separate(tensor, layout):
    flat = tensor.detach().contiguous().view(-1)
    return [flat[at] for at in positions(tensor.shape, layout)]


def optimizers(x, layout, **options):
    """Muon on a parameter with a layout, and on parameters that hold one matrix each."""
    options = {"lr": 0.02, "weight_decay": 0.5} | options
    parts = [nn.Parameter(matrix) for matrix in separate(x, layout)]
    fused = CWDMuon([{"params": [x], "layout": layout.as_group_value()}], **options)
    return fused, CWDMuon(parts, **options), parts


def step_both(fused, apart, x, parts, layout, steps):
    for seed in range(steps):
        set_grads([x], seed)
        for part, grad in zip(parts, separate(x.grad, layout), strict=True):
            part.grad = grad
        fused.step()
        apart.step()


@every_case
def test_matrices_are_where_they_are_counted_out_to_be(shape, layout):
    x = parameter(*shape, dtype=torch.float64).detach()
    expected = separate(x, layout)
    found = [member for matrix in layout.matrices(x) for member in matrix.reshape(-1, *matrix.shape[-2:])]
    assert layout.count(shape) == len(expected)
    assert [matrix.tolist() for matrix in found] == [matrix.tolist() for matrix in expected]


@every_case
@pytest.mark.parametrize("adjust_lr_fn", ["match_rms_adamw", "original"])
def test_a_fused_parameter_moves_as_its_matrices_would(shape, layout, adjust_lr_fn):
    x = parameter(*shape, dtype=torch.float64)
    fused, apart, parts = optimizers(x, layout, adjust_lr_fn=adjust_lr_fn)
    start = x.detach().clone()
    step_both(fused, apart, x, parts, layout, steps=4)
    assert not torch.allclose(x, start, atol=1e-3)
    for found, part in zip(separate(x, layout), parts, strict=True):
        # Batched and single products round differently, and Newton-Schulz multiplies a difference by up to 3.4^5.
        torch.testing.assert_close(found, part.detach(), rtol=0, atol=1e-12)
    for found, part in zip(separate(fused.state[x]["exp_avg"], layout), parts, strict=True):
        assert torch.equal(found, apart.state[part]["exp_avg"])


def test_a_convolution_in_channels_last_moves_as_a_contiguous_one():
    x = parameter(6, 4, 3, 2, dtype=torch.float64)
    twin = nn.Parameter(x.detach().clone(memory_format=torch.channels_last))
    for p in (x, twin):
        optimizer = CWDMuon([{"params": [p], "layout": {"flattened": True}}], lr=0.02, weight_decay=0.5)
        for seed in range(3):
            set_grads([p], seed)
            optimizer.step()
    assert twin.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(twin, x, rtol=0, atol=1e-12)


def test_an_expert_without_tokens_is_only_decayed():
    x = parameter(3, 8, 4)
    start = x.detach().clone()
    optimizer = CWDMuon([{"params": [x], "layout": {"sizes": (4, 4)}}], lr=0.1, weight_decay=0.5)
    set_grads([x], 0)
    x.grad[1] = 0
    optimizer.step()
    torch.testing.assert_close(x[1], start[1] * (1 - 0.1 * 0.5))
    assert (x[::2] - start[::2]).abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_default_precision_keeps_every_layout_finite(dtype):
    params = [parameter(*shape, dtype=dtype) for shape, _ in CASES]
    starts = [p.detach().clone() for p in params]
    groups = [{"params": [p], "layout": layout.as_group_value()} for p, (_, layout) in zip(params, CASES, strict=True)]
    optimizer = CWDMuon(groups, lr=0.1, weight_decay=0.1)
    for seed in range(3):
        set_grads(params, seed)
        optimizer.step()
    for p, start, (shape, _) in zip(params, starts, CASES, strict=True):
        assert (p.dtype, p.shape, optimizer.state[p]["exp_avg"].shape) == (dtype, shape, shape)
        assert p.isfinite().all()
        assert (p != start).any()


@pytest.mark.parametrize(
    ("layout", "shape", "message"),
    [
        (MatrixLayout(), (3,), r"shape \(3,\) holds no matrix"),
        (MatrixLayout((2, 3)), (6, 4), r"shape \(6, 4\) has 6 output features, not 2 \+ 3$"),
        (MatrixLayout((2, 3), periods=2), (5, 4), r"shape \(5, 4\) has 5 output features, not 2 x \(2 \+ 3\)"),
        (MatrixLayout(periods=3), (4, 2), r"shape \(4, 2\) has 4 output features, not 3 x \(...\)"),
        (MatrixLayout((6, -2)), (4, 2), r"sizes \(6, -2\) and periods 1 must be positive"),
        (MatrixLayout(periods=0), (4, 2), r"sizes \(\) and periods 0 must be positive"),
        (MatrixLayout((2, 3), transposed=True), (5, 4), r"shape \(5, 4\) has 4 output features, not 2 \+ 3"),
        (MatrixLayout((2, 3), flattened=True), (4, 5, 1), r"shape \(4, 5, 1\) has 4 output features, not 2 \+ 3"),
    ],
)
def test_a_layout_that_does_not_fit_says_what_does_not(layout, shape, message):
    with pytest.raises(ValueError, match=message):
        layout.check(shape)


def test_the_optimizer_names_the_parameter_that_a_layout_does_not_fit():
    groups = [{"params": [("qkv", parameter(6, 4))], "layout": {"sizes": (2, 3)}}]
    with pytest.raises(
        ValueError, match=r"parameter 'qkv' of shape \(6, 4\) does not fit.*'sizes': \(2, 3\).*has 6 out"
    ):
        CWDMuon(groups)
    with pytest.raises(ValueError, match=r"does not fit the group's layout=\{'rows': 3\}.*'rows'"):
        CWDMuon([{"params": [parameter(6, 4)], "layout": {"rows": 3}}])
    with pytest.raises(ValueError, match=r"shape \(2, 6, 4\) is not a matrix.*'layout'"):
        CWDMuon([parameter(2, 6, 4)])


def saved(optimizer):
    """The state dict after a way through a file that is read without pickle's power to run code."""
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_a_state_dict_with_layouts_continues_bit_for_bit():
    def make(params):
        layouts = [layout.as_group_value() for _, layout in CASES] + [None]
        groups = [{"params": [p], "layout": layout} for p, layout in zip(params, layouts, strict=True)]
        return CWDMuon([*groups, {"params": [vector], "algorithm": "adamw"}], lr=0.02, weight_decay=0.5)

    params, vector = [parameter(*shape) for shape, _ in CASES] + [parameter(5, 3)], parameter(4)
    optimizer = make(params)
    assert "layout" not in optimizer.param_groups[-1]
    for seed in range(2):
        set_grads(params, seed)
        optimizer.step()
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = make(twins)
    resumed.load_state_dict(saved(optimizer))
    assert [g.get("layout") for g in resumed.param_groups] == [g.get("layout") for g in optimizer.param_groups]
    set_grads(params, 2)
    set_grads(twins, 2)
    optimizer.step()
    resumed.step()
    assert all(torch.equal(p, twin) for p, twin in zip(params, twins, strict=True))


def test_a_state_dict_from_another_layout_is_refused_and_nothing_is_loaded():
    def make(p, layout):
        return CWDMuon([{"params": [p], "layout": layout}], lr=0.02)

    p, q = parameter(8, 4), parameter(8, 4)
    optimizer, whole = make(p, {"sizes": (4, 4)}), make(q, None)
    set_grads([p], 0)
    optimizer.step()
    whole.param_groups[0]["lr"] = 0.5
    message = r"took layout=\{'sizes': \(4, 4\)\} from parameters that are now routed as None.*the target modules"
    with pytest.raises(ValueError, match=message):
        whole.load_state_dict(saved(optimizer))
    assert whole.param_groups[0]["lr"] == 0.5
    assert not whole.state
    with pytest.raises(ValueError, match=r"took layout=None from parameters that are now routed as \{'sizes'"):
        optimizer.load_state_dict(saved(whole))


def test_a_layout_that_went_through_json_is_the_same():
    optimizer = CWDMuon([{"params": [parameter(8, 4)], "layout": {"sizes": (4, 4)}}])
    state = optimizer.state_dict()
    state["param_groups"][0]["layout"]["sizes"] = [4, 4]
    optimizer.load_state_dict(state)
    assert MatrixLayout(**optimizer.param_groups[0]["layout"]) == MatrixLayout((4, 4))


def test_a_state_dict_of_before_layouts_still_loads():
    p, q = parameter(8, 4), parameter(8, 4)
    optimizer, resumed = CWDMuon([p], weight_decay=0.5), CWDMuon([q], weight_decay=0.5)
    set_grads([p], 0)
    optimizer.step()
    state = saved(optimizer)
    assert state["param_groups"][0].pop("layout") is None
    resumed.load_state_dict(state)
    assert resumed.param_groups[0]["layout"] is None
    with torch.no_grad():
        q.copy_(p)
    set_grads([p], 1)
    set_grads([q], 1)
    optimizer.step()
    resumed.step()
    assert torch.equal(p, q)
