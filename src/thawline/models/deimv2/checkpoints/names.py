"""Names that other libraries give to the same weights, and translation in both directions.

This network's names are the authors' own, so their files need no renaming. For every other library a table of
rules translates our name to theirs. Reading translates the names of a model and looks each up, so one table
serves both directions. One tensor of ours may be several of theirs, concatenated along the first axis.

    to_transformers, from_transformers      the whole detector, as `Deimv2ForObjectDetection` has it
    read_backbone                           a vision transformer alone: Meta's names (= ours), the authors'
                                            distilled ones (= ours), transformers', timm's; HGNetv2 (= ours)

Layers that only transformers' port has (a LayerNorm on the encoder's output, layer scales and a final norm in
ViT-Tiny) are written close to the identity, and files in which they were trained are rejected.
"""

from __future__ import annotations

__all__ = ["StateDict", "from_transformers", "read_backbone", "to_transformers", "transformers_names"]

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from thawline.errors import CheckpointError

StateDict = dict[str, Tensor]
Rules = tuple[tuple[str, str], ...]
Splits = tuple[tuple[str, tuple[str, ...]], ...]

# Applied before the rules, which then see each part under its own name.
_PORT_SPLITS: Splits = (
    ("attn.qkv.", ("attn.q_proj.", "attn.k_proj.", "attn.v_proj.")),
    ("self_attn.in_proj_", ("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj.")),
    ("swish_ffn.w12.", ("mlp.gate_proj.", "mlp.up_proj.")),
)

_VIT_RULES: Rules = (
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings."),
    (r"^(cls_token|mask_token)$", r"embeddings.\1"),
    (r"^storage_tokens$", "embeddings.register_tokens"),
    (r"^blocks\.", "model.layer."),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"\.attn\.", ".attention."),
    (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"),
    (r"\.mlp\.(?:fc1|w2)\.", ".mlp.up_proj."),
    (r"\.mlp\.(?:fc2|w3)\.", ".mlp.down_proj."),
    (r"\.mlp\.w1\.", ".mlp.gate_proj."),
)

_TIMM_SPLITS: Splits = (("attn.qkv.bias", ("attn.q_bias", "attn.k_bias", "attn.v_bias")),)
_TIMM_RULES: Rules = (
    (r"^storage_tokens$", "reg_token"),
    (r"\.ls([12])\.gamma$", r".gamma_\1"),
    (r"\.mlp\.w1\.", ".mlp.fc1_g."),
    (r"\.mlp\.w2\.", ".mlp.fc1_x."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
)

_HGNET, _ADAPTER = r"model\.conv_encoder\.model\..*\.", r"\.spatial_tuning_adapter\."
_AIFI, _LAYER = r"model\.encoder\.aifi\..*\.", r"model\.decoder\.layers\.\d+\."
_DETECTOR_RULES: Rules = (
    # HGNetv2
    (r"^backbone\.stem\.", "model.conv_encoder.model.embedder."),
    (r"^backbone\.stages\.", "model.conv_encoder.model.encoder.stages."),
    (rf"^({_HGNET})conv\.weight$", r"\1convolution.weight"),
    (rf"^({_HGNET})bn\.", r"\1normalization."),
    # adapter and fusion
    (r"^backbone\.sta\.stem\.", "model.conv_encoder.spatial_tuning_adapter.stem_conv."),
    (r"^backbone\.sta\.", "model.conv_encoder.spatial_tuning_adapter."),
    (rf"({_ADAPTER}(?:stem_conv|conv2))\.0\.", r"\1.conv."),
    (rf"({_ADAPTER}(?:stem_conv|conv2))\.1\.", r"\1.norm."),
    (rf"({_ADAPTER}conv[34])\.1\.", r"\1.conv."),
    (rf"({_ADAPTER}conv[34])\.2\.", r"\1.norm."),
    (r"^backbone\.convs\.(\d+)\.", r"model.conv_encoder.fusion_proj.\1.conv."),
    (r"^backbone\.norms\.(\d+)\.", r"model.conv_encoder.fusion_proj.\1.norm."),
    # encoders
    (r"^encoder\.encoder\.", "model.encoder.aifi."),
    (rf"^({_AIFI})self_attn\.out_proj\.", r"\1self_attn.o_proj."),
    (rf"^({_AIFI})linear1\.", r"\1mlp.layers.0."),
    (rf"^({_AIFI})linear2\.", r"\1mlp.layers.1."),
    (rf"^({_AIFI})norm1\.", r"\1self_attn_layer_norm."),
    (rf"^({_AIFI})norm2\.", r"\1final_layer_norm."),
    (r"^encoder\.downsample_convs\.(\d+)\.0\.cv([12])\.", r"model.encoder.downsample_convs.\1.conv\2."),
    (r"^encoder\.down_sample([12])\.1\.", r"model.encoder.down_conv\1.conv."),
    (r"^encoder\.down_sample([12])\.2\.", r"model.encoder.down_conv\1.norm."),
    (r"^encoder\.bi_fusion\.cv\.", "model.encoder.bi_fusion_conv."),
    (r"^encoder\.((?:fpn|pan)_.*)\.cv1\.", r"model.encoder.\1.conv1."),
    (r"^encoder\.((?:fpn|pan)_.*)\.cv4\.", r"model.encoder.\1.conv2."),
    (r"^encoder\.((?:fpn|pan)_.*)\.cv2\.0\.", r"model.encoder.\1.csp_rep1."),
    (r"^encoder\.((?:fpn|pan)_.*)\.cv3\.0\.", r"model.encoder.\1.csp_rep2."),
    (r"^encoder\.((?:fpn|pan)_.*)\.cv2\.1\.", r"model.encoder.\1.csp_rep1.conv2."),
    (r"^encoder\.((?:fpn|pan)_.*)\.cv3\.1\.", r"model.encoder.\1.csp_rep2.conv2."),
    (r"^encoder\.input_proj\.", "model.conv_encoder.encoder_input_proj."),  # of the hybrid encoder
    (r"^encoder\.", "model.encoder."),
    # decoder
    (r"^decoder\.decoder\.", "model.decoder."),
    (rf"^({_LAYER})self_attn\.out_proj\.", r"\1self_attn.o_proj."),
    (rf"^({_LAYER})cross_attn\.", r"\1encoder_attn."),
    (rf"^({_LAYER})norm1\.scale$", r"\1self_attn_layer_norm.weight"),
    (rf"^({_LAYER})norm2\.scale$", r"\1encoder_attn_layer_norm.weight"),
    (rf"^({_LAYER})norm3\.scale$", r"\1final_layer_norm.weight"),
    (rf"^({_LAYER})gateway\.norm\.scale$", r"\1gateway.norm.weight"),
    (rf"^({_LAYER})swish_ffn\.w3\.", r"\1mlp.down_proj."),
    (r"^decoder\.(pre_bbox_head|query_pos_head)\.", r"model.decoder.\1."),
    (r"^decoder\.dec_score_head\.", "model.decoder.class_embed."),
    (r"^decoder\.dec_bbox_head\.", "model.decoder.bbox_embed."),
    (r"^decoder\.", "model."),
)

_VIT = re.compile(r"backbone\.dinov3\.(?:_model\.)?(.*)")
_PORT_VIT = "model.conv_encoder.backbone."
_TWIN = re.compile(r"^((?:class|bbox)_embed\.)")
"""Heads that the port holds twice, here and under `model.decoder.`; its files hold either or both."""
_OURS_ALONE = ("rope_embed.periods", "attn.qkv.bias_mask")
"""Tensors that others do not store: a table computed from shapes, and a mask folded into the bias."""


def transformers_names(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return for each tensor of this network the names of its parts in transformers' port, in order."""
    names = list(names)
    is_lite = any(name.startswith("encoder.bi_fusion.") for name in names)
    return {name: _port_names(name, is_lite=is_lite) for name in names}


def to_transformers(state: StateDict) -> StateDict:
    """Return the weights as `Deimv2ForObjectDetection` reads them.

    Only names are translated: the port computes other numbers from them (docs/models/detect.md).

    Args:
        state: of a network in its training form.
    """
    theirs: StateDict = {}
    for name, parts in transformers_names(state).items():
        tensor = _as_the_port_has_it(state, name)
        pieces = tensor.chunk(len(parts)) if len(parts) > 1 else [tensor] * len(parts)
        theirs |= dict(zip(parts, pieces, strict=True))
    for name in [name for name in theirs if name.endswith(".attention.k_proj.bias")]:
        if not theirs[name].any():
            del theirs[name]
    theirs = _neutral(theirs) | theirs
    inner = "model.decoder."
    theirs |= {
        name.removeprefix(inner): tensor
        for name, tensor in theirs.items()
        if name.startswith(inner) and _TWIN.match(name.removeprefix(inner))
    }
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in theirs.items()}


def from_transformers(state: StateDict, names: Iterable[str]) -> StateDict:
    """Return the weights of a `Deimv2ForObjectDetection` under this network's names.

    Args:
        state: state dict saved by transformers.
        names: tensor names of the network to load.
    Returns: the tensors found; those without a place in the network keep their names.
    Raises: CheckpointError: the port has trained layers that the network does not have.
    """
    theirs = {_in_memory(_TWIN.sub(r"model.decoder.\1", name)): tensor for name, tensor in state.items()}
    neutral = _neutral(theirs)
    ours = _gather(theirs, transformers_names(names))
    trained = [
        name for name, value in neutral.items() if not torch.equal(theirs.pop(name, value).to(value), value)
    ]
    if trained:
        raise CheckpointError(
            f"{len(trained)} tensors, such as '{trained[0]}', belong to layers that only transformers' port "
            "has, and they are trained. DEIMv2 has no such layers: keep using transformers for this file."
        )
    return ours | theirs


def read_backbone(state: StateDict, names: Iterable[str]) -> StateDict:
    """Return the weights of a backbone alone under this network's names, for every supported source.

    Args:
        state: Meta's DINOv3, the authors' ViT-Tiny, PaddleClas' HGNetv2 (all in our names), transformers'
            `dinov3_vit`, or timm's.
        names: names of the backbone's tensors, without the prefix they have in a detector.
    Returns: the tensors found; those without a place in the backbone keep their names.
    """
    names = list(names)
    if "embeddings.cls_token" in state:
        theirs = {_in_memory(name): tensor for name, tensor in state.items()}
        table = {name: _translate(name, _VIT_RULES) for name in names}
    elif "reg_token" in state or any(".gamma_" in name for name in state):
        theirs = dict(state)
        table = {name: _translate(name, _TIMM_RULES, _TIMM_SPLITS) for name in names}
    else:
        # A classifier on top of PaddleClas' files is no part of the backbone.
        return {name: tensor for name, tensor in state.items() if not name.startswith(("last_conv.", "fc."))}
    ours = _gather(theirs, table)
    # Both omit what is zero in the released weights: the key's bias, or the whole bias, and the mask token.
    for name in names:
        if name.endswith("attn.qkv.bias") and name not in ours:
            weight = ours.get(name.replace(".bias", ".weight"))
            ours |= {} if weight is None else {name: weight.new_zeros(len(weight))}
    if "mask_token" in names and "cls_token" in ours:
        ours.setdefault("mask_token", torch.zeros_like(ours["cls_token"][0]))
    return ours | theirs


def _port_names(name: str, *, is_lite: bool) -> tuple[str, ...]:
    vit = _VIT.fullmatch(name)
    if vit:
        return tuple(_PORT_VIT + part for part in _translate(vit[1], _VIT_RULES))
    if is_lite and name.startswith("encoder.input_proj."):
        return (f"model.{name}",)
    return _translate(name, _DETECTOR_RULES)


def _translate(name: str, rules: Rules, splits: Splits = _PORT_SPLITS) -> tuple[str, ...]:
    """Return the other side's names for the parts of a tensor, in order."""
    if name.endswith(_OURS_ALONE):
        return ()
    names = next(
        ([name.replace(whole, part) for part in parts] for whole, parts in splits if whole in name), [name]
    )
    for pattern, replacement in rules:
        names = [re.sub(pattern, replacement, part) for part in names]
    return tuple(names)


def _in_memory(name: str) -> str:
    """Add the `model.` that transformers drops from its DINOv3 layers when it saves them."""
    return re.sub(rf"^((?:{re.escape(_PORT_VIT)})?)layer\.", r"\1model.layer.", name)


def _gather(theirs: StateDict, table: dict[str, tuple[str, ...]]) -> StateDict:
    """Remove the tensors of the table from `theirs` and return them. Missing parts of a bias are zero."""
    ours = {}
    for name, parts in table.items():
        pieces = [theirs.pop(part, None) for part in parts]
        found = [piece for piece in pieces if piece is not None]
        if not found or (len(found) < len(parts) and not name.endswith("attn.qkv.bias")):
            continue
        pieces = [torch.zeros_like(found[0]) if piece is None else piece for piece in pieces]
        tensor = torch.cat(pieces) if len(parts) > 1 else found[0]
        ours[name] = tensor.flatten(0, 1) if name.endswith("mask_token") else tensor
    return ours


def _as_the_port_has_it(state: StateDict, name: str) -> Tensor:
    tensor = state[name]
    if name.endswith("mask_token"):
        return tensor[None]
    mask = state.get(f"{name}_mask")
    return tensor if mask is None else tensor * mask


def _neutral(theirs: StateDict) -> StateDict:
    """Return layers that only the port has, close to the identity: identities, ones, zeros."""
    score_head = theirs.get("model.enc_score_head.weight")
    if score_head is None:
        return {}
    dim = score_head.shape[1]
    extra = {
        "model.enc_output.0.weight": torch.eye(dim),
        "model.enc_output.0.bias": torch.zeros(dim),
        "model.enc_output.1.weight": torch.ones(dim),
        "model.enc_output.1.bias": torch.zeros(dim),
    }
    token = theirs.get(f"{_PORT_VIT}embeddings.cls_token")
    if token is not None:
        width = token.shape[-1]
        vit = {
            "embeddings.mask_token": torch.zeros(1, 1, width),
            "embeddings.register_tokens": torch.zeros(1, 0, width),
            "norm.weight": torch.ones(width),
            "norm.bias": torch.zeros(width),
        }
        for name in theirs:
            layer = re.fullmatch(rf"{re.escape(_PORT_VIT)}(model\.layer\.\d+\.)norm1\.weight", name)
            if layer:
                vit |= {f"{layer[1]}layer_scale{i}.lambda1": torch.ones(width) for i in (1, 2)}
        extra |= {_PORT_VIT + name: tensor for name, tensor in vit.items()}
    return {name: tensor.to(score_head) for name, tensor in extra.items()}
