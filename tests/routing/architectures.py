"""Tiny random models of the architectures people train, and their routing as readable files.

``python -m tests.routing.architectures`` rewrites ``routes/``: read the difference before you keep it.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_cwd import route

ROUTES = Path(__file__).parent / "routes"
# The parts of a fused projection have different sizes wherever the architecture lets them, so that none can be taken
# for another. One layer, unless the layers differ.
DECODER = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ENCODER = {name: value for name, value in DECODER.items() if name not in ("num_key_value_heads", "bos_token_id")}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4}
EXPERTS = {"num_experts": 3, "moe_intermediate_size": 16, "num_experts_per_tok": 2, "head_dim": 8}
STATE_SPACE = {"vocab_size": 64, "hidden_size": 32, "state_size": 6, "num_hidden_layers": 1, "pad_token_id": 0}
IMAGES = {"image_size": 16, "patch_size": 8, "num_channels": 3, "num_labels": 3}


def _model(family: str, kind: str = "ForCausalLM", config: str = "Config", **options: Any) -> nn.Module:
    """``<family><kind>`` of transformers, from ``<family><config>``."""
    torch.manual_seed(0)
    return getattr(transformers, family + kind)(getattr(transformers, family + config)(**options))


def _decoder(family: str, **options: Any) -> nn.Module:
    return _model(family, **DECODER | options)


def _gpt2(**options: Any) -> nn.Module:
    return _model("GPT2", "LMHeadModel", vocab_size=64, n_embd=32, n_head=4, n_layer=1, n_positions=64, **options)


def _qwen2_vl() -> nn.Module:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = DECODER | {"rope_parameters": rope}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4}
    special = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
    return _model("Qwen2VL", "ForConditionalGeneration", text_config=text, vision_config=vision, **special)


def llama_with_lora(rank: int, **options: Any) -> nn.Module:
    config = LoraConfig(r=rank, target_modules=["q_proj", "v_proj", "embed_tokens"], **options)
    return get_peft_model(_decoder("Llama"), config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": functools.partial(_decoder, "Llama"),
    "qwen2": functools.partial(_decoder, "Qwen2", tie_word_embeddings=True),
    "gemma3": functools.partial(_model, "Gemma3", config="TextConfig", **DECODER, head_dim=8),
    "gpt2": _gpt2,
    "gpt2_cross_attention": functools.partial(_gpt2, add_cross_attention=True),
    "gpt_neox": functools.partial(_decoder, "GPTNeoX"),
    "bloom": functools.partial(_model, "Bloom", vocab_size=64, hidden_size=32, n_head=4, n_layer=1),
    "falcon": functools.partial(
        _decoder, "Falcon", new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=2
    ),
    "falcon_multi_query": functools.partial(_decoder, "Falcon", multi_query=True),
    "phi3": functools.partial(_decoder, "Phi3"),
    "mixtral": functools.partial(_decoder, "Mixtral", num_local_experts=3),
    "qwen3_moe": functools.partial(_decoder, "Qwen3Moe", **EXPERTS, num_hidden_layers=2, mlp_only_layers=[0]),
    "gpt_oss": functools.partial(
        _decoder, "GptOss", num_local_experts=3, num_experts_per_tok=2, head_dim=8, layer_types=["full_attention"]
    ),
    "deepseek_v3": functools.partial(
        _decoder,
        "DeepseekV3",
        **HEADS,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=16,
        q_lora_rank=12,
        kv_lora_rank=10,
        qk_nope_head_dim=6,
        qk_rope_head_dim=4,
        v_head_dim=5,
    ),
    "mamba": functools.partial(_model, "Mamba", **STATE_SPACE, time_step_rank=4),
    "mamba2": functools.partial(_model, "Mamba2", **STATE_SPACE, num_heads=4, head_dim=16, n_groups=2, chunk_size=8),
    "jamba": functools.partial(
        _decoder,
        "Jamba",
        num_hidden_layers=2,
        num_experts=3,
        expert_layer_period=2,
        expert_layer_offset=1,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=6,
        mamba_dt_rank=4,
    ),
    "qwen3_next": functools.partial(
        _decoder,
        "Qwen3Next",
        **EXPERTS,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        shared_expert_intermediate_size=24,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=6,
        linear_value_head_dim=8,
    ),
    "bert": functools.partial(_model, "Bert", "ForMaskedLM", **ENCODER),
    "modernbert": functools.partial(
        _model, "ModernBert", "ForMaskedLM", **ENCODER, cls_token_id=1, sep_token_id=2, layer_types=["full_attention"]
    ),
    "t5": functools.partial(
        _model,
        "T5",
        "ForConditionalGeneration",
        vocab_size=64,
        d_model=32,
        d_kv=6,
        d_ff=48,
        num_layers=1,
        num_heads=4,
        relative_attention_num_buckets=8,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    ),
    "vit": functools.partial(_model, "ViT", "ForImageClassification", **ENCODER, **IMAGES),
    "resnet": functools.partial(
        _model,
        "ResNet",
        "ForImageClassification",
        embedding_size=8,
        hidden_sizes=[16, 32],
        depths=[1, 1],
        layer_type="basic",
        num_labels=3,
    ),
    "whisper": functools.partial(
        _model,
        "Whisper",
        "ForConditionalGeneration",
        vocab_size=64,
        d_model=32,
        num_mel_bins=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_source_positions=16,
        max_target_positions=32,
        decoder_start_token_id=1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "wav2vec2": functools.partial(
        _model,
        "Wav2Vec2",
        "ForCTC",
        **ENCODER,
        conv_dim=[16, 24],
        conv_kernel=[4, 2],
        conv_stride=[2, 2],
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    ),
    "qwen2_vl": _qwen2_vl,
    "lora": functools.partial(llama_with_lora, 4),
    "lora_and_head": functools.partial(llama_with_lora, 4, modules_to_save=["lm_head"]),
}


def main() -> None:
    ROUTES.mkdir(exist_ok=True)
    for path in set(ROUTES.glob("*.txt")) - {ROUTES / f"{name}.txt" for name in MODELS}:
        path.unlink()
    for name, make in MODELS.items():
        (ROUTES / f"{name}.txt").write_text(f"{route(make())}\n")


if __name__ == "__main__":
    main()
