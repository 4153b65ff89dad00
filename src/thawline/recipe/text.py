"""Sections of a text recipe: language model or encoder, rows, objective."""

from __future__ import annotations

__all__ = [
    "MatchSettings",
    "TextBase",
    "TextData",
    "TextSettings",
]

from dataclasses import dataclass, field
from typing import Any, Literal

from thawline.errors import ConfigError
from thawline.recipe.checks import all_at_least, at_least, fraction, one_of, require


@dataclass(frozen=True, kw_only=True)
class TextBase:
    """The pretrained transformers model that is adapted."""

    model: str = ""
    """Folder or Hub id of the model."""
    head: Literal["auto", "causal-lm", "seq2seq-lm", "classifier"] = "auto"
    """Output of the model. auto: by its config. A classifier gets the data's labels."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights in memory. auto: bfloat16 for a frozen base trained in bf16 (`training.precision`),
    else float32."""
    quantization: Literal["none", "nf4", "int8"] = "none"
    """Storage of the frozen linear layers: as they are, in 4 bits (NF4 with double quantisation) or in 8, by
    bitsandbytes. For a base in 16 bits, with an adapter."""
    revision: str | None = None
    """Branch, tag or commit on the Hub. None: the default branch."""
    attn_implementation: str | None = None
    """Attention kernel by transformers' name (sdpa, flash_attention_2, …). None: transformers' choice."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for sources you trust."""

    def __post_init__(self) -> None:
        require(
            self.model,
            "`base.model` is missing: give a folder or Hub id, e.g. `--base.model ../models/llama`.",
        )

    @property
    def label(self) -> str:
        """Name of the model, for messages and the run's folder."""
        return self.model


@dataclass(frozen=True, kw_only=True)
class TextData:
    """Rows of text: JSONL, JSON, CSV, TSV or Parquet files, or a dataset of the `datasets` library."""

    path: str | list[str] = ""
    """File or folder, or several; or a dataset saved by `save_to_disk`, or "hf://OWNER/NAME". Rows with a
    `split` of validation, dev, eval or test are held out, as are files with such a name."""
    eval_path: str | list[str] | None = None
    """Held-out rows. None: those held out in `path`, or `eval_fraction` of them."""
    eval_fraction: float = 0.0
    """Share of the training rows to hold out, drawn by `seed`, where nothing else is held out."""
    format: Literal[
        "auto", "prompt-completion", "messages", "conversations", "instruction", "input-output", "text"
    ] = "auto"
    """Format of a row. auto: by its keys."""
    columns: dict[str, str] = field(default_factory=dict)
    """Keys that the rows name differently: our key → theirs, e.g. {input: sentence, output: label}."""
    template: str | None = None
    """Prompt made of a row's fields, e.g. "Question: {input}\\nAnswer:". None: the format's own."""
    chat_template: str | None = None
    """For `messages`: a Jinja file, or "plain" (`user: …` lines). None: the tokenizer's own."""
    chat_options: dict[str, Any] = field(default_factory=dict)
    """Variables of the chat template, as its model card names them, e.g. {enable_thinking: false}."""
    max_length: int = 512
    """Longest sequence, in tokens. A longer prompt loses its beginning, a longer completion its end."""
    overlong: Literal["cut", "drop", "error"] = "cut"
    """Rows longer than `max_length`: cut them, leave them out, or stop. All three say how many there are."""
    packing: bool | Literal["auto"] = False
    """Join the training rows of a causal model to sequences of up to `max_length` tokens, none attending to
    another. auto: where rows fill less than 0.7 of `max_length`."""
    max_rows: int | None = None
    """Use this many training rows, drawn by `seed`. None: all."""
    max_eval_rows: int | None = None
    """Evaluate on this many held-out rows, drawn by `seed`. None: all."""
    max_task_eval_rows: int | None = None
    """Evaluate on this many held-out rows of each task, drawn by `seed`. None: all."""
    tasks: list[str] | None = None
    """Tasks to use, by name or pattern ("clinc_*"). None: all there are."""
    exclude_tasks: list[str] = field(default_factory=list)
    """Tasks to leave out, by name or pattern, e.g. those held out for a second phase."""
    task_types: list[str] | None = None
    """Types of tasks to use, as the folder's manifest.json calls them. None: all."""
    sampling: Literal["each", "size", "temperature", "equal"] = "each"
    """Frequency of the tasks. each: every row once an epoch; else tasks are drawn, in proportion to their
    number of rows (size), to a root of it (temperature), or equally often (equal)."""
    sampling_temperature: float = 2.0
    """Root for `sampling: temperature`: 1 equals size, a large value approaches equal."""
    task_cap: int | None = None
    """Maximum number of rows a task counts with when tasks are drawn. None: no maximum."""
    batches: Literal["mixed", "task"] = "mixed"
    """Rows of a batch: from several tasks (mixed), or from one (task), which needs a `sampling` that draws
    tasks."""
    shots: int | None = None
    """Train on this many rows of each task only, drawn by `shots_seed`. None: all."""
    shots_per: Literal["task", "class"] = "task"
    """Unit of `shots`: rows per task, or per answer (class) of a task."""
    shots_seed: int | None = None
    """Seed that draws the shots. None: the run's seed."""

    def __post_init__(self) -> None:
        require(
            self.path, "`data.path` is missing: give a JSONL file or a folder, e.g. `--data train.jsonl`."
        )
        at_least("data.max_length", self.max_length, 2)
        fraction("data.eval_fraction", self.eval_fraction)
        all_at_least(self, "data", 1, "max_rows", "max_eval_rows", "max_task_eval_rows", "task_cap", "shots")
        one_of("data.sampling", self.sampling, ("each", "size", "temperature", "equal"))
        if self.packing is True and self.sampling != "each":
            raise ConfigError(
                "`data.packing` joins rows that come once an epoch, and "
                f"`data.sampling: {self.sampling}` draws tasks. Choose one of them."
            )
        one_of("data.overlong", self.overlong, ("cut", "drop", "error"))
        one_of("data.batches", self.batches, ("mixed", "task"))
        one_of("data.shots_per", self.shots_per, ("task", "class"))
        if not self.sampling_temperature > 0:
            raise ConfigError(
                f"`data.sampling_temperature` must be positive, got {self.sampling_temperature!r}."
            )
        draws_tasks = {"task_cap": self.task_cap is not None, "batches": self.batches == "task"}
        for name, is_set in draws_tasks.items():
            if is_set and self.sampling == "each":
                raise ConfigError(
                    f"`data.{name}` needs tasks to be drawn: `data.sampling` size, temperature or equal."
                )


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """Predict text: next tokens, or a label where the base is a classifier."""

    kind: Literal["text"] = "text"
    """text."""
    loss_on: Literal["completion", "all"] = "completion"
    """Tokens that count in the loss: completions (assistant turns), or prompts too; all of a `text` row."""
    metrics: Literal["auto"] | list[str] = "auto"
    """Metrics besides the loss: choice_accuracy, exact_match, rouge_l. auto: choice_accuracy where rows have
    choices; exact_match and rouge_l for other short answers; none for chats and texts."""
    max_new_tokens: int | None = None
    """Maximum tokens of a generated answer in evaluation. None: those of the longest held-out answer, at most
    256."""

    def __post_init__(self) -> None:
        all_at_least(self, "objective", 1, "max_new_tokens")


@dataclass(frozen=True, kw_only=True)
class MatchSettings:
    """Choose among a row's choices by the similarity of embeddings, with any text encoder."""

    kind: Literal["match"] = "match"
    """match."""
    scale: float = 20.0
    """The cosine of mean-pooled embeddings is multiplied by this before the softmax."""
    choice_template: str = "{choice}"
    """Text to embed for a choice, e.g. "This is about {choice}."."""

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ConfigError(f"`objective.scale` must be positive, got {self.scale!r}.")
        if "{choice}" not in self.choice_template:
            raise ConfigError(
                f"`objective.choice_template` must hold {{choice}}, got {self.choice_template!r}."
            )
