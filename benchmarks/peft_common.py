"""Run PEFT's own common tests on PaCA and MHR, with tiny random models in place of those from the Hub.

    git clone --depth 1 https://github.com/huggingface/peft ../peft
    python benchmarks/peft_common.py ../peft [custom decoder encoder-decoder feature] [-- pytest's options]

PEFT's test files read their configs and models from lists, which are filled with ours before pytest collects
the tests; run are those that name PaCA or MHR. `SETTINGS` has what some tests need of a tuner, as PEFT's own
have for its methods, and `NEEDS_022` those that the installed PEFT fails with LoRA as well.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import os
import sys
import tempfile
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILES = {
    "custom": "test_custom_models",
    "decoder": "test_decoder_models",
    "encoder-decoder": "test_encoder_decoder_models",
    "feature": "test_feature_extraction_models",
}
TASK_TYPES = {"decoder": "CAUSAL_LM", "encoder-decoder": "SEQ_2_SEQ_LM", "feature": "FEATURE_EXTRACTION"}
LISTS = {
    "decoder": "PEFT_DECODER_MODELS_TO_TEST",
    "encoder-decoder": "PEFT_ENCODER_DECODER_MODELS_TO_TEST",
    "feature": "PEFT_FEATURE_EXTRACTION_MODELS_TO_TEST",
}
TOKENS = {"vocab_size": 1000, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDTHS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
ROTARY = {**WIDTHS, "num_key_value_heads": 2, "max_position_embeddings": 128}
GPT = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}
BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 128, "decoder_start_token_id": 2,
}  # fmt: skip
OPT = {
    "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "word_embed_proj_dim": 32,
    "max_position_embeddings": 128,
}  # fmt: skip
T5 = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
MODELS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "decoder": {
        "GPT2LMHeadModel": ("GPT2Config", GPT),
        "GPTJForCausalLM": ("GPTJConfig", {**GPT, "rotary_dim": 4, "tie_word_embeddings": False}),
        "OPTForCausalLM": ("OPTConfig", OPT),
        "LlamaForCausalLM": ("LlamaConfig", ROTARY),
        "Qwen2ForCausalLM": ("Qwen2Config", ROTARY),
        "Gemma3ForCausalLM": ("Gemma3TextConfig", {**ROTARY, "head_dim": 8}),
    },
    "encoder-decoder": {
        "T5ForConditionalGeneration": ("T5Config", T5),
        "BartForConditionalGeneration": ("BartConfig", BART),
    },
    "feature": {
        "BertModel": ("BertConfig", WIDTHS),
        "RobertaModel": ("RobertaConfig", WIDTHS),
        "DebertaModel": (
            "DebertaConfig",
            {**WIDTHS, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        ),
        "DebertaV2Model": ("DebertaV2Config", WIDTHS),
    },
}
"""Kind of tests → class of transformers → its config."""
SETTINGS: dict[tuple[str, str], dict[str, Any]] = {
    # FSDP1 flattens the weights that columns would be written into.
    ("test_save_load_roundtrip_fsdp_wrapped", "PACA"): {"mode": "additive"},
    # Columns in the weight are parameters of the base that change; merging and disabling restore them.
    ("test_only_params_are_updated", "PACA"): {"mode": "additive"},
    # Skills that start at zero leave the routing without a gradient in the first of three steps.
    ("test_only_params_are_updated", "MHR"): {"init_weights": False},
}
"""Start of a test's name and tuner → fields of its config."""
NEEDS_022 = (
    "test_loading_model_requires_grad_set_correctly[True",
    "test_loading_model_with_modules_to_save_requires_grad_set_correctly[True",
)
"""Starts of names of tests that ask for PEFT 0.22."""


def main(arguments: list[str]) -> int:
    """Fill PEFT's lists, and run the tests of the kinds asked for."""
    import pytest

    root, *rest = arguments
    cut = rest.index("--") if "--" in rest else len(rest)
    kinds, options = rest[:cut] or list(FILES), rest[cut + 1 :]
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    sys.path.insert(0, str(Path(root).resolve()))
    if importlib.util.find_spec("diffusers") is None:
        stub: Any = types.ModuleType("diffusers")
        stub.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
        stub.__spec__ = importlib.machinery.ModuleSpec("diffusers", None)
        sys.modules["diffusers"] = stub
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds:
            tests = importlib.import_module(f"tests.{FILES[kind]}")
            fill_custom(tests) if kind == "custom" else fill_models(tests, kind, Path(folder))
        files = [f"{root}/tests/{FILES[kind]}.py" for kind in kinds]
        chosen = ["-k", "paca or mhr", "-p", "no:cacheprovider", "--rootdir", root, "-c", os.devnull]
        return int(pytest.main(["-q", "--tb=line", "-rs", *chosen, *options, *files], plugins=[Adjust()]))


class Adjust:
    """Plugin of pytest: gives tests the fields of `SETTINGS`, and skips those that need a newer PEFT."""

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Change the parameters of collected tests."""
        import peft
        import pytest

        for item in items:
            params = getattr(getattr(item, "callspec", None), "params", {})
            for (test, tuner), fields in SETTINGS.items():
                if item.name.startswith(test) and tuner in params["config_cls"].__name__.upper():
                    params["config_kwargs"] = {**params["config_kwargs"], **fields}
            if item.name.startswith(NEEDS_022) and peft.__version__ < "0.22":
                item.add_marker(pytest.mark.skip(reason="asks for PEFT 0.22; LoRA of this version fails too"))


def fill_models(tests: Any, kind: str, folder: Path) -> None:
    """Give tests of transformers' models our configs, and models of random weights."""
    import torch
    import transformers

    from thawline import MHRConfig, PacaConfig

    shared = {"task_type": TASK_TYPES[kind], "target_modules": None, "r": 4}
    tests.ALL_CONFIGS[:] = [(PacaConfig, shared), (MHRConfig, {**shared, "n_skills": 2})]
    found = []
    for name, (config, sizes) in MODELS[kind].items():
        torch.manual_seed(0)
        path = folder / f"tiny-random-{name}"
        model = getattr(transformers, name)(getattr(transformers, config)(**TOKENS, **sizes))
        model.save_pretrained(path)
        byte_tokenizer().save_pretrained(path)
        found.append(str(path))
    getattr(tests, LISTS[kind])[:] = found


def fill_custom(tests: Any) -> None:
    """Give tests of PEFT's own small networks our configs; MHR has no convolutions."""
    from thawline import MHRConfig, PacaConfig

    @dataclass(kw_only=True)
    class SmallPaca(PacaConfig):
        r: int = 2

    linear = [
        ("MLP", {"target_modules": "lin0"}),
        ("MLP", {"target_modules": ["lin1"]}),
        ("MLP", {"target_modules": ["lin0", "lin1"]}),
        ("MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
        ("MLP2", {"target_modules": ["lin0"]}),
        ("MLP_LayerNorm", {"target_modules": ["lin0"]}),
        ("EmbConv1D", {"target_modules": ["conv1d"]}),
        ("Conv2d", {"target_modules": ["lin0"]}),
    ]
    convolutions = [
        ("Conv2d", {"target_modules": ["conv2d"]}),
        ("Conv2d", {"target_modules": ["conv2d", "lin0"]}),
        ("Conv2d1x1", {"target_modules": ["conv2d"], "r": 1}),
    ]
    ours = {"PaCA": (PacaConfig, {"r": 2}), "MHR": (MHRConfig, {"r": 2, "n_skills": 2})}
    tests.TEST_CASES[:] = [
        (f"{name} {i} {model}", model, config, {**shared, **extra})
        for name, (config, shared) in ours.items()
        for i, (model, extra) in enumerate([*linear, *convolutions] if name == "PaCA" else linear)
    ]
    tests.ALL_PEFT_CONFIG_CLASSES[:] = [SmallPaca, MHRConfig]
    tests.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES[:] = [
        (
            f"{name} {second}", name.lower(), config,
            {**shared, "target_modules": ["lin0"], "init_weights": False},
            {**shared, "target_modules": [second], "init_weights": False},
        )
        for name, (config, shared) in ours.items()
        for second in ("lin0", "lin1")
    ]  # fmt: skip


def byte_tokenizer() -> Any:
    """Return our tests' tokenizer; PEFT's tests take the name `tests`."""
    file = Path(__file__).resolve().parents[1] / "tests" / "support" / "text.py"
    spec: Any = importlib.util.spec_from_file_location("thawline_tests_text", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.byte_tokenizer()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
