"""Latency of the detector, compared with transformers' port of the same weights.

    python -m thawline.bench.detector --size atto s --profile --out benchmarks/results/detector.json

Measured in paired rounds (`thawline.measure`), from normalised pixels to boxes in the image's pixels:

    port        `Deimv2ForObjectDetection`, eager, with transformers' post-processing: the reference
    eager       `DEIMv2`                              compiled         the same under torch.compile
    fused       `DEIMv2.fuse()`                       compiled_fused   the same under torch.compile
    onnx        the exported ONNX file in onnxruntime, on a GPU by its CUDA provider
    openvino    the exported IR in OpenVINO           pt2              torch's exported program, eager
    tensorrt    the ONNX file by onnxruntime's TensorRT provider, on a GPU
    product     a product of two square matrices: the speed of the machine in that round

A CPU is timed by the wall clock, because its threads work at the same time; a GPU by CUDA events. With
`--profile` each form runs once more under torch's profiler, which names the operators that take the time.
Sizes that the results file already holds from this machine stay in it, so sizes can be measured one by one.
"""

from __future__ import annotations

__all__ = ["FORMS", "main", "measure_size"]

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from thawline.bench.harness import bench_parser, bench_results, markdown, use_device
from thawline.bench.port import build_port
from thawline.errors import ConfigError, MissingExtraError
from thawline.files import read_json
from thawline.measure import Sample, median_ratio, median_seconds, paired_rounds, write_results
from thawline.models.deimv2 import VARIANTS, DEIMv2
from thawline.sessions import open_onnx, open_session

FORMS = ("port", "eager", "fused", "compiled", "compiled_fused")
EXPORTED = ("onnx", "openvino", "pt2", "tensorrt")
"""Forms that are files for a fixed batch, with post-processing inside, in fp32."""
PROVIDERS = {"onnx": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
"""Form → onnxruntime's provider that runs it on a GPU."""
UNCOMPILED = {"compiled": "eager", "compiled_fused": "fused"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
N_OPERATORS = 8
"""Number of operators that a profile names."""
PRODUCT_SIZE = {"cpu": 1024, "cuda": 8192}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line above. Returns the exit status."""
    args = _parser().parse_args(argv)
    device = use_device(args)
    if device.type == "cpu" and args.dtype != ["fp32"]:
        raise ConfigError(f"`--dtype {' '.join(args.dtype)}` needs a GPU; a CPU is measured in fp32.")
    results = _start(args.out, device)
    for size in args.size:
        record = measure_size(
            size,
            device=device,
            batches=args.batch,
            dtypes=args.dtype,
            forms=args.forms,
            rounds=args.rounds,
            calls=args.calls,
            profiled=args.profile,
        )
        results["sizes"][size] = {"command": _command(args, size)} | record
        sys.stdout.write(f"\n{size}, {record['resolution']}: {_counts(record)}\n{_table(record)}\n")
        sys.stdout.flush()
        write_results(args.out, results)  # after each size, for runs that are stopped
    return 0


def measure_size(
    size: str,
    *,
    device: torch.device,
    batches: Sequence[int] = (1,),
    dtypes: Sequence[str] = ("fp32",),
    forms: Sequence[str] = FORMS,
    rounds: int = 10,
    calls: int = 1,
    profiled: bool = False,
    resolution: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Measure one size.

    Args:
        rounds: paired timing rounds.        calls: calls of each form per round; a sample is their sum.
        profiled: also name the operators of each form.
        resolution: (height, width). None: the size's own.
    Returns: a JSON-ready record. For each batch and dtype and form: `median_ms` of one call, `images_per_s`,
        `of_port`, and `of_product`: floating-point operations a second as a share of the matrix product's;
        for a compiled form `of_uncompiled`, if that was measured too; with `profiled`, `operators`: the share
        of the time that each of the largest takes. For a file `export`: how long it took, and its errors.
    """
    model, port = _pair(size)
    height, width = resolution or model.config.image_size
    counted = {"port": port, "eager": model, "fused": model.fuse()}
    record: dict[str, Any] = {
        "resolution": f"{height}×{width}",
        "rounds": rounds,
        "calls": calls,
        "parameters": {name: sum(p.numel() for p in net.parameters()) for name, net in counted.items()},
        "gflops": {name: _gflops(net, (1, 3, height, width)) for name, net in counted.items()},
        "runs": [],
    }
    for name in dtypes:
        dtype = DTYPES[name]
        calls_of = {
            form: _detector(form, model, port, device, dtype) for form in forms if form not in EXPORTED
        }
        for batch in batches:
            files = _files(forms, model, batch, device)
            pixels = torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0))
            pixels = pixels.to(device, dtype)
            calls_of_batch = calls_of | {form: call for form, (call, _) in files.items()}
            steps: dict[str, Callable[[], object]] = {
                form: partial(call, pixels) for form, call in calls_of_batch.items()
            }
            product, product_gflops = _product(device, dtype)
            with torch.inference_mode():
                samples = paired_rounds(
                    steps | {"product": product}, rounds=rounds, steps_per_round=calls, warmup=3
                )
            run = _read(samples, calls, batch, record["gflops"]["eager"] * batch, product_gflops)
            for form, (_, facts) in files.items():
                run["forms"][form]["export"] = facts
            if profiled:
                for form, step in steps.items():
                    run["forms"][form]["operators"] = _operators(step, max(5, calls))
            record["runs"].append({"batch": batch, "dtype": name} | run)
    return record


def _pair(size: str) -> tuple[DEIMv2, nn.Module]:
    """Build the detector and transformers' port with equal weights, none of them at a trivial start."""
    torch.manual_seed(0)
    model = DEIMv2.from_variant(size, rope_rescale=None) if size in "lx" else DEIMv2.from_variant(size)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.8, 1.2)
    return model.eval(), build_port(model).eval()


def _detector(
    form: str, model: DEIMv2, port: nn.Module, device: torch.device, dtype: torch.dtype
) -> Callable[[Tensor], object]:
    """Build one form: a call from pixels to detections."""
    if form == "port":
        from transformers import RTDetrImageProcessorPil

        processor = RTDetrImageProcessorPil()
        theirs = port.to(device, dtype)

        def detect_as_port(pixels: Tensor) -> object:
            return processor.post_process_object_detection(
                theirs(pixel_values=pixels), threshold=0.0, target_sizes=[(480, 640)] * len(pixels)
            )

        return detect_as_port
    ours = model.fuse() if form.endswith("fused") else model
    ours = ours.to(device, dtype)
    network = torch.compile(ours, fullgraph=True) if form in UNCOMPILED else ours

    def detect(pixels: Tensor) -> object:
        return ours.postprocess(network(pixels), [(480, 640)] * len(pixels))

    return detect


def _files(
    forms: Sequence[str], model: DEIMv2, batch: int, device: torch.device
) -> dict[str, tuple[Callable[[Tensor], object], dict[str, float]]]:
    """Export the forms that are files; on a GPU those whose runtime is not installed are left out."""
    files = {}
    for form in (form for form in forms if form in EXPORTED):
        try:
            files[form] = _exported(form, model, batch, device)
        except (ConfigError, MissingExtraError) as error:
            if device.type == "cpu":
                raise
            sys.stdout.write(f"{form} is left out: {error}\n")
    return files


def _exported(
    form: str, model: DEIMv2, batch: int, device: torch.device
) -> tuple[Callable[[Tensor], object], dict[str, float]]:
    """Export the model, and open the file with as many threads as torch has.

    Returns: a call from pixels to detections; seconds that the export took, and its certificate's errors.
    """
    is_on_gpu = device.type == "cuda"
    if is_on_gpu != (form in PROVIDERS) and form != "onnx":
        raise ConfigError(f"`--forms {form}` is measured on a {'CPU' if is_on_gpu else 'GPU'} only.")
    with tempfile.TemporaryDirectory() as folder:
        from thawline.exporters.export import export_detector  # needs the `export` extra
        from thawline.exporters.settings import Settings

        format: Any = "onnx" if form in PROVIDERS else form
        start = time.perf_counter()
        report = export_detector(deepcopy(model).cpu(), folder, Settings(format=format, batch=batch))
        facts = {"seconds": round(time.perf_counter() - start, 1)}
        for name in ("box_error_px", "score_error"):
            facts[name] = max(getattr(row, name) for row in report.rows)
        if is_on_gpu:
            session = open_onnx(report.path, provider=PROVIDERS[form])
        else:
            session = open_session(report.path, form, torch.get_num_threads())

    def detect(pixels: Tensor) -> object:
        sizes = np.full((len(pixels), 2), 640)
        return session({"images": pixels.float().cpu().numpy(), "orig_target_sizes": sizes})

    return detect, facts


def _gflops(network: nn.Module, shape: tuple[int, ...]) -> float:
    """Count twice the multiply-adds of products, convolutions and attention."""

    def convolution(x: Any, weight: Any, *_: Any, out_shape: Sequence[int], **__: Any) -> int:
        return 2 * math.prod(out_shape) * math.prod(weight) // out_shape[1]

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])

    # Operators of the CPU that the counter does not know.
    known = {
        torch.ops.mkldnn._convolution_pointwise: convolution,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
    }
    with torch.inference_mode(), FlopCounterMode(display=False, custom_mapping=known) as counter:
        network(torch.rand(shape))
    return round(counter.get_total_flops() / 1e9, 3)


def _product(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], Tensor], float]:
    n = PRODUCT_SIZE[device.type]
    a = torch.rand(n, n, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    return lambda: a @ a, 2 * n**3 / 1e9


def _operators(call: Callable[[], object], calls: int) -> dict[str, float]:
    """Profile a call: the operators that take most of the time, with their own shares."""
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.inference_mode():
        call()
        with profile(activities=activities) as profiler:
            for _ in range(calls):
                call()
    kind = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    times = {event.key: getattr(event, kind) for event in profiler.key_averages()}
    largest = sorted(times, key=times.__getitem__, reverse=True)[:N_OPERATORS]
    return {name: round(times[name] / sum(times.values()), 4) for name in largest}


def _read(
    samples: dict[str, list[Sample]], calls: int, batch: int, gflops: float, product_gflops: float
) -> dict[str, Any]:
    clock = "cuda" if samples["product"][0].cuda is not None else "wall"
    product = samples["product"]
    forms = {}
    for name, own in samples.items():
        seconds = median_seconds(own, clock) / calls
        if name == "product":
            continue
        forms[name] = {
            "median_ms": round(seconds * 1e3, 3),
            "images_per_s": round(batch / seconds, 2),
            "of_product": round(gflops / product_gflops / median_ratio(own, product, clock), 4),
        }
        for base, key in (("port", "of_port"), (UNCOMPILED.get(name), "of_uncompiled")):
            if base in samples:
                forms[name][key] = round(median_ratio(own, samples[base], clock), 4)
    seconds = median_seconds(product, clock) / calls
    return {"clock": clock, "product_gflops_per_s": round(product_gflops / seconds, 1), "forms": forms}


def _start(out: Path | None, device: torch.device) -> dict[str, Any]:
    """Start the results, with the sizes that `out` already holds from the same machine."""
    results = bench_results("detector", "thawline bench detector", device, sizes={})
    earlier = read_json(out) if out is not None else {}
    if not earlier:
        return results
    different = [key for key in ("bench", "machine", "device") if earlier.get(key) != results[key]]
    if different:
        raise ConfigError(
            f"'{out}' holds results of another {' and '.join(different)}. Move it, or give another `--out`."
        )
    return results | {"sizes": earlier["sizes"]}


def _command(args: argparse.Namespace, size: str) -> str:
    """Return the command line that measures this size again."""
    words = ["thawline bench detector", f"--size {size}"]
    words += [f"--{name} {' '.join(map(str, getattr(args, name)))}" for name in ("batch", "dtype", "forms")]
    words += [f"--{name} {getattr(args, name)}" for name in ("rounds", "calls", "threads")]
    return " ".join(words) + (" --profile" if args.profile else "")


def _counts(record: dict[str, Any]) -> str:
    parameters, gflops = record["parameters"], record["gflops"]
    return ", ".join(f"{name} {parameters[name]:,} parameters, {gflops[name]:.2f} GFLOP" for name in gflops)


def _table(record: dict[str, Any]) -> str:
    """Format the record as a Markdown table."""
    head = ["dtype", "batch", "form", "ms", "images/s", "× port", "× uncompiled", "of the product's rate"]
    lines = []
    for run in record["runs"]:
        for name, form in run["forms"].items():
            lines.append(
                [
                    run["dtype"],
                    str(run["batch"]),
                    name,
                    f"{form['median_ms']:.2f}",
                    f"{form['images_per_s']:.1f}",
                    *(f"{form[key]:.3f}" if key in form else "-" for key in ("of_port", "of_uncompiled")),
                    f"{form['of_product']:.0%}",
                ]
            )
    table = markdown(head, lines)
    for run in record["runs"]:
        for name, form in run["forms"].items():
            if "operators" in form:
                shares = ", ".join(f"{op} {share:.0%}" for op, share in form["operators"].items())
                table += f"\n{run['dtype']}, batch {run['batch']}, {name}: {shares}"
    return table


def _parser() -> argparse.ArgumentParser:
    parser = bench_parser("detector", "Latency of the detector, compared with transformers' port.")
    parser.add_argument("--size", nargs="+", choices=VARIANTS, default=["atto"], help="Default: atto.")
    parser.add_argument("--batch", nargs="+", type=int, default=[1], help="Images per call. Default: 1.")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32"], help="bf16, fp16 need a GPU.")
    parser.add_argument("--forms", nargs="+", choices=(*FORMS, *EXPORTED), default=["port", "eager", "fused"])
    parser.add_argument("--calls", type=int, default=1, help="Calls of each form per round, for small sizes.")
    parser.add_argument("--profile", action="store_true", help="Name the operators that take the time.")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
