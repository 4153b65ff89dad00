"""Checkpoints that are damaged: found out, passed over, and never run as code."""

from __future__ import annotations

import errno
import os
import pickle
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import pytest

from tests.support.detection_runs import DetectionRecipes, assert_same, state_of, write_painted_coco
from tests.support.text_runs import TextRecipes, logged, weights, write_first_letters
from thawline.errors import CheckpointError, ThawlineError
from thawline.inference.detector import Detector
from thawline.run import evaluate, predict, run, saved_config
from thawline.training.checkpoints import MANIFEST, checkpoint_fault, newest_checkpoint, seal_checkpoint

STEPS = {"text": (8, 12), "detection": (6, 9)}
BIG = ("pytorch_model.bin", "average.pt", "adapter_model.safetensors", "optimizer.pt")


class Poison:
    """Object that, unpickled, makes a file: what code from a pickle could do."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.proof),)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def remove(file: Path) -> None:
    file.unlink()


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def poison(file: Path) -> None:
    file.write_bytes(pickle.dumps(Poison(file.parents[2] / "ran")))


DAMAGE: dict[Callable[[Path], None], str] = {
    cut: r"has [\d,]+ bytes, not [\d,]+",
    empty: r"has 0 bytes, not [\d,]+",
    remove: "is missing",
    flip_a_bit: "has changed since it was saved",
    poison: r"has [\d,]+ bytes, not [\d,]+",
}


@pytest.fixture(scope="module")
def straight(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished runs of both objectives: the folder of each."""
    root = tmp_path_factory.mktemp("straight")
    text = TextRecipes(tiny_llama, write_first_letters(root / "first.jsonl"), root / "text-runs")
    (root / "images").mkdir()
    detection = DetectionRecipes(write_painted_coco(root / "images"), root / "detection-runs")
    # Without bars, which are written to a file that a full disk would not let grow.
    quiet = {"args": {"disable_tqdm": True}}
    return {
        "text": run(text("straight", **quiet)).folder,
        "detection": run(detection("straight", **quiet)).folder,
    }


@pytest.fixture
def unfinished(straight: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """Return a copy of an objective's run that ended before its result was written."""

    def copy(objective: str) -> Path:
        folder = tmp_path / "straight"
        shutil.copytree(straight[objective], folder)
        shutil.rmtree(folder / "model")
        (folder / "result.json").unlink()
        config = saved_config(folder).to_mapping()
        (folder / "config.yaml").write_text(
            re.sub(r"(?m)^folder: .*$", f"folder: {tmp_path}", (folder / "config.yaml").read_text())
        )
        assert config["name"] == "straight"
        return folder

    return copy


def files_of(checkpoint: Path) -> list[Path]:
    return [file for file in sorted(checkpoint.rglob("*")) if file.is_file() and file.name != MANIFEST]


@pytest.mark.parametrize("objective", STEPS)
def test_every_file_of_a_checkpoint_is_guarded(objective: str, unfinished) -> None:
    folder = unfinished(objective)
    newer = folder / f"checkpoint-{STEPS[objective][1]}"
    assert newest_checkpoint(folder) == newer
    names = {file.name for file in files_of(newer)}
    assert names >= {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    assert objective == "text" or names >= {"pytorch_model.bin", "average.pt", "scores.json"}
    for file in files_of(newer):
        whole = file.read_bytes()
        for damage, fault in DAMAGE.items():
            damage(file)
            assert re.fullmatch(f"{file.name} {fault}", checkpoint_fault(newer) or "")
            file.write_bytes(whole)
    assert checkpoint_fault(newer) is None
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("objective", STEPS)
def test_a_checkpoint_without_a_manifest_is_passed_over(objective, unfinished, caplog) -> None:
    folder = unfinished(objective)
    older, newer = (folder / f"checkpoint-{step}" for step in STEPS[objective])
    (newer / MANIFEST).unlink()
    (folder / "checkpoint-99").write_text("no folder")
    assert newest_checkpoint(folder) == older
    assert f"{newer.name} (manifest.json is missing: it is written last)" in caplog.text


@pytest.mark.parametrize("damage", [cut, empty, poison])
def test_a_file_that_cannot_be_opened_is_named_whatever_the_manifest_says(damage, unfinished) -> None:
    folder = unfinished("detection")
    newer = folder / "checkpoint-9"
    for file in files_of(newer):
        if file.name != "training_args.bin":  # never read
            whole = file.read_bytes()
            damage(file)
            seal_checkpoint(newer)
            fault = checkpoint_fault(newer) or ""
            assert re.match(f"{file.name} (is empty|cannot be read: .|holds other objects)", fault), file.name
            file.write_bytes(whole)
    assert not (folder / "ran").exists()


def test_a_poisoned_file_with_a_manifest_to_match_does_not_run(unfinished, caplog) -> None:
    folder = unfinished("detection")
    poison(folder / "checkpoint-9" / "optimizer.pt")
    seal_checkpoint(folder / "checkpoint-9")
    assert newest_checkpoint(folder) == folder / "checkpoint-6"
    assert "checkpoint-9 (optimizer.pt holds other objects than tensors" in caplog.text
    (folder / "checkpoint-9" / MANIFEST).write_text('{"files": 3}')
    assert newest_checkpoint(folder) == folder / "checkpoint-6"
    assert "checkpoint-9 (manifest.json is damaged)" in caplog.text
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(("objective", "name"), [("text", "optimizer.pt"), ("detection", "average.pt")])
def test_resuming_goes_on_from_the_newest_whole_checkpoint(
    objective, name, unfinished, straight, caplog
) -> None:
    folder, expected = unfinished(objective), straight[objective]
    older, newer = (f"checkpoint-{step}" for step in STEPS[objective])
    cut(folder / newer / name)
    with caplog.at_level("INFO"):
        run(saved_config(folder), resume=True)
    passed = [text for text in caplog.messages if text.startswith("Passed over")]
    assert len(passed) == 1
    assert f"{newer} ({name} has" in passed[0]
    assert f"Resuming from {folder / older}." in caplog.messages
    assert newest_checkpoint(folder) == folder / newer
    assert logged(folder) == logged(expected)
    if objective == "detection":
        assert_same(state_of(folder / newer), state_of(expected / newer))
    else:
        assert_same(weights(folder), weights(expected))


@pytest.mark.parametrize("objective", STEPS)
def test_without_a_whole_checkpoint_nothing_is_started_anew(objective: str, unfinished) -> None:
    folder = unfinished(objective)
    for step in STEPS[objective]:
        empty(folder / f"checkpoint-{step}" / "optimizer.pt")
    before = sorted(folder.rglob("*"))
    with pytest.raises(
        CheckpointError,
        match=r"has no whole checkpoint: checkpoint-\d+ \(optimizer.pt has 0 .*\), checkpoint-\d+ .*--name",
    ):
        run(saved_config(folder), resume=True)
    assert sorted(folder.rglob("*")) == before


@contextmanager
def full_after(n_bytes: int) -> Iterator[None]:
    """Let no file grow beyond `n_bytes`: writing more fails as on a full disk, in Python and in C++."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("objective", "name"),
    [
        ("text", "optimizer.pt"), ("text", "adapter_model.safetensors"), ("text", "trainer_state.json"),
        ("detection", "optimizer.pt"), ("detection", "average.pt"),
    ],
)  # fmt: skip
def test_a_full_disk_is_said_in_one_line_and_costs_nothing_but_the_room(
    objective: str, name: str, unfinished, straight
) -> None:
    folder = unfinished(objective)
    older, newer = (folder / f"checkpoint-{step}" for step in STEPS[objective])
    limit = (newer / name).stat().st_size - 1
    size = sum((newer / file).stat().st_size for file in BIG if (newer / file).is_file())
    shutil.rmtree(newer)
    with full_after(limit), pytest.raises(CheckpointError, match="could not be written") as caught:
        run(saved_config(folder), resume=True)
    said = re.fullmatch(
        r"'(.*)' could not be written: a checkpoint takes about ([\d,]+) bytes, and ([\d,]+) are free\. "
        rf"Make room, then thawline train --config {folder}/config.yaml --resume\.",
        str(caught.value),
    )
    assert said is not None
    assert said[1].startswith(str(folder))
    assert size <= int(said[2].replace(",", "")) < 3 * size
    assert checkpoint_fault(older) is None
    assert not newer.exists()
    assert not list(folder.rglob("*.partial"))
    run(saved_config(folder), resume=True)
    assert checkpoint_fault(newer) is None
    assert logged(folder) == logged(straight[objective])
    read = state_of if objective == "detection" else weights
    of = [path / newer.name if objective == "detection" else path for path in (folder, straight[objective])]
    assert_same(read(of[0]), read(of[1]))


def test_a_disk_that_is_full_before_the_first_step_leaves_nothing_in_the_way(
    tiny_llama, tmp_path, monkeypatch
) -> None:
    config = TextRecipes(tiny_llama, write_first_letters(tmp_path / "rows.jsonl"), tmp_path / "runs")("first")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", no_room)
        with pytest.raises(OSError, match=r"No space left.*plan\.json"):
            run(config)
    write = Path.write_text

    def no_room_for_sample(path: Path, *args: object, **kwargs: object) -> int:
        return (no_room if "sample.txt" in path.name else write)(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", no_room_for_sample)
        with pytest.raises(CheckpointError, match=r"sample.txt' could not be written: .*then start again\."):
            run(config)
    assert run(config).status == "finished"


def no_room(path: Path, *args: object, **kwargs: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        *product(
            ("model/adapter_model.safetensors", "model/adapter_config.json", "objective.json"), (cut, empty)
        ),
        ("config.yaml", empty),
    ],
)
def test_a_text_run_with_a_damaged_file_is_refused_in_one_line(file: str, damage, straight, tmp_path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(straight["text"], folder)
    damage(folder / file)
    for judge in (lambda: predict(folder, ["ab"]), lambda: evaluate(folder)):
        with pytest.raises(
            ThawlineError, match=re.escape(Path(file).name if "/" not in file else "model")
        ) as caught:
            judge()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", [cut, empty])
@pytest.mark.parametrize("part", ["best", "last"])
@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_detector_with_a_damaged_file_is_refused_in_one_line(file, part, damage, unfinished) -> None:
    folder = unfinished("detection")
    for other in {"best", "last"} - {part}:
        shutil.rmtree(folder / other)
    damage(folder / part / file)
    for judge in (lambda: Detector.from_pretrained(folder), lambda: evaluate(folder)):
        with pytest.raises(CheckpointError, match=f"{part}/{file}' ") as caught:
            judge()
        assert "\n" not in str(caught.value)


def test_a_whole_model_with_a_cut_weight_file_is_refused_in_one_line(tiny_llama, tmp_path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    cut(base / "model.safetensors")
    recipe = TextRecipes(base, write_first_letters(tmp_path / "rows.jsonl"), tmp_path / "runs")
    with pytest.raises(ThawlineError, match="Cannot load '.*base': .*safetensors|header|incomplete"):
        run(recipe("cut"))
