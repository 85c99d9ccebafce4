"""Checkpoints as users leave them: what is said of each, or that the run goes on at the learning rates it had."""

import json
import logging
import os
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, Trainer

from hf_cwd import CWDTrainer, CWDTrainingArguments, log
from hf_cwd.checkpoint import manifest
from hf_cwd.checkpoint.files import CheckpointError
from tests.support.tiny import tiny_data, tiny_llama

RESET, OFF = "on_rule_change=reset", "cwd_verify=off"
STEPS, SAVED = 6, 4
NEW_STATES = f"{RESET}: CWD.* begins with new states at step {SAVED}, since "
AS_IT_IS = r"To use it without verification, give --optim_args cwd_verify=off"


def train(folder, *, optim="cwd_adamw", kind=Trainer, resume=None, lora=False, **options):
    log.warn_once.cache_clear()
    model = tiny_llama()
    if lora:
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    defaults = {
        "output_dir": str(folder),
        "use_cpu": True,
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "steps",
        "save_steps": 2,
        "dataloader_pin_memory": False,
    }
    args = CWDTrainingArguments(optim=optim, **(defaults | options))
    trainer = kind(model=model, args=args, train_dataset=tiny_data(), eval_dataset=tiny_data(4))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Runs by their options, each made once: their directory, and what they logged by step."""
    known = {}

    def get(**options):
        key = str(sorted(options.items()))
        if key not in known:
            folder = tmp_path_factory.mktemp("saved")
            known[key] = folder, rates(train(folder, **options))
        return known[key]

    return get


def rates(trainer):
    return {entry["step"]: entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry}


# --- what users do to a checkpoint


def remove(*names: str) -> Callable[[Path], None]:
    return lambda path: [(path / name).unlink() for name in names]


def write(name: str, text: str = "mine") -> Callable[[Path], None]:
    def act(path: Path) -> None:
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(text)

    return act


def cut(name: str) -> Callable[[Path], None]:
    return lambda path: os.truncate(path / name, 100)


def state(**changes: Any) -> Callable[[Path], None]:
    def act(path: Path) -> None:
        file = path / "trainer_state.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}, indent=2, sort_keys=True) + "\n")

    return act


def step_of_the_same_length(path: Path) -> None:
    text = (path / "trainer_state.json").read_text()
    assert text.count(f'"global_step": {SAVED}') == 1
    (path / "trainer_state.json").write_text(text.replace(f'"global_step": {SAVED}', '"global_step": 3'))


def in_shards(path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(path)
    (path / "model.safetensors").unlink()
    model.save_pretrained(path, max_shard_size="60KB")


def as_bin(path: Path) -> None:
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


def of_format(number: int) -> Callable[[Path], None]:
    def act(path: Path) -> None:
        body = json.loads((path / manifest.NAME).read_text())
        (path / manifest.NAME).write_text(json.dumps({**body, "format": number}))

    return act


def both(*acts: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda path: [act(path) for act in acts]


def touch(path: Path) -> None:
    for file in path.rglob("*"):
        os.utime(file, (0, 0))


def linked(path: Path) -> None:
    path.rename(path.parent / "elsewhere")
    path.symlink_to(path.parent / "elsewhere")


def tokens(path: Path) -> None:
    tiny = {
        "tokenizer.json": "{}",
        "special_tokens_map.json": "{}",
        "README.md": "# Mine",
        "notes.pt": "",
        "ema.bin": "",
    }
    for name, text in tiny.items():
        (path / name).write_text(text)


def bare(*acts: Callable[[Path], None]) -> Callable[[Path], None]:
    """Without a manifest, as adamw_torch saves."""
    return both(remove(manifest.NAME), *acts)


@dataclass(frozen=True)
class Case:
    what: str
    act: Callable[[Path], Any]  # on checkpoint-4
    said: str | None = None  # an error; None where the run goes on
    kinds: tuple[type[Trainer], ...] = (Trainer, CWDTrainer)
    options: dict[str, Any] = field(default_factory=dict)
    error: type[Exception] = CheckpointError
    saved: dict[str, Any] = field(default_factory=dict)
    logged: str = "resumed at step 4: [1-9]"


ONLY = {"save_only_model": True}
LORA = {"lora": True}
NO_STATES = r"has no optimizer state .*no schedule.*begin a new run from its weights.* With --optim_args on_rule_change"
CASES = [
    # What no resume loads is the user's.
    Case("training_args.bin is gone", remove("training_args.bin")),
    Case("training_args.bin is another", write("training_args.bin")),
    Case("notes, a card, a tokenizer", tokens),
    Case("an export below it", write("merged/model.safetensors")),
    Case("an adapter beside the weights", both(write("adapter_config.json", "{}"), write("adapter_model.safetensors"))),
    Case("PEFT's card is rewritten", write("README.md"), saved=LORA, options=LORA),
    Case("copied", touch),
    Case("a link to a directory", linked),
    Case("without a manifest", bare()),
    Case("without a manifest, with notes", bare(tokens)),
    # What differs is named with its reason.
    Case(
        "other weights beside adapters",
        write("model.safetensors"),
        r"model\.safetensors is not of this",
        saved=LORA,
        options=LORA,
        kinds=(CWDTrainer,),
    ),
    Case(
        "another adapter below one",
        both(write("old/adapter_model.bin"), write("old/adapter_config.json")),
        r"old/adapter_config\.json is not of this checkpoint",
        saved=LORA,
        options=LORA,
        kinds=(CWDTrainer,),
    ),
    Case("shards", in_shards, r"its weights were written again after it was saved, as model-00001-of.*" + AS_IT_IS),
    Case("shards, as they are", in_shards, options={"optim_args": OFF}),
    Case("shards, as they are, by the field", in_shards, options={"cwd_verify": "off"}),
    Case("converted", as_bin, r"as pytorch_model\.bin instead of model\.safetensors.*" + AS_IT_IS),
    Case("converted, as they are", as_bin, options={"optim_args": OFF}),
    Case("state edited", state(log_history=[]), r"trainer_state\.json has .*: it was written again after.*" + AS_IT_IS),
    Case("state edited, as it is", state(log_history=[]), options={"optim_args": OFF}),
    Case("the step edited", step_of_the_same_length, r"checkpoint-4 is not what was saved: trainer_state\.json was"),
    Case("states cut", cut("optimizer.pt"), r"optimizer\.pt has 100 bytes instead of \d+: it was cut off"),
    Case(
        "weights cut",
        cut("model.safetensors"),
        r"safetensors has 100 bytes instead of \d+: it was cut off",
        kinds=(CWDTrainer,),
    ),
    Case(
        "weights cut, a path given",
        cut("model.safetensors"),
        "Error while deserializing",
        kinds=(Trainer,),
        error=SafetensorError,
    ),
    Case(
        "states not fetched",
        write("optimizer.pt", "version https://git-lfs.github.com/spec/v1\noid sha256:1\n"),
        r"optimizer\.pt has .*: it is a Git LFS pointer, and git lfs pull fetches the file",
    ),
    Case("no states", remove("optimizer.pt"), r"optimizer\.pt is missing"),
    Case("no schedule", remove("scheduler.pt"), r"scheduler\.pt is missing"),
    Case("no random numbers", remove("rng_state.pth"), r"rng_state\.pth is missing"),
    Case("no random numbers, as it is", remove("rng_state.pth"), options={"optim_args": OFF}),
    Case("an older manifest", of_format(1), r"cannot be verified: .* has format 1, of an older hf_cwd.*" + AS_IT_IS),
    Case("a newer manifest", of_format(9), r"cannot be verified: .* has format 9, of a newer hf_cwd"),
    Case("an older manifest, as it is", of_format(1), options={"optim_args": OFF}),
    # Without a manifest what can be seen is seen.
    Case("no trainer_state.json", bare(remove("trainer_state.json")), r"has no trainer_state\.json:", (CWDTrainer,)),
    Case(
        "a state that is a list",
        bare(write("trainer_state.json", "[]")),
        r"trainer_state\.json that can be read",
        (CWDTrainer,),
    ),
    Case(
        "a state without a step",
        bare(state(global_step=0)),
        r"no trainer_state\.json with the number of a step",
        (CWDTrainer,),
    ),
    Case(
        "a shard is lost",
        bare(in_shards, remove("model-00002-of-00002.safetensors")),
        r"index\.json names model-00002-of-00002\.safetensors, which is missing",
        (CWDTrainer,),
    ),
    Case(
        "an index that is none",
        bare(in_shards, write("model.safetensors.index.json")),
        r"is damaged: model\.safetensors\.index\.json cannot be read",
        (CWDTrainer,),
    ),
    Case(
        "a pointer",
        bare(write("scheduler.pt", "version https://git-lfs.github.com/spec/v1\n")),
        r"is damaged: scheduler\.pt is a Git LFS pointer",
        (CWDTrainer,),
    ),
    Case("states without an end", bare(cut("optimizer.pt")), r"is damaged: optimizer\.pt was cut off", (CWDTrainer,)),
    Case("no schedule, no manifest", bare(remove("scheduler.pt")), "has no schedule", (CWDTrainer,)),
    Case(
        "no states, no manifest",
        bare(remove("optimizer.pt")),
        r"needs both optimizer\.pt and scheduler\.pt",
        (Trainer,),
        error=RuntimeError,
    ),
    # Weights alone, and new states on demand.
    Case(
        "save_only_model",
        lambda path: None,
        "saved with save_only_model and has no.* With --optim_args on_rule",
        saved=ONLY,
    ),
    Case(
        "save_only_model, anew",
        lambda path: None,
        saved=ONLY,
        options={"optim_args": RESET},
        logged=NEW_STATES + "the checkpoint holds no optimizer state",
    ),
    Case("save_only_model, no manifest", bare(), NO_STATES, (CWDTrainer,), saved=ONLY),
    Case("save_only_model, no manifest, anew", bare(), saved=ONLY, options={"optim_args": RESET}, logged=NEW_STATES),
    Case(
        "save_only_model of LoRA, anew",
        lambda path: None,
        saved={**ONLY, **LORA},
        logged=NEW_STATES,
        options={**LORA, "optim_args": RESET},
    ),
    Case("no states, anew", remove("optimizer.pt"), options={"optim_args": RESET}, logged=NEW_STATES),
    Case(
        "no states and no schedule, anew",
        remove("optimizer.pt", "scheduler.pt"),
        options={"optim_args": RESET},
        logged=NEW_STATES,
    ),
    Case("no schedule, anew", remove("scheduler.pt"), options={"optim_args": RESET}, logged=NEW_STATES),
    Case("cut states, anew", cut("optimizer.pt"), r"optimizer\.pt has 100 bytes", options={"optim_args": RESET}),
    Case("nothing amiss, anew", lambda path: None, options={"optim_args": RESET}),
    Case(
        "a plateau cannot follow",
        remove("optimizer.pt", "scheduler.pt"),
        "cannot continue a ReduceLROnPlateau",
        options={"optim_args": RESET, "lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"},
        error=ValueError,
    ),
    Case(
        "a schedule of another kind",
        both(bare(), lambda path: torch.save({"best": 1.0}, path / "scheduler.pt")),
        "schedule is of another type: continue with the --lr_scheduler_type that saved it",
        error=ValueError,
    ),
]


# --- other rules: refused with both named, begun anew on demand


class Projector:
    """An object among the states, as GaLore and APOLLO keep it."""


def states(change: Callable[[dict[str, Any], torch.Tensor], Any], **groups: Any) -> Callable[[Path], None]:
    """Gives each parameter's state of AdamW what another optimizer has there, and the groups its keys."""

    def act(path: Path) -> None:
        found = torch.load(path / "optimizer.pt", weights_only=True)
        for each in found["state"].values():
            change(each, each["exp_avg"])
        for group in found["param_groups"]:
            group.update(groups)
        torch.save(found, path / "optimizer.pt")

    return act


def in_8_bits(state, momentum):
    state.update(state1=momentum.to(torch.uint8), state2=momentum.to(torch.uint8), qmap1=torch.zeros(256))
    del state["exp_avg"], state["exp_avg_sq"]


def more_groups(path):
    found = torch.load(path / "optimizer.pt", weights_only=True)
    first = found["param_groups"][0]
    found["param_groups"].insert(0, {**first, "params": first["params"][:1]})
    found["param_groups"][1] = {**first, "params": first["params"][1:]}
    torch.save(found, path / "optimizer.pt")
    schedule = torch.load(path / "scheduler.pt", weights_only=True)
    schedule.update(base_lrs=[0.5, 0.5, 0.5], lr_lambdas=[{}] * 3, _last_lr=[0.5, 0.5, 0.5])
    torch.save(schedule, path / "scheduler.pt")


def nothing(path):
    del path


ADAMW = {"optim": "adamw_torch"}
PAIRS = lambda state, momentum: state.update(exp_avg=torch.stack([momentum, momentum]))  # noqa: E731
RULES = [
    ("adafactor", {"optim": "adafactor"}, nothing, "cwd_adamw", "the saved state holds .*exp_avg_sq_col"),
    ("rmsprop", {"optim": "rmsprop"}, nothing, "cwd_sgd", "the saved state holds square_avg"),
    ("adagrad", {"optim": "adagrad"}, nothing, "cwd_adamw", "the saved state holds sum"),
    ("sgd", {"optim": "sgd"}, nothing, "cwd_adamw", "the saved groups have none of betas, eps, which rule 'adamw'"),
    ("sgd to muon", {"optim": "sgd"}, nothing, "cwd_muon", "the saved optimizer has 2 parameter groups"),
    ("momentum", {"optim": "sgd", "optim_args": "momentum=0.9"}, nothing, "cwd_adamw", "saved state holds momentum_"),
    ("adamw to lion", ADAMW, nothing, "cwd_lion", "the saved state holds exp_avg_sq, but rule 'lion' keeps"),
    ("muon", {"optim": "cwd_muon"}, nothing, "cwd_adamw", "the saved state is of rule 'muon' and 'adamw'"),
    ("lion", {"optim": "cwd_lion"}, nothing, "cwd_sgd", "the saved state is of rule 'lion'"),
    ("amsgrad", ADAMW, states(lambda s, m: s.update(max_exp_avg_sq=m), amsgrad=True), "cwd_adamw", "used amsgrad=True"),
    ("ademamix", ADAMW, states(PAIRS, betas=(0.9, 0.999, 0.9999), alpha=5.0), "cwd_adamw", "are not of rule 'adamw'"),
    ("paged 8 bits", ADAMW, states(in_8_bits), "cwd_adamw", "the saved state holds qmap1"),
    ("schedule-free", ADAMW, states(lambda s, m: s.update(z=s.pop("exp_avg")), k=4), "cwd_adamw", "state holds z"),
    ("grokadamw", ADAMW, states(lambda s, m: s.update(grok_ema=m)), "cwd_adamw", "saved state holds grok_ema"),
    ("stable_adamw", ADAMW, states(lambda s, m: s.update(eps_sq=m)), "cwd_adamw", "saved state holds eps_sq"),
    ("a projector", ADAMW, states(lambda s, m: s.update(projector=Projector())), "cwd_adamw", None),
    ("more groups", ADAMW, more_groups, "cwd_adamw", "the saved optimizer has 3 parameter groups, this one 2"),
    ("low rank", ADAMW, states(lambda s, m: s.update(exp_avg=m[:1])), "cwd_adamw", r"saved exp_avg of .* has shape"),
]


@pytest.mark.parametrize(("name", "options", "act", "optim", "said"), RULES, ids=[rule[0] for rule in RULES])
def test_the_states_of_other_rules(saved, tmp_path, caplog, name, options, act, optim, said):
    folder, whole = saved(**options)
    checkpoint = tmp_path / f"checkpoint-{SAVED}"
    shutil.copytree(folder / checkpoint.name, checkpoint)
    (checkpoint / manifest.NAME).unlink(missing_ok=True)
    act(checkpoint)
    error = pickle.UnpicklingError if said is None else ValueError
    case = Case(name, act, said, options={"optim": optim}, error=error)
    with pytest.raises(error, match=said) as caught:
        train(tmp_path / "out", resume=str(checkpoint), save_strategy="no", optim=optim)
    text = "".join((str(caught.value), *getattr(caught.value, "__notes__", ())))
    assert re.search(f"or begin with new states by .*{RESET} .weights, step number and schedule go on", text)
    logged = NEW_STATES + ".*" + (said or "torch does not load the optimizer's state in .*checkpoint-4 from a file")
    case = replace(case, said=None, options={"optim": optim, "optim_args": RESET}, logged=logged)
    caplog.set_level(logging.INFO, logger="hf_cwd")
    for kind in (Trainer, CWDTrainer):
        caplog.clear()
        trainer = check(case, kind, tmp_path / "out", str(checkpoint), whole, caplog)
        steps = {float(state["step"]) for state in trainer.optimizer.state.values()}
        assert steps == {STEPS - SAVED}, "the states are new"


def test_sgd_without_momentum_goes_on(saved, tmp_path):
    """It keeps no state: the weights end as the uninterrupted run's, whose decay is another, and here 0."""
    folder, _ = saved(optim="sgd", weight_decay=0.0)
    resumed = train(tmp_path, optim="cwd_sgd", weight_decay=0.0, resume=str(folder / "checkpoint-4"))
    ours, theirs = (load_file(Path(end, "checkpoint-6", "model.safetensors")) for end in (tmp_path, folder))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)
    assert rates(resumed)[STEPS] == rates(resumed)[STEPS - 1] / 2


# --- the newest one


def damaged(*steps: int) -> Callable[[Path], None]:
    return lambda out: [os.truncate(out / f"checkpoint-{step}" / "optimizer.pt", 100) for step in steps]


def at(step: int, act: Callable[[Path], Any]) -> Callable[[Path], None]:
    return lambda out: act(out / f"checkpoint-{step}")


NEWEST = [
    ("all is well", nothing, 6, None),
    ("the newest is cut", damaged(6), 4, r"skipped: .*checkpoint-6 is not what was saved: optimizer\.pt has 100 bytes"),
    ("two in a row", damaged(6, 4), 2, r"skipped: .*checkpoint-4 is not what was saved"),
    ("weights that would not load", at(6, cut("model.safetensors")), 4, r"skipped: .*checkpoint-6 is not what was"),
    ("the newest is unfinished", at(6, bare(remove("optimizer.pt"))), 4, "skipped: .*checkpoint-6 has no cwd_manifest"),
    ("the newest is older hf_cwd's", at(6, of_format(1)), 4, "skipped: .*checkpoint-6 cannot be verified"),
    ("a file among them", lambda out: (out / "checkpoint-9").touch(), 6, None),
    ("none is whole", damaged(2, 4, 6), None, r"(?s)no checkpoint in .* can be resumed from:.*-6 is.*-4 is.*-2 is not"),
]


@pytest.mark.parametrize("kind", [Trainer, CWDTrainer])
@pytest.mark.parametrize(("name", "act", "step", "said"), NEWEST, ids=[each[0] for each in NEWEST])
def test_the_newest_that_is_whole(saved, tmp_path, caplog, kind, name, act, step, said):
    caplog.set_level(logging.INFO, logger="hf_cwd")
    folder, _ = saved()
    out = tmp_path / "out"
    shutil.copytree(folder, out)
    act(out)
    if step is None:
        with pytest.raises(CheckpointError, match=said):
            train(out, kind=kind, resume=True, save_strategy="no", max_steps=8)
        return
    trainer = train(out, kind=kind, resume=True, save_strategy="no", max_steps=8)
    assert trainer.state.global_step == 8
    assert f"resumed at step {step}: 63 state tensors" in caplog.text
    assert caplog.text.count(f"checkpoint-{step} is what was saved at step {step}: 6 files") == 1
    assert (said is None and "skipped" not in caplog.text) or re.search(said, caplog.text)


def test_the_plain_trainer_takes_the_newest_as_ever(saved, tmp_path, caplog):
    """Where no checkpoint has a manifest, or its optimizer is another, or it is told not to look."""
    folder, _ = saved()
    for optim, options in (
        ("cwd_adamw", {"bare": True}),
        ("adamw_torch", {}),
        ("cwd_adamw", {"optim_args": OFF}),
    ):
        out = tmp_path / f"{optim}-{len(options)}-{options.get('optim_args')}"
        shutil.copytree(folder, out)
        os.truncate(out / "checkpoint-6" / "training_args.bin", 3)
        if options.pop("bare", False):
            for path in out.glob("checkpoint-*"):
                (path / manifest.NAME).unlink()
        trainer = train(out, resume=True, save_strategy="no", max_steps=7, optim=optim, **options)
        assert (trainer.state.global_step, [*rates(trainer)][-1]) == (7, 7)
    assert "is what was saved" not in caplog.text
    with pytest.raises(ValueError, match="No valid checkpoint found in output directory"):
        train(tmp_path / "empty", resume=True)


def test_what_hf_cwd_puts_around_the_trainer_is_undone():
    from hf_cwd.trainer import registration

    ours = Trainer.train, Trainer._load_optimizer_and_scheduler
    registration.register()
    assert (Trainer.train, Trainer._load_optimizer_and_scheduler) == ours, "once"
    registration.unregister()
    try:
        theirs = Trainer.train, Trainer._load_optimizer_and_scheduler
        assert [each.__wrapped__ for each in ours] == [*theirs]
        assert not any(hasattr(each, "_hf_cwd_original") for each in theirs)
    finally:
        registration.register()


@pytest.mark.parametrize(
    ("case", "kind"),
    [(case, kind) for case in CASES for kind in case.kinds],
    ids=lambda x: getattr(x, "what", None) or x.__name__,
)
def test_checkpoints_as_users_leave_them(saved, tmp_path, caplog, case, kind):
    caplog.set_level(logging.INFO, logger="hf_cwd")
    folder, whole = saved(**case.saved)
    checkpoint = tmp_path / f"checkpoint-{SAVED}"
    shutil.copytree(folder / checkpoint.name, checkpoint)
    case.act(checkpoint)
    check(case, kind, tmp_path / "out", str(checkpoint), whole, caplog)


def check(case, kind, out, resume, whole, caplog):
    run = lambda: train(out, kind=kind, resume=resume, save_strategy="no", **case.options)  # noqa: E731
    if case.said is not None:
        with pytest.raises(case.error, match=case.said):
            run()
        return
    trainer = run()
    found = rates(trainer)
    assert {step: rate for step, rate in found.items() if step > SAVED} == {s: whole[s] for s in whole if s > SAVED}
    assert re.search(case.logged, caplog.text)
    return trainer
