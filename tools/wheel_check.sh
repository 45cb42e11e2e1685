#!/usr/bin/env bash
# Builds the wheel, installs it into an environment of its own, and uses it in an empty folder as somebody would who has
# no checkout: fetch, a grid on the default model and data with a placement of one's own, the same again, a search, the
# analysis. `make wheel-check` runs it; what it makes is removed, unless a folder to keep is named.
#
#     tools/wheel_check.sh PYTHON [FOLDER]      # an interpreter with pip and hatchling
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
if (($# > 1)); then
  mkdir -p "$2"
  work=$(cd "$2" && pwd)
else
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
fi
unset PYTHONPATH PYTHONHOME SWEEPER_CACHE HYDRA_FULL_ERROR
export XDG_CACHE_HOME=$work/cache TOKENIZERS_PARALLELISM=false

step() { printf '\n[%d s] %s\n' "$SECONDS" "$*"; }
# runs a command, shows what it says, and fails where that does not have the words expected of it
expect() {
  local wanted=$1
  shift
  printf '$ %s\n' "$*"
  "$@" 2>&1 | tee "$work/said" || { echo "failed: $*" >&2; exit 1; }
  grep -qF -- "$wanted" "$work/said" || { echo "failed: $* did not say '$wanted'" >&2; exit 1; }
}

step "the wheel"
rm -rf "$work/dist"
"$python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$work/dist" "$root"
wheel=$(echo "$work"/dist/lora_atlas-*.whl)

step "a clean environment"
[ -x "$work/venv/bin/python" ] || "$python" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet -c "$root/constraints.txt" "$wheel[train,search,analysis]"
# in a folder that was kept lies a former build of the same version
"$work/venv/bin/python" -m pip install --quiet --no-deps --force-reinstall "$wheel"
export PATH=$work/venv/bin:$PATH

step "an empty folder"
rm -rf "$work/here" && mkdir "$work/here" && cd "$work/here"
expect "lora-atlas 0." lora-atlas --version
expect "lora-atlas train -m placement=attn,ff,full" lora-atlas train --help
if lora-atlas train rank=2 2>"$work/said"; then echo "failed: it trained without its data" >&2; exit 1; fi
grep -F "lora-atlas fetch simple-icd-10-cm" "$work/said"
expect "simple-icd-10-cm 1.5.0 is in $XDG_CACHE_HOME/lora-atlas/packages" lora-atlas fetch

step "the main job: a grid on the default model and data, with a placement of one's own"
mkdir -p conf/placement
printf 'name: mine\nroles: [attn_q]\nlayers: "first:2"\n' >conf/placement/mine.yaml
short=(rank=2 trainer.max_steps=4 trainer.batch_size=2 dataset.train_examples=42 dataset.validation_examples=21
  dataset.test_examples=21 sweep.calibrate=false)
expect "3 runs, 3 to train" lora-atlas train -m placement=attn,ff,mine "${short[@]}" sweep.dry_run=true
expect "lora-atlas analyse outputs/default" lora-atlas train -m placement=attn,ff,mine "${short[@]}"
expect "3 runs, 0 to train" lora-atlas train -m placement=attn,ff,mine "${short[@]}" sweep.dry_run=true

step "a search"
expect "saved: outputs/search/summary.csv" lora-atlas train -m model=tiny_llama 'optim.lr=tag(log,interval(1e-4,1e-2))' \
  hydra.sweeper.n_trials=2 study=search "${short[@]}"

step "saved adapters"
expect "chain_sum, test" lora-atlas evaluate outputs/default dataset=chain_sum dataset.test_examples=10
expect "spectra.json" lora-atlas adapters spectra outputs/default --update-only

step "the analysis"
expect "start with paper/report.html" lora-atlas analyse outputs/default
[ -s paper/report.html ] && [ -s paper/tables/runs.csv ] && [ -s paper/figures/arms_nll.pdf ]
expect "3 runs" python -c 'import sweeper; print(len(sweeper.load_study("outputs/default").table()), "runs")'

step "everything works from the wheel"
