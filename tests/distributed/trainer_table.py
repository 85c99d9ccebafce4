"""The trainer equality table: every layout, model, rule and variation that is trained, derived from the tables below.

No framework is imported here, so that the test and every rank derive the same cases at no cost.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from hf_cwd.rules import RULES, Rule
from hf_cwd.trainer.optim_args import options

STEPS = 4
GLOBAL_BATCH = 12  # for 1 to 4 ranks, and for two accumulation steps
ROWS, TOKENS, VOCABULARY = STEPS * GLOBAL_BATCH, 16, 64
LEARNING_RATE, WEIGHT_DECAY = 1e-2, 0.1

SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}  # grouped queries: k and v are smaller than q
# 50 rows of gate and up: uneven on 3 ranks, and on 4 ranks of FSDP2 or of FSDP2 over tensor parallelism.
LLAMA = {"model_type": "llama", "intermediate_size": 50, **SIZES, **HEADS}
# Conv1D weights, which lie the other way round, fused q, k and v, and biases. Dropout would depend on the layout.
GPT2 = {
    **{"model_type": "gpt2", "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32},
    **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "llama_tied": {**LLAMA, "tie_word_embeddings": True},
    "qwen3_moe": {
        **{"model_type": "qwen3_moe", "intermediate_size": 48, "moe_intermediate_size": 24, "head_dim": 8},
        **{"num_experts": 4, "num_experts_per_tok": 2, **SIZES, **HEADS},
    },
}


@dataclass(frozen=True)
class Variation:
    """How a run differs from the plain one."""

    arguments: dict[str, Any] = field(default_factory=dict)  # of TrainingArguments
    equals: str | None = None  # the variation of one process that it must equal, if not the same
    model: str | None = None  # a change of the model, see trainer_ranks.CHANGES
    float32: bool = False  # instead of float64


ACCUMULATION, CLIPPING = {"gradient_accumulation_steps": 2}, {"max_grad_norm": 0.05}
VARIATIONS: dict[str, Variation] = {
    "plain": Variation(),
    "float32": Variation(float32=True),
    "accumulation": Variation(ACCUMULATION, equals="plain"),
    "checkpointing": Variation({"gradient_checkpointing": True}, equals="plain"),
    "clipping": Variation(CLIPPING),
    "lora": Variation(model="lora"),
    "frozen": Variation(model="frozen"),
    # DeepSpeed trains in no float64.
    "float32_accumulation": Variation(ACCUMULATION, equals="float32", float32=True),
    "float32_checkpointing": Variation({"gradient_checkpointing": True}, equals="float32", float32=True),
    "float32_clipping": Variation(CLIPPING, float32=True),
    "float32_lora": Variation(model="lora", float32=True),
    "float32_frozen": Variation(model="frozen", float32=True),
    # Each of two ranks rounds its gradients to bfloat16 before they are added: so does a step of accumulation.
    "bfloat16": Variation({"bf16": True}, equals="bfloat16_accumulated", float32=True),
    "bfloat16_accumulated": Variation({"bf16": True, **ACCUMULATION}, float32=True),
    # Dynamo and AOTAutograd without Inductor, whose C++ takes a minute to compile.
    "compiled": Variation({"torch_compile": True, "torch_compile_backend": "aot_eager"}, equals="plain"),
}


@dataclass(frozen=True)
class Layout:
    """How a model is spread over ranks, and what is trained so."""

    world: int
    arguments: dict[str, Any] = field(default_factory=dict)  # of TrainingArguments
    parallelism: dict[str, int] = field(default_factory=dict)  # of accelerate's ParallelismConfig
    distributed: dict[str, int] = field(default_factory=dict)  # of transformers' DistributedConfig
    placements: frozenset[str] = frozenset()  # which some of its parameters have; none: every parameter is a plain one
    models: tuple[str, ...] = ("llama",)
    plain: str = "plain"  # the variation in which it trains these with every rule
    variations: tuple[str, ...] = ()  # in which it trains Llama besides
    matrices: bool = True  # whether rules for whole matrices can train so
    sums_in_bfloat16: bool = False  # with --bf16 it adds up in bfloat16 what the ranks have computed
    deepspeed: dict[str, Any] = field(default_factory=dict)  # its configuration, beside what the Trainer fills in

    @property
    def same_batch(self) -> int:
        """The number of neighbouring ranks that are given the same batches."""
        return self.distributed.get("tp_size", 1)

    @property
    def accelerate_shards(self) -> bool:
        """Whether Accelerate has to take CPUs for accelerators, see scripts/dev/cpu_ranks.py."""
        sharded = bool(self.arguments or self.parallelism) or self.same_batch > 1 or self.world == 4
        return sharded and not self.deepspeed


def zero(stage: int, *, top: dict[str, Any] | None = None, **section: Any) -> dict[str, Any]:
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    filled = {**dict.fromkeys(auto, "auto"), "bf16": {"enabled": "auto"}}
    return {**filled, "zero_optimization": {"stage": stage, **section}, **(top or {})}


def fsdp(**config: Any) -> dict[str, Any]:
    return {"fsdp": True, "fsdp_config": {"version": 2, **config}}


ROWS_CUT = frozenset({"(Shard(dim=0),)"})
TP_CUT = frozenset({"(Shard(dim=0),)", "(Shard(dim=1),)"})
EP_CUT = frozenset({"(Shard(dim=0),)", "(_StridedShard(dim=0, sf=2), Shard(dim=0))"})
HSDP_CUT = frozenset({"(Replicate(), Shard(dim=0))"})
FSDP_TP_CUT = frozenset({"(_StridedShard(dim=0, sf=2), Shard(dim=0))", "(Shard(dim=0), Shard(dim=1))"})

# FSDP1's sync_module_states looks for an accelerator, and its clipping refuses float64.
FSDP1 = {"use_orig_params": True, "sync_module_states": False}

OFFLOADED = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
FLOAT32 = ("float32_accumulation", "float32_checkpointing", "float32_clipping", "float32_lora", "float32_frozen")
IN_PARTS = frozenset({"partitioned"})

EVERY_MODEL = tuple(MODELS)
COMMON = ("float32", "accumulation", "checkpointing", "clipping", "lora", "frozen", "bfloat16")
COMPILED = ("compiled",)


def deepspeed(world: int, config: dict[str, Any], *, plain: str = "float32", **options: Any) -> Layout:
    parts = IN_PARTS if config["zero_optimization"]["stage"] == 3 else frozenset()
    return Layout(world, placements=parts, plain=plain, sums_in_bfloat16=True, deepspeed=config, **options)


LAYOUTS: dict[str, Layout] = {
    "ddp": Layout(2, models=EVERY_MODEL, variations=COMMON + COMPILED),
    # The Trainer multiplies the loss by 3, which the float32 that Llama's norms compute in rounds: not for float64.
    "ddp_3": Layout(3, plain="float32"),
    # Accelerate: FSDP2, FSDP1, and its ParallelismConfig.
    "fsdp2": Layout(2, fsdp(), {}, {}, ROWS_CUT, EVERY_MODEL, variations=COMMON + COMPILED, sums_in_bfloat16=True),
    # 4 experts on 3 ranks: the last one's part of them is empty.
    "fsdp2_3": Layout(3, fsdp(), {}, {}, ROWS_CUT, ("llama", "llama_tied", "qwen3_moe"), plain="float32"),
    "fsdp2_offloaded": Layout(2, fsdp(cpu_offload=True), placements=ROWS_CUT),
    "fsdp2_checkpointed": Layout(2, fsdp(activation_checkpointing=True), placements=ROWS_CUT),
    "fsdp1": Layout(2, fsdp(version=1, **FSDP1), plain="float32", matrices=False),
    "accelerate_dp_shard": Layout(2, fsdp(), {"dp_shard_size": 2}, placements=ROWS_CUT),
    "accelerate_hsdp": Layout(4, fsdp(), {"dp_replicate_size": 2, "dp_shard_size": 2}, placements=HSDP_CUT),
    "accelerate_tp": Layout(2, {}, {"tp_size": 2}, {"tp_size": 2}, TP_CUT),
    # transformers' DistributedConfig; it has no plan to cut GPT-2 by tensor parallelism.
    "fsdp": Layout(2, {}, {}, {"fsdp_size": 2}, ROWS_CUT, EVERY_MODEL, variations=COMMON),
    "tp": Layout(2, {}, {}, {"tp_size": 2}, TP_CUT, EVERY_MODEL[1:], variations=COMMON, sums_in_bfloat16=True),
    "fsdp_tp": Layout(4, {}, {}, {"fsdp_size": 2, "tp_size": 2}, FSDP_TP_CUT, ("llama", "qwen3_moe")),
    "hsdp": Layout(4, {}, {}, {"dp_replicate_size": 2, "fsdp_size": 2}, HSDP_CUT),
    # In float64 FSDP2 divides the experts' gradients twice: their group is one rank and has a divisor of its own.
    "fsdp_ep": Layout(2, {}, {}, {"fsdp_size": 2, "ep_size": 2}, EP_CUT, ("qwen3_moe",), plain="float32"),
    "tp_ep": Layout(2, {}, {}, {"tp_size": 2, "ep_size": 2}, TP_CUT, ("qwen3_moe",)),
    "zero1": deepspeed(2, zero(1), models=EVERY_MODEL),
    "zero2": deepspeed(2, zero(2), models=EVERY_MODEL, variations=(*FLOAT32, "bfloat16")),
    "zero3": deepspeed(2, zero(3), models=EVERY_MODEL, variations=(*FLOAT32, "bfloat16")),
    "zero1_offloaded": deepspeed(2, zero(1, **OFFLOADED)),
    "zero2_offloaded": deepspeed(2, zero(2, **OFFLOADED), variations=("float32_accumulation",)),
    "zero3_offloaded": deepspeed(2, zero(3, **OFFLOADED), variations=("bfloat16",)),
    "zero2_round_robin": deepspeed(2, zero(2, round_robin_gradients=True)),
    "zero3_sub_groups": deepspeed(2, zero(3, sub_group_size=4000)),
    "bf16_optimizer": deepspeed(2, zero(1, top={"data_types": {"grad_accum_dtype": "fp32"}}), plain="bfloat16"),
    "zero1_3": deepspeed(3, zero(1)),
    "zero2_3": deepspeed(3, zero(2), models=("llama", "llama_tied", "qwen3_moe")),
    "zero3_3": deepspeed(3, zero(3), models=("llama", "llama_tied", "qwen3_moe")),
    "zero3_offloaded_3": deepspeed(3, zero(3, **OFFLOADED)),
    "zero1_aligned_3": deepspeed(3, zero(1, parameter_alignment=True)),
}


class Case(NamedTuple):
    """One run of the Trainer; ``layout`` None is one process."""

    layout: str | None
    model: str
    rule: str
    variation: str

    def __str__(self) -> str:
        return "-".join((self.layout or "one", self.model, self.rule, self.variation))


def cases(world: int, *, deepspeed: bool = False) -> list[Case]:
    """What ``world`` ranks train in one launch; one process trains what the others are compared with."""
    if world == 1:
        launches = [cases(ranks, deepspeed=kind) for ranks in (2, 3, 4) for kind in (False, True)]
        return list(dict.fromkeys(one_process(case) for launch in launches for case in launch))
    found = []
    for name, layout in LAYOUTS.items():
        if layout.world != world or bool(layout.deepspeed) != deepspeed:
            continue
        rules = [rule for rule in RULES.values() if layout.matrices or rule.matrix is None]
        found += [Case(name, *pair, layout.plain) for pair in models_and_rules(name)]
        found += [Case(name, "llama", rule.name, key) for key in layout.variations for rule in varied(rules, key)]
    # What needs no switch runs first, as it would without the switch.
    return sorted(found, key=lambda case: LAYOUTS[case.layout].accelerate_shards)


def models_and_rules(name: str) -> list[tuple[str, str]]:
    """What a layout trains plainly: rules for matrices with each of its models, every other rule with one of them.

    A rule for matrices has to know how a layout has cut each of a model's matrices. An element-wise rule is given the
    same local tensors as one for matrices gives its companion, and does not look at their shapes: it suffices that it
    meets each layout, and with DeepSpeed and without it each model, which a test asserts. The layouts take turns.
    """
    layout = LAYOUTS[name]
    kind = layout.models, bool(layout.deepspeed)
    turn = [other for other, its in LAYOUTS.items() if (its.models, bool(its.deepspeed)) == kind].index(name)
    matrices = [rule.name for rule in RULES.values() if rule.matrix is not None]
    others = [rule.name for rule in RULES.values() if rule.matrix is None]
    found = [(model, rule) for model in layout.models for rule in matrices if layout.matrices]
    return found + [(layout.models[(k - turn) % len(layout.models)], rule) for k, rule in enumerate(others)]


def varied(rules: list[Rule], variation: str) -> list[Rule]:
    """A rule for matrices has its companion in the same optimizer: two rules in one run."""
    return rules if variation == "float32" else [rule for rule in rules if rule.matrix is not None]


def one_process(case: Case) -> Case:
    """The run of one process whose weights a case must reach."""
    return case._replace(layout=None, variation=VARIATIONS[case.variation].equals or case.variation)


def optim_args(case: Case) -> str:
    """Momentum for every rule that has it; and for float32, what keeps rounding errors small."""
    wanted: dict[str, Any] = {"momentum": 0.9}
    if VARIATIONS[case.variation].float32:
        companion = RULES[case.rule].companion
        # AdamW's first direction is g / (|g| + eps): with this eps a smooth function of g, also near zero.
        wanted |= {"ns_dtype": "float32", f"{companion}_eps" if companion else "eps": 1e-4}
    return ",".join(f"{key}={value}" for key, value in wanted.items() if key in options(case.rule))
