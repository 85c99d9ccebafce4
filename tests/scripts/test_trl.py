"""TRL's trainers in plain Python: `import hf_cwd` and `optim="cwd_..."` are all that it takes."""

import json
import math

import pytest
import torch
from common.lm_data import train_tokenizer
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments, set_seed
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
    TrlParser,
)

import hf_cwd

CLASSES = {"cwd_adamw": hf_cwd.CWDAdamW, "cwd_lion": hf_cwd.CWDLion, "cwd_muon": hf_cwd.CWDMuon}


class Start(TrainerCallback):
    """The optimizer and a copy of the weights, before the first step."""

    def on_train_begin(self, args, state, control, *, model, optimizer, **others):
        self.optimizer = optimizer.optimizer
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def model(workspace) -> str:
    """The tiny Llama and a tokenizer, in a directory: DPO loads its reference model from there."""
    folder = workspace / "trl"
    documents = Dataset.from_json(str(workspace / "docs.jsonl"), cache_dir=str(workspace / "cache"))
    tokenizer = train_tokenizer(documents, text_column="text", vocab_size=512)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    set_seed(0)
    LlamaForCausalLM(LlamaConfig.from_pretrained(workspace / "config.json")).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def rows(workspace) -> dict[str, Dataset]:
    """Real beginnings and their real ends; rejected is an end read backwards."""
    lines = (workspace / "docs.jsonl").read_text(encoding="utf-8").split("\n")[:16]
    texts = [json.loads(line)["text"] for line in lines]
    pairs = [{"prompt": t[:20], "chosen": t[20:60], "rejected": t[20:60][::-1]} for t in texts]
    return {
        "texts": Dataset.from_list([{"text": t[:100]} for t in texts]),
        "pairs": Dataset.from_list(pairs),
        "prompts": Dataset.from_list([{"prompt": t[:20]} for t in texts]),
    }


def spaces(completions, **others) -> list[float]:
    return [float(completion.count(" ")) for completion in completions]


LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
GENERATING = {"num_generations": 4, "max_completion_length": 8}
# Trainer, class of its arguments (only SFTTrainer takes plain ones), optimizer, rows, options of the two classes.
CASES = {
    "SFT": (SFTTrainer, SFTConfig, "cwd_muon", "texts", {}, {}),
    "SFT, plain arguments": (SFTTrainer, TrainingArguments, "cwd_adamw", "texts", {}, {}),
    "SFT, LoRA": (SFTTrainer, SFTConfig, "cwd_lion", "texts", {"peft_config": LORA}, {}),
    "DPO": (DPOTrainer, DPOConfig, "cwd_adamw", "pairs", {}, {}),
    "DPO, LoRA": (DPOTrainer, DPOConfig, "cwd_muon", "pairs", {"peft_config": LORA}, {}),
    "reward": (RewardTrainer, RewardConfig, "cwd_muon", "pairs", {}, {}),
    "GRPO": (GRPOTrainer, GRPOConfig, "cwd_muon", "prompts", {"reward_funcs": spaces}, GENERATING),
}


@pytest.mark.parametrize("case", CASES)
def test_trainer(case, model, rows, tmp_path):
    trainer_class, arguments_class, optim, kind, trainer_options, options = CASES[case]
    arguments = arguments_class(
        output_dir=str(tmp_path),
        optim=optim,
        optim_args="mask=gt",
        learning_rate=1e-2,
        weight_decay=0.1,
        per_device_train_batch_size=8,
        max_steps=6,
        lr_scheduler_type="constant",
        logging_steps=1,
        bf16=False,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    start = Start()
    trainer = trainer_class(
        model=model,
        args=arguments,
        train_dataset=rows[kind],
        processing_class=AutoTokenizer.from_pretrained(model),
        callbacks=[start],
        **trainer_options,
    )
    trainer.train()
    assert type(start.optimizer) is CLASSES[optim]
    assert {group["mask"] for group in start.optimizer.param_groups} == {"gt"}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert all(map(math.isfinite, losses))
    if trainer_class is not GRPOTrainer:  # whose loss is no measure
        assert min(losses[-2:]) < losses[0]
    trained = dict(trainer.model.named_parameters())
    changed = {name for name, p in trained.items() if not torch.equal(p, start.weights[name])}
    assert changed == {name for name, p in trained.items() if p.requires_grad}
    if "peft_config" in trainer_options:
        assert changed
        assert all("lora_" in name for name in changed)
    elif trainer_class is DPOTrainer:  # the reference model is out of the optimizer's reach
        assert all(torch.equal(p, start.weights[name]) for name, p in trainer.ref_model.named_parameters())


def test_trl_s_own_parser_offers_the_nearest_name(tmp_path, capsys):
    with pytest.raises(SystemExit):
        TrlParser((SFTConfig,)).parse_args_and_config(["--output_dir", str(tmp_path), "--optim", "cwd_adam"])
    assert "--optim cwd_adam does not exist. Did you mean cwd_adamw?" in capsys.readouterr().err
