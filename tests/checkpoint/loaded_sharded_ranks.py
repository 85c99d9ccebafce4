"""Trains, and in new processes resumes, models sharded at load time; each rank writes what it saw to FOLDER/PHASE-RANK.

    python -m tests.checkpoint.loaded_sharded_ranks FOLDER

One process imports everything and makes the models. It never trains: it forks the ranks of each phase.
"""

import faulthandler
import os
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from dev import cpu_ranks
from dev.forked_runs import clean_state, finish, start
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, set_seed
from transformers.distributed import DistributedConfig

from hf_cwd import CWDTrainer
from hf_cwd.checkpoint import rank_files
from hf_cwd.distributed.dtensor import is_dtensor, local
from hf_cwd.trainer.wrappers import innermost
from tests.distributed import trainer_ranks
from tests.distributed.trainer_table import LAYOUTS, MODELS, STEPS, VARIATIONS, Case, Variation
from tests.support import garbage

HALF = f"checkpoint-{STEPS // 2}"
WAIT = 240  # seconds that a run may take before its ranks are given up
RULES = ("adamw", "muon", "lion", "sgd")
CASES = {
    2: [Case("fsdp", "llama", rule, "resumed") for rule in RULES]
    + [Case("fsdp", model, "muon", "resumed") for model in ("llama_tied", "qwen3_moe")]
    + [Case("fsdp_ep", "qwen3_moe", rule, "float32_resumed") for rule in ("adamw", "muon")]
    + [Case("tp", "llama", rule, "resumed") for rule in RULES]
    + [Case("tp_ep", "qwen3_moe", "muon", "resumed")]
    + [Case(layout, "llama", "muon", "lora_resumed") for layout in ("fsdp", "tp")]
    + [Case("fsdp", "llama", "adamw", "remainder_resumed")],
    4: [Case(layout, "llama", rule, "resumed") for layout in ("fsdp_tp", "hsdp") for rule in ("adamw", "muon")]
    + [Case("fsdp_tp", "qwen3_moe", "muon", "resumed")],
}
RESUMING = {"save_strategy": "steps", "save_steps": STEPS // 2}
OWN_VARIATIONS = {
    "resumed": Variation(RESUMING),
    "float32_resumed": Variation(RESUMING, float32=True),
    "lora_resumed": Variation(RESUMING, model="lora"),
    "remainder_resumed": Variation(RESUMING, float32=True),  # bfloat16 weights with the lower halves of fp32 masters
}
# A damaged copy of a checkpoint, and what it is resumed as.
FSDP, TP = CASES[2][0], Case("tp", "llama", "adamw", "resumed")
REFUSALS = {
    "wrong_world": (str(CASES[4][0]), FSDP),
    "wrong_layout": (str(TP), FSDP),
    "wrong_rule": (str(FSDP), FSDP._replace(rule="muon")),
    "wrong_dtype": (str(FSDP), FSDP._replace(variation="float32_resumed")),
    "wrong_model": (str(FSDP), FSDP._replace(model="llama_tied")),
    "missing": (str(FSDP), FSDP),
    "truncated": (str(FSDP), FSDP),
    "renamed": (str(FSDP), FSDP),
    "mixed": (str(FSDP), FSDP),
    "no_parts": (str(FSDP), FSDP),
    "no_scheduler": (str(FSDP), FSDP),
    "flipped": (str(FSDP), FSDP),  # which only the manifest can tell
}


def damage(kind, folder):
    first, second = (folder / rank_files.file_name(rank, 2) for rank in range(2))
    if kind == "missing":
        second.unlink()
    elif kind == "truncated":
        second.write_bytes(second.read_bytes()[:-100])
    elif kind == "renamed":
        shutil.copy(first, second)
    elif kind == "mixed":
        shutil.copy(folder.with_name(f"checkpoint-{STEPS}") / second.name, second)
    elif kind == "no_parts":
        first.unlink()
        second.unlink()
    elif kind == "flipped":
        content = bytearray(second.read_bytes())
        content[-1] ^= 1
        second.write_bytes(content)
    elif kind == "no_scheduler":
        (folder / "scheduler.pt").unlink()


class Evaluated(TrainerCallback):
    """After an evaluation FSDP2 has whole parameters in the place of its shards: just then a checkpoint is saved."""

    steps = 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.steps += 1

    def on_step_end(self, args, state, control, **kwargs):
        control.should_evaluate = control.should_save


def make(folder, case, output, world, kind=CWDTrainer):
    set_seed(42)
    args = trainer_ranks.arguments(case, output, world)
    if case.variation == "remainder_resumed":
        args.optim_args += ",master=remainder"
        sizes = DistributedConfig(**LAYOUTS[case.layout].distributed)
        model = AutoModelForCausalLM.from_pretrained(
            folder / case.model, dtype=torch.bfloat16, distributed_config=sizes
        )
    else:
        model = trainer_ranks.load(folder, case)
    loss = None if VARIATIONS[case.variation].float32 else trainer_ranks.loss_in_float64
    rows = trainer_ranks.material()
    return kind(
        model, args, train_dataset=rows, eval_dataset=rows[:world], compute_loss_func=loss, callbacks=[Evaluated()]
    )


def snapshot(trainer):
    """Every bit of this rank that a checkpoint must bring back."""
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    optimizer = innermost(trainer.optimizer)
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    states = {
        (names[id(p)], key): (str(getattr(value, "placements", None)), local(value).clone())
        for p, state in optimizer.state.items()
        for key, value in state.items()
    }
    weights = {name: local(p.detach()).clone() for name, p in trainer.model.named_parameters()}
    return {
        "weights": weights,
        "states": states,
        "groups": groups,
        "scheduler": trainer.lr_scheduler.state_dict(),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "placements": {str(p.placements) for p in trainer.model.parameters() if is_dtensor(p)},
    }


def train(folder, world):
    for case in CASES[world]:
        trainer = make(folder, case, folder / "runs" / str(case), world)
        strategy = trainer.args.save_strategy
        trainer.train()
        assert trainer.args.save_strategy == strategy == "steps"
        yield str(case), snapshot(trainer)


def resume(folder, world):
    for case in CASES[world]:
        trainer = make(folder, case, folder / "again" / str(case), world)
        trainer.train(resume_from_checkpoint=str(folder / "runs" / str(case) / HALF))
        yield str(case), snapshot(trainer)


def refuse(folder, world):
    for kind, (_, case) in REFUSALS.items():
        trainer = make(folder, case, folder / "refused" / kind, world)
        trainer.args.cwd_verify = "full" if kind == "flipped" else "off"  # what the manifest tells is tested elsewhere
        before = [local(p.detach()).clone() for p in trainer.model.parameters()]
        checkpoint = folder / "damaged" / kind / HALF
        words = outcome(lambda: trainer.train(resume_from_checkpoint=str(checkpoint)))  # noqa: B023
        same = all(map(torch.equal, before, [local(p.detach()) for p in trainer.model.parameters()]))
        (watch,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, Evaluated))
        yield kind, (words, same, watch.steps)
    trainer = make(folder, FSDP._replace(rule="muon"), folder / "refused" / "reset", world)
    trainer.args.optim_args += ",on_rule_change=reset"
    trainer.train(resume_from_checkpoint=str(folder / "runs" / str(FSDP) / HALF))
    yield "reset", snapshot(trainer)
    yield "plain", outcome(lambda: make(folder, FSDP, folder / "refused" / "plain", world, Trainer))
    trainer = make(folder, FSDP, folder / "refused" / "best", world)
    trainer.state.best_model_checkpoint = str(folder / "runs" / str(FSDP) / HALF)
    trainer.evaluate()
    trainer._load_best_model()
    whole = load_file(folder / "runs" / str(FSDP) / HALF / "model.safetensors")  # which transformers has gathered
    found = {name: p.full_tensor() for name, p in trainer.model.named_parameters()}
    yield "best", found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)


def outcome(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def run(folder, phase, world):
    """One phase on this rank; nothing is carried over from one of its runs to the next."""
    cpu_ranks.switch_on()
    results, items = {}, phase(folder, world)
    while True:
        faulthandler.dump_traceback_later(WAIT, exit=True)
        with clean_state():
            item = next(items, None)
        if item is None:
            break
        results[item[0]] = item[1]
        garbage.pass_over()
    torch.save(results, folder / f"{phase.__name__}-{world}-{os.environ['RANK']}")
    dist.destroy_process_group()


def launch(folder, phase, world):
    """Forks the ranks of a phase and waits for them; the first that fails ends the program."""
    log = folder / f"log-{phase.__name__}-{world}"
    codes = finish(start(lambda: run(folder, phase, world), world, log), timeout=10 * WAIT)
    print(log.read_text(), file=sys.stderr)
    if any(codes):
        sys.exit(f"{phase.__name__}: ranks have ended with {codes}")


def main():
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    VARIATIONS.update(OWN_VARIATIONS)
    for name, config in MODELS.items():
        set_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).double().save_pretrained(folder / name)
    garbage.pass_over()
    for world in CASES:
        launch(folder, train, world)
        launch(folder, resume, world)
    for kind, (run, _) in REFUSALS.items():
        shutil.copytree(folder / "runs" / run, folder / "damaged" / kind)
        damage(kind, folder / "damaged" / kind / HALF)
    launch(folder, refuse, 2)


if __name__ == "__main__":
    main()
