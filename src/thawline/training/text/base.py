"""Base of the objectives on rows of text: rows by task, task ids, the trainer, evaluation by task."""

from __future__ import annotations

__all__ = ["Row", "RowObjective", "judged_row", "on_text"]

import dataclasses
import logging
import math
import os
import random
import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from operator import attrgetter, itemgetter
from typing import Any, ClassVar

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, TrainerCallback

from thawline.data.text.encode import OverlongError, TextEncoder, collate_tokens
from thawline.data.text.multitask import TaskSampler
from thawline.data.text.rows import Example, prompt_example
from thawline.errors import ConfigError, DataError, RoutingError, all_of, did_you_mean
from thawline.files import to_json
from thawline.recipe import Adapter, Full, Mhr, RunConfig, TextBase, TextData, Training, TunerSettings
from thawline.tables import AT_START, ZERO_SHOT
from thawline.training.arguments import choose_precision, training_arguments
from thawline.training.callbacks import Annealing
from thawline.training.evaluation import Evaluation
from thawline.training.objective import Objective, ReadRows
from thawline.training.text.limits import Limits, read_limits
from thawline.training.text.pretrained import (
    build_without_weights,
    load_pretrained,
    load_processor,
    quantization_config,
)
from thawline.training.text.rows import evaluation_by_task, group, name_some, read_rows
from thawline.training.text.shares import gather, own_share
from thawline.training.trainer import Trainer
from thawline.tuners.build import attach_tuner, routed_tasks
from thawline.tuners.mhr.adapt import parameter_groups
from thawline.tuners.targets import join_patterns

logger = logging.getLogger(__name__)

CALIBRATION_BATCHES = 8
"""Training batches that PaCA's `activation` and `gradient` selections look at."""
ALIGN_ROWS = 64
"""Rows of each task that alignment is measured on."""
MANY_ROWS = 5000
"""Rows from which on encoding shows a progress bar."""

Row = Mapping[str, Any]


class RowObjective(Objective):
    """Objective on rows of text, which may be of several tasks.

    A subclass calls `encode_rows` when it is ready to encode. A row holds `input_ids`, `labels`, `task` and
    `example`, from which it was made.

    Raises: as `read_rows`.
    """

    base: TextBase
    data: TextData
    training: Training
    encoder: TextEncoder
    train_rows: Sequence[Row] = ()
    unpacked_rows: Sequence[Row] = ()
    """Training rows before they were packed, if they were."""
    held_out_rows: Sequence[Row] = ()
    smaller_is_better: tuple[str, ...] = ("loss", "macro_loss")
    metrics: tuple[str, ...]
    """Metrics evaluated in addition to the loss."""
    needs_choices: ClassVar[bool] = False
    """Answers are always picked among choices."""

    def __init__(self, config: RunConfig, *, read: ReadRows = "all", described: Mapping[str, Any]) -> None:
        super().__init__(config, read=read, described=described)
        self.has_weights = read != "config"
        n_virtual = getattr(config.tuner, "args", {}).get("num_virtual_tokens", 0)
        self.limits = read_limits(self.base, n_virtual) if self.has_weights else Limits()
        self.processor = load_processor(self.base, self.limits.tokens) if self.has_weights else None
        self.described = described
        self.task_ids: dict[str, int] | None = None
        self.train_examples, self.held_out_examples = read_rows(self.data, seed=config.seed, read=read)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks in the order of their first row: those to train or, where none are, to evaluate on."""
        examples = self.train_examples or self.held_out_examples
        known = self.described.get("tasks", ()) if not self.has_weights else ()
        return tuple(dict.fromkeys(example.task for example in examples)) or tuple(known)

    def build_encoder(self, **options: Any) -> TextEncoder:
        """Build the encoder of the rows, which are no longer than the base can take."""
        data, positions = self.data, self.limits.positions
        length = data.max_length if positions is None else min(data.max_length, positions)
        cut, n_tokens = data.overlong == "cut", self.limits.tokens
        return TextEncoder(self.processor, max_length=length, cut=cut, n_tokens=n_tokens, **options)

    @abstractmethod
    def encode(self, example: Example) -> dict[str, Any]:
        """Return an example's `input_ids` and `labels`."""

    @abstractmethod
    def judge(self, model: nn.Module, rows: Sequence[Row], batch_size: int) -> list[dict[str, Any]]:
        """Return one `judged_row` per row."""

    @abstractmethod
    def answer(
        self, model: nn.Module, examples: Sequence[Example], batch_size: int, **sampling: Any
    ) -> list[str]:
        """Answer each example: by one of its choices, where it has some."""

    def encode_rows(self) -> None:
        """Fill `train_rows` and `held_out_rows`; say how many rows were cut, or leave them out.

        Raises: DataError: naming the rows that cannot be encoded, or may not be cut.
        """
        examples = (*self.train_examples, *self.held_out_examples)
        rows: list[Row | None] = []
        faults: list[DataError] = []
        hidden = len(examples) < MANY_ROWS
        for example in tqdm(examples, desc="tokens", unit="row", leave=False, disable=hidden):
            try:
                rows.append({**self.encode(example), "task": example.task, "example": example})
            except DataError as fault:
                rows.append(None)
                if not (isinstance(fault, OverlongError) and self.data.overlong == "drop"):
                    faults.append(fault)
        if faults:
            raise all_of(faults, "rows cannot be used")
        n_train = len(self.train_examples)
        self.train_rows = [row for row in rows[:n_train] if row is not None]
        self.held_out_rows = [row for row in rows[n_train:] if row is not None]
        n_dropped, length = rows.count(None), self._length
        if n_dropped:
            logger.warning("%d of %d rows are longer than %s and left out.", n_dropped, len(rows), length)
        elif self.encoder.n_cut:
            logger.warning("%d of %d rows were cut to %s.", self.encoder.n_cut, len(rows), length)
        empty = [one.where for one in examples if not (one.answer.strip() or one.calls_tools)]
        if empty:
            logger.warning("%d of %d rows have an empty answer, first %s.", len(empty), len(rows), empty[0])
        if n_train and not self.train_rows:
            raise DataError(f"All rows are longer than {length}. Raise `data.max_length`, or cut them.")
        self.train_examples = [row["example"] for row in self.train_rows]
        self.held_out_examples = [row["example"] for row in self.held_out_rows]

    @property
    def _length(self) -> str:
        """The length that rows are cut to, in words."""
        length = self.encoder.max_length
        why = ", all positions of the base" if length < self.data.max_length else ""
        return f"max_length={length} tokens{why}"

    @property
    def dtype(self) -> torch.dtype:
        """Type of the base's weights. Raises: ConfigError: for float16 weights that train."""
        trains_base = isinstance(self.config.tuner, Full)
        if self.base.dtype == "auto":
            is_bf16 = choose_precision(self.training.precision) == "bf16"
            return torch.bfloat16 if is_bf16 and not trains_base else torch.float32
        if trains_base and self.base.dtype == "float16":
            raise ConfigError("`base.dtype: float16` cannot be fine-tuned whole. Use float32, or an adapter.")
        return getattr(torch, self.base.dtype)

    def row_facts(self) -> Iterator[bytes]:
        """Return the tokens and labels of each training row."""
        for row in self.train_rows:
            yield to_json({key: value for key, value in row.items() if key != "example"}).encode()

    @property
    def align_every(self) -> int | None:
        """Steps between measurements of gradient alignment. None: not measured."""
        return self.training.align_every

    @property
    def start_name(self) -> str | None:
        """Name of the evaluation before the first step. None: there is none."""
        tuner, wanted = self.config.tuner, self.training.eval_at_start
        if wanted is None:
            wanted = getattr(tuner, "start_from", None) is not None
        if not wanted or not self.held_out_rows:
            return None
        return AT_START if getattr(tuner, "adapt", "none") == "none" else ZERO_SHOT

    def load_model(self, loader: Any, source: str | None, **extra: Any) -> nn.Module:
        """Load the base, or a model saved in `source`, by one of transformers' Auto classes."""
        base = self.base if source is None else dataclasses.replace(self.base, model=source, revision=None)
        if not self.has_weights:
            return build_without_weights(loader, base, self.dtype, **extra)
        attention = base.attn_implementation
        if base.quantization != "none":
            if isinstance(self.config.tuner, Full):
                raise ConfigError(
                    f"`base.quantization: {base.quantization}` freezes the weights. Use an adapter, e.g. "
                    "`tuner: paca`, or leave it out."
                )
            extra["quantization_config"] = quantization_config(base.quantization, self.dtype)
        return load_pretrained(loader, base, dtype=self.dtype, attn_implementation=attention, **extra)

    def attach_tuner(self, model: nn.Module, tuner: TunerSettings, *, saved: bool = False) -> nn.Module:
        """Attach the tuner to what reads text; batches carry task ids where the model routes by them."""
        tuner = on_text(model, tuner)
        batches = partial(self._calibration_batches, model)
        model = attach_tuner(model, tuner, tasks=self.tasks, saved=saved, batches=batches)
        self.route(routed_tasks(model))
        return model

    def route(self, tasks: Sequence[str] | None) -> None:
        """Give batches the ids of their rows' tasks in a routing table, by its tasks' names; None: no ids.

        Raises: RoutingError: naming a task of the rows that the table lacks.
        """
        if tasks is None:
            self.task_ids = None
            return
        self.task_ids = {name: i for i, name in enumerate(tasks)}
        rows = (*(self.unpacked_rows or self.train_rows), *self.held_out_rows)
        unknown = {row["task"] for row in rows} - set(tasks)
        if unknown:
            raise RoutingError(
                f"No routing for {name_some(sorted(unknown))}: the model was trained on {name_some(tasks)}. "
                "Leave it out (`data.exclude_tasks`), adapt to it (`tuner.start_from` and `tuner.adapt`), or "
                "use the average of the skills (`--tuner.adapt mu`)."
            )

    def build_trainer(self, model: nn.Module, callbacks: Sequence[TrainerCallback] = ()) -> Trainer:
        """Build the trainer; MHR's routing gets its own rates, and its annealing.

        Raises: ConfigError: for settings that do not fit the rows, and as `training_arguments`.
        """
        config, tuner = self.config, self.config.tuner
        arguments = training_arguments(
            self._fitted_training(), folder=config.run_folder, tuner=tuner, seed=config.seed,
            smaller_is_better=self.smaller_is_better,
        )  # fmt: skip
        groups = None
        if isinstance(tuner, Mhr):
            groups = partial(
                parameter_groups,
                lr=arguments.learning_rate,
                routing_lr=tuner.routing_lr,
                weight_decay=arguments.weight_decay,
                routing_weight_decay=tuner.routing_weight_decay,
            )
            if tuner.anneal:
                callbacks = [*callbacks, Annealing(tuner.anneal)]
        return Trainer(
            model,
            arguments,
            self,
            callbacks,
            sampler=self.train_sampler(arguments.train_batch_size),
            loss=self.loss,
            parameter_groups=groups,
            on_broken_loss=self.training.on_broken_loss,
        )

    def train_sampler(self, batch_size: int) -> TaskSampler | None:
        """Return the order of rows where tasks are drawn; None: every row once an epoch, shuffled."""
        if self.data.sampling == "each":
            return None
        numbers = {task: i for i, task in enumerate(self.tasks)}
        return TaskSampler(
            [numbers[row["task"]] for row in self.train_rows],
            self.data.sampling,
            temperature=self.data.sampling_temperature,
            cap=self.data.task_cap,
            seed=self.config.seed,
            same_task=batch_size if self.data.batches == "task" else 1,
        )

    def alignment_batches(self) -> dict[str, list[Any]]:
        """Return batches of training rows of every task, drawn by the seed.

        All batches of a task have the same size, so that the mean over them is one over rows.
        """
        found = {}
        for task, own in group(self.unpacked_rows or self.train_rows, itemgetter("task")).items():
            drawn = random.Random(f"{self.config.seed} {task}").sample(own, min(ALIGN_ROWS, len(own)))
            size = min(self.training.batch_size, len(drawn))
            starts = range(0, len(drawn) - size + 1, size)
            found[task] = [self.collate(drawn[start : start + size]) for start in starts]
        return found

    def describe(self) -> dict[str, Any]:
        """Return the prompt's format; the tasks, and the choices of those whose rows share them."""
        examples = (*self.train_examples, *self.held_out_examples)
        tasks = group(examples, attrgetter("task"))
        choices = {task: {example.choices for example in tasks[task]} for task in self.tasks}
        return {
            "format": examples[0].format,
            "template": self.data.template,
            "tasks": {task: list(*found) if len(found) == 1 else [] for task, found in choices.items()},
        }

    def evaluate(self, model: nn.Module, batch_size: int) -> Evaluation:
        """Compute loss and metrics on the held-out rows, over all of them and by task.

        Where several processes train, each judges a share of the rows, and all get the same result.
        """
        model.eval()
        share = own_share(model)
        rows = gather(self.judge(model, self.held_out_rows[share], batch_size), share)
        broken = [row["where"] for row in rows if not math.isfinite(row["log_likelihood"])]
        if broken:
            logger.warning(
                "The loss of %d of %d held-out rows is not finite: %s.", len(broken), len(rows), broken[0]
            )
        return evaluation_by_task(rows, self.metrics)

    def predict(
        self,
        model: nn.Module,
        inputs: Sequence[str],
        *,
        choices: Sequence[str] = (),
        task: str | None = None,
        batch_size: int = 8,
        **sampling: Any,
    ) -> list[str]:
        """Answer texts, each put into the prompt the model was trained with.

        Args:
            choices: answers to pick from. None: the task's, where several tasks have been trained.
            task: the texts' task. None: the only one.
            sampling: see `answer`.

        Raises: RoutingError: for an unknown task, or none where the model routes several.
        """
        known = self.described.get("tasks", {})
        names = known or self.task_ids or ()
        if task is not None and task not in names:
            raise RoutingError(f"The model knows no task '{task}'. {did_you_mean(task, names)}")
        if task is None and self.task_ids is not None and len(self.task_ids) > 1:
            raise RoutingError(f"Which task are the texts of? {did_you_mean('', self.task_ids)}")
        task = task or next(iter(self.task_ids or known), "")
        # A run of one task without ids writes freely unless choices are given.
        if not choices and (self.task_ids is not None or self.needs_choices or len(known) > 1):
            choices = known.get(task, ())
        format, template = self.described.get("format", "text"), self.described.get("template")
        examples = [prompt_example(text, format, template, choices, task) for text in inputs]
        n_cut = self.encoder.n_cut
        answers = self.answer(model, examples, batch_size, **sampling)
        if n_cut := self.encoder.n_cut - n_cut:
            logger.warning("%d of %d texts were cut: the model takes %s.", n_cut, len(inputs), self._length)
        return answers

    def pad(self, rows: Sequence[Row], *keys: str) -> dict[str, Any]:
        """Build a padded batch of those of `keys` that the rows have, and of `task_ids` where routed."""
        kept = [{key: row[key] for key in keys if key in row} for row in rows]
        return collate_tokens(kept, self.processor.pad_token_id) | self.ids_of(row["task"] for row in rows)

    def ids_of(self, tasks: Iterable[str]) -> dict[str, list[int]]:
        """Return the `task_ids` of a batch, a list, as ids are read on the host; nothing without routing."""
        ids = self.task_ids
        return {} if ids is None else {"task_ids": [ids[task] for task in tasks]}

    def _calibration_batches(self, model: nn.Module) -> list[Mapping[str, Any]]:
        """Return a few batches of training rows; moves `model` to where it will train."""
        if torch.cuda.is_available():
            model.to(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
        rows, size = self.train_rows, self.training.batch_size
        n_rows = min(CALIBRATION_BATCHES * size, len(rows))
        drawn = random.Random(self.config.seed).sample(rows, n_rows)
        return [self.collate(drawn[start : start + size]) for start in range(0, n_rows, size)]

    def _fitted_training(self) -> Training:
        """Return settings that evaluate only where there are rows to evaluate on.

        Raises: ConfigError: if `best_metric` is none of what evaluation gives.
        """
        rows, wanted = self.held_out_rows, self.training.best_metric
        known = ["loss", *self.metrics] if rows else []
        if len({row["task"] for row in rows}) > 1:
            known += [f"macro_{name}" for name in known]
        if wanted is not None and wanted not in known:
            reason = f"is not evaluated. {did_you_mean(wanted, known)}" if rows else "needs held-out rows."
            raise ConfigError(f"`training.best_metric: {wanted}` {reason}")
        return self.training if rows else dataclasses.replace(self.training, eval_every="end")


def judged_row(row: Row, log_likelihood: float, n_tokens: int = 1, **more: Any) -> dict[str, Any]:
    """Return an evaluated row as plain values: a line of predictions.jsonl.

    Args:
        log_likelihood: of the right answer, in nats, over its `n_tokens`.
        more: prediction and metrics.
    """
    example = row["example"]
    return {
        "task": example.task,
        "where": example.where,
        "input": example.question,
        "answer": example.answer,
        "log_likelihood": log_likelihood,
        "n_tokens": n_tokens,
        **more,
    }


def on_text(model: nn.Module, tuner: TunerSettings) -> TunerSettings:
    """Return `tuner` with "all-linear" confined to the language model of a base with parts for images too."""
    config: Any = getattr(model, "config", None)
    if not isinstance(tuner, Adapter) or tuner.target_modules != "all-linear" or tuner.start_from is not None:
        return tuner
    if (
        not isinstance(model, PreTrainedModel)
        or config.get_text_config() is config
        or config.is_encoder_decoder
    ):
        return tuner
    decoder: Any = model.get_decoder()
    name = next(name for name, module in model.named_modules() if module is decoder)
    if not name:
        return tuner
    logger.info("'all-linear' is that of '%s': the rows hold text alone.", name)
    others = rf"(?!{re.escape(name)}\.).*"
    return dataclasses.replace(tuner, exclude_modules=join_patterns(tuner.exclude_modules, others))
