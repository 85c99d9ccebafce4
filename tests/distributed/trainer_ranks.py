"""Trains the cases of layouts.py for this world size; each rank writes what it saw to FOLDER/WORLD-RANK.

    torchrun --nproc_per_node 2 -m tests.distributed.trainer_ranks FOLDER [deepspeed]

One process comes first: it also writes the models that all start from.
"""

import faulthandler
import os
import sys
from pathlib import Path

import torch
from accelerate import ParallelismConfig
from dev import cpu_ranks
from dev.forked_runs import clean_state
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.distributed import DistributedConfig

import hf_cwd  # noqa: F401
from hf_cwd.trainer.wrappers import innermost
from tests.distributed import trainer_table
from tests.distributed.trainer_table import LAYOUTS, MODELS, STEPS, VARIATIONS
from tests.support import garbage

LONGEST = 240  # seconds that one case may take


def material() -> list[dict[str, torch.Tensor]]:
    """Rows whose numbers of labels differ, so that ranks have different shares of a batch's items."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, trainer_table.VOCABULARY, (trainer_table.ROWS, trainer_table.TOKENS), generator=generator)
    rows = []
    for i, row in enumerate(tokens):
        labels = row.clone()
        labels[: i % 8] = -100
        rows.append({"input_ids": row, "labels": labels})
    return rows


def loss_in_float64(outputs, labels, num_items_in_batch=None):
    """transformers' own loss casts the logits to float32, whose rounding depends on how the batch was split."""
    logits = outputs.logits[:, :-1].flatten(0, 1)
    assert logits.dtype == torch.float64
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


def with_lora(model):
    # Not o_proj or down_proj: on those PEFT 0.21's forward fails under transformers' tensor parallelism.
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"]))
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_A" in name:  # PEFT's own start depends on what a rank holds of the layer
            torch.nn.init.normal_(p, std=0.1, generator=generator)
    return model


def with_frozen_parts(model):
    for name, p in model.named_parameters():
        p.requires_grad_("embed_tokens" not in name and "layers.0.mlp" not in name)
    return model


CHANGES = {"lora": with_lora, "frozen": with_frozen_parts}


class Recorder(Trainer):
    """The Trainer, and what it trained on."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.batches = []

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.batches.append((self.state.global_step, inputs["input_ids"].tolist(), float(num_items_in_batch)))
        return super().training_step(model, inputs, num_items_in_batch)


class Norms(TrainerCallback):
    """The norm of all gradients as the optimizer is given them, computed without the framework."""

    def __init__(self, flattened):
        self.flattened, self.norms = flattened, []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        total = sum((whole(gradient).double().square().sum() for gradient in gradients), torch.zeros(()).double())
        if self.flattened:  # FSDP1's gradients are this rank's part of them
            torch.distributed.all_reduce(total)
        self.norms.append(total.sqrt().item())


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def plain_name(name):
    for wrapper in ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.", "module."):
        name = name.replace(wrapper, "")
    return name


def weights(model):
    """All parameters whole, by the names of an unsharded model; cloned, for trained ones share memory with them."""
    if hasattr(next(model.parameters()), "_hp_mapping") or is_partitioned(model):
        from deepspeed.utils import safe_get_full_fp32_param

        # Round-robin gradients leave the table of masters wrong, and frozen parameters have none.
        masters = {
            name: safe_get_full_fp32_param(p) for name, p in model.named_parameters() if p.dtype != torch.float32
        }
        return {name: masters[name] if name in masters else gathered(p) for name, p in model.named_parameters()}
    with torch.distributed.fsdp.FullyShardedDataParallel.summon_full_params(model, writeback=False):
        return {plain_name(name): whole(p).clone() for name, p in model.named_parameters()}


def is_partitioned(model):
    return any(hasattr(p, "ds_id") for p in model.parameters())


def gathered(p):
    if not hasattr(p, "ds_id"):
        return p.detach().clone()
    import deepspeed

    with deepspeed.zero.GatheredParameters([p]):
        return p.detach().clone()


def load(folder, case):
    layout = LAYOUTS.get(case.layout)
    dtype = torch.float32 if VARIATIONS[case.variation].float32 else torch.float64
    options = {"experts_implementation": "eager"} if "num_experts" in MODELS[case.model] else {}
    if layout and layout.distributed:
        options["distributed_config"] = DistributedConfig(**layout.distributed)
    model = AutoModelForCausalLM.from_pretrained(folder / case.model, dtype=dtype, **options)
    change = VARIATIONS[case.variation].model
    return CHANGES[change](model) if change else model


def arguments(case, output, world):
    layout, variation = LAYOUTS.get(case.layout), VARIATIONS[case.variation]
    data_parallel = world // (layout.same_batch if layout else 1)
    options = dict(variation.arguments)
    accumulation = options.get("gradient_accumulation_steps", 1)
    if layout:
        options |= layout.arguments
        if layout.parallelism:
            options["parallelism_config"] = ParallelismConfig(**layout.parallelism)
        if layout.deepspeed:
            options["deepspeed"] = layout.deepspeed
    return TrainingArguments(
        output_dir=str(output),
        use_cpu=True,
        ddp_backend="gloo" if world > 1 else None,
        optim=f"cwd_{case.rule}",
        optim_args=trainer_table.optim_args(case),
        learning_rate=trainer_table.LEARNING_RATE,
        weight_decay=trainer_table.WEIGHT_DECAY,
        max_steps=STEPS,
        per_device_train_batch_size=trainer_table.GLOBAL_BATCH // data_parallel // accumulation,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        **{"save_strategy": "no", **options},
    )


def train(folder, case, output, world):
    deepspeed = case.layout is not None and bool(LAYOUTS[case.layout].deepspeed)
    early = arguments(case, output, world) if deepspeed else None  # for from_pretrained has to know of stage 3
    model = load(folder, case)
    args = early or arguments(case, output, world)
    start = {name: p.detach().clone() for name, p in model.named_parameters()} if world == 1 else None
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    norms = Norms(flattened=case.layout == "fsdp1")
    loss = None if VARIATIONS[case.variation].float32 else loss_in_float64
    trainer = Recorder(model, args, train_dataset=material(), compute_loss_func=loss, callbacks=[norms])
    dtypes = []
    if case.variation != "compiled":  # a hook with side effects would break the graph
        linear = next(module for name, module in model.named_modules() if name.endswith(("q_proj", "attn.c_attn")))
        linear.register_forward_hook(lambda module, given, output: dtypes.append(output.dtype))
    trainer.train()
    parameters = {plain_name(name): p for name, p in trainer.model.named_parameters()}
    return {
        "start": start,
        "trained": trained,
        "weights": weights(trainer.model),
        "batches": trainer.batches,
        "logged_norms": [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry],
        "applied_norms": norms.norms,
        "figures": [
            {key: value for key, value in entry.items() if key.startswith("cwd/")}
            for entry in trainer.state.log_history
            if "loss" in entry
        ],
        "world_size": args.world_size,
        "linear_dtypes": dtypes,
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
        "placements": {name: str(p.placements) for name, p in parameters.items() if isinstance(p, DTensor)}
        | ({"any": "partitioned"} if is_partitioned(trainer.model) else {}),
        "numels": {name: (p.to_local() if isinstance(p, DTensor) else p).numel() for name, p in parameters.items()},
        "optimizer": type(innermost(trainer.optimizer)).__name__,
        "together": sorted(exchange.group.ranks for exchange in innermost(trainer.optimizer).exchanges),
    }


def main():
    folder, world, rank = Path(sys.argv[1]), int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    torch.set_num_threads(1)
    if world == 1:
        for name, config in MODELS.items():
            set_seed(0)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
            model.double().save_pretrained(folder / name)
    results, switched, deepspeed = {}, False, sys.argv[2:] == ["deepspeed"]
    if deepspeed:
        import deepspeed as library

        library.init_distributed("gloo")  # zero.Init wants to know the ranks before there is a Trainer
    for case in trainer_table.cases(world, deepspeed=deepspeed):
        # On a busy machine gloo can stand still for ever: a thread of its own in ~UnboundBuffer, the ranks in a gather.
        faulthandler.dump_traceback_later(LONGEST, exit=True)
        if not switched and case.layout and LAYOUTS[case.layout].accelerate_shards:
            cpu_ranks.switch_on()
            switched = True
        with clean_state():
            results[tuple(case)] = train(folder, case, folder / "runs" / str(case), world)
        garbage.pass_over()
    faulthandler.cancel_dump_traceback_later()
    torch.save(results, folder / "-".join([str(world), str(rank), *sys.argv[2:]]))


if __name__ == "__main__":
    main()
