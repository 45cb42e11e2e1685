# Sourced by each task of this folder: a fresh clone with an empty cache, and what a newcomer types there, timed.
set -euo pipefail
root=$(git rev-parse --show-toplevel)
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
git clone -q "$root" "$place/lora-atlas"
cd "$place/lora-atlas"
export XDG_CACHE_HOME=$place/cache
unset VIRTUAL_ENV PYTHONPATH
task=$(basename "$0" .sh) steps=0 spent=0

# types COMMAND: one step; its output is shown only if it fails
types() {
  local began=$SECONDS
  steps=$((steps + 1))
  printf '%s$ %s\n' "$task" "$1"
  bash -c "$1" >"$place/log" 2>&1 </dev/null || { tail -n 20 "$place/log" && printf '%s: failed\n' "$task" && exit 1; }
  spent=$((spent + SECONDS - began))
  printf '%s: %d s\n' "$task" $((SECONDS - began))
}

# has FILE: what the task is for
has() { [ -s "$1" ] || { printf '%s: no %s\n' "$task" "$1" && exit 1; }; }

finish() { awk -v t="$task" -v n="$steps" -v s="$spent" 'BEGIN { printf "%s: %d steps, %.1f minutes\n", t, n, s / 60 }'; }
