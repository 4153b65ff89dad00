"""Cases of the tuners' bench: a network with random weights, a generated batch, and the adapted parts.

LoRA and PaCA get ranks with which they train about the same number of parameters. Sizes are those of the
case's source where a CPU can run them; the others need a GPU.
"""

from __future__ import annotations

__all__ = ["CASES", "Case"]

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from thawline.bench.methods import Adapt
from thawline.bench.networks import ConvNet, VisionTransformer
from thawline.bench.quantised import engine

Batch = dict[str, Any]
"""Model inputs, with the rows' task ids."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One network, one batch, and the methods to compare on it."""

    what: str
    """One line: the network, its sizes, and the question it answers."""
    build: Callable[[], nn.Module]
    """Return the network with random weights, float32, on torch's default device."""
    batch: Callable[[], Batch]
    """Return the generated inputs."""
    loss: Callable[[nn.Module, Batch], Tensor]
    """Run a forward and return the scalar that backward starts from."""
    adapt: Adapt
    """The adapted parts and the ranks."""
    methods: tuple[str, ...]
    """Names in `thawline.bench.methods.METHODS`."""
    dtype: torch.dtype = torch.float32
    """dtype of the network and of images."""
    quantised: Literal["", "nf4", "int8"] = ""
    """Storage of the linear layers but the head; see `thawline.bench.quantised`."""
    needs_gpu: bool = False
    """Too large for a CPU."""
    tasks: tuple[int, ...] | None = None
    """The task of every row, for the methods that route."""
    new_tokens: int = 0
    """Above 0, a step generates this many tokens after the batch, greedily, instead of training."""


def _llama(
    *,
    hidden: int,
    mlp: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    trunk: bool = False,
    cache: bool = False,
) -> Callable[[], nn.Module]:
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, use_cache=cache,
    )  # fmt: skip
    return lambda: (LlamaModel if trunk else LlamaForCausalLM)(config)


def _mixture() -> nn.Module:
    config = Qwen3MoeConfig(
        vocab_size=1024, hidden_size=256, intermediate_size=512, moe_intermediate_size=192, num_experts=16,
        num_experts_per_tok=4, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        use_cache=False,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config)


def _tokens(*, vocab: int, batch: int, length: int) -> Callable[[], Batch]:
    return lambda: {"input_ids": torch.randint(0, vocab, (batch, length))}


def _images(*, classes: int, batch: int, size: int) -> Callable[[], Batch]:
    return lambda: {
        "pixel_values": torch.randn(batch, 3, size, size),
        "labels": torch.randint(0, classes, (batch,)),
    }


def _roberta() -> nn.Module:
    config = RobertaConfig(
        vocab_size=8192, hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=6,
        max_position_embeddings=514, type_vocab_size=1, num_labels=2,
    )  # fmt: skip
    return RobertaForSequenceClassification(config)


def _resnet(depths: tuple[int, ...], layer_type: str, widths: tuple[int, ...]) -> Callable[[], nn.Module]:
    config = ResNetConfig(
        depths=list(depths), hidden_sizes=list(widths), layer_type=layer_type, num_labels=10
    )
    return lambda: ResNetForImageClassification(config)


def _next_token_loss(model: nn.Module, batch: Batch) -> Tensor:
    loss: Tensor = model(**batch, labels=batch["input_ids"]).loss
    return loss


def _one_linear() -> nn.Module:
    """A linear after an identity, whose output is made to require a gradient."""
    return nn.Sequential(OrderedDict(entry=nn.Identity(), linear=nn.Linear(1024, 1024)))


def _square(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean square, which keeps the output for backward with every method."""
    inputs = dict(batch)
    output: Tensor = model(inputs.pop("x"), **inputs)
    return output.square().mean()


def _trunk_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean, which keeps nothing for backward, so that only the blocks count."""
    return model(**batch).last_hidden_state.mean()


def _own_loss(model: nn.Module, batch: Batch) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def _image_loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch["pixel_values"]), batch["labels"])


def _classified_tokens() -> Batch:
    return {"input_ids": torch.randint(5, 8192, (8, 128)), "labels": torch.randint(0, 2, (8,))}


_FP32 = ("floor", "full", "lora", "lora_dropout", "paca", "paca_lean")
_BF16 = ("floor", "full", "lora", "lora_fp32", "lora_dropout", "lora_fp32_dropout", "paca", "paca_lean")
_SKILLS = ("floor", "lora", "poly", "mhr")
_EIGHT_TASKS = tuple(range(8))  # mixed in every batch
_STOCK_BLOCKS = ("floor", "full", "lora", "lora_dropout", "paca")  # no lean version of these networks' blocks
_CONVS = r".*encoder.*\.convolution"

_REFERENCE: dict[str, Any] = {
    "hidden": 512,
    "mlp": 1408,
    "layers": 8,
    "heads": 8,
    "kv_heads": 8,
    "vocab": 4096,
}
_REFERENCE_CASE = Case(
    what="Llama, hidden 512, 8 layers, MLP 1408, 8 heads, vocabulary 4096; 4 × 256 tokens",
    build=_llama(**_REFERENCE),
    batch=_tokens(vocab=4096, batch=4, length=256),
    loss=_next_token_loss,
    adapt=Adapt(entry="model.embed_tokens", targets="all-linear"),
    methods=_FP32,
)
_SMALL: dict[str, Any] = {"hidden": 64, "mlp": 160, "layers": 8, "heads": 4, "kv_heads": 4, "vocab": 256}


def _skills_case(what: str, sizes: dict[str, Any], length: int, *, new_tokens: int = 0) -> Case:
    """A Llama with eight rows of eight tasks, or of one where it generates text."""
    return Case(
        what=what,
        build=_llama(**sizes, cache=bool(new_tokens)),
        batch=_tokens(vocab=sizes["vocab"], batch=8, length=length),
        loss=_next_token_loss,
        adapt=Adapt(entry="model.embed_tokens", targets="all-linear", task_type="CAUSAL_LM"),
        methods=_SKILLS,
        tasks=(3,) * 8 if new_tokens else _EIGHT_TASKS,
        new_tokens=new_tokens,
    )


def _quantised_case(kind: Literal["nf4", "int8"]) -> Case:
    """The reference Llama as QLoRA's users have it: `lora` is PEFT's on the quantised base, `paca` QPaCA."""
    return replace(
        _REFERENCE_CASE,
        what=f"{_REFERENCE_CASE.what}; linear layers in {kind} ({engine()}), products in fp32",
        methods=("floor", "lora", "lora_dropout", "paca"),
        quantised=kind,
    )


CASES: dict[str, Case] = {
    "reference": _REFERENCE_CASE,
    "beside": replace(_REFERENCE_CASE, methods=("floor", "lora", "paca", "paca_additive")),
    "nf4": _quantised_case("nf4"),
    "int8": _quantised_case("int8"),
    "experts": Case(
        what="Qwen3-MoE, hidden 256, 4 layers, 16 experts of 192, 4 per token; 4 × 128 tokens; experts alone",
        build=_mixture,
        batch=_tokens(vocab=1024, batch=4, length=128),
        loss=_next_token_loss,
        adapt=Adapt(
            entry="model.embed_tokens",
            targets=r".*\.mlp\.experts",
            lora_parameters=("experts.gate_up_proj", "experts.down_proj"),
            paca_r=14,
        ),
        methods=("floor", "full", "lora", "paca"),
    ),
    "bf16-8b-proportions": Case(
        what="two Llama blocks in the proportions of the 8B: hidden 512, MLP 1792, 8/2 heads; 1 × 64 tokens",
        build=_llama(hidden=512, mlp=1792, layers=2, heads=8, kv_heads=2, vocab=64, trunk=True),
        batch=_tokens(vocab=64, batch=1, length=64),
        loss=_trunk_loss,
        adapt=Adapt(entry="embed_tokens", targets="all-linear"),
        methods=_BF16,
        dtype=torch.bfloat16,
    ),
    "8b-blocks": Case(
        what="four blocks of the Llama 8B (hidden 4096, MLP 14336, 32/8 heads); 4 × 2048 tokens",
        build=_llama(hidden=4096, mlp=14336, layers=4, heads=32, kv_heads=8, vocab=64, trunk=True),
        batch=_tokens(vocab=64, batch=4, length=2048),
        loss=_trunk_loss,
        adapt=Adapt(entry="embed_tokens", targets="all-linear"),
        methods=_BF16,
        dtype=torch.bfloat16,
        needs_gpu=True,
    ),
    "small-model": Case(
        what="RoBERTa, hidden 384, 6 layers; 8 × 128 tokens (huggingface/peft #925: no faster than full)",
        build=_roberta,
        batch=_classified_tokens,
        loss=_own_loss,
        adapt=Adapt(entry="roberta.embeddings", targets=r".*encoder.*\.(query|key|value|dense)"),
        methods=_STOCK_BLOCKS,
    ),
    "resnet18": Case(
        what="ResNet-18, convolutions; 64 images of 32 × 32 (huggingface/peft #960: slower than full)",
        build=_resnet((2, 2, 2, 2), "basic", (64, 128, 256, 512)),
        batch=_images(classes=10, batch=64, size=32),
        loss=_own_loss,
        adapt=Adapt(entry="resnet.embedder", targets=_CONVS, lora_r=16, paca_r=16, dropout=0.1),
        methods=_STOCK_BLOCKS,
    ),
    "small-llama-memory": Case(
        # Width, tokens, ranks by 16, layers by 5.5, vocabulary by both: every share of memory stays.
        what="TinyLlama, LoRA r=64, 2 × 8192 tokens, scaled down (huggingface/peft #1514: more than full)",
        build=_llama(hidden=128, mlp=352, layers=4, heads=8, kv_heads=1, vocab=364),
        batch=_tokens(vocab=364, batch=2, length=512),
        loss=_next_token_loss,
        adapt=Adapt(entry="model.embed_tokens", targets="all-linear", lora_r=4, paca_r=8),
        methods=_BF16,
        dtype=torch.bfloat16,
    ),
    "tinyllama": Case(
        what="TinyLlama 1.1B, LoRA r=64, 2 × 4096 tokens: huggingface/peft #1514 itself, at half its context",
        build=_llama(hidden=2048, mlp=5632, layers=22, heads=32, kv_heads=4, vocab=32000),
        batch=_tokens(vocab=32000, batch=2, length=4096),
        loss=_next_token_loss,
        adapt=Adapt(entry="model.embed_tokens", targets="all-linear", lora_r=64, paca_r=128),
        methods=("floor", "full", "lora", "lora_fp32", "paca", "paca_lean"),
        dtype=torch.bfloat16,
        needs_gpu=True,
    ),
    "resnet50": Case(
        what="ResNet-50, convolutions; 4 images of 224 × 224 (huggingface/peft #2196: activations double)",
        build=_resnet((3, 4, 6, 3), "bottleneck", (256, 512, 1024, 2048)),
        batch=_images(classes=10, batch=4, size=224),
        loss=_own_loss,
        adapt=Adapt(entry="resnet.embedder", targets=_CONVS, lora_r=4, paca_r=6),
        methods=_STOCK_BLOCKS,
    ),
    "vit": Case(
        what="small vision transformer (width 64, 3 blocks); 64 images of 32 × 32",
        build=VisionTransformer,
        batch=_images(classes=10, batch=64, size=32),
        loss=_image_loss,
        adapt=Adapt(entry="patches", targets=VisionTransformer.targets),
        methods=_STOCK_BLOCKS,
    ),
    "convnet": Case(
        what="small residual conv net (width 32 to 128); 64 images of 32 × 32",
        build=ConvNet,
        batch=_images(classes=10, batch=64, size=32),
        loss=_image_loss,
        adapt=Adapt(entry="stem", targets=ConvNet.targets, paca_r=7),
        methods=_STOCK_BLOCKS,
    ),
    "skills-linear": Case(
        what="one linear of 1024 × 1024; 8 × 256 tokens of 8 tasks",
        build=_one_linear,
        batch=lambda: {"x": torch.randn(8, 256, 1024)},
        loss=_square,
        adapt=Adapt(entry="entry", targets="linear"),
        methods=("floor", "lora", "lora_fp32", "poly", "mhr"),
        dtype=torch.bfloat16,
        tasks=_EIGHT_TASKS,
    ),
    "skills-small": _skills_case(
        "Llama so small that launches decide: hidden 64, 8 layers, MLP 160; 8 × 16 tokens of 8 tasks",
        _SMALL,
        16,
    ),
    "skills-reference": _skills_case("the reference Llama; 8 × 128 tokens of 8 tasks", _REFERENCE, 128),
    "skills-decoding": _skills_case(
        "the reference Llama writes 32 tokens after 8 × 16, all of one task", _REFERENCE, 16, new_tokens=32
    ),
    "skills-decoding-small": _skills_case(
        "the small Llama writes 32 tokens after 8 × 16, all of one task", _SMALL, 16, new_tokens=32
    ),
}  # fmt: skip
