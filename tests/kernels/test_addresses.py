"""Kernels take an address where the tensor's numbers lie, and nowhere else; the eager kernel steps what is otherwise.

The Triton kernels are held to it in triton_risks.py.
"""

import itertools
import logging

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from hf_cwd import CWDAdamW, CWDMuon, CWDOptimizer, StepStatistics
from hf_cwd.kernels import eager, interface, selection
from hf_cwd.kernels.addresses import are_plain, lacks_memory, obstacle, overlaps_itself, share_memory
from hf_cwd.rules import RULES
from tests.kernels.followed import settings
from tests.kernels.odd import ARE_PLAIN, KINDS, LIE_OTHERWISE, PLACES, SHAPE, Wrapped, problems, trained

PAIRS = list(itertools.product(KINDS, PLACES))


def is_taken(kind, place):
    """Gradients that lie otherwise are copied, and states are made as their parameter lies."""
    return (
        kind in ARE_PLAIN
        or (place == "gradient" and kind in LIE_OTHERWISE)
        or (kind, place) == ("transposed", "parameter")
    )


@pytest.fixture
def warnings(caplog):
    selection._said.clear()
    caplog.set_level(logging.WARNING, logger="hf_cwd")
    return caplog


@pytest.mark.parametrize("rule", RULES)
def test_odd_tensors_are_stepped_as_ordinary_ones(rule):
    assert list(problems(rule)) == []


@pytest.mark.parametrize(("kind", "place"), [pair for pair in PAIRS if not is_taken(*pair)])
def test_a_kernel_by_name_refuses_them(kind, place):
    with pytest.raises(ValueError, match=r"kernel='c' cannot step parameter 'odd' of shape \(12, 20\)"):
        trained("adamw", kind, place, kernel="c")


@pytest.mark.parametrize(("kind", "place"), [pair for pair in PAIRS if is_taken(*pair)])
def test_a_kernel_by_name_takes_what_has_memory(kind, place):
    trained("adamw", kind, place, kernel="c")


def test_it_is_said_once_and_names_the_parameter(warnings):
    for _ in range(2):
        trained("adamw", "wrapper", "states")
    (record,) = warnings.records
    assert "the eager kernel, which is slower, steps parameter 'odd' of shape (12, 20)" in record.message
    assert "since its state is a Wrapped, which decides itself what its numbers are" in record.message
    trained("adamw", "negative bit", "gradient")
    assert "since its gradient has its negative bit set" in warnings.records[-1].message


@pytest.mark.parametrize("rule", ["adamw", "muon"])
def test_of_a_zero_tensor_the_numbers_are_zero(rule, warnings):
    results = []
    for zeros in (torch._efficientzerotensor, torch.zeros):
        p = nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))
        optimizer = CWDOptimizer([p], lr=0.1, weight_decay=0.1, algorithm=rule)
        for grad in (torch.ones(3, 4), zeros(3, 4)):
            p.grad = grad
            optimizer.step()
        results.append(p.detach())
    torch.testing.assert_close(*results)
    assert "has no memory" in warnings.records[0].message


def test_equal_to_torch_s_number():
    """Where torch's sign is right without a word, and where it steps a wrapper."""
    found = {}
    for kind in (torch.optim.AdamW, CWDAdamW):
        params = [nn.Parameter(torch.ones(4)), nn.Parameter(Wrapped(torch.ones(4)))]
        params[0].grad, params[1].grad = torch._neg_view(torch.ones(4)), Wrapped(torch.ones(4))
        kind(params, lr=0.1, weight_decay=0.0).step()
        found[kind] = [params[0].detach(), params[1].inner.detach()]
    torch.testing.assert_close(found[CWDAdamW], found[torch.optim.AdamW])
    assert found[CWDAdamW][0][0] > 1 > found[CWDAdamW][1][0]


def test_statistics_of_a_wrapper_are_those_of_its_numbers():
    totals = []
    for kind in (None, "wrapper"):
        _, optimizer = trained("adamw", kind, "parameter")
        optimizer.statistics = StepStatistics()
        optimizer.step()
        totals.append(optimizer.statistics.read().total)
    assert totals[1].weight == pytest.approx(totals[0].weight)
    assert totals[1].decayed == totals[0].decayed
    assert totals[1].numel == 2 * 12 * 20


def freed(tensor):
    tensor.untyped_storage().resize_(0)


def halved(tensor):
    tensor.untyped_storage().resize_(tensor.nbytes // 2)


@pytest.mark.parametrize("lose", [freed, halved])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kernel", ["auto", "eager", "c"])
@pytest.mark.parametrize("rule", ["adamw", "muon"])
def test_memory_that_is_not_there(rule, kernel, place, lose):
    """Also where items are kept: torch's own kernels would read it."""
    p = nn.Parameter(torch.randn(SHAPE))
    optimizer = CWDOptimizer([("weights", p)], lr=0.1, algorithm=rule, kernel=kernel)
    for _ in range(3):
        p.grad = torch.randn(SHAPE)
        optimizer.step()
    tensor = {"parameter": p.data, "gradient": p.grad, "states": optimizer.state[p]["exp_avg"]}[place]
    lose(tensor)
    name = "parameter 'weights' of shape" if rule == "adamw" else "parameter .*of shape"
    with pytest.raises(RuntimeError, match=rf"{name} \(12, 20\) .* storage of \d+ bytes, which is too small"):
        optimizer.step()


@pytest.mark.parametrize("kernel", ["auto", "eager", "c"])
@pytest.mark.parametrize("place", ["parameter", "states"])
def test_elements_that_share_memory(kernel, place):
    value = torch.ones(1, 6).expand(4, 6)
    p = nn.Parameter(value if place == "parameter" else torch.ones(4, 6))
    p.grad = torch.ones(1, 6).expand(4, 6)
    optimizer = CWDAdamW([("weights", p)], lr=0.1, kernel=kernel)
    if place == "states":
        optimizer.step()
        optimizer.state[p]["exp_avg"] = value
    with pytest.raises(RuntimeError, match=r"parameter 'weights' .* strides \(0, 1\), by which some"):
        optimizer.step()


def test_a_gradient_may_share_memory_among_its_elements():
    p = nn.Parameter(torch.ones(4, 6))
    p.grad = torch.full((1, 6), 2.0).expand(4, 6)
    CWDOptimizer([p], lr=0.25, weight_decay=0.0, algorithm="sgd", kernel="c").step()
    assert (p == 0.5).all()


def test_parameters_that_share_memory_are_stepped_in_turn(warnings):
    found = []
    for kernel in ("auto", "eager"):
        w = torch.linspace(-1, 1, 36).view(6, 6)
        params = [nn.Parameter(w), nn.Parameter(w.t()), nn.Parameter(w[:2]), nn.Parameter(torch.ones(3))]
        optimizer = CWDAdamW(params, lr=0.1, kernel=kernel)
        for k in range(3):
            for p in params:
                p.grad = torch.full_like(p, k - 1.5)
            optimizer.step()
        found.append(w.clone())
    assert torch.equal(*found)
    assert "shares memory with another parameter" in warnings.records[0].message
    assert share_memory([torch.ones(3), w[:2], torch.ones(0), w[1:], w[5:]]) == {1, 3, 4}
    assert share_memory(list(w)) == set()


@pytest.mark.parametrize("place", ["parameter", "remainder"])
def test_masters_are_made_of_bits(place):
    p = nn.Parameter(torch.ones(4, 6, dtype=torch.bfloat16))
    optimizer = CWDAdamW([("weights", p)], lr=0.1, master="remainder")
    p.grad = torch.ones_like(p)
    optimizer.step()
    if place == "parameter":
        p.data = torch._neg_view(p.data)
    else:
        optimizer.state[p]["remainder"] = torch._neg_view(optimizer.state[p]["remainder"])
    with pytest.raises(RuntimeError, match=r"parameter 'weights' .* negative bit set, and its master is made of"):
        optimizer.step()


class Dispatched(torch.Tensor):
    """Has memory, and decides what is done with it."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} was called")


def test_what_is_plain():
    jagged = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    odd = [
        *(torch._efficientzerotensor(4), torch._neg_view(torch.ones(4)), torch.ones(4, device="meta")),
        *(torch._to_functional_tensor(torch.ones(4)), torch.eye(4).to_sparse(), torch.ones(4, 4).to_mkldnn()),
        *(TwoTensor(torch.ones(4), torch.ones(4)), nn.UninitializedParameter(), jagged),
        torch.ones(4).as_subclass(Dispatched),
    ]
    for tensor in odd:
        assert obstacle(tensor) is not None
        assert not are_plain([torch.ones(3), tensor])
        assert not lacks_memory(tensor)
        assert not overlaps_itself(tensor)
    cut = torch.ones(12)[8:]
    cut.untyped_storage().resize_(cut.nbytes)  # as many bytes as it has, and not where it has them
    assert lacks_memory(cut)
    assert not are_plain([cut])
    whole = torch.ones(6, 4)
    fine = [whole, whole[2:], whole[6:], nn.Parameter(whole), torch.ones(()), torch.ones(3, 0), whole[:1]]
    assert are_plain(fine)
    assert not any(map(lacks_memory, fine))
    assert not any(map(overlaps_itself, [*fine, whole.t(), whole[:, ::2], whole[:, 1:].t()]))
    assert overlaps_itself(whole.as_strided((5, 5), (4, 1)))
    for tensor in (whole.t(), whole[:, 1:]):
        assert not are_plain([tensor])
        assert obstacle(tensor) is None
    parts = [whole, whole[2:], whole[:2], whole.t()[:2]]
    whole.untyped_storage().resize_(40)
    assert list(map(lacks_memory, parts)) == [True, True, False, True]
    assert [are_plain([part]) for part in parts] == [False, False, True, False]


def test_each_device_has_its_calls(monkeypatch):
    """A kernel is launched for the tensors of one device: models whose layers lie on several are stepped as well."""
    monkeypatch.setattr(selection, "_kernel_for", lambda rule, name, device, dtypes: eager)
    made = settings("lion")
    devices = ["cpu", "meta", "cpu", "meta"]
    tensors = [torch.zeros(3, device=device) for device in devices]
    items = [interface.Item(t, t, (t,), None, 1, made, t) for t in tensors]
    found = selection.calls(RULES["lion"], items)
    assert [[item.param.device.type for item in call.items] for call in found] == [["cpu"] * 2, ["meta"] * 2]


def test_a_part_of_another_shape():
    """As a DTensor's state is that was placed otherwise."""
    p = torch.zeros(6)
    made = settings("lion")._replace(kernel="auto")
    item = interface.Item(p, torch.zeros(6), (torch.zeros(3),), None, 1, made, p)
    with pytest.raises(RuntimeError, match=r"shape \(6,\), and its gradient and states \(6,\), \(3,\)"):
        selection.calls(RULES["lion"], [item])


def test_matrices_of_wrappers_are_orthogonalised():
    results = []
    for make in (torch.Tensor.clone, Wrapped):
        p = nn.Parameter(make(torch.eye(6, 9)))
        p.grad = make(torch.linspace(-1, 1, 54).view(6, 9))
        CWDMuon([p], lr=0.1).step()
        results.append(p.detach() if make is not Wrapped else p.inner.detach())
    torch.testing.assert_close(*results)
