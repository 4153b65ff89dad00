"""Trainer of a detector: parameter groups, schedule, averaged weights, best and last detector.

It extends the engine's Trainer through public methods. Besides the checkpoints that a run resumes from, the
run's folder holds two detectors ready to use, with averaged weights and any adapter merged:

    best/   highest value of the chosen metric so far
    last/   latest evaluation

At the end of a run the weights are evaluated as trained, too: where they score higher than their average,
which in a short run may lag behind, they are what is kept.

A published run starts stage 2 from the best epoch of stage 1 (weights, average and optimiser), and restarts
it from there after every epoch that beats none of those since the last restart.
"""

from __future__ import annotations

__all__ = ["DetectionTrainer"]

import json
import logging
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from thawline.data.detection.collate import build_loader
from thawline.data.detection.mixture import MixedImages
from thawline.domains import DOMAINS
from thawline.errors import ConfigError, ThawlineError, did_you_mean
from thawline.files import atomic_file, atomic_folder, read_json, write_json, write_text
from thawline.metrics.detection import STATISTICS
from thawline.models.deimv2.model import DEIMv2
from thawline.recipe import TunerSettings
from thawline.training.checkpoints import load_state
from thawline.training.detection.arguments import DetectionTrainingData
from thawline.training.detection.backbone import fast_parameters, routing_group
from thawline.training.detection.callbacks import Speed, TrainingEvents
from thawline.training.detection.detectors import Detectors
from thawline.training.detection.domain import domain_bytes
from thawline.training.detection.ema import EMA
from thawline.training.detection.groups import ParameterGroup, build_groups
from thawline.training.detection.learner import Learner, collate_on_host
from thawline.training.detection.plan import (
    batch_statistics,
    sampling_overview,
    sampling_plan,
    schedule_overview,
)
from thawline.training.detection.scores import Scores
from thawline.training.evaluation import Evaluation
from thawline.training.trainer import Trainer

logger = logging.getLogger(__name__)

WEIGHTS, AVERAGE, SCORES = "pytorch_model.bin", "average.pt", "scores.json"
"""Files of a checkpoint: the weights in training, their average, the results of evaluations."""
STAGE_1 = "stage_1.pt"
"""Weights, average and optimiser of the published run's best epoch of stage 1."""


class DetectionTrainer(Trainer):
    """Trainer of a detector.

    Args:
        model: with its tuner attached (`tune_backbone`).
        args: see `detection_arguments`.
        objective: images, schedule, evaluation.
        tuner: the recipe's; decides which of the backbone's parameters train at the full rate.
        callbacks: additional callbacks.
    Raises: ConfigError: if `training.best_metric` is unknown.
    """

    objective: DetectionTrainingData
    optimizer: torch.optim.Optimizer
    lr_scheduler: LambdaLR

    def __init__(
        self,
        model: DEIMv2 | Detectors,
        args: TrainingArguments,
        objective: DetectionTrainingData,
        tuner: TunerSettings,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        metric = objective.training.best_metric
        if metric not in STATISTICS:
            raise ConfigError(f"Unknown `training.best_metric: {metric}`. {did_you_mean(metric, STATISTICS)}")
        self.schedule = objective.schedule
        settings = self.schedule.settings
        if args.world_size > 1 and args.device.type == "cuda" and objective.domain is None:
            # As published: the few images of one device make poor statistics. There is no CPU version.
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.groups: list[ParameterGroup] = build_groups(
            model, settings, fast=fast_parameters(model, tuner), routing=routing_group(model, tuner)
        )
        action = objective.training.on_broken_loss
        super().__init__(Learner(model), args, objective, callbacks, on_broken_loss=action)
        self.folder = Path(args.output_dir)
        self.average: EMA | None = None
        self.scores = Scores()
        self.sampler = objective.train_rows.sampler()
        self._term_sums: dict[str, Tensor] = {}
        self._n_terms = 0
        self._resumed_from: Path | None = None
        self.add_callback(
            TrainingEvents(
                train_begin=self.begin_training, epoch_begin=self.begin_epoch, step_end=self.update_average
            )
        )
        self.add_callback(Speed(objective.device_batch_size * args.gradient_accumulation_steps))

    @property
    def evaluated_model(self) -> nn.Module:
        """Detector that is evaluated."""
        return self.model.detector

    @property
    def epoch(self) -> int:
        """Epoch of the next step, from 0."""
        return self.state.global_step // self.schedule.steps_per_epoch

    def get_train_dataloader(self) -> DataLoader:
        """Build the loader of augmented batches; targets stay on the host, where the losses count them."""
        objective = self.objective
        loader = build_loader(
            objective.train_rows,
            partial(collate_on_host, objective.collate),
            batch_size=objective.device_batch_size,
            sampler=self.sampler,
            workers=objective.workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build AdamW on the parameter groups."""
        if self.optimizer is None:
            groups = [group.for_optimizer() for group in self.groups]
            self.optimizer = AdamW(groups, betas=self.schedule.settings.betas, fused=True)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LambdaLR:
        """Build the schedule's learning rate, a function of the step alone."""
        if self.lr_scheduler is None:
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, self.schedule.factor_at)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """Return the sum of all loss terms."""
        terms = model(inputs["pixel_values"], inputs["targets"], epoch=self.epoch)
        self._n_terms += 1
        for name, value in terms.items():
            kind = "_".join(name.split("_")[:2])  # over all layers; the device is not read here
            self._term_sums[kind] = self._term_sums.get(kind, 0) + value.detach()
        loss = torch.stack(list(terms.values())).sum()
        return (loss, terms) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the mean of each kind of loss term since the last line as well."""
        if "loss" in logs and self._n_terms:
            sums = torch.stack(list(self._term_sums.values())).tolist()
            terms = {name: value / self._n_terms for name, value in zip(self._term_sums, sums, strict=True)}
            logs = {**logs, **{name: round(value, 6) for name, value in terms.items()}}
            self._term_sums, self._n_terms = {}, 0
        super().log(logs, start_time)

    def evaluation_loop(
        self, dataloader: DataLoader, description: str, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Evaluate the averaged weights and save them as last/ and best/, without drawing random numbers."""
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices), self._averaged():
            output = super().evaluation_loop(dataloader, description, metric_key_prefix, **kwargs)
            is_best_of_stage_1 = self.is_in_train and self._save_evaluated()
        if is_best_of_stage_1 and self.schedule.published:
            self._save_stage_1()
        return output

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train as transformers' Trainer does; a resumed run restores its average and best scores."""
        if isinstance(resume_from_checkpoint, str):
            self._resumed_from = Path(resume_from_checkpoint)
            saved = read_json(self._resumed_from / SCORES)
            # JSON holds null for the scores that there are none of yet.
            self.scores = Scores(**{name: value for name, value in saved.items() if value is not None})
            self._check_best()
        return super().train(resume_from_checkpoint, **kwargs)

    def _check_best(self) -> None:
        """Forget the run's best detector if it cannot be read; the best of those to come takes its place."""
        if self.scores.best_step == -1:
            return
        try:
            self.objective.load_base(str(self.folder / "best"))
        except ThawlineError as error:
            logger.warning("The run's best detector is lost. The best from here on is kept. %s", error)
            self.scores.best, self.scores.best_step = -math.inf, -1

    def checkpoint_bytes(self) -> int:
        """Return the approximate size of a checkpoint, with the averaged weights."""
        average = {} if self.average is None else self.average.state_dict()["tensors"]
        return super().checkpoint_bytes() + sum(tensor.nbytes for tensor in average.values())

    def begin_training(self) -> None:
        """Start the average at the current weights, or restore it; catch up on a missed evaluation."""
        settings = self.schedule.settings
        if self.objective.settings.ema:
            self.average = EMA(
                self.model,
                decay=settings.ema_decay,
                warmup_steps=settings.ema_warmup_steps,
                once_per_name=settings.published,
            )
            if self._resumed_from is not None:
                self.average.load_state_dict(load_state(self._resumed_from / AVERAGE))
        self._catch_up()

    def update_average(self) -> None:
        """Average in the weights after a step."""
        if self.average is not None:
            self.average.update()

    def _catch_up(self) -> None:
        """Evaluate an epoch whose end was saved just before its evaluation, replacing a line of that."""
        step = self.state.global_step
        is_end = self._resumed_from is not None and step % self.schedule.steps_per_epoch == 0
        if not is_end or self.args.eval_strategy != "epoch" or not self.objective.held_out_rows:
            return
        if any(row["step"] == step and "eval_AP" in row for row in self.state.log_history):
            return
        file = self.folder / "metrics.jsonl"
        if self.args.should_save and file.is_file():
            lines = file.read_text(encoding="utf-8").splitlines()
            kept = [
                line for line in lines if (row := json.loads(line))["step"] < step or "eval_AP" not in row
            ]
            write_text(file, "".join(f"{line}\n" for line in kept))
        self.evaluate()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save all that resuming needs, for a checkpoint; else the detector that the run ends with.

        That is the best one of the run if images are held out, else the latest one.
        """
        folder = Path(output_dir or self.args.output_dir)
        if not _internal_call and self.objective.held_out_rows:
            self._evaluate_end()
        if not self.args.should_save:
            return
        if _internal_call:
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(self.model.state_dict(), folder / WEIGHTS)
            write_json(folder / SCORES, vars(self.scores), indent=None)
            if self.average is not None:
                torch.save(self.average.state_dict(), folder / AVERAGE)
            return
        with self._averaged():
            self._save_last()
        kept = self.folder / ("last" if self.scores.best_step == -1 else "best")
        _copy_folder(kept, folder)
        if (kept / DOMAINS).is_dir():
            _copy_folder(kept / DOMAINS, self.folder / DOMAINS)

    def begin_epoch(self) -> None:
        """Set the sampler's epoch; restart from the best of stage 1 where the published run does."""
        self.sampler.set_epoch(self.epoch)
        is_start = self.state.global_step == self.epoch * self.schedule.steps_per_epoch
        stage_2 = self.schedule.windows["stage_2"]
        again = self.epoch == stage_2.start or (stage_2.covers(self.epoch) and self.scores.start_again)
        if self.schedule.published and is_start and again:
            self._load_stage_1()

    def final_evaluation(self) -> Evaluation:
        """Evaluate the detector that the run ends with."""
        if not self.objective.held_out_rows:
            return Evaluation(metrics={})
        ends_with_last = self.scores.best_step in (-1, self.state.global_step)
        if ends_with_last and self.last_evaluation and self.last_evaluated_step == self.state.global_step:
            return self.last_evaluation
        if self.scores.best_step == -1:
            self.evaluate()
            assert self.last_evaluation is not None
            return self.last_evaluation
        self.accelerator.wait_for_everyone()  # until the first process has written it
        best = self.objective.load_base(str(self.folder / "best")).to(self.args.device)
        with torch.no_grad():
            return self.objective.evaluate(best, self.args.per_device_eval_batch_size)

    def plan(self) -> dict[str, Any]:
        """Return the schedule, the parameter groups and statistics of the first batch."""
        start = time.perf_counter()
        batch = self.objective.first_batch()
        seconds = time.perf_counter() - start
        rows, datasets = self.objective.train_rows, self.objective.datasets
        sampling: dict[str, Any] = {}
        if isinstance(rows, MixedImages):
            names = [dataset.name for dataset in datasets]
            sampling["batches"] = dict(zip(names, rows.n_batches, strict=True))
        elif (repeats := datasets[0].class_repeats) is not None:
            sampling["sampling"] = sampling_plan(rows.order, repeats, datasets[0].class_names)
        if sizes := domain_bytes(self.model.detector, self.objective.domain):
            sampling["domains"] = sizes
        return {
            **sampling,
            "steps": self.schedule.n_steps if self.args.max_steps < 0 else self.args.max_steps,
            "rows_a_step": self.schedule.settings.batch_size,
            "schedule": self.schedule.describe(),
            "parameter_groups": [group.describe() for group in self.groups],
            "first_batch": batch_statistics(
                batch, self.model.detector.config, self.objective.datasets[0].class_names
            ),
            "loader": {
                "processes": self.objective.workers,
                "images_per_second_each": round(len(batch["targets"]) / seconds, 1),
            },
        }

    def overview(self, plan: Mapping[str, Any]) -> dict[str, str]:
        """Return the schedule of `plan`, in words, under at most four headings."""
        overview = schedule_overview(self.schedule, plan)
        if routing := [group.lr for group in self.groups if group.name == "routing" and group.parameters]:
            overview["rates"] = f"routing {routing[0]:g}, else {overview['rates']}"
        if (sampling := plan.get("sampling")) is not None:
            overview["steps"] += f"; {sampling_overview(sampling)}"
        if (batches := plan.get("batches")) is not None:
            each = ", ".join(f"{n} {name}" for name, n in batches.items())
            overview["steps"] += f"; batches an epoch: {each}"
        return overview

    def _averaged(self) -> AbstractContextManager[None]:
        """Give the model the averaged weights inside the context."""
        return nullcontext() if self.average is None else self.average.applied()

    def _evaluate_end(self) -> None:
        """Evaluate the weights that training ends with, their average first, and save the better ones."""
        step, per_epoch = self.state.global_step, self.schedule.steps_per_epoch
        if self.last_evaluated_step != step:
            self.evaluate()
            with self._averaged():
                self._save_evaluated()
        last, weights = self._score(), ""
        if self.average is not None and not self.schedule.published:
            average, averaged = self.average, self.last_evaluation
            self.average = None  # from here on the weights as trained are what is evaluated and saved
            super().evaluation_loop(self.get_eval_dataloader(), "as trained")
            trained = self._score()
            weights = f" (averaged weights; {trained:.3f} as trained)"
            if trained > last:
                weights = f" (weights as trained; {last:.3f} averaged)"
                last = trained
                self._save_evaluated()
            else:
                self.average, self.last_evaluation = average, averaged
        scores, metric = self.scores, self.objective.training.best_metric
        self.ending = f"{metric} {last:.3f} after the last epoch, {step / per_epoch:.4g}{weights}"
        if scores.best_step != step:
            best = f"{scores.best:.3f} after epoch {scores.best_step / per_epoch:.4g}"
            self.ending += f"; the best, which is kept, is {best}, {scores.best - last:.3f} above"

    def _save_evaluated(self) -> bool:
        """Save the weights of the latest evaluation as last/ and, if they score best, as best/.

        Returns: whether they are the best of stage 1 so far.
        """
        score = self._score()
        epoch = (self.state.global_step - 1) // self.schedule.steps_per_epoch
        is_stage_2 = self.schedule.windows["stage_2"].covers(epoch)
        is_best = self.scores.note(score, step=self.state.global_step, is_stage_2=is_stage_2)
        if self.args.should_save:
            self._save_last()
            if is_best:
                _copy_folder(self.folder / "last", self.folder / "best")
        return is_best and not is_stage_2

    def _save_last(self) -> None:
        """Save the weights in the model as last/: a plain detector, and inside it the domains, if any."""
        with atomic_folder(self.folder / "last") as temporary:
            self.objective.save(self.model.detector, self.last_evaluation, temporary)

    def _score(self) -> float:
        """Return the latest value of the metric that chooses the best detector; 0 where there is none."""
        metrics = self.last_evaluation.metrics if self.last_evaluation is not None else {}
        return metrics.get(self.objective.training.best_metric, 0.0)

    def _save_stage_1(self) -> None:
        """Save the start of stage 2: the weights in training, their average, the optimiser."""
        if not self.args.should_save:
            return
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        if self.average is not None:
            state["average"] = self.average.state_dict()
        with atomic_file(self.folder / STAGE_1) as temporary:
            torch.save(state, temporary)

    def _load_stage_1(self) -> None:
        """Restore the best of stage 1; the rate stays the schedule's."""
        self.accelerator.wait_for_everyone()
        logger.info("epoch %d restarts from the best of stage 1", self.epoch)
        state = load_state(self.folder / STAGE_1, self.args.device)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        for group, lr in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = lr


def _copy_folder(source: Path, folder: Path) -> None:
    with atomic_folder(folder) as temporary:
        shutil.copytree(source, temporary, dirs_exist_ok=True)
