"""Several domains on one base: each answers as it would alone, to the last bit, whatever the others do."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import supervision
import torch
from torch import nn

from tests.support.domains import NAMES, TUNERS, make_base, make_domain
from thawline import SharedDetector, jobs
from thawline.domains.changes import Changes, JoinedWeights, _Rows, _Whole
from thawline.domains.domain import base_digest, load_domain, read_domain
from thawline.domains.folder import SharedFolder
from thawline.errors import CheckpointError, ConfigError
from thawline.inference import Detector
from thawline.measure import count_ops
from thawline.models.deimv2 import DEIMv2
from thawline.models.deimv2.fused.conv import FusedConv
from thawline.recipe import Paca
from thawline.service.api import load_detector
from thawline.training.detection.objective import DetectionObjective


@pytest.fixture(scope="module")
def base() -> DEIMv2:
    return make_base()


@pytest.fixture(scope="module")
def folder(base: DEIMv2, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shop") / "shared"
    shared = SharedFolder.create(path, base)
    for name, tuner in zip(NAMES, TUNERS.values(), strict=True):
        shared.add(make_domain(base, path.parent / name, name, tuner))
    return path


@pytest.fixture(scope="module")
def shared(folder: Path) -> SharedDetector:
    """A detector to ask, never to change: what was asked before leaves no trace in an answer."""
    return SharedDetector.from_pretrained(folder, device="cpu")


@pytest.fixture
def fresh(folder: Path) -> SharedDetector:
    """A detector to add domains to, and to remove them from."""
    return SharedDetector.from_pretrained(folder, device="cpu")


def images(n: int) -> list[np.ndarray]:
    rng = np.random.default_rng(n)
    return [rng.integers(0, 256, (40 + 8 * i, 70, 3), dtype=np.uint8) for i in range(n)]


def bits(found: supervision.Detections) -> bytes:
    return found.xyxy.tobytes() + found.confidence.tobytes() + found.class_id.tobytes()


def close(a: supervision.Detections, b: supervision.Detections) -> None:
    np.testing.assert_allclose(a.confidence, b.confidence, atol=1e-5)
    np.testing.assert_array_equal(a.class_id, b.class_id)
    np.testing.assert_allclose(a.xyxy, b.xyxy, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_a_domain_answers_as_its_own_merged_detector(
    shared: SharedDetector, folder: Path, base: DEIMv2, name: str
) -> None:
    alone = load_domain(base, folder / "domains" / name)
    (image,) = images(1)
    for other in NAMES:  # whatever was inside before
        shared(image, domain=other)
        found = shared(image, domain=name)
        assert bits(found) == bits(Detector(alone, device="cpu", threshold=0.0)(image))
    assert set(found.data["domain"]) == {name}
    assert set(found.data["class_name"]) <= set(NAMES[name])


@pytest.mark.parametrize("variant", ["pico", "n", "s"])
def test_the_columns_of_every_family_survive_fusing(variant: str, tmp_path: Path) -> None:
    base = make_base(variant)
    domain = load_domain(base, make_domain(base, tmp_path / "cards", "cards", Paca(r=2)))
    SharedFolder.create(tmp_path / "shared", base).add(tmp_path / "cards")
    shared = SharedDetector(tmp_path / "shared", "cpu")
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected, plain = domain(x), base.fuse()(x)
        member = shared._member("cards")
        shared._network.switch(member.changes)
        found = shared._network.model(x)
        shared._network.switch(None)
        restored = shared._network.model(x)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.pred_boxes, expected.pred_boxes, atol=1e-5, rtol=0)
    assert torch.equal(restored.logits, plain.logits)
    weights = sum(p.nbytes for p in base.parameters())
    assert shared.nbytes("cards") < 0.05 * weights


def test_a_domain_is_exchanged_where_layers_read_it(
    shared: SharedDetector, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, changes = shared._network.model, shared._member("cards").changes
    shared._network.switch(None)
    before = {name: weight.to_dense().clone() for name, weight in model.named_parameters()}
    kernels = [weight for weight in model.parameters() if weight.is_mkldnn]
    assert kernels
    addresses = {torch.ops.mkldnn.data_ptr(weight) for weight in kernels}
    others = [item for item in changes._items if isinstance(item, _Whole) or _address(item) not in addresses]
    assert len(others) < len(changes._changed) / 4
    assert len(others) < len(changes._items)
    assert all(weight.data_ptr() % 64 == 0 for weight in shared._network._weights.places)
    changes.exchange()
    changes.exchange()
    assert all(torch.equal(weight.to_dense(), before[name]) for name, weight in model.named_parameters())
    monkeypatch.delattr(FusedConv, "pack")  # oneDNN's layout is made once, not after every exchange
    for domain in NAMES:
        shared(images(1)[0], domain=domain)
    n_operations, _ = count_ops(lambda: shared._network.switch(changes))
    assert n_operations == 0


def _address(rows: _Rows) -> int:
    return rows.joined.ctypes.data


def test_a_kernel_that_a_domain_packs_otherwise_is_exchanged_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = (FusedConv(torch.rand(16, 16, 3, 3), torch.zeros(16), padding=1) for _ in range(2))
    x, network = torch.rand(1, 16, 8, 8), nn.Sequential(ours)
    with torch.no_grad():
        before, expected = network(x), theirs(x)
        weights = JoinedWeights(network)
        # Another number of threads, of as many values in another order.
        monkeypatch.setattr(FusedConv, "pack", lambda conv, shape: conv.weight.to_mkldnn())
        changes = Changes(weights, nn.Sequential(theirs))
        changes.exchange()
        torch.testing.assert_close(network(x), expected)
        changes.exchange()
        assert torch.equal(network(x), before)


def test_a_kernel_in_the_place_of_another_is_packed_too() -> None:
    ours, theirs = (FusedConv(torch.rand(4, 4, 3, 3), torch.zeros(4), padding=1) for _ in range(2))
    x = torch.rand(1, 4, 6, 6)
    with torch.no_grad():
        ours(x)
        ours._parameters["weight"] = theirs.weight
        assert torch.equal(ours(x), theirs(x))


def test_a_network_that_was_moved_exchanges_nothing(base: DEIMv2, folder: Path) -> None:
    joined = JoinedWeights(base.fuse())
    changes = Changes(joined, load_domain(base, folder / "domains" / "cards").fuse())
    joined.network.decoder.double()
    before = joined.network.decoder.enc_score_head.weight
    with pytest.raises(RuntimeError, match="moved or cast"):
        changes.exchange()
    assert joined.network.decoder.enc_score_head.weight is before


def test_kernels_that_no_call_has_packed_stay_as_they_are() -> None:
    network = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(4, 4))
    network.append(FusedConv(torch.rand(4, 4, 3, 3), torch.zeros(4), padding=1))
    kernel = network[3].weight
    assert set(JoinedWeights(network).places) == {network[1].weight, network[2].weight}
    assert network[3].weight is kernel
    x = torch.rand(1, 4, 6, 6)
    with torch.no_grad():
        expected = network[3](x)
        JoinedWeights(network)
        assert network[3].weight.is_mkldnn
        assert torch.equal(network[3](x), expected)
        torch.testing.assert_close(network[3](torch.cat([x, x]))[1:], expected)
        with torch.backends.mkldnn.flags(enabled=False):
            torch.testing.assert_close(network[3](x), expected)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(network[3](x).float(), expected, rtol=0.05, atol=0.05)
    with pytest.raises(RuntimeError, match="moved or cast"):
        network.double()


def test_a_batch_of_several_domains_equals_single_calls(shared: SharedDetector) -> None:
    batch, names = images(5), ["pcb", "cards", "pcb", "plates", "cards"]
    found = shared(batch, domain=names)
    for image, name, one in zip(batch, names, found, strict=True):
        close(one, shared(image, domain=name))
        assert set(one.data["domain"]) == {name}


def test_all_domains_see_every_image(shared: SharedDetector) -> None:
    (image,) = images(1)
    found = shared(image, domain="all")
    for name in NAMES:
        mine = found[found.data["domain"] == name]
        close(mine[np.argsort(-mine.confidence, kind="stable")], shared(image, domain=name))
    only = shared(image, domain="all", classes=["short", "plate"])
    assert set(only.data["class_name"]) <= {"short", "plate"}
    with pytest.raises(ConfigError, match="dwarf"):
        shared(image, domain="all", classes="dwarf")


def test_parts_that_no_domain_changes_run_once(
    fresh: SharedDetector, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    backbone = fresh._network.model.backbone
    backbone.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    fresh.remove("cards")
    fresh.remove("plates")
    fresh.add("again", fresh.folder.path / "domains" / "pcb")  # class heads alone
    fresh(images(3), domain=["pcb", "again", "pcb"])
    assert calls == [3]


def test_an_earlier_domain_is_the_same_after_others_came_and_went(base: DEIMv2, tmp_path: Path) -> None:
    SharedFolder.create(tmp_path / "shared", base).add(make_domain(base, tmp_path / "cards", "cards"))
    shared = SharedDetector(tmp_path / "shared", "cpu")
    (image,) = images(1)
    first = bits(shared(image))
    for name in ("plates", "pcb"):
        make_domain(base, tmp_path / name, name)
        shared.add(name, tmp_path / name)
        shared(image, domain=name)
        assert bits(shared(image, domain="cards")) == first
        SharedFolder(tmp_path / "shared").add(tmp_path / name)
    shared.remove("pcb")
    assert bits(shared(image, domain="cards")) == first
    script = (
        "import hashlib, numpy as np, torch; torch.set_num_threads(1)\n"
        "from thawline import SharedDetector\n"
        f"shared = SharedDetector.from_pretrained({str(tmp_path / 'shared')!r}, device='cpu')\n"
        "image = np.random.default_rng(1).integers(0, 256, (40, 70, 3), dtype=np.uint8)\n"
        "shared(image, domain='pcb'); found = shared(image, domain='cards')\n"
        "bits = found.xyxy.tobytes() + found.confidence.tobytes() + found.class_id.tobytes()\n"
        "print(hashlib.sha256(bits).hexdigest())"
    )
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert printed.stdout.split()[-1] == hashlib.sha256(first).hexdigest()


def test_a_base_of_another_shape_has_another_digest(base: DEIMv2) -> None:
    other = DEIMv2(replace(base.config, decoder=replace(base.config.decoder, num_queries=5)))
    other.load_state_dict(base.state_dict())
    assert base_digest(other) != base_digest(base)


def test_threads_get_whole_domains(fresh: SharedDetector, folder: Path) -> None:
    (image,) = images(1)
    expected = {name: bits(fresh(image, domain=name)) for name in NAMES}
    wrong: list[str] = []

    def ask(name: str) -> None:
        wrong.extend(name for _ in range(6) if bits(fresh(image, domain=name)) != expected[name])

    threads = [threading.Thread(target=ask, args=(name,)) for name in NAMES]
    for thread in threads:
        thread.start()
    for _ in range(2):
        fresh.add("plates", folder / "domains" / "plates")  # replaced while others ask
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_removed_domain_finishes_what_it_was_asked(fresh: SharedDetector) -> None:
    answers = fresh.stream(images(3), domain="plates", batch_size=1)
    next(answers)
    fresh.remove("plates")
    assert len(list(answers)) == 2
    with pytest.raises(ConfigError, match="No domain 'plates'"):
        fresh(images(1)[0], domain="plates")


def test_what_cannot_be_asked(shared: SharedDetector) -> None:
    (image,) = images(1)
    with pytest.raises(ConfigError, match="No domain 'card'.*cards"):
        shared(image, domain="card")
    with pytest.raises(ConfigError, match="Which domain"):
        shared(image)
    with pytest.raises(ConfigError, match="2 domains for 1 images"):
        shared([image], domain=["cards", "pcb"])
    with pytest.raises(ConfigError, match="no list of images"):
        shared(image, domain=["cards"])


def test_one_broken_domain_does_not_take_the_others_down(base: DEIMv2, tmp_path: Path) -> None:
    folder = SharedFolder.create(tmp_path / "shared", base)
    for name in NAMES:
        folder.add(make_domain(base, tmp_path / name, name))
    heads = folder.folder("pcb") / "heads.safetensors"
    heads.write_bytes(heads.read_bytes()[:-40])
    (folder.folder("plates") / "adapter_model.safetensors").unlink()
    shared = SharedDetector(tmp_path / "shared", "cpu")
    assert shared.domains == ("cards",)
    assert set(shared.broken) == {"pcb", "plates"}
    (image,) = images(1)
    assert len(shared(image)) > 0
    with pytest.raises(CheckpointError, match="'pcb' cannot be used.*heads.safetensors"):
        shared(image, domain="pcb")
    shared.add("boards", tmp_path / "pcb")
    assert set(shared(image, domain="boards").data["domain"]) == {"boards"}


def test_an_unreadable_image_of_a_mixed_list_says_so(fresh: SharedDetector, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    first, second = fresh([str(broken), str(broken)], domain=["cards", "pcb"])
    assert "broken.jpg" in first.metadata["error"]
    assert len(second) == 0
    asked = []
    fresh._network.model.decoder.register_forward_pre_hook(lambda module, args: asked.append(len(args[0][0])))
    (image,) = images(1)
    first, second = fresh([str(broken), image], domain=["cards", "pcb"])
    assert (len(first), asked) == (0, [1])  # a domain without a readable image does not run
    assert set(second.data["domain"]) == {"pcb"}
    only = fresh._member("cards").about.class_names[0]
    found = fresh([str(broken), image], domain=["cards", "pcb"], classes=[only])
    assert [len(one) for one in found] == [0, 0]


def test_a_domain_is_exported_as_its_merged_detector(
    folder: Path, base: DEIMv2, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []
    monkeypatch.setattr("thawline.exporters.export.export_detector", lambda *words: given.append(words))
    jobs.export(folder, domain="cards")
    ((detector, out, *_),) = given
    expected = load_domain(base, folder / "domains" / "cards").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in detector.state_dict().items())
    assert (out, detector.config.class_names) == (folder / "exports" / "cards", NAMES["cards"])
    for domain, message in ((None, "Which domain.*cards, pcb, plates"), ("card", "Did you mean 'cards'")):
        with pytest.raises(ConfigError, match=message):
            jobs.export(folder, domain=domain)
    with pytest.raises(ConfigError, match="no folder of base/"):
        jobs.export(folder / "base", domain="cards")


@pytest.mark.parametrize(("option", "value"), [("variant", "atto"), ("weights", "random")])
def test_options_of_a_plain_detector_are_refused(folder: Path, option: str, value: str) -> None:
    for ask in (
        lambda **words: jobs.detect(folder, "photo.jpg", domain="cards", **words),
        lambda **words: load_detector(str(folder), words),
        lambda **words: jobs.export(folder, domain="cards", **words),
    ):
        with pytest.raises(ConfigError, match=f"`{option}`: the base of '.*' is trained"):
            ask(**{option: value})


def test_the_base_is_read_once_for_a_new_folder(
    base: DEIMv2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base.save_pretrained(tmp_path / "base")
    domain, read = make_domain(base, tmp_path / "pcb", "pcb"), []
    load = DEIMv2.from_pretrained
    monkeypatch.setattr(DEIMv2, "from_pretrained", lambda *words: read.append(words[0]) or load(*words))
    jobs.add_domain(tmp_path / "shop", domain, base=tmp_path / "base")
    assert read == [tmp_path / "base"]


def test_all_domains_of_a_run_are_added_or_none(base: DEIMv2, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "domains", tmp_path / "run" / "domains")
    base.save_pretrained(tmp_path / "base")
    SharedFolder.create(tmp_path / "shop", base).add(folder / "domains" / "plates")
    with pytest.raises(ConfigError, match="already has a domain 'plates'"):
        jobs.add_domain(tmp_path / "shop", tmp_path / "run")
    assert [one.name for one in (tmp_path / "shop" / "domains").iterdir()] == ["plates"]
    (tmp_path / "run" / "domains" / "plates" / "heads.safetensors").unlink()
    with pytest.raises(CheckpointError, match="plates/heads"):
        jobs.add_domain(tmp_path / "new", tmp_path / "run", base=tmp_path / "base")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("load", ["run", "folder"])
def test_the_base_is_hashed_once_for_all_domains(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: str
) -> None:
    hashed = []
    for module in ("domains.domain", "domains.folder", "training.detection.objective"):
        name = f"thawline.{module}.base_digest"
        monkeypatch.setattr(name, lambda base: hashed.append(base) or base_digest(base))
    if load == "folder":
        jobs.add_domain(tmp_path / "shop", folder, base=folder / "base")
    else:
        datasets = [SimpleNamespace(name=name) for name in NAMES]
        DetectionObjective.load_base(SimpleNamespace(datasets=datasets), str(folder))
    assert len(hashed) == 1


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("threshold", "high", "expected a number"),
        ("threshold", float("nan"), "expected 0 to 1"),
        ("threshold", 5, "expected 0 to 1"),
        ("class_names", "abc", "expected a list"),
        ("class_groups", [1, 1], "not 3 classes"),
        ("class_groups", [3, 0], "not 3 classes"),
        ("recipe", None, "expected a mapping"),
        ("recipe", {"base": None}, "`recipe.base` is None, expected a mapping"),
        ("recipe", {"base": {"weights": 5}}, "`recipe.base.weights` is 5, expected a text"),
        ("base", 7, "`base` is 7, expected a text"),
        ("metrics", None, "`metrics` is None, expected a mapping"),
        ("class_names", ["a", 2, "c"], "expected names"),
        ("name", 0, None),
    ],
)
def test_what_a_domain_says_of_itself_is_checked(
    folder: Path, tmp_path: Path, key: str, value: object, message: str | None
) -> None:
    copy = tmp_path / "pcb"
    shutil.copytree(folder / "domains" / "pcb", copy)
    about = json.loads((copy / "domain.json").read_text())
    text = json.dumps([1] if message is None else {**about, key: value})
    (copy / "domain.json").write_text(text)
    with pytest.raises(CheckpointError, match=f"domain.json' is damaged.*{message or ''}"):
        read_domain(copy)
