"""Getting trained weights to the model that generates: PaCA's columns beside LoRA's merges and whole models.

    python benchmarks/rollouts.py --rounds 10 --out benchmarks/results/rollouts.json

A small Llama in the proportions of the 8B, bfloat16, on the CPU; the receiver is another copy in this
process, so that sending costs a copy in memory. Measured: time per update of each way, paired; bytes of an
update, and those of Llama-3-8B by arithmetic; how far one block is from where it was after 1,000 merges; time
to switch the adapter of a layer as large as the 8B's.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import sys
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import thawline
from harness import study_results
from thawline import PacaConfig
from thawline.bench.harness import bench_parser, markdown, use_device
from thawline.measure import median_ratio, median_seconds, paired_rounds, write_results
from thawline.tuners.paca import PacaLayer

N_MERGES = 1000
HIDDEN, MLP, KV, LAYERS, VOCAB = 4096, 14336, 1024, 32, 128256
"""Llama-3-8B."""


def main() -> None:
    args = bench_parser("rollouts", (__doc__ or "").splitlines()[0], threads=1).parse_args()
    use_device(args)
    torch.manual_seed(0)
    base = build_base()
    results = study_results(__file__, bench="rollouts", r=16, updates=time_updates(base, args.rounds))
    results["bytes"] = {
        "model": sum(p.nbytes for p in base.parameters()),
        "update": sum(t.nbytes for t in thawline.pack_columns(with_paca(base)).values()),
        "model_8b": 2 * (LAYERS * sum(i * o for i, o in linears_8b()) + 2 * VOCAB * HIDDEN),
        "update_8b": LAYERS * sum(16 * o * 2 + 16 * 8 for _, o in linears_8b()),
    }
    results["switch_ms_per_layer"] = {
        "random columns": time_switch(seed=1),
        "random, the same": time_switch(),
        "adjacent": time_switch(seed=1, selection="adjacent"),
        "adjacent, the same": time_switch(selection="adjacent"),
        "beside the weight": time_switch(seed=1, mode="additive"),
    }
    block = build_base(layers=1, hidden=256)
    results["drift"] = {"paca": drift(with_paca(block)), "lora": drift(with_lora(block))}
    write_results(args.out, results)
    sys.stdout.write(tables(results))


def linears_8b() -> list[tuple[int, int]]:
    """Inputs and outputs of the linear layers of one block."""
    return [
        (HIDDEN, HIDDEN),
        (HIDDEN, KV),
        (HIDDEN, KV),
        (HIDDEN, HIDDEN),
        (HIDDEN, MLP),
        (HIDDEN, MLP),
        (MLP, HIDDEN),
    ]


def build_base(layers: int = 8, hidden: int = 512) -> nn.Module:
    config = LlamaConfig(
        vocab_size=4096, hidden_size=hidden, intermediate_size=7 * hidden // 2, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).bfloat16()


def with_paca(base: nn.Module) -> PeftModel:
    return get_peft_model(
        copy.deepcopy(base), PacaConfig(r=16, target_modules="all-linear", init_weights=False)
    )


def with_lora(base: nn.Module) -> PeftModel:
    config = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(copy.deepcopy(base), config)


def time_updates(base: nn.Module, rounds: int) -> dict[str, Any]:
    """Seconds of an update by each way, and its ratio to sending the columns."""
    paca, lora, receiver = with_paca(base), with_lora(base), copy.deepcopy(base)
    steps: dict[str, Callable[[], object]] = {
        "columns": lambda: thawline.apply_columns(receiver, sent(thawline.pack_columns(paca))),
        "merged model": lambda: receive(receiver, paca),
        "LoRA: merge, send, unmerge": lambda: merge_and_send(receiver, lora),
    }
    samples = paired_rounds(steps, rounds=rounds)
    return {
        name: {"seconds": median_seconds(found), "ratio": median_ratio(found, samples["columns"])}
        for name, found in samples.items()
    }


def sent(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def receive(receiver: nn.Module, model: PeftModel) -> None:
    """Copy every weight as it stands, adapters' own tensors left out."""
    weights = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor.clone()
        for name, tensor in model.named_parameters()
        if "lora_" not in name and "thawline_" not in name
    }
    with torch.no_grad():
        for name, parameter in receiver.named_parameters():
            parameter.copy_(weights[name])


def merge_and_send(receiver: nn.Module, model: PeftModel) -> None:
    model.merge_adapter()
    receive(receiver, model)
    model.unmerge_adapter()


def drift(model: PeftModel) -> dict[str, float]:
    """Mean change of weights by merging and unmerging, over their mean size, and the share that changed."""
    layers = [module for module in model.modules() if hasattr(module, "base_layer")]
    with model.disable_adapter():
        before = [layer.base_layer.weight.clone() for layer in layers]
    for _ in range(N_MERGES):
        model.merge_adapter()
        model.unmerge_adapter()
    with model.disable_adapter():
        after = [layer.base_layer.weight.clone() for layer in layers]
    pairs = list(zip(before, after, strict=True))
    return {
        "relative": sum((a - b).abs().sum().item() for b, a in pairs)
        / sum(b.abs().sum().item() for b, _ in pairs),
        "changed": sum((a != b).sum().item() for b, a in pairs) / sum(b.numel() for b, _ in pairs),
    }


def time_switch(seed: int = 0, **fields: Any) -> dict[str, float]:
    """Milliseconds to switch the adapter of one layer of the 8B, by its kind, and of a block: medians.

    Args:
        seed: of the second adapter's columns; the first has 0.
        fields: of both adapters' configs.
    """
    found = {}
    for name, (n_in, n_out) in zip(("q", "k", "v", "o", "gate", "up", "down"), linears_8b(), strict=True):
        config = PacaConfig(r=16, target_modules=["0"], init_weights=False, **fields)
        layer = nn.Sequential(nn.Linear(n_in, n_out, bias=False).bfloat16())
        model = get_peft_model(layer, config)
        model.add_adapter("b", dataclasses.replace(config, seed=seed))
        adapted = next(module for module in model.modules() if isinstance(module, PacaLayer))
        turns = itertools.cycle(["b", "default"])
        steps = {"switch": lambda a=adapted, turns=turns: a.set_adapter(next(turns))}
        found[name] = 1e3 * median_seconds(paired_rounds(steps, rounds=40)["switch"])
    return found | {"block": sum(found.values())}


def tables(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    updates = [[n, f"{1e3 * u['seconds']:.1f}", f"{u['ratio']:.2f}"] for n, u in results["updates"].items()]
    drifts = [[n, f"{d['relative']:.3f}", f"{d['changed']:.3f}"] for n, d in results["drift"].items()]
    sizes = results["bytes"]
    shares = [[n, f"{100 * sizes[f'update{n}'] / sizes[f'model{n}']:.2f} %"] for n in ("", "_8b")]
    switches = results["switch_ms_per_layer"]
    switch = [[mode, *(f"{ms:.2f}" for ms in by.values())] for mode, by in switches.items()]
    return "\n\n".join(
        (
            markdown(["update", "ms", "÷ columns"], updates),
            markdown(["1,000 merges", "drift", "weights changed"], drifts),
            markdown(["model", "bytes of an update"], shares),
            markdown(["switch, ms", *switches["adjacent"]], switch),
        )
    )


if __name__ == "__main__":
    main()
