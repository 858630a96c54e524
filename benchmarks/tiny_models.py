"""Tiny random models of the families that users fine-tune, with their sizes and a tokenizer of whole words."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCABULARY = 96
CLASSES = ("blue", "green", "red")

Sizes = dict[str, Any]
TOKENS: Sizes = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
PLAIN: Sizes = {
    **TOKENS,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
GROUPED: Sizes = {**PLAIN, "num_key_value_heads": 2}
HEADED: Sizes = {**GROUPED, "head_dim": 8}
GPT2: Sizes = {**TOKENS, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
GEMMA: Sizes = {**HEADED, "query_pre_attn_scalar": 8, "sliding_window": 8}
EXPERTS: Sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MAMBA: Sizes = {**TOKENS, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 8}
SIGLIP: Sizes = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
LLAMA4: Sizes = {**HEADED, "num_local_experts": 4, "intermediate_size_mlp": 64, "attention_chunk_size": 64}
LLAMA4_VISION: Sizes = {
    **SIGLIP,
    "intermediate_size": 64,
    "projector_input_dim": 16,
    "projector_output_dim": 16,
    "vision_output_dim": 16,
}
MLLAMA_VISION: Sizes = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_global_layers": 1,
    "attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "vision_output_dim": 32,
    "intermediate_layers_indices": [0],
    "max_num_tiles": 2,
    "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
}
DEEPSEEK: Sizes = {
    **PLAIN,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
BART: Sizes = {
    **TOKENS,
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
}
T5: Sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4}

CAUSAL: dict[str, tuple[str, Sizes]] = {
    "Llama": ("llama", GROUPED),
    "Llama-4": ("llama4", {"text_config": LLAMA4, "vision_config": LLAMA4_VISION}),
    "Mllama": ("mllama", {"text_config": {**GROUPED, "cross_attention_layers": [1]}, "vision_config": MLLAMA_VISION}),
    "Mistral": ("mistral", GROUPED),
    "Ministral 3": ("ministral3", HEADED),
    "Qwen2": ("qwen2", GROUPED),
    "Qwen3": ("qwen3", HEADED),
    "Phi-3": ("phi3", GROUPED),
    "Gemma": ("gemma", HEADED),
    "Gemma-2": ("gemma2", GEMMA),
    "Gemma-3 (text)": ("gemma3_text", GEMMA),
    "Gemma-3 (multimodal)": (
        "gemma3",
        {"text_config": GEMMA, "vision_config": SIGLIP, "mm_tokens_per_image": 4, "image_token_index": 95},
    ),
    "OLMo-2": ("olmo2", GROUPED),
    "Granite": ("granite", GROUPED),
    "SmolLM3": ("smollm3", GROUPED),
    "GLM-4": ("glm4", HEADED),
    "StableLM": ("stablelm", GROUPED),
    "StarCoder2": ("starcoder2", GROUPED),
    "Cohere": ("cohere", GROUPED),
    "GPT-2": ("gpt2", GPT2),
    "GPT-NeoX": ("gpt_neox", PLAIN),
    "GPT-J": ("gptj", {**GPT2, "rotary_dim": 4}),
    "BLOOM": ("bloom", {**TOKENS, "hidden_size": 32, "n_layer": 3, "n_head": 4}),
    "Falcon": ("falcon", PLAIN),
    "OPT": ("opt", {**PLAIN, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    "Mixtral": ("mixtral", {**GROUPED, "num_local_experts": 4}),
    "Qwen3-MoE": ("qwen3_moe", {**HEADED, **EXPERTS}),
    "OLMoE": ("olmoe", {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2}),
    "DeepSeek-V3": ("deepseek_v3", DEEPSEEK),
    "gpt-oss": ("gpt_oss", {**HEADED, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}),
    "Mamba": ("mamba", {**MAMBA, "time_step_rank": 4}),
    "Mamba-2": ("mamba2", {**MAMBA, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8}),
    "LFM2": ("lfm2", {**GROUPED, "layer_types": ["conv", "full_attention", "conv"]}),
}
"""Families of causal language models: transformers' model type, and sizes of about 30,000 to 100,000 weights."""

CLASSIFIERS: dict[str, tuple[str, Sizes]] = {
    "BERT": ("bert", PLAIN),
    "RoBERTa": ("roberta", PLAIN),
    "ELECTRA": ("electra", {**PLAIN, "embedding_size": 32}),
    "ALBERT": ("albert", {**PLAIN, "embedding_size": 16}),
    "DistilBERT": ("distilbert", {**TOKENS, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 64}),
    "DeBERTa": ("deberta", PLAIN),
    "DeBERTa-v3": ("deberta-v2", {**PLAIN, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "ModernBERT": ("modernbert", {**PLAIN, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 8}),
    "T5": ("t5", {**TOKENS, **T5, "decoder_start_token_id": 0}),
    "BART": ("bart", BART),
    "Llama (classifier)": ("llama", GROUPED),
    "Qwen3 (classifier)": ("qwen3", HEADED),
}
"""Families that are trained as classifiers."""

Task = Literal["CausalLM", "Classifier"]


@dataclass(frozen=True)
class Family:
    """A family of models: its name in the table, its task, transformers' model type, and the sizes of a tiny one."""

    name: str
    task: Task
    model_type: str
    sizes: Sizes

    def tiny(self, seed: int = 0) -> PreTrainedModel:
        """Return a random model of the family in fp32, with random biases."""
        config = AutoConfig.for_model(self.model_type, **self.sizes)
        auto = AutoModelForCausalLM if self.task == "CausalLM" else AutoModelForSequenceClassification
        if config.get_text_config() is not config:  # the whole checkpoint, of which users train the text model
            auto = AutoModelForImageTextToText
        if self.task == "Classifier":
            config.num_labels = len(CLASSES)
            config.id2label = dict(enumerate(CLASSES))
            config.label2id = {name: number for number, name in enumerate(CLASSES)}
        torch.manual_seed(seed)
        model = auto.from_config(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # at zero, an adapter that scales them would have no gradient
                nn.init.normal_(parameter, std=0.02)
        return model

    def write(self, folder: Path, dropout: bool = True) -> Path:
        """Write a random model with a tokenizer to `folder`; without dropout, if it is false."""
        model = self.tiny()
        for name, value in vars(model.config).items():
            if not dropout and "drop" in name and isinstance(value, float):
                setattr(model.config, name, 0.0)
        model.save_pretrained(folder)
        word_tokenizer().save_pretrained(folder)
        return folder


FAMILIES = {
    **{name: Family(name, "CausalLM", *how) for name, how in CAUSAL.items()},
    **{name: Family(name, "Classifier", *how) for name, how in CLASSIFIERS.items()},
}


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words that ends each text, as BART's and T5's do."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{n}" for n in range(VOCABULARY - 4))]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
