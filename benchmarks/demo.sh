#!/bin/sh
# The whole loop on this machine: profile small models, fit, predict a larger one, train it, compare, report.
# usage: benchmarks/demo.sh DIRECTORY (what an earlier run left there is discarded)
set -eu
out=${1:?usage: benchmarks/demo.sh DIRECTORY}
mkdir -p "$out"
rm -rf "$out/sweep" "$out/train" "$out/calibration.json" "$out/prediction.json" "$out/report.html"

say() { printf '\n\033[1m$ %s\033[0m\n' "$*"; }
run() { say "$@"; "$@"; }

# Small models on the device at hand, in fp32: what every machine has.
run vramcalc profile --model nano,micro,mini --precision fp32 --seq 128,256 --batch 1,2 --out "$out/sweep"
run vramcalc fit "$out/sweep" --out "$out/calibration.json"

# A model three times as large as any that was measured: predicted first, and kept as it was predicted.
larger="--model small --precision fp32 --seq 256 --batch 2"
# shellcheck disable=SC2086
{
  say vramcalc estimate $larger --calibration "$out/calibration.json"
  vramcalc estimate $larger --calibration "$out/calibration.json"
  vramcalc estimate $larger --calibration "$out/calibration.json" --json > "$out/prediction.json"
  run vramcalc train $larger --calibration "$out/calibration.json" --samples 48 --epochs 2 --out "$out/train"
  run vramcalc profile $larger --out "$out/larger"
}
run vramcalc report "$out/sweep" "$out/larger" --calibration "$out/calibration.json" --training "$out/train" --out "$out/report.html"

printf '\nThe runs: %s\nThe laws: %s\nThe prediction made before the run: %s\nThe training: %s\nThe report: %s\n' \
  "$out/sweep/measured_runs.parquet" "$out/calibration.json" "$out/prediction.json" "$out/train" "$out/report.html"
