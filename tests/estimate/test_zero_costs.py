"""``hf-cwd explain --layout zero1|zero2|zero3`` against real DeepSpeed engines; zero_ranks.py says how it is compared.

There is one launch for all cases.
"""

import json
import re
import sys
import time
from math import prod

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from hf_cwd.cli import explain, main
from hf_cwd.distributed.local_view import full_shape
from hf_cwd.estimate import costs, zero_costs
from hf_cwd.estimate import step_cost as estimated
from hf_cwd.estimate.parallelism import Zero
from hf_cwd.rules import RULES
from tests.estimate.zero_tables import CASES, MODELS, WORLD
from tests.support.forking import DEEPSPEED, fork_ranks
from tests.support.launching import ROOT, finish_all
from tests.support.tiny import TINY


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each rank found out about each case."""
    folder = tmp_path_factory.mktemp("engines")
    ranks = fork_ranks(WORLD, "-m", "tests.estimate.zero_ranks", folder, cwd=ROOT, modules=DEEPSPEED)
    for result in finish_all(ranks):
        assert result.returncode == 0, result.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_who_holds_what_the_plans_and_the_memory_are_deepspeed_s(case, results):
    for number, rank in enumerate(results):
        assert not rank[str(case)]["problems"], f"rank {number}: {rank[str(case)]['problems']}"


def test_the_cases_are_such_that_a_mistake_would_show(results):
    """Ranks that receive different amounts, several rounds, and sub-groups, which make a difference."""
    first, third, in_sub_groups = (results[0][str(CASES[i])] for i in (0, 4, -1))
    assert [CASES[i].layout for i in (0, 4, -1)] == ["zero1", "zero3", "zero3"]
    assert len(set(first["received"])) > 1
    assert third["rounds"] > 2
    assert in_sub_groups["received"] != third["received"]


def printed(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["hf-cwd", "explain", *map(str, arguments)])
    assert main() == 0
    return capsys.readouterr().out.splitlines()


def table(lines):
    """The table of ranks: the first column to the others."""
    start = next(i for i, line in enumerate(lines) if line.startswith("ranks "))
    cells = (re.split(r"  +", line) for line in lines[start + 1 :])
    return {name: rest for name, *rest in cells if rest}


@pytest.mark.parametrize("case", [case for case in CASES if not case.frozen], ids=str)
def test_what_is_printed_is_what_a_step_sends(case, results, monkeypatch, capsys, tmp_path):
    """The frozen ones aside, for no configuration says what is frozen."""
    AutoConfig.for_model(**MODELS[case.model]).save_pretrained(tmp_path)
    monkeypatch.setattr(zero_costs, "SUB_GROUP_SIZE", case.sub_group_size)
    flags = ["--layout", case.layout, "--world", WORLD, "--all", "--device", "cpu", "--dtype", case.dtype]
    flags += ["--optim", case.optim, *(["--optim_args", case.optim_args] if case.optim_args else [])]
    lines = printed(monkeypatch, capsys, tmp_path, *flags)
    assert f"--layout {case.layout}=3: 3 ranks, {case.dtype} parameters" in lines
    wanted = results[0][str(case)]
    if case.optim == "cwd_adamw":
        assert wanted["received"] == [0] * WORLD
        assert [len(columns) for columns in table(lines).values()] == [3] * WORLD
        assert lines[-1].startswith("cwd_adamw is element-wise: each rank steps what it holds")
        return
    assert [int(columns[4].replace(",", "")) for columns in table(lines).values()] == wanted["received"]
    (line,) = (line for line in lines if line.startswith("Rounds of exchange a step: "))
    assert line.startswith(f"Rounds of exchange a step: {wanted['rounds']}, in float32;")


def step_costs(model, layout, *, dtype=torch.float32, rule="muon", device="cpu", **arguments):
    routing = explain.routed(model, RULES[rule])
    states = {r.name: explain.state_bytes(r, arguments, zero_costs.MASTER) for r in routing.routes}
    return estimated.step_cost(model, routing, layout, arguments=arguments, states=states, dtype=dtype, device=device)


def tiny(**changes):
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**(TINY | changes)))


@pytest.mark.parametrize("world", [2, 4, 8, 16])
def test_what_stage_3_receives_by_formula(world):
    """A rank owns one W-th of the matrices and lacks (W-1)/W of each, and of all others it gets its part back."""
    model = tiny()
    matrices = sum(p.numel() for name, p in model.named_parameters() if "proj" in name)
    found = [cost.received for cost in step_costs(model, Zero(3, world, False)).costs]
    assert sum(found) / world == pytest.approx(2 * (world - 1) / world * matrices / world * 4)


def test_sums_and_peaks_over_flat_tensors(monkeypatch):
    """Traffic and work of flat tensors add up, buffers do not: they are stepped in turn."""
    model, layout = tiny(intermediate_size=50), Zero(3, 3, False)
    monkeypatch.setattr(zero_costs, "SUB_GROUP_SIZE", 1500)
    found = step_costs(model, layout)
    flats = zero_costs.flat_tensors(costs.groups(model, explain.routed(model, RULES["muon"])), layout)
    of_matrices = [flat for flat in flats if flat.group.rule.name == "muon"]
    assert len(found.plans) == len(of_matrices) > 2
    peaks = [costs.buffers(plan, [flat.numel]) for plan, flat in zip(found.plans, of_matrices, strict=True)]
    assert len({max(peak) for peak in peaks}) > 1
    for rank, cost in enumerate(found.costs):
        assert cost.received == sum(plan.received[rank] for plan in found.plans)
        assert cost.flops == sum(plan.flops[rank] for plan in found.plans)
        assert cost.buffers == max(peak[rank] for peak in peaks)


def test_stages_by_hand():
    """Memory of a model whose sizes two ranks divide evenly, in bfloat16."""
    model = tiny()
    total = sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for name, p in model.named_parameters() if "proj" in name)
    vectors = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    states = (2 * total - matrices) // 2 * 4  # one for each matrix, two for the rest

    def cost(stage, offload=False, device="cpu"):
        found = step_costs(model, Zero(stage, 2, offload), dtype=torch.bfloat16, device=device).costs
        assert found[0][:3] == found[1][:3]
        return found[0]

    assert cost(1)[:3] == (total * 2, total * 2, total * 2 + states)
    assert cost(1, offload=True)[:3] == (total * 2, total * 2 + total * 2, total * 2 + total + states)
    # A rank has one of two layers, the embedding or the head, and two and a half of five vectors, which makes three.
    assert cost(2)[:3] == (total * 2, (total - vectors) + vectors // 5 * 3 * 2, total * 2 + states)
    assert cost(2, offload=True)[:3] == (total * 2, total * 2, total * 2 + total + states)
    assert cost(3)[:3] == (total + vectors * 2, total, total * 2 + states)
    assert cost(3, offload=True)[:3] == (total + vectors * 2, total + total * 2, total * 2 + states)
    # On an accelerator the directions of an offloaded flat tensor are not in its memory, and travel in bfloat16.
    near, far = (cost(3, offload, "cuda").buffers for offload in (False, True))
    assert near - far == matrices // 2 * 2


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["zero2=2"], ["A rank has the whole gradient of each parameter that it has a part of"]),
        (["zero1=2"], ["The states include float32 masters of a rank's part of the weights"]),
        (
            ["zero2_offload=2", "--dtype", "bfloat16"],
            [
                "The states include float32 masters of a rank's part of the weights, and a bfloat16 copy of it",
                "In the CPU's memory: the states, the gradients, and the directions of matrices, which buffers leave "
                "out",
                "DeepSpeed steps 3 flat tensors in turn",
            ],
        ),
        (
            ["zero3=2", "--optim", "cwd_lion"],
            [
                "Parameters of up to 320 elements are kept whole as well (stage3_param_persistence_threshold)",
                "DeepSpeed steps 2 flat tensors in turn, and needs up to 0.0 MiB more for the float32 gradient of one",
            ],
        ),
        (["zero3_offload=2", "--device", "cpu"], ["In the CPU's memory: the states, the gradients"]),
        (
            ["zero1_offload=2", "--device", "cpu"],
            ["In the CPU's memory: the states, 0.0 MiB of the gradients"],
        ),
    ],
)
def test_what_is_said_of_the_memory(flags, wanted, monkeypatch, capsys, tmp_path):
    LlamaConfig(**TINY).save_pretrained(tmp_path)
    lines = printed(monkeypatch, capsys, tmp_path, "--layout", *flags)
    for line in wanted:
        assert line in lines, "\n".join(lines)
    assert "Not counted: activations, and what the framework itself gathers and reduces" in lines


def test_what_every_rank_keeps_whole_at_stage_3():
    assert zero_costs.persistence_threshold(tiny()) == 320
    model = tiny()
    model.config = AutoConfig.for_model("gemma3")
    assert zero_costs.persistence_threshold(model) == 10 * model.config.text_config.hidden_size
    model.config = AutoConfig.for_model("swin", hidden_sizes=[8, 16])
    del model.config.hidden_size
    assert zero_costs.persistence_threshold(model) == 160
    assert zero_costs.persistence_threshold(torch.nn.Linear(2, 2)) == 10**5


def test_masters_of_masters_are_refused(monkeypatch, capsys, tmp_path):
    LlamaConfig(**TINY).save_pretrained(tmp_path)
    flags = ["--layout", "zero2=2", "--dtype", "bfloat16", "--optim_args", "master=remainder"]
    monkeypatch.setattr(sys, "argv", ["hf-cwd", "explain", str(tmp_path), *flags])
    with pytest.raises(SystemExit):
        main()
    assert "master=remainder with zero2=2: DeepSpeed keeps float32 masters itself" in capsys.readouterr().err


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_large_model_on_many_ranks(stage):
    """Llama 3 70B on 1024 ranks; every element is on some rank, and every matrix is orthogonalised."""
    shape = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 128256}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=64, num_key_value_heads=8))
    before = time.process_time()
    found = step_costs(model, Zero(stage, 1024, False), dtype=torch.bfloat16, device="cuda")
    assert time.process_time() - before < 60  # a loop over ranks for each matrix, and no more: it takes two seconds
    assert sum(len(plan.jobs) for plan in found.plans) == 560
    total = sum(prod(full_shape(p)) for p in model.parameters())
    masters = sum(cost.states for cost in found.costs) / 4
    matrices = sum(p.numel() for name, p in model.named_parameters() if "proj" in name)
    assert 0 <= masters - (3 * total - matrices) < 10 * 1024 * 723  # padding
