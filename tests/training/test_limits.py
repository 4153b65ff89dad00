"""Limits of bases: what they say, their own forward confirms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModel

from thawline.recipe import TextBase
from thawline.training.text.limits import Limits, read_limits

ENCODER = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
BOTH = {
    "d_model": 8, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 12,
}  # fmt: skip
GPT = {"n_positions": 12, "n_embd": 8, "n_layer": 1, "n_head": 2}
OPT = {
    "hidden_size": 8, "ffn_dim": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "word_embed_proj_dim": 8, "max_position_embeddings": 12,
}  # fmt: skip
XGLM = {"d_model": 8, "ffn_dim": 8, "num_layers": 1, "attention_heads": 2, "max_position_embeddings": 12}
BASES = {
    "GPT2Config": (GPT, 12),
    "GPTJConfig": ({**GPT, "rotary_dim": 2}, 12),
    "OPTConfig": (OPT, 12),
    "BertConfig": ({**ENCODER, "max_position_embeddings": 12}, 12),
    "RobertaConfig": ({**ENCODER, "max_position_embeddings": 12}, 10),
    "BartConfig": (BOTH, 12),
    "PegasusConfig": (BOTH, 12),
    "M2M100Config": (BOTH, None),
    "XGLMConfig": (XGLM, None),
    "LlamaConfig": ({**ENCODER, "max_position_embeddings": 12}, None),
    "BloomConfig": ({"hidden_size": 8, "n_layer": 1, "n_head": 2}, None),
    "T5Config": ({"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}, None),
}


@pytest.mark.parametrize("name", BASES)
def test_a_base_takes_as_many_tokens_as_its_limits_say(tmp_path: Path, name: str) -> None:
    fields, positions = BASES[name]
    config = getattr(transformers, name)(vocab_size=50, **fields)
    config.save_pretrained(tmp_path)
    assert read_limits(TextBase(model=str(tmp_path))) == Limits(positions, 50)
    model = AutoModel.from_config(config).eval()

    def forward(n: int) -> None:
        ids = torch.full((1, n), 5)
        model(input_ids=ids, **({"decoder_input_ids": ids} if config.is_encoder_decoder else {}))

    if positions is None:
        forward(30)
        return
    forward(positions)
    with pytest.raises((IndexError, RuntimeError)):
        forward(positions + 1)


def test_what_cannot_be_built_from_its_config_has_no_known_limits(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nowhere"}')
    assert read_limits(TextBase(model=str(tmp_path))) == Limits()
