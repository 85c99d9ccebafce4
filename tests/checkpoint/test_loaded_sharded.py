"""Runs of models sharded at load time are resumed bit for bit, or not at all."""

import inspect
import json
import re
import textwrap

import pytest
import torch
import transformers
from bench.machine import peak_of
from safetensors.torch import load_file
from transformers import Trainer

from hf_cwd import CWDAdamW, CWDTrainer
from hf_cwd.checkpoint import rank_files
from hf_cwd.checkpoint.restore import RankFile
from tests.checkpoint.loaded_sharded_ranks import CASES, REFUSALS
from tests.support.forking import fork
from tests.support.launching import ROOT, finish
from tests.support.tiny import arguments, tiny_data, tiny_llama  # noqa: F401

PAIRS = [(world, case) for world, cases in CASES.items() for case in cases]
LAYOUTS = "saved on {} ranks as {}, and this run has 2 ranks as fsdp_size=2: resume with the number of ranks and the"


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What every rank saw, by phase."""
    folder = tmp_path_factory.mktemp("sharded")
    result = finish(fork("-m", "tests.checkpoint.loaded_sharded_ranks", folder, cwd=ROOT))
    assert result.returncode == 0, result.stderr[-5000:]

    def phase(name, world):
        return [torch.load(folder / f"{name}-{world}-{rank}", weights_only=False) for rank in range(world)]

    return {(name, world): phase(name, world) for world in CASES for name in ("train", "resume")} | {
        "refuse": phase("refuse", 2),
        "log": result.stderr,
    }


def bits(tensor):
    """Remainders are no numbers: some look like NaN, which equals nothing."""
    return tensor.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize(("world", "case"), PAIRS, ids=str)
def test_resumed_run_ends_as_the_uninterrupted_one(seen, world, case):
    for rank, (one, two) in enumerate(zip(seen["train", world], seen["resume", world], strict=True)):
        whole, resumed = one[str(case)], two[str(case)]
        assert whole["weights"].keys() == resumed["weights"].keys()
        for name, x in whole["weights"].items():
            assert torch.equal(x, resumed["weights"][name]), (rank, name)
        assert whole["states"]
        assert whole["states"].keys() == resumed["states"].keys()
        for name, (placements, x) in whole["states"].items():
            assert resumed["states"][name][0] == placements, (rank, name)
            assert resumed["states"][name][1].dtype == x.dtype
            assert torch.equal(bits(x), bits(resumed["states"][name][1])), (rank, name)
        for key in ("groups", "scheduler", "losses"):
            assert whole[key] == resumed[key], (rank, key)
        assert {step.item() for (_, key), (_, step) in whole["states"].items() if key == "step"} == {4.0}


def test_layouts_were_what_they_are_called(seen):
    def cut(world, layout):
        runs = [run for rank in seen["train", world] for name, run in rank.items() if name.startswith(layout)]
        return {placements for run in runs for placements in run["placements"]}

    assert "(_StridedShard(dim=0, sf=2), Shard(dim=0))" in cut(4, "fsdp_tp-llama")
    assert "(Shard(dim=0), _StridedShard(dim=1, sf=2))" in cut(4, "fsdp_tp-qwen3")
    assert "(_StridedShard(dim=0, sf=2), Shard(dim=0))" in cut(2, "fsdp_ep")
    assert cut(4, "hsdp") == {"(Replicate(), Shard(dim=0))"}
    assert "(Shard(dim=1),)" in cut(2, "tp-")
    states = seen["train", 2][0]["fsdp-llama-adamw-remainder_resumed"]["states"]
    assert {x.dtype for (_, key), (_, x) in states.items() if key == "remainder"} == {torch.bfloat16}
    adapters = seen["train", 2][0]["tp-llama-muon-lora_resumed"]["states"]
    moments = {placements for (_, key), (placements, _) in adapters.items() if key != "step"}
    assert moments == {"None", "(Shard(dim=0),)"}, "plain tensors beside DTensors"


def test_what_came_back_is_counted_in_the_log(seen):
    assert re.search(r"checkpoint-2: 21 tensors of FSDPLlamaForCausalLM restored on each of 2 ranks", seen["log"])
    assert "49 state tensors of CWDMuon restored on each of 4 ranks (fsdp_size=2, tp_size=2)" in seen["log"]


WORDS = {
    "wrong_world": LAYOUTS.format(4, "fsdp_size=2, tp_size=2"),
    "wrong_layout": LAYOUTS.format(2, "tp_size=2"),
    "wrong_rule": "the saved state is of rule 'adamw'",
    "wrong_dtype": "model.embed_tokens.weight has dtype F32, and had F64 when it was saved",
    "wrong_model": "the checkpoint has lm_head.weight, and the model does not",
    "missing": "has files of 1 of 2 ranks, and cwd_part-00001-of-00002.safetensors is missing",
    "truncated": "cwd_part-00001-of-00002.safetensors is damaged or was cut off",
    "renamed": "holds the part of rank 0 of 2: it was renamed",
    "mixed": "was saved at step 4, and trainer_state.json beside it at step 2",
    "no_parts": "has no file of this rank",
    "no_scheduler": "scheduler.pt is missing",
    "flipped": "cwd_part-00001-of-00002.safetensors",
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_checkpoint_is_refused_on_all_ranks_before_training(seen, kind):
    results = [rank[kind] for rank in seen["refuse"]]
    assert all(words.startswith(("ValueError: ", "CheckpointError: ")) for words, _, _ in results)
    assert WORDS[kind] in results[1][0]
    assert WORDS[kind] in results[0][0] or "rank 1 refuses it, see its message" in results[0][0]
    # Which rule it is can be seen when there is an optimizer: the weights, which fit, are there by then.
    assert [(same, steps) for _, same, steps in results] == [(kind != "wrong_rule", 0)] * 2


def test_plain_trainer_still_refuses(seen):
    assert all("Resuming is not supported for models sharded at load time" in rank["plain"] for rank in seen["refuse"])


def test_best_model_is_loaded_from_the_parts(seen):
    assert all(rank["best"] for rank in seen["refuse"])


def test_change_of_rule_begins_with_new_states_if_that_is_asked_for(seen):
    for rank in seen["refuse"]:
        assert len(rank["reset"]["losses"]) == 4
        steps = {step.item() for (_, key), (_, step) in rank["reset"]["states"].items() if key == "step"}
        assert steps == {2.0}
    assert "on_rule_change=reset: CWDMuon begins with new states at step 2" in seen["log"]


def sharded_at_load_time():
    model = tiny_llama()
    model._is_distributed_loading_by_transformers = True  # all that Trainer.__init__ looks at
    return model


def test_only_the_refusal_is_passed_by(arguments):  # noqa: F811
    args = arguments(save_strategy="steps", optim="cwd_adamw")
    with pytest.raises(ValueError, match="Resuming is not supported"):
        Trainer(sharded_at_load_time(), args)
    trainer = CWDTrainer(sharded_at_load_time(), args)
    assert trainer.is_distributed_loading_by_transformers
    assert not trainer.place_model_on_device
    assert trainer.args is args
    assert (args.save_strategy, args.save_only_model) == ("steps", False)
    with pytest.raises(ValueError, match="metric_for_best_model"):
        CWDTrainer(sharded_at_load_time(), arguments(save_strategy="best", optim="cwd_adamw"))
    assert not CWDTrainer(tiny_llama(), args).is_distributed_loading_by_transformers


REFUSAL = "self.is_distributed_loading_by_transformers and args.save_strategy"
CHANGES = {
    "gone": (REFUSAL, "False and args.save_strategy", RuntimeError),
    "asks_twice": (REFUSAL, f"self.is_distributed_loading_by_transformers or {REFUSAL}", RuntimeError),
    "asks_earlier": (
        "self._validate_args()",
        "if self.is_distributed_loading_by_transformers: raise NotImplementedError",
        NotImplementedError,
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_transformers_is_an_error_at_construction(arguments, monkeypatch, change):  # noqa: F811
    old, new, error = CHANGES[change]
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(Trainer.__init__)))
    source = source[source.index("def __init__") :]
    changed = re.sub(r"\s+".join(map(re.escape, old.split())), new, source)
    assert changed != source
    scope = {}
    exec(compile(changed, "changed", "exec"), vars(transformers.trainer), scope)
    monkeypatch.setattr(Trainer, "__init__", scope["__init__"])
    with pytest.raises(error, match="does not know" if error is RuntimeError else None):
        CWDTrainer(sharded_at_load_time(), arguments(save_strategy="steps", optim="cwd_adamw"))
    if error is RuntimeError:
        CWDTrainer(sharded_at_load_time(), arguments(save_strategy="no", optim="cwd_adamw"))


def test_parts_are_no_use_to_a_run_in_one_process(arguments, tmp_path):  # noqa: F811
    (tmp_path / rank_files.file_name(0, 2)).touch()
    args = arguments(optim="cwd_adamw")
    args.cwd_verify = "off"
    trainer = CWDTrainer(tiny_llama(), args, train_dataset=tiny_data())
    with pytest.raises(ValueError, match="is of a model sharded at load time, and this one is not"):
        trainer.train(resume_from_checkpoint=str(tmp_path))


@pytest.fixture
def stepped():
    """A model with odd sizes, several dtypes, a tied weight, an empty tensor, and an optimizer that has stepped."""
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.half16 = torch.nn.Parameter(torch.randn(3, 5).bfloat16())
    model.full7 = torch.nn.Parameter(torch.randn(7))
    model.matrix = torch.nn.Parameter(torch.randn(1, 3).double())
    model.tied, model.none = model.full7, torch.nn.Parameter(torch.empty(0, 4))
    model.register_buffer("flag", torch.tensor([True, False, True]))
    model.register_buffer("count", torch.tensor(7))
    params = list(model.parameters())
    optimizer = CWDAdamW(params, lr=torch.tensor(0.1), weight_decay=0.1)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    return model, optimizer


ALONE = {"rank": 0, "world": 1}
SAVED = {**ALONE, "parallelism": "one part", "global_step": 2}


def test_file_is_plain_safetensors_that_bring_back_every_bit(stepped, tmp_path):
    model, optimizer = stepped
    weights = rank_files.tensors_of(model)
    assert list(weights) == ["half16", "full7", "matrix", "none", "flag", "count"]
    rank_files.save(tmp_path / rank_files.file_name(0, 1), weights, optimizer, **SAVED)
    loaded = load_file(tmp_path / rank_files.file_name(0, 1))
    before = {name: tensor.detach().clone() for name, tensor in weights.items()}
    assert all(torch.equal(loaded[f"weights/{name}"], tensor) for name, tensor in before.items())
    states = {p: {key: value.clone() for key, value in state.items()} for p, state in optimizer.state.items()}

    for tensor in weights.values():
        tensor.data.zero_()
    fresh = CWDAdamW(list(model.parameters()), lr=torch.tensor(0.5))
    part = RankFile(tmp_path, weights, **ALONE, parallelism="one part")
    assert part.load_weights() == 6
    fresh.load_state_dict(part.optimizer_state(fresh))
    assert all(torch.equal(weights[name], tensor) for name, tensor in before.items())
    assert fresh.state.keys() == states.keys()
    for p, state in states.items():
        assert state.keys() == fresh.state[p].keys()
        assert all(torch.equal(value, fresh.state[p][key]) for key, value in state.items())
    group = fresh.param_groups[0]
    assert torch.equal(group["lr"], torch.tensor(0.1))
    assert (group["weight_decay"], group["betas"]) == (0.1, (0.9, 0.999))


def test_saving_a_part_copies_no_tensor(tmp_path):
    """Of 96 MB."""
    model = torch.nn.Linear(2048, 4096, bias=False)
    optimizer = CWDAdamW(model.parameters())
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    path, weights = tmp_path / rank_files.file_name(0, 1), rank_files.tensors_of(model)
    needed = peak_of(lambda: rank_files.save(path, weights, optimizer, **SAVED), "cpu")
    if needed is None:
        pytest.skip("the kernel does not tell the peak of the resident set")
    assert needed < path.stat().st_size / 12


def test_what_a_file_cannot_hold_is_refused_by_name(stepped, tmp_path):
    model, optimizer = stepped
    weights, path = rank_files.tensors_of(model), tmp_path / rank_files.file_name(0, 1)
    optimizer.param_groups[0]["mine"] = object()
    with pytest.raises(ValueError, match="parameter group 0 has mine=<object"):
        rank_files.save(path, weights, optimizer, **SAVED)
    del optimizer.param_groups[0]["mine"], weights["full7"]
    with pytest.raises(ValueError, match=r"a parameter of shape \(7,\) that is not in the model"):
        rank_files.save(path, weights, optimizer, **SAVED)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda about: about.update(format=2), "is in format 2, but this version of hf_cwd reads format 1"),
        (lambda about: about.pop("groups"), "is in format 1"),
        (lambda about: about.update(states=3), "it has 12 states, and 6 tensors and 3 states were written"),
        (lambda about: about["tensors"]["full7"].update(shape=[8]), r"full7 has shape \[7\], and had \[8\]"),
        (lambda about: about["tensors"].update(more={}), "the checkpoint has more, and the model does not"),
    ],
)
def test_header_that_does_not_fit_is_refused(stepped, tmp_path, change, words):
    model, optimizer = stepped
    weights, path = rank_files.tensors_of(model), tmp_path / rank_files.file_name(0, 1)
    rank_files.save(path, weights, optimizer, **SAVED)
    header = path.read_bytes()
    length = int.from_bytes(header[:8], "little")
    entries = json.loads(header[8 : 8 + length])
    about = json.loads(entries["__metadata__"][rank_files.KEY])
    change(about)
    entries["__metadata__"][rank_files.KEY] = json.dumps(about)
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + header[8 + length :])
    with pytest.raises(ValueError, match=words):
        RankFile(tmp_path, weights, **ALONE, parallelism="one part")


def test_groups_with_other_parameters_are_refused(stepped, tmp_path):
    model, optimizer = stepped
    weights = rank_files.tensors_of(model)
    rank_files.save(tmp_path / rank_files.file_name(0, 1), weights, optimizer, **SAVED)
    part = RankFile(tmp_path, weights, **ALONE, parallelism="one part")
    with pytest.raises(ValueError, match=r"no longer matrix, none\. Freeze and route them as in that run"):
        part.optimizer_state(CWDAdamW([model.half16, model.full7]))
    with pytest.raises(ValueError, match="their order is another"):
        part.optimizer_state(CWDAdamW([model.full7, model.half16, model.matrix, model.none]))
