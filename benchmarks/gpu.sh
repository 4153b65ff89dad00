#!/usr/bin/env bash
# Every GPU bench and GPU test in one call: under ten minutes on one card, JSON in $OUT (default benchmarks/results).
# Needs torch, transformers and peft; generates its data; nothing to install, no network.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-benchmarks/results}
export PYTHONPATH=src PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
failed=0
run() { echo "== $*"; "$@" || { failed=1; echo "FAILED: $*"; }; }

bench=(run python3 -m thawline.bench.tuners --device cuda --rounds 15)
"${bench[@]}" --case reference bf16-8b-proportions 8b-blocks --out "$out/tuners-gpu.json"
"${bench[@]}" --case small-model resnet18 small-llama-memory tinyllama resnet50 --out "$out/complaints-gpu.json"
"${bench[@]}" --case skills-small skills-reference skills-linear skills-decoding --out "$out/mhr-gpu.json"
"${bench[@]}" --case vit convnet --out "$out/vision-cost-gpu.json"
run python3 -m thawline.bench.vision --device cuda --out "$out/vision-gpu.json"
sizes=(atto femto pico n s m l x)
run python3 -m thawline.bench.detector --device cuda --size "${sizes[@]}" --batch 1 8 --dtype fp32 bf16 fp16 --calls 5 --out "$out/detector-gpu.json"
run python3 -m thawline.bench.detector --device cuda --size atto s --batch 1 8 --dtype fp32 bf16 --calls 5 --forms port eager fused compiled compiled_fused --out "$out/detector-compiled-gpu.json"
run python3 -m thawline.bench.train_step --device cuda --out "$out/train-step-gpu.json"
if [ -d tests/gpu ]; then run python3 -m pytest -q -m gpu tests/gpu; fi
exit $failed
