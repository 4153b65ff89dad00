"""Replace an adapter by a saved one in place: modules and parameters stay the same objects."""

from __future__ import annotations

__all__ = ["hotswap"]

from pathlib import Path

from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict
from torch import nn

from thawline.errors import CheckpointError, ConfigError
from thawline.files import read_json
from thawline.tuners._names import PREFIX, plain_name, unwrapped
from thawline.tuners.paca.config import PACA, PacaConfig
from thawline.tuners.paca.layer import PacaLayer, check_index
from thawline.tuners.paca.model import scale_of
from thawline.tuners.to_lora import adapter_named


def hotswap(model: nn.Module, directory: str | Path, adapter_name: str = "default") -> None:
    """Put the PaCA adapter of a folder in the place of a loaded one.

    Both have the same layers and numbers of columns; which columns may differ. A compiled model
    is not compiled again for inference. All is checked before the first column is written.

    Args:
        model: with PaCA adapters; may be wrapped by DDP or torch.compile.
        directory: a folder that `save_pretrained` wrote.
        adapter_name: the adapter to replace.
    Raises: CheckpointError: for a folder without a PaCA adapter, one of other layers or shapes, or one that
        trains more than columns.
        ConfigError: for an adapter that the model does not have, or that is merged.
    """
    model, folder = unwrapped(model), Path(directory)
    name = adapter_named(model, adapter_name)
    if not (folder / "adapter_config.json").is_file():
        raise CheckpointError(f"'{folder}' has no adapter_config.json: expected the folder of an adapter.")
    kind = read_json(folder / "adapter_config.json").get("peft_type")
    if kind != PACA.value:
        raise CheckpointError(f"'{folder}' holds a {kind} adapter; expected {PACA.value}.")
    config = PacaConfig.from_pretrained(str(folder))
    weights = load_peft_weights(str(folder), device="cpu")
    layers = {
        plain_name(path): layer
        for path, layer in model.named_modules()
        if isinstance(layer, PacaLayer) and name in layer.r
    }
    if any(layer.merged for layer in layers.values()):
        raise ConfigError("Adapters are merged. Call unmerge_adapter() first.")
    if config.columns_from != model.peft_config[name].columns_from:
        raise CheckpointError(
            f"'{folder}' has columns_from={config.columns_from!r}, unlike adapter {name!r}. "
            "load_adapter takes it."
        )
    tensors = {
        f"{PREFIX}{path}.{PACA.prefix}{part}": tensor
        for path, layer in layers.items()
        for part, tensor in (
            ("delta", layer.thawline_paca_delta[name]),
            ("indices", layer.thawline_paca_indices[name]),
        )
    }
    if odd := sorted(tensors.keys() ^ weights.keys()):
        has = "has" if odd[0] in weights else "lacks"
        raise CheckpointError(
            f"'{folder}' {has} '{odd[0]}', unlike adapter {name!r}: hotswap replaces columns of the same "
            "layers. load_adapter takes any adapter."
        )
    for key, tensor in tensors.items():
        if weights[key].shape != tensor.shape:
            raise CheckpointError(
                f"'{folder}': '{key}' is {tuple(weights[key].shape)}, and of adapter {name!r} "
                f"{tuple(tensor.shape)}. load_adapter takes another r."
            )
    for path, layer in layers.items():
        check_index(weights[f"{PREFIX}{path}.{PACA.prefix}indices"], layer)
    config.inference_mode = model.peft_config[name].inference_mode
    model.peft_config[name] = config
    for path, layer in layers.items():
        layer.scaling[name] = layer.base_scaling[name] = scale_of(config, path)
    set_peft_model_state_dict(model, weights, adapter_name=name)
