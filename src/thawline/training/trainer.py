"""The trainer of every run: transformers' Trainer, extended through its public methods only.

It evaluates by the objective, can sample rows in an order of its own, takes a loss and parameter groups, and
plans a run. Every logged value goes to metrics.jsonl; the progress bar shows the loss.
"""

from __future__ import annotations

__all__ = ["Trainer", "smoothed_loss"]

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother
from transformers.trainer_utils import EvalLoopOutput

from thawline.files import finite, read_json
from thawline.ops.lean_head import LeanHeadModel
from thawline.training.callbacks import BrokenLoss, MetricsFile, Patience, Progress, ResumedRates
from thawline.training.checkpoints import WholeCheckpoints, checkpoint_step
from thawline.training.evaluation import Evaluation, TrainingData


class Trainer(transformers.Trainer):
    """Trainer that evaluates by an objective.

    Args:
        model: base with its tuner attached.
        args: see `training_arguments`.
        objective: rows, batches and evaluation.
        callbacks: further callbacks of transformers.
        sampler: order of rows, with a `set_epoch`. None: every row once an epoch, shuffled.
        loss: `loss(model, batch)`, a mean over rows. None: the model's own.
        parameter_groups: returns the optimiser's groups for a model. None: transformers' choice.
        on_broken_loss: what to do where the loss is no longer finite.
    """

    optimizer: Any

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        objective: TrainingData,
        callbacks: Sequence[TrainerCallback] = (),
        *,
        sampler: Sampler[int] | None = None,
        loss: Callable[[nn.Module, Mapping[str, Any]], Tensor] | None = None,
        parameter_groups: Callable[[nn.Module], list[dict[str, Any]]] | None = None,
        on_broken_loss: Literal["stop", "warn"] = "stop",
    ) -> None:
        self.objective = objective
        self.row_sampler, self.loss, self.parameter_groups = sampler, loss, parameter_groups
        self.broken_loss = BrokenLoss(on_broken_loss)
        self.last_evaluation: Evaluation | None = None
        self.last_evaluated_step = -1
        self.ending = ""
        """Comparison of the run's last and best evaluations, in words."""
        super().__init__(
            model=model,
            args=args,
            data_collator=objective.collate,
            train_dataset=objective.train_rows,
            eval_dataset=objective.held_out_rows or None,
            processing_class=objective.processor,
            callbacks=[
                MetricsFile(Path(args.output_dir) / "metrics.jsonl"),
                WholeCheckpoints(),
                ResumedRates(),
                *callbacks,
                self.broken_loss,  # the others may ask for a checkpoint
            ],
        )
        base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        if self.label_smoother is not None and isinstance(base, LeanHeadModel) and not args.use_liger_kernel:
            # Transformers' smoother wants the logits, which a lean loss does not hold.
            base.lean_label_smoothing = args.label_smoothing_factor
            self.label_smoother: Any = None
        self.decoder_inputs = getattr(base, "prepare_decoder_input_ids_from_labels", None)
        if loss is not None:
            # The loss is a mean over a batch's rows: accumulated batches are averaged, not summed.
            self.model_accepts_loss_kwargs = False
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(Progress())
        self.remove_callback(PrinterCallback)

    @property
    def evaluated_model(self) -> nn.Module:
        """The model that the objective evaluates."""
        return self.model

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train; after the last step no further one, which transformers' Trainer would take on resuming."""
        args, checkpoint = self.args, resume_from_checkpoint
        length = args.max_steps, args.num_train_epochs
        if isinstance(checkpoint, str) and self._is_over(Path(checkpoint)):
            args.max_steps, args.num_train_epochs = -1, 0
        try:
            return super().train(resume_from_checkpoint, **kwargs)
        finally:
            args.max_steps, args.num_train_epochs = length

    def _is_over(self, checkpoint: Path) -> bool:
        """Return whether training had ended at a checkpoint: after its last step, or early."""
        log = read_json(checkpoint / "trainer_state.json")["log_history"]
        patience = [c for c in self.callback_handler.callbacks if isinstance(c, Patience)]
        return 0 < self.args.max_steps <= checkpoint_step(checkpoint) or any(c.is_over(log) for c in patience)

    def checkpoint_bytes(self) -> int:
        """Return the approximate size of a checkpoint: the weights it holds and the optimiser's state."""
        is_adapter = hasattr(self.model, "get_base_model")
        weights = [p for p in self.model.parameters() if p.requires_grad or not is_adapter]
        states = self.optimizer.state.values() if self.optimizer is not None else ()
        tensors = [value for state in states for value in state.values() if isinstance(value, Tensor)]
        return sum(tensor.nbytes for tensor in (*weights, *tensors))

    def get_train_dataloader(self) -> DataLoader:
        """Return batches in the sampler's order, if there is one."""
        if self.row_sampler is None:
            return super().get_train_dataloader()
        return self.accelerator.prepare(
            DataLoader(
                self.objective.train_rows,
                batch_size=self.args.train_batch_size,
                sampler=self.row_sampler,
                collate_fn=self.data_collator,
                num_workers=self.args.dataloader_num_workers,
                pin_memory=self.args.dataloader_pin_memory,
                drop_last=self.args.dataloader_drop_last,
            )
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimiser that `args` name, on the parameter groups."""
        if self.parameter_groups is None or self.optimizer is not None:
            return super().create_optimizer(model)
        trained = self.model if model is None else model
        make, fields = self.get_optimizer_cls_and_kwargs(self.args, trained)
        self.optimizer = make(self.parameter_groups(trained), **fields)
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Take a forward and a backward pass; return the loss."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.broken_loss.losses.append((self.state.global_step + 1, loss.detach()))
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log values; in the trainer's state, which is saved as JSON, None stands for those not finite."""
        super().log(logs, start_time)
        self.state.log_history[-1] = finite(self.state.log_history[-1])

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """Return `loss`, where it is given, else the model's."""
        if self.loss is None:
            if self.label_smoother is not None and self.decoder_inputs is not None:
                # Transformers' smoother takes away the labels, of which the decoder's inputs are made.
                inputs = {**inputs, "decoder_input_ids": self.decoder_inputs(labels=inputs["labels"])}
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        loss = self.loss(model, inputs)
        return (loss, None) if return_outputs else loss

    def plan(self) -> dict[str, Any]:
        """Return steps, parameter groups and the first batch as plain values."""
        rows, args = self.objective.train_rows, self.args
        rows_a_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        n_rows = len(rows) if self.row_sampler is None else len(self.row_sampler)
        steps = round(-(-n_rows // rows_a_step) * args.num_train_epochs)
        steps = args.max_steps if args.max_steps > 0 else steps
        batch = self.objective.collate(rows[: args.train_batch_size])
        return {
            "steps": steps,
            "rows_a_step": rows_a_step,
            "warmup_steps": args.get_warmup_steps(steps),
            "schedule": str(args.lr_scheduler_type.value),
            "parameter_groups": [
                {
                    "lr": group["lr"],
                    "weight_decay": group["weight_decay"],
                    "tensors": len(group["params"]),
                    "parameters": sum(p.numel() for p in group["params"]),
                }
                for group in self.create_optimizer().param_groups
                if group["params"]
            ],
            "first_batch": {name: _summary(value) for name, value in batch.items()},
        }

    def overview(self, plan: Mapping[str, Any]) -> dict[str, str]:
        """Return the steps and rates of `plan`, in words, under their headings."""
        rates = dict.fromkeys(f"{group['lr']:.2g}" for group in plan["parameter_groups"])
        return {
            "steps": f"{plan['steps']:,} of {plan['rows_a_step']} rows",
            "rate": f"{' and '.join(rates)}, {plan['schedule']} after {plan['warmup_steps']} warm-up steps",
        }

    def full_evaluation(self) -> Evaluation:
        """Evaluate; return predictions too, where `evaluate` returns metrics alone."""
        self.evaluate()
        assert self.last_evaluation is not None
        return self.last_evaluation

    def final_evaluation(self) -> Evaluation:
        """Return the evaluation of the model that the run ends with; computed unless that is the latest."""
        if not self.objective.held_out_rows:
            return Evaluation(metrics={})
        is_latest = self.last_evaluated_step == self.state.global_step
        if self.last_evaluation is None or not is_latest or self.args.load_best_model_at_end:
            return self.full_evaluation()
        return self.last_evaluation

    def evaluation_loop(
        self, dataloader: DataLoader, description: str, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Evaluate by the objective; the dataloader and transformers' options play no part."""
        was_training = self.model.training
        with torch.no_grad(), self.compute_loss_context_manager():
            evaluation = self.objective.evaluate(self.evaluated_model, self.args.per_device_eval_batch_size)
        self.model.train(was_training)
        self.last_evaluation = evaluation
        self.last_evaluated_step = self.state.global_step
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in evaluation.metrics.items()}
        n = len(self.objective.held_out_rows)
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=n)


def smoothed_loss(model: nn.Module, batch: Mapping[str, Any], epsilon: float, *, shifted: bool) -> Any:
    """Return the loss of a model as transformers' Trainer computes it with label smoothing."""
    labels, inputs = batch["labels"], {name: value for name, value in batch.items() if name != "labels"}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = labels
    return LabelSmoother(epsilon)(model(**inputs), labels, shift_labels=shifted)


def _summary(value: Any) -> dict[str, Any]:
    value = torch.as_tensor(value)
    return {"shape": list(value.shape), "least": value.min().item(), "greatest": value.max().item()}
