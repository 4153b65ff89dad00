"""Training section of a text recipe, and the names that TrainingArguments has for its fields."""

from __future__ import annotations

__all__ = [
    "TRAINING_ARGUMENTS",
    "Training",
]

from dataclasses import dataclass, field
from typing import Any, Literal

from thawline.errors import ConfigError
from thawline.recipe.checks import all_at_least, check_patience


@dataclass(frozen=True, kw_only=True)
class Training:
    """Training settings: the common fields of TrainingArguments by shorter names, the rest in `args`."""

    epochs: float = 3.0
    """Passes over the data, if `max_steps` is None."""
    max_steps: int | None = None
    """Optimiser steps. None: by `epochs`."""
    batch_size: int = 8
    """Rows per device and forward pass."""
    gradient_accumulation: int = 1
    """Forward passes per optimiser step."""
    lr: float | None = None
    """Peak learning rate. None: the tuner's usual one (see docs/running.md)."""
    schedule: str = "linear"
    """Learning-rate schedule by transformers' name (linear, cosine, constant_with_warmup, …)."""
    warmup: float = 0.03
    """Warm-up: below 1 a fraction of all steps, from 1 on a number of steps."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Maximum norm of the gradients; larger ones are clipped. 0: no clipping."""
    optimizer: str = "adamw_torch_fused"
    """Optimiser by transformers' name (adamw_torch_fused, adamw_8bit, …)."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of training. auto: bf16 on a GPU that supports it, else fp32."""
    gradient_checkpointing: bool = False
    """Recompute activations in backward instead of keeping them: less memory, about a third more time."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    eval_every: int | Literal["epoch", "end"] = "epoch"
    """Steps between evaluations, or every epoch, or only at the end, which is always evaluated."""
    eval_batch_size: int | None = None
    """Rows per device in evaluation. None: `batch_size`."""
    save_every: int | Literal["epoch", "end"] = "epoch"
    """Steps between checkpoints, or every epoch, or only at the end. A run resumes from the newest."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints kept; the best one is kept as well."""
    eval_at_start: bool | None = None
    """Evaluate before the first step too (zero-shot where `tuner.adapt` adapts to new tasks). None: only when
    starting from a trained adapter."""
    align_every: int | None = None
    """Steps between measurements of the alignment of the tasks' gradients (`thawline align`), each a forward
    and a backward pass over 64 rows of every task. None: not measured."""
    best_metric: str | None = None
    """Metric that selects the final checkpoint (loss, choice_accuracy, …). None: the last checkpoint."""
    patience: int | None = None
    """Evaluations without an improvement of `best_metric` after which training ends early. None: it never
    does."""
    on_broken_loss: Literal["stop", "warn"] = "stop"
    """Where the loss is no longer finite: stop with an error, or say so and go on (fp16 may recover)."""
    report_to: str | list[str] = "none"
    """Trackers by transformers' names (tensorboard, wandb, mlflow, …)."""
    workers: int = 0
    """Processes that load data. 0: the training process does."""
    args: dict[str, Any] = field(default_factory=dict)
    """Any other field of `transformers.TrainingArguments`, by its name there (`{neftune_noise_alpha: 5}`)."""

    def __post_init__(self) -> None:
        counts = (
            "batch_size",
            "gradient_accumulation",
            "log_every",
            "keep_checkpoints",
            "max_steps",
            "patience",
        )
        all_at_least(
            self, "training", 1, *counts, "eval_batch_size", "align_every", "eval_every", "save_every"
        )
        all_at_least(self, "training", 0, "warmup", "weight_decay", "max_grad_norm", "workers")
        if self.max_steps is None and not self.epochs > 0:
            raise ConfigError(f"`training.epochs` must be positive, got {self.epochs}.")
        check_patience(self)
        if self.lr is not None and not self.lr > 0:
            raise ConfigError(
                f"`training.lr` must be positive, got {self.lr}. None takes the tuner's usual one."
            )


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
"""Name in TrainingArguments → name here."""
