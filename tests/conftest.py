"""Fixtures for every test. `../shared` holds real data and reference numbers; a public clone has none."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from tests.support import models
from tests.support.text import byte_tokenizer

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and reference numbers beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent: real data and reference numbers do not travel with a clone")
    return SHARED


@pytest.fixture(autouse=True)
def _one_thread_and_a_fixed_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a Llama with random weights (13 k parameters) and a tokenizer of one token a byte."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tokenizer = byte_tokenizer()
    model = models.tiny_llama(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def painted_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images to learn from and two to judge by, as COCO JSON."""
    from tests.support.detection_runs import write_painted_coco

    return write_painted_coco(tmp_path_factory.mktemp("painted"))


def pytest_collection_finish() -> None:
    """Leave what the imports made, half a million objects, out of every garbage collection.

    Every `Trainer.train` collects twice, a quarter of a second each time.
    """
    gc.collect()
    gc.freeze()
