"""What a recipe may say: frozen dataclasses, free of frameworks, so that the command line answers at once.

A recipe is base × tuner × objective, on data, trained somehow:

    objective: text                             what is asked: decides the fields of base, data and objective
    base: {model: ../models/llama}              what is frozen
    tuner: {method: lora, r: 8}                 what moves: `method` decides the other fields
    data: {path: train.jsonl}
    training: {epochs: 3, lr: 2.0e-4}

`TUNERS` and `OBJECTIVES` hold the choices; adding one is a dataclass and a line there, and the command line,
its help and `thawline list` pick it up. A section may be given as its leading field alone (`tuner: lora`).
Where fields mirror another library's, tests/test_recipe.py holds them to it.
"""

from __future__ import annotations

__all__ = [
    "OBJECTIVES",
    "PEFT_METHODS",
    "TUNERS",
    "Adapter",
    "DetectionBase",
    "DetectionData",
    "DetectionSettings",
    "DetectionTraining",
    "Frozen",
    "Full",
    "Lora",
    "MatchSettings",
    "Mhr",
    "Paca",
    "PeftMethod",
    "RunConfig",
    "TextBase",
    "TextData",
    "TextSettings",
    "Training",
    "TunerSettings",
    "check_mapping",
    "expand_sections",
    "load_recipe",
    "nearest_key",
    "read_mapping",
    "section_types",
    "usual_method",
]

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml

from thawline.errors import ConfigError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class TextBase:
    """The pretrained transformers model that is adapted."""

    model: str = ""
    """Folder or Hub id of the model."""
    head: Literal["auto", "causal-lm", "seq2seq-lm", "classifier"] = "auto"
    """What the model computes. auto: as its config says. A classifier gets the data's labels."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights in memory. auto: bfloat16 for a frozen base where `training.precision` comes out as
    bf16, else float32."""
    revision: str | None = None
    """Branch, tag or commit on the Hub. None: the default branch."""
    attn_implementation: str | None = None
    """Attention kernel by transformers' name (sdpa, flash_attention_2, …). None: transformers' choice."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for sources you trust."""

    def __post_init__(self) -> None:
        _require(
            self.model,
            "`base.model` is missing: give a folder or Hub id, e.g. `--base.model ../models/llama`.",
        )

    @property
    def label(self) -> str:
        """What is trained, for messages and names."""
        return self.model


@dataclass(frozen=True, kw_only=True)
class Full:
    """No tuner: every weight of the base trains."""

    usual_lr: ClassVar[float] = 2e-5
    method: Literal["none"] = "none"
    """none: full fine-tuning."""


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """The base stays as it is: a language model is only evaluated, a detector trains all but its backbone."""

    usual_lr: ClassVar[float] = 0.0
    method: Literal["frozen"] = "frozen"
    """frozen: the base as it is."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What every adapter has in common; the names are PEFT's."""

    target_modules: str | list[str] | None = "all-linear"
    """Modules to adapt: "all-linear" (all but the head), name endings, or one regular expression.
    None: PEFT's own mapping for the architecture."""
    exclude_modules: str | list[str] | None = None
    """Modules to leave out of `target_modules`."""
    layers_to_transform: int | list[int] | None = None
    """Layer indices to adapt. None: all."""
    modules_to_save: list[str] | None = None
    """Modules trained whole and saved beside the adapter. A classifier's new head is added by itself."""
    start_from: str | None = None
    """A run, or the folder of an adapter, of the same method to go on from. None: a fresh one."""


@dataclass(frozen=True, kw_only=True)
class Paca(Adapter):
    """Partial connections: some input columns of each weight, trained in place (Woo et al., ICLR 2025)."""

    usual_lr: ClassVar[float] = 3e-4
    method: Literal["paca"] = "paca"
    """paca."""
    r: int = 16
    """Columns trained in each layer. 16 costs about the parameters of LoRA's r = 8."""
    alpha: float | None = None
    """The change of a column is scaled by alpha / r. None: r, so `training.lr` is full fine-tuning's."""
    selection: Literal["random", "weight_norm", "activation", "gradient", "explicit"] = "random"
    """How columns are chosen: by chance, by their norm, by what a few batches say, or by `indices`."""
    indices: dict[str, list[int]] | None = None
    """Columns by module name or a regular expression for it, for `selection: explicit`."""
    rank_pattern: dict[str, int] | None = None
    """r for modules whose name matches a regular expression."""
    alpha_pattern: dict[str, float] | None = None
    """alpha for modules whose name matches a regular expression."""
    layers_pattern: str | list[str] | None = None
    """Name of the list of blocks that `layers_to_transform` counts in. None: found by itself."""
    bias: Literal["none", "all", "paca_only"] = "none"
    """Biases to train besides."""
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    """Tokens of the embedding to train besides."""
    seed: int = 0
    """Seed of `selection: random`."""

    def __post_init__(self) -> None:
        _at_least("tuner.r", self.r, 1)


@dataclass(frozen=True, kw_only=True)
class Lora(Adapter):
    """Low-rank updates by PEFT: LoRA, or DoRA, which learns magnitudes apart from directions."""

    usual_lr: ClassVar[float] = 2e-4
    method: Literal["lora", "dora"] = "lora"
    """lora, or dora (LoRA on the direction of each weight, with a learned magnitude)."""
    r: int = 8
    """Rank of the update."""
    alpha: float | None = None
    """The update is scaled by alpha / r. None: 2 r."""
    dropout: float = 0.0
    """Dropout on the adapter's input, in [0, 1)."""
    args: dict[str, Any] = field(default_factory=dict)
    """Any other field of `peft.LoraConfig`, by its name there (`{use_rslora: true}`)."""

    def __post_init__(self) -> None:
        _at_least("tuner.r", self.r, 1)
        _fraction("tuner.dropout", self.dropout)


@dataclass(frozen=True, kw_only=True)
class Mhr(Adapter):
    """Skills that tasks share, mixed for each task by its own weights (Caccia et al., NeurIPS 2023)."""

    usual_lr: ClassVar[float] = 1e-3
    method: Literal["mhr", "poly"] = "mhr"
    """mhr, or poly (Ponti et al., 2023): whole skills are mixed, by one head."""
    adapt: Literal["none", "full", "z", "mu"] = "none"
    """How to turn the adapter of `start_from` to the tasks of `data`: all of it, their routing alone (z), or
    the average of the skills (mu). none: train on, on the tasks it has."""
    new_rows: str = "fresh"
    """Where the routing of new tasks starts when adapting: fresh (near zero, the average of the skills),
    uniform, mean (of the trained rows), or the name of a trained task."""
    routing_lr: float = 0.1
    """Peak learning rate of the routing; `training.lr` is that of the skills."""
    routing_weight_decay: float = 0.0
    """Weight decay of the routing, towards the average; `training.weight_decay` is that of the skills."""
    anneal: float = 0.0
    """Share of the steps, at the end, over which the routing moves to the average of skills, in [0, 1]."""
    r: int = 8
    """Rank of every skill, and so of every task's update."""
    alpha: float | None = None
    """The update is scaled by alpha / r. None: r. The authors train with 1."""
    n_skills: int = 8
    """Skills in the inventory. With `router: private` as many as tasks, whatever stands here."""
    n_heads: int | None = None
    """Blocks of features with weights of their own; must divide every adapted size. None: 4; 1 for poly."""
    heads_pattern: dict[str, int] | None = None
    """n_heads for modules whose name matches a regular expression."""
    router: Literal["learned", "uniform", "private", "random"] = "learned"
    """How tasks get their weights. private is one skill a task; uniform and random are the controls."""
    granularity: Literal["linear", "layer", "block", "coder", "network"] = "linear"
    """Who shares a routing table: nobody, a sub-layer, a block, encoder or decoder, or all."""
    routing_init: float = 1e-3
    """Fresh logits are uniform in ± this."""
    noise: Literal["none", "example", "task"] = "none"
    """Noise on the logits in training, per example or per task of the batch: more discrete routes."""
    temperature: float = 1.0
    """Of the noise: near 0 the sampled weights are all or nothing."""
    dropout: float = 0.0
    """Chance of dropping an input of the skills in training, in [0, 1)."""
    a_init: Literal["lora", "mttl", "peft"] = "lora"
    """Bound of the uniform A: LoRA's, the authors' or that of PEFT's Poly. B starts at 0."""
    rank_pattern: dict[str, int] | None = None
    """r for modules whose name matches a regular expression."""
    alpha_pattern: dict[str, float] | None = None
    """alpha for modules whose name matches a regular expression."""
    layers_pattern: str | list[str] | None = None
    """Name of the list of blocks that `layers_to_transform` counts in. None: found by itself."""
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    """Tokens of the embedding to train besides."""

    def __post_init__(self) -> None:
        for name in ("r", "n_skills"):
            _at_least(f"tuner.{name}", getattr(self, name), 1)
        if self.n_heads is not None:
            _at_least("tuner.n_heads", self.n_heads, 1)
        _one_of("tuner.adapt", self.adapt, ("none", "full", "z", "mu"))
        if self.method == "poly" and self.heads != 1:
            raise ConfigError(f"`tuner: poly` has one head, got n_heads={self.heads}. Use `tuner: mhr`.")
        if self.adapt != "none" and self.start_from is None:
            raise ConfigError(
                f"`tuner.adapt: {self.adapt}` needs a trained adapter: give its run as `tuner.start_from`."
            )
        _fraction("tuner.dropout", self.dropout)
        if not 0 <= self.anneal <= 1:
            raise ConfigError(f"`tuner.anneal` must be in [0, 1], got {self.anneal!r}.")
        for name in ("routing_lr", "routing_weight_decay"):
            _at_least(f"tuner.{name}", getattr(self, name), 0)

    @property
    def heads(self) -> int:
        """`n_heads`, or the method's own."""
        return self.n_heads or (1 if self.method == "poly" else 4)


@dataclass(frozen=True, kw_only=True)
class PeftMethod:
    """Another method of PEFT, by the fields of its own config (`tuner.args`)."""

    usual_lr: ClassVar[float] = 1e-3
    method: str = "ia3"
    """PEFT's name of the method, in lower case."""
    args: dict[str, Any] = field(default_factory=dict)
    """The fields of the method's PEFT config, by their names there."""
    start_from: str | None = None
    """A run, or the folder of an adapter, of the same method to go on from. None: a fresh one."""


@dataclass(frozen=True, kw_only=True)
class TextData:
    """Rows of text: JSONL (or JSON) files, or a dataset of the `datasets` library."""

    path: str | list[str] = ""
    """File or folder, or several; or a dataset: save_to_disk's, "hf://OWNER/NAME". Rows with a `split`
    of validation, dev, eval or test are held out, as are files with such a name."""
    eval_path: str | list[str] | None = None
    """Held-out rows. None: those held out in `path`, or `eval_fraction` of them."""
    eval_fraction: float = 0.0
    """Share of the training rows to hold out, drawn by `seed`, where nothing else is held out."""
    format: Literal["auto", "prompt-completion", "messages", "instruction", "input-output", "text"] = "auto"
    """How to read a row. auto: by looking at its keys."""
    columns: dict[str, str] = field(default_factory=dict)
    """Where rows have other keys: our key → theirs, e.g. {input: sentence, output: label, task: source}."""
    template: str | None = None
    """Prompt made of a row's fields, e.g. "Question: {input}\\nAnswer:". None: the format's own."""
    chat_template: str | None = None
    """For `messages`: a Jinja file, or "plain" (`user: …` lines). None: the tokenizer's own."""
    max_length: int = 512
    """Longest sequence, in tokens. A longer prompt loses its beginning, a longer completion its end."""
    max_rows: int | None = None
    """Use this many training rows, drawn by `seed`. None: all."""
    max_eval_rows: int | None = None
    """Evaluate on this many held-out rows, drawn by `seed`. None: all."""
    max_task_eval_rows: int | None = None
    """The same for each task."""
    tasks: list[str] | None = None
    """Tasks to use, by name or pattern ("clinc_*"). None: all there are."""
    exclude_tasks: list[str] = field(default_factory=list)
    """Tasks to leave out, by name or pattern: those held out for a second phase, say."""
    task_types: list[str] | None = None
    """Types of tasks to use, as the folder's manifest.json calls them. None: all."""
    sampling: Literal["each", "size", "temperature", "equal"] = "each"
    """Which task comes how often. each: every row once an epoch; size, temperature, equal: tasks are drawn,
    in proportion to their rows, to a root of them, or alike."""
    sampling_temperature: float = 2.0
    """The root of `sampling: temperature`: 1 is size, large is equal."""
    task_cap: int | None = None
    """No task counts as having more rows than this when tasks are drawn."""
    batches: Literal["mixed", "task"] = "mixed"
    """Whether a batch mixes tasks or is of one. `task` needs a `sampling` that draws tasks."""
    shots: int | None = None
    """Learn from this many rows of each task only, drawn by `shots_seed`. None: all."""
    shots_per: Literal["task", "class"] = "task"
    """Whether `shots` counts a task's rows, or those of each of its answers."""
    shots_seed: int | None = None
    """Draws the shots. None: the run's seed."""

    def __post_init__(self) -> None:
        _require(
            self.path, "`data.path` is missing: give a JSONL file or a folder, e.g. `--data train.jsonl`."
        )
        _at_least("data.max_length", self.max_length, 2)
        _fraction("data.eval_fraction", self.eval_fraction)
        for name in ("max_rows", "max_eval_rows", "max_task_eval_rows", "task_cap", "shots"):
            if getattr(self, name) is not None:
                _at_least(f"data.{name}", getattr(self, name), 1)
        _one_of("data.sampling", self.sampling, ("each", "size", "temperature", "equal"))
        _one_of("data.batches", self.batches, ("mixed", "task"))
        _one_of("data.shots_per", self.shots_per, ("task", "class"))
        if not self.sampling_temperature > 0:
            raise ConfigError(
                f"`data.sampling_temperature` must be positive, got {self.sampling_temperature!r}."
            )
        drawn = {"task_cap": self.task_cap, "batches": self.batches == "task" or None}
        for name in (name for name, value in drawn.items() if value is not None):
            if self.sampling == "each":
                raise ConfigError(
                    f"`data.{name}` needs tasks to be drawn: `data.sampling` size, temperature or equal."
                )


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """Predict text: next tokens, or a label where the base is a classifier."""

    kind: Literal["text"] = "text"
    """text."""
    loss_on: Literal["completion", "all"] = "completion"
    """What is learned: completions (assistant turns), or prompts too. `text` rows are learned whole."""
    metrics: Literal["auto"] | list[str] = "auto"
    """What to evaluate beside the loss: choice_accuracy, exact_match, rouge_l. auto: choice_accuracy where
    rows have choices; exact_match and rouge_l for other short answers; nothing more for chats and texts."""
    max_new_tokens: int | None = None
    """Longest generated answer in evaluation. None: the longest held-out answer, at most 256."""

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None:
            _at_least("objective.max_new_tokens", self.max_new_tokens, 1)


@dataclass(frozen=True, kw_only=True)
class MatchSettings:
    """Choose among a row's choices by the similarity of its embedding and theirs: any text encoder."""

    kind: Literal["match"] = "match"
    """match."""
    scale: float = 20.0
    """The cosine of mean-pooled embeddings is multiplied by this before the softmax."""
    choice_template: str = "{choice}"
    """Text made of a choice, e.g. "This is about {choice}."."""

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ConfigError(f"`objective.scale` must be positive, got {self.scale!r}.")
        if "{choice}" not in self.choice_template:
            raise ConfigError(
                f"`objective.choice_template` must hold {{choice}}, got {self.choice_template!r}."
            )


@dataclass(frozen=True, kw_only=True)
class DetectionBase:
    """The detector that is trained: a size of DEIMv2, and what its weights come from."""

    variant: Literal["atto", "femto", "pico", "n", "s", "m", "l", "x"] = "n"
    """Size. Atto to N have an HGNetv2 backbone, S to X a vision transformer."""
    weights: str | None = None
    """What to start from: a detector (a run's folder, a file, a folder, a Hub id; a size's name for its
    published weights) or a pretrained backbone. None: random weights."""
    size: int | None = None
    """Side of the square input in pixels, a multiple of 32. None: the published one."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Other settings of the network, by the names of its config (`{num_queries: 500}`)."""

    def __post_init__(self) -> None:
        if self.size is not None and (self.size < 32 or self.size % 32):
            raise ConfigError(f"`base.size` must be a multiple of 32, got {self.size}: 320, 416, 640, …")

    @property
    def label(self) -> str:
        """What is trained, for messages and names."""
        return f"deimv2_{self.variant}"


@dataclass(frozen=True, kw_only=True)
class DetectionData:
    """Labelled images: COCO, YOLO or Pascal VOC."""

    path: str = ""
    """Folder, COCO JSON or data.yaml."""
    format: Literal["auto", "coco", "yolo", "voc"] = "auto"
    """auto: found by looking."""
    images: str | None = None
    """Folder that image names start from. None: looked for around the annotations."""
    train_split: str = "train"
    """Split to learn from."""
    eval_split: str | None = None
    """Split to evaluate on. None: val, valid, validation or test, whichever is there first."""
    eval_fraction: float = 0.1
    """Share of the training images to hold out, drawn by `seed`, where there is no other split."""
    max_images: int | None = None
    """Use this many training images, drawn by `seed`. None: all."""
    max_eval_images: int | None = None
    """Evaluate on this many held-out images, drawn by `seed`. None: all."""

    def __post_init__(self) -> None:
        _require(self.path, "`data.path` is missing: give a folder of labelled images, e.g. `--data set/`.")
        _fraction("data.eval_fraction", self.eval_fraction)
        for name in ("max_images", "max_eval_images"):
            if getattr(self, name) is not None:
                _at_least(f"data.{name}", getattr(self, name), 1)


@dataclass(frozen=True, kw_only=True)
class DetectionSettings:
    """Find objects: boxes and classes, as DEIMv2 learns them."""

    kind: Literal["detection"] = "detection"
    """detection."""
    preset: Literal["derived", "published"] = "derived"
    """derived: everything follows from epochs and data. published: the authors' run as it was, slips
    included; epochs, batch and rates are theirs where not given."""
    class_loss: Literal["mal", "vfl", "focal"] = "mal"
    """Loss on the classes; mal as published."""
    ema: bool = True
    """Evaluate and keep an average of the weights."""
    dense_o2o: bool = True
    """Mosaic, MixUp and CopyBlend: more boxes a picture."""
    strong_augmentation: bool = True
    """All of it: Dense O2O, colours, zoom-out, crop. Off: flips alone."""
    multi_scale: bool = True
    """Batches of several sizes, for the sizes of network that were trained so (S to X)."""
    mosaic_prob: float | None = None
    """None: the size's published one; so for the next two."""
    mixup_prob: float | None = None
    """Share of the batches with MixUp, in its epochs."""
    copyblend_prob: float | None = None
    """Share of the other batches with CopyBlend, in its epochs."""
    colour_prob: float = 0.5
    """Chance of each change of colour; 0 where colour is what tells classes apart."""
    vertical_flip_prob: float = 0.0
    """Chance of turning an image upside down: for pictures from the air or the microscope."""
    merged_mosaic: bool = False
    """Warp each tile of a Mosaic once, bilinearly, instead of by the published steps."""

    def __post_init__(self) -> None:
        for name in ("mosaic_prob", "mixup_prob", "copyblend_prob", "colour_prob", "vertical_flip_prob"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"`objective.{name}` must be a probability, 0 to 1, got {value!r}.")


@dataclass(frozen=True, kw_only=True)
class DetectionTraining:
    """How a detector is trained. `epochs` is enough; None is derived (docs/training-detection.md)."""

    epochs: int | None = None
    """Passes over the data. None: 72, or those of the published run."""
    max_steps: int | None = None
    """Stop after this many optimiser steps; the schedule stays that of `epochs`."""
    batch_size: int | None = None
    """Images per optimiser step, over all devices. None: derived from the number of images."""
    gradient_accumulation: int = 1
    """Forward passes per optimiser step, each with its share of the batch."""
    lr: float | None = None
    """Full learning rate of all but the backbone. None: derived."""
    backbone_lr: float | None = None
    """Full learning rate of the backbone. None: derived."""
    weight_decay: float | None = None
    """AdamW's decoupled weight decay. None: the published one."""
    max_grad_norm: float = 0.1
    """Gradients are clipped to this norm. 0: not."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of training. auto: bf16 on a GPU that supports it, else fp32."""
    log_every: int = 50
    """Steps between two lines of metrics.jsonl."""
    eval_every: int | Literal["epoch", "end"] = "epoch"
    """Steps between evaluations, or once an epoch, or at the end only. The end is always evaluated."""
    eval_batch_size: int | None = None
    """Images per device in evaluation. None: twice the batch of a device."""
    save_every: int | Literal["epoch", "end"] = "epoch"
    """Steps between checkpoints, or once an epoch, or at the end only. A run resumes from its newest one."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept. The best and the last detector lie beside them."""
    best_metric: str = "AP"
    """Metric that chooses the best detector (AP, AP50, …)."""
    report_to: str | list[str] = "none"
    """Trackers as transformers knows them (tensorboard, wandb, mlflow, …)."""
    workers: int | None = None
    """Processes that prepare pictures, per device. None: up to 8 beside a GPU, else 0."""
    args: dict[str, Any] = field(default_factory=dict)
    """Any other field of `transformers.TrainingArguments`, by its name there."""

    def __post_init__(self) -> None:
        for name in ("gradient_accumulation", "log_every", "keep_checkpoints"):
            _at_least(f"training.{name}", getattr(self, name), 1)
        for name in ("epochs", "max_steps", "batch_size", "eval_batch_size"):
            if getattr(self, name) is not None:
                _at_least(f"training.{name}", getattr(self, name), 1)
        for name in ("eval_every", "save_every"):
            if not isinstance(getattr(self, name), str):
                _at_least(f"training.{name}", getattr(self, name), 1)
        for name in ("weight_decay", "max_grad_norm", "workers"):
            if getattr(self, name) is not None:
                _at_least(f"training.{name}", getattr(self, name), 0)
        for name in ("lr", "backbone_lr"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"`training.{name}` must be positive, got {value}. None derives it.")


@dataclass(frozen=True, kw_only=True)
class Training:
    """How it is trained: the common fields of TrainingArguments by shorter names, the rest in `args`."""

    epochs: float = 3.0
    """Passes over the data, where `max_steps` is None."""
    max_steps: int | None = None
    """Optimiser steps. None: by `epochs`."""
    batch_size: int = 8
    """Rows per device and forward pass."""
    gradient_accumulation: int = 1
    """Forward passes per optimiser step."""
    lr: float | None = None
    """Peak learning rate. None: the tuner's usual one (see docs/running.md)."""
    schedule: str = "linear"
    """The learning rate after warm-up, by transformers' name (linear, cosine, constant_with_warmup, …)."""
    warmup: float = 0.03
    """Warm-up: a share of all steps below 1, a number of steps from 1 on."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm. 0: not."""
    optimizer: str = "adamw_torch_fused"
    """By transformers' name (adamw_torch_fused, adamw_8bit, …)."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of training. auto: bf16 on a GPU that supports it, else fp32."""
    gradient_checkpointing: bool = False
    """Recompute activations in backward instead of keeping them: less memory, about a third more time."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    eval_every: int | Literal["epoch", "end"] = "epoch"
    """Steps between evaluations, or once an epoch, or at the end only. The end is always evaluated."""
    eval_batch_size: int | None = None
    """Rows per device in evaluation. None: `batch_size`."""
    save_every: int | Literal["epoch", "end"] = "epoch"
    """Steps between checkpoints, or once an epoch, or at the end only. A run resumes from its newest one."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept; the best one is kept beside them."""
    eval_at_start: bool | None = None
    """Evaluate before the first step too: zero-shot. None: where a trained adapter is started from."""
    align_every: int | None = None
    """Steps between measurements of how the tasks' gradients agree (`thawline align`), each a forward and a
    backward pass over 64 rows of every task. None: not measured."""
    best_metric: str | None = None
    """Metric that chooses the checkpoint the run ends with (loss, choice_accuracy, …). None: the last one."""
    report_to: str | list[str] = "none"
    """Trackers as transformers knows them (tensorboard, wandb, mlflow, …)."""
    workers: int = 0
    """Processes that load data beside the training one."""
    args: dict[str, Any] = field(default_factory=dict)
    """Any other field of `transformers.TrainingArguments`, by its name there (`{neftune_noise_alpha: 5}`)."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "gradient_accumulation", "log_every", "keep_checkpoints"):
            _at_least(f"training.{name}", getattr(self, name), 1)
        for name in ("max_steps", "eval_batch_size", "align_every"):
            if getattr(self, name) is not None:
                _at_least(f"training.{name}", getattr(self, name), 1)
        for name in ("eval_every", "save_every"):
            if not isinstance(getattr(self, name), str):
                _at_least(f"training.{name}", getattr(self, name), 1)
        for name in ("warmup", "weight_decay", "max_grad_norm", "workers"):
            _at_least(f"training.{name}", getattr(self, name), 0)
        if self.max_steps is None and not self.epochs > 0:
            raise ConfigError(f"`training.epochs` must be positive, got {self.epochs}.")
        if self.lr is not None and not self.lr > 0:
            raise ConfigError(
                f"`training.lr` must be positive, got {self.lr}. None takes the tuner's usual one."
            )


PEFT_METHODS = (
    "adalora", "adamss", "adaption_prompt", "beft", "boft", "c3a", "cartridge", "cpt", "deft", "delora",
    "fourierft", "frod", "glora", "gralora", "hira", "hra", "ia3", "lily", "ln_tuning", "loha", "lokr",
    "miss", "multitask_prompt_tuning", "oft", "osf", "p_tuning", "peanut", "prefix_tuning",
    "prompt_tuning", "psoft", "pvera", "randlora", "road", "shadow", "shira", "supertuning", "tinylora",
    "trainable_tokens", "unilora", "vblora", "vera", "waveft", "xlora",
)  # fmt: skip

TunerSettings = Paca | Mhr | Lora | Full | Frozen | PeftMethod
TUNERS: dict[str, type] = {
    "paca": Paca,
    "mhr": Mhr,
    "poly": Mhr,
    "lora": Lora,
    "dora": Lora,
    "none": Full,
    "frozen": Frozen,
    **dict.fromkeys(PEFT_METHODS, PeftMethod),
}
"""What may move: `tuner.method` → the dataclass of its fields."""

OBJECTIVES: dict[str, dict[str, type]] = {
    "text": {"objective": TextSettings, "base": TextBase, "data": TextData},
    "match": {"objective": MatchSettings, "base": TextBase, "data": TextData},
    "detection": {
        "objective": DetectionSettings,
        "base": DetectionBase,
        "data": DetectionData,
        "training": DetectionTraining,
    },
}
"""What may be asked: `objective.kind` → the dataclasses of the sections that depend on it."""

LEADING_FIELD = {"objective": "kind", "base": "model", "tuner": "method", "data": "path"}
"""A section given as a single value gives this field."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run: base × tuner × objective, on data, trained somehow."""

    objective: TextSettings | MatchSettings | DetectionSettings = field(default_factory=TextSettings)
    base: TextBase | DetectionBase = field(default_factory=TextBase)
    tuner: TunerSettings = field(default_factory=Paca)
    data: TextData | DetectionData = field(default_factory=TextData)
    training: Training | DetectionTraining = field(default_factory=Training)
    name: str | None = None
    """Name of the run's folder. None: made of base, tuner and data."""
    folder: str = "runs"
    """Where run folders are made."""
    seed: int = 0
    """Seeds the adapter's start, the order of the data and dropout."""
    lean: bool = False
    """Swap norms and gated MLPs for versions that keep less for backward (`thawline.apply_lean`)."""

    def __post_init__(self) -> None:
        for section, wanted in section_types(self.objective.kind, self.tuner.method).items():
            if not isinstance(getattr(self, section), wanted):
                got = type(getattr(self, section)).__name__
                raise ConfigError(f"`{section}` must be a {wanted.__name__} in this recipe, got a {got}.")
        if isinstance(self.seed, bool) or not 0 <= self.seed < 2**32:
            raise ConfigError(f"`seed` must be a whole number from 0 to 2^32 - 1, got {self.seed!r}.")
        if self.name is not None and (not self.name or Path(self.name).name != self.name):
            raise ConfigError(
                f"`name` must be a plain folder name, got {self.name!r}. `folder` says where it lies."
            )

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], source: str = "the recipe") -> RunConfig:
        """Build a config from nested plain values, as a YAML file holds them.

        Raises: ConfigError: naming an unknown key and its nearest known one, or a value that cannot work.
        """
        values = check_mapping(mapping, source)
        types = _types_of(values)
        sections = {name: types[name](**section) for name, section in values.items() if name in types}
        return cls(**{**values, **sections})

    def to_mapping(self) -> dict[str, Any]:
        """Nested plain values, ready for YAML or JSON; `from_mapping` reads them back."""
        return dataclasses.asdict(self)

    @property
    def run_name(self) -> str:
        """`name`, or one made of base, tuner and data."""
        if self.name is not None:
            return self.name
        paths = [self.data.path] if isinstance(self.data.path, str) else self.data.path
        adapt = getattr(self.tuner, "adapt", "none")
        tuner = self.tuner.method if adapt == "none" else f"{self.tuner.method}-{adapt}"
        parts = [Path(self.base.label).name, tuner, Path(paths[0]).stem]
        return "-".join(re.sub(r"[^\w.]+", "_", part) for part in parts)

    @property
    def run_folder(self) -> Path:
        """Folder of this run."""
        return Path(self.folder) / self.run_name


def load_recipe(path: str | Path) -> RunConfig:
    """Read a recipe, or the config.yaml of a run folder.

    Raises: ConfigError: if the file is missing, is not YAML, or says something that cannot work.
    """
    return RunConfig.from_mapping(read_mapping(path), str(path))


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The nested plain values of a YAML file. Raises: ConfigError: if it is missing or not a mapping."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"Cannot read recipe '{path}': {error.strerror}.") from error
    try:
        mapping = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"Recipe '{path}' is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(mapping, dict):
        raise ConfigError(f"Recipe '{path}' must hold keys and values, got {type(mapping).__name__}.")
    return mapping


def section_types(objective: str, method: str) -> dict[str, type]:
    """The dataclass of each section of a recipe. Raises: ConfigError: for an unknown choice."""
    if objective not in OBJECTIVES:
        raise ConfigError(f"Unknown objective '{objective}'. {did_you_mean(objective, OBJECTIVES)}")
    if method not in TUNERS:
        raise ConfigError(f"Unknown tuner '{method}'. {did_you_mean(method, TUNERS)}")
    return {"training": Training, **OBJECTIVES[objective], "tuner": TUNERS[method]}


def usual_method(objective: str) -> str:
    """The tuner of a recipe that names none: a detector's backbone trains with the rest."""
    return Full.method if objective == "detection" else Paca.method


def check_mapping(mapping: Mapping[str, Any], source: str = "the recipe") -> dict[str, Any]:
    """A recipe's nested values with its sections written out. Raises: ConfigError: naming an unknown key."""
    values = expand_sections(mapping, source)
    types = _types_of(values)
    known = set(known_keys(types))
    for section, value in values.items():
        for key in [f"{section}.{name}" for name in value] if section in types else [section]:
            if key not in known:
                raise ConfigError(f"Unknown key '{key}' in {source}. {nearest_key(key, types)}")
    return values


def expand_sections(mapping: Mapping[str, Any], source: str = "the recipe") -> dict[str, Any]:
    """Write out sections given as their leading field alone (`tuner: lora`)."""
    values = dict(mapping)
    for section in (*LEADING_FIELD, "training"):
        value = values.get(section, {})
        if section in LEADING_FIELD and isinstance(value, (str, list)):
            value = {LEADING_FIELD[section]: value}
        if not isinstance(value, dict):
            raise ConfigError(f"`{section}` in {source} must hold keys and values, got {value!r}.")
        values[section] = dict(value)
    return values


def nearest_key(key: str, types: Mapping[str, type], more: Sequence[str] = ()) -> str:
    """The end of an "unknown key" message: the nearest known key, or ours for another library's name."""
    known = [*known_keys(types), *more]
    section, _, name = key.partition(".")
    if section == "training" and name in TRAINING_ARGUMENTS:
        return f"Here it is called 'training.{TRAINING_ARGUMENTS[name]}'."
    # The same last name in another section is nearer than a similar spelling.
    same = [other for other in known if other.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    close = same or get_close_matches(key, known, n=1)
    if close:
        return f"Did you mean '{close[0]}'?"
    inside = {other.partition(".")[2] for other in known if other.startswith(f"{section}.")}
    if inside:
        return f"'{section}' has: {', '.join(sorted(inside))}."
    return f"Known: {', '.join(sorted({other.partition('.')[0] for other in known}))}."


def known_keys(types: Mapping[str, type]) -> Iterator[str]:
    """Every dotted key a recipe with these sections may have."""
    for config_field in dataclasses.fields(RunConfig):
        if config_field.name in types:
            yield from (
                f"{config_field.name}.{inner.name}" for inner in dataclasses.fields(types[config_field.name])
            )
        else:
            yield config_field.name


TRAINING_ARGUMENTS = {
    "num_train_epochs": "epochs",
    "max_steps": "max_steps",
    "per_device_train_batch_size": "batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation",
    "learning_rate": "lr",
    "lr_scheduler_type": "schedule",
    "warmup_steps": "warmup",
    "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm",
    "optim": "optimizer",
    "activation_checkpointing": "gradient_checkpointing",
    "logging_steps": "log_every",
    "eval_steps": "eval_every",
    "save_steps": "save_every",
    "save_total_limit": "keep_checkpoints",
    "metric_for_best_model": "best_metric",
    "report_to": "report_to",
    "dataloader_num_workers": "workers",
}
"""TrainingArguments' names and ours."""


def _types_of(values: Mapping[str, Any]) -> dict[str, type]:
    objective = values["objective"].get("kind", TextSettings.kind)
    return section_types(objective, values["tuner"].get("method", usual_method(objective)))


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number; YAML 1.1, and so PyYAML, takes it for text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)


def _require(value: object, message: str) -> None:
    if not value:
        raise ConfigError(message)


def _at_least(name: str, value: float, least: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < least:
        raise ConfigError(f"`{name}` must be a number of at least {least}, got {value!r}.")


def _one_of(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"`{name}` must be {', '.join(choices[:-1])} or {choices[-1]}, got {value!r}.")


def _fraction(name: str, value: float) -> None:
    if not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ConfigError(f"`{name}` must be in [0, 1), got {value!r}.")
