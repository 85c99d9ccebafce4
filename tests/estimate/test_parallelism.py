"""``hf-cwd explain --layout`` against the frameworks: their placements, and the plan that the optimizer runs.

Run as a script it is two or four ranks that shard real models.
"""

import json
import multiprocessing
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from dev import cpu_ranks
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from hf_cwd import route
from hf_cwd.cli.layout import parse_layout
from hf_cwd.distributed.geometry import Mesh, everywhere
from hf_cwd.distributed.plan import flops_per_byte, plan
from hf_cwd.estimate.costs import entries, local_sizes
from hf_cwd.estimate.parallelism import Parallelism, Zero, shardings
from hf_cwd.trainer.optim_args import optimizer_arguments
from tests.routing.architectures import MODELS
from tests.support.forking import fork, free_port
from tests.support.launching import ROOT, launch

SIZES = {"vocab_size": 66, "hidden_size": 32, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 32}
# 50 rows and a vocabulary of 66: uneven parts. The biases of projections along their input are not cut.
LLAMA = {"model_type": "llama", "intermediate_size": 50, "attention_bias": True, "mlp_bias": True, **SIZES}
MOE = {"model_type": "qwen3_moe", "intermediate_size": 48, "moe_intermediate_size": 24, "head_dim": 8, **SIZES}
MOE |= {"num_experts": 8, "num_experts_per_tok": 2}
TIED = {**LLAMA, "tie_word_embeddings": True}
CASES = {
    2: [
        *((LLAMA, layout) for layout in ("ddp=2", "fsdp2=2", "tp=2")),
        *((MOE, layout) for layout in ("fsdp2=2,ep=2", "tp=2,ep=2")),
    ],
    4: [
        *((LLAMA, layout) for layout in ("ddp=4", "fsdp2=4", "ddp=2,fsdp2=2", "tp=4", "fsdp2=2,tp=2", "ddp=2,tp=2")),
        *((TIED, layout) for layout in ("fsdp2=2,tp=2",)),
        *((MOE, layout) for layout in ("fsdp2=2,tp=2", "fsdp2=2,tp=2,ep=2", "fsdp2=2,tp=2,ep=4")),
        *((MOE, layout) for layout in ("tp=4,ep=4", "fsdp2=4,ep=2", "ddp=2,fsdp2=2,ep=2")),
    ],
}
# Two without a plan, and those with styles and shapes that the cases above lack.
ARCHITECTURES = ["gpt2", "bert", "gemma3", "phi3", "gpt_oss", "deepseek_v3", "jamba", "qwen3_next", "qwen2_vl"]
OPTIMIZER = {"optim": "cwd_muon", "optim_args": "share=auto,exchange_bytes=4096", "use_cpu": True, "report_to": "none"}
OPTIMIZER |= {"save_strategy": "no"}


def sharded(model: torch.nn.Module, layout: Parallelism) -> torch.nn.Module:
    """The model as transformers shards it; DDP takes it as it is."""
    if layout.ddp == layout.world:
        return model
    from transformers.distributed import DistributedConfig

    sizes = {"dp_replicate_size": layout.ddp, "fsdp_size": layout.fsdp2, "tp_size": layout.tp, "ep_size": layout.ep}
    options = {"config": model.config, "state_dict": model.state_dict(), "dtype": torch.float32}
    return type(model).from_pretrained(None, **options, distributed_config=DistributedConfig(**sizes))


def copies(mesh: Mesh) -> set[frozenset[int]]:
    """The ranks of each replica, whose numbers mean nothing."""
    numbers = {rank: mesh.replica(rank) for rank in mesh.ranks}
    return {frozenset(rank for rank in numbers if numbers[rank] == number) for number in numbers.values()}


def compared(model: torch.nn.Module, real: torch.nn.Module, layout: Parallelism) -> list[str]:
    """Parameters that are not, on every rank, where :func:`shardings` says."""
    from hf_cwd.distributed.dtensor import is_dtensor, local, mesh_of

    rank, everybody, told, wrong = torch.distributed.get_rank(), range(layout.world), shardings(model, layout), []
    parameters = dict(real.named_parameters())
    for name, p in parameters.items():
        shape, found = tuple(p.shape), mesh_of(p) if is_dtensor(p) else everywhere(everybody)
        # What tensor parallelism leaves alone lies on the mesh of FSDP2 only, of which its ranks have one each.
        held = {frozenset(same & set(found.ranks)) for same in copies(told[name])} - {frozenset()}
        same = held == copies(found) and all(told[name].pieces(shape, r) == found.pieces(shape, r) for r in found.ranks)
        if not same or local_sizes(shape, told[name])[rank] != local(p.detach()).numel():
            wrong.append(f"{name}: {getattr(p, 'placements', None)}, told {told[name]}")
    return wrong + [f"{name}: only one of the two has it" for name in told.keys() ^ parameters.keys()]


def planned(model: torch.nn.Module, real: torch.nn.Module, layout: Parallelism, folder: Path) -> list[bool]:
    """Whether the optimizer that a Trainer makes for the sharded model runs the plan that explain computes, and whether
    this rank really receives the bytes that it says.
    """
    import hf_cwd.distributed.build

    ran, of_run, counted, exchanged = [], hf_cwd.distributed.build.plan, [], torch.distributed.all_to_all_single

    def counting(received, *args, **options):
        counted.append(received.nbytes)
        return exchanged(received, *args, **options)

    def recorded(*args, **options):
        ran.append(of_run(*args, **options))
        return ran[-1]

    args = TrainingArguments(str(folder / "out"), **OPTIMIZER)
    optimizer = Trainer(model=real, args=args).create_optimizer()
    if layout.ddp == layout.world:  # as the guard does once the Trainer has wrapped it
        optimizer.mark_replicated(real.parameters())
    for p in real.parameters():
        p.grad = torch.zeros_like(p)
    hf_cwd.distributed.build.plan, torch.distributed.all_to_all_single = recorded, counting
    optimizer.step()
    hf_cwd.distributed.build.plan, torch.distributed.all_to_all_single = of_run, exchanged
    arguments = optimizer_arguments(args)
    found = entries(model, route(model), layout, arguments=arguments, dtype=torch.float32, device="cpu")
    told = plan(found, share="auto", exchange_bytes=4096, balance=flops_per_byte("cpu"))
    (ran,) = ran
    same = (told.jobs, told.rounds, told.received, told.flops) == (ran.jobs, ran.rounds, ran.received, ran.flops)
    return [same, len(counted) == 2 * told.rounds, sum(counted) == told.received[torch.distributed.get_rank()]]


def rank_main(rank: int, world: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    cpu_ranks.switch_on()
    torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    results = {"cases": [], "architectures": {}}
    for config, text in CASES[world]:
        model, layout = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)), parse_layout(text, world)
        real = sharded(model, layout)
        results["cases"].append([config["model_type"], text, compared(model, real, layout)])
        results["cases"][-1].append(planned(model, real, layout, folder))
    layout = parse_layout("fsdp2=2,tp=2", None)
    for name in ARCHITECTURES if world == layout.world else ():
        model = MODELS[name]()
        try:
            real = sharded(model, layout)
        except ValueError as error:
            results["architectures"][name] = str(error)
        else:
            results["architectures"][name] = compared(model, real, layout)
    (folder / f"{rank}.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank of worlds of two and four found out about models that transformers sharded for it."""
    results = {}
    for world in CASES:
        folder = tmp_path_factory.mktemp("ranks")
        network = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
        launch("-m", "tests.estimate.test_parallelism", folder, cwd=folder, start=fork, PYTHONPATH=str(ROOT), **network)
        results[world] = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]
    return results


@pytest.mark.parametrize("world", CASES)
def test_placements_are_those_of_the_frameworks(world, ranks):
    for result in ranks[world]:
        names = [[config["model_type"], text, []] for config, text in CASES[world]]
        assert [case[:3] for case in result["cases"]] == names


@pytest.mark.parametrize("world", CASES)
def test_the_plan_is_the_one_that_the_optimizer_runs_and_its_bytes_are_those_that_travel(world, ranks):
    for result in ranks[world]:
        assert [case[3] for case in result["cases"]] == [[True] * 3] * len(CASES[world])


def test_every_architecture_has_the_placements_of_its_plan(ranks):
    for result in ranks[4]:
        planless = {name for name, found in result["architectures"].items() if "has no `tp_plan`" in found}
        assert planless == {"gpt2", "bert"}
        assert all(found == [] for name, found in result["architectures"].items() if name not in planless)
        for name in planless:
            with torch.device("meta"), pytest.raises(ValueError, match="has no tp plan"):
                shardings(MODELS[name](), parse_layout("tp=2", None))


@pytest.mark.parametrize(
    ("text", "world", "sizes"),
    [
        ("ddp", 8, (8, 1, 1, 1)),
        ("fsdp2", 1024, (1, 1024, 1, 1)),
        ("ddp=128, fsdp2=8", None, (128, 8, 1, 1)),
        ("tp=8,fsdp2", 1024, (1, 128, 8, 1)),
        ("fsdp2=16,tp=8,ep=32", 128, (1, 16, 8, 32)),
    ],
)
def test_layouts_are_read(text, world, sizes):
    assert parse_layout(text, world) == Parallelism(*sizes)
    assert parse_layout(str(parse_layout(text, world)), None) == Parallelism(*sizes)


@pytest.mark.parametrize(
    ("text", "world", "wanted"),
    [
        ("zero1", 8, Zero(1, 8, False)),
        ("zero2=4", None, Zero(2, 4, False)),
        ("zero3 = 1024", 1024, Zero(3, 1024, False)),
        ("zero1_offload=2", None, Zero(1, 2, True)),
        ("zero3_offload", 16, Zero(3, 16, True)),
    ],
)
def test_layouts_of_deepspeed_are_read(text, world, wanted):
    assert parse_layout(text, world) == wanted
    assert parse_layout(str(wanted), None) == wanted


@pytest.mark.parametrize(
    ("text", "world", "message"),
    [
        ("hsdp=128x8", None, "'hsdp=128x8' is not understood. Write ddp, fsdp2"),
        ("fsdp2=0", None, "'fsdp2=0' is not understood"),
        ("tp=2,tp=4", None, "'tp=4' is not understood"),
        ("fsdp2", None, "say how many ranks fsdp2 has, fsdp2=8, or give --world"),
        ("fsdp2,ddp", 8, "say how many ranks fsdp2 has"),
        ("fsdp2=8,ep", 8, "say how many ranks ep has, ep=8"),
        ("fsdp2,tp=3", 8, "3 does not divide --world 8"),
        ("fsdp2=4", 8, "has 4 ranks, and --world is 8"),
        ("fsdp2=4,ep=3", None, "ep must be a multiple of tp, and a divisor of fsdp2 x tp"),
        ("fsdp2=4,tp=4,ep=2", None, "ep must be a multiple of tp"),
        ("zero3", None, "say how many ranks zero3 has, zero3=8, or give --world"),
        ("zero4=8", None, "'zero4=8' is not understood"),
        ("zero=8", None, "'zero=8' is not understood"),
        ("zero3=8", 16, "has 8 ranks, and --world is 16"),
        ("zero3=4,tp=2", None, "zero3 is over all ranks, and has not been tried together with tp: leave tp out"),
        ("fsdp2,zero1_offload", 8, "zero1_offload is over all ranks, and has not been tried together with fsdp2"),
        ("ddp=2,fsdp2=2,zero2", 8, "has not been tried together with ddp and fsdp2: leave ddp and fsdp2 out, or zero2"),
        ("zero2=4,zero3=4", None, "zero2 is over all ranks, and has not been tried together with zero3"),
    ],
)
def test_layouts_that_are_none(text, world, message):
    with pytest.raises(ValueError, match="^--layout .*" + re.escape(message)):
        parse_layout(text, world)


def test_a_number_of_ranks_that_is_none():
    with pytest.raises(ValueError, match=r"^--world 0: give the number of ranks"):
        parse_layout("fsdp2", 0)


def test_a_layout_that_a_model_cannot_have():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MOE))
    with pytest.raises(ValueError, match="ep=16 does not divide the 8 experts of model"):
        shardings(model, parse_layout("fsdp2=16,ep=16", None))
    model._tp_plan["lm_head"] = "sideways"
    with pytest.raises(ValueError, match="is sharded in the style 'sideways'"):
        shardings(model, parse_layout("tp=2", None))
    with pytest.raises(ValueError, match="tp is not known for a PEFT adapter"):
        shardings(MODELS["lora"](), parse_layout("tp=2", None))


if __name__ == "__main__":
    # Forked, so that what takes long, to import transformers, is done once.
    context, world = multiprocessing.get_context("fork"), int(os.environ["WORLD_SIZE"])
    processes = [context.Process(target=rank_main, args=(rank, world, Path(sys.argv[1]))) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(any(process.exitcode for process in processes))
