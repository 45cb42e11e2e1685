#!/usr/bin/env bash
# From a fresh machine to a comparison of placements on a CSV file of one's own, which groups its rows.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
{
  echo question,answer,source
  for i in $(seq 160); do printf '"What is %d + %d, exactly?",%d,book%d\n' "$i" "$i" $((2 * i)) $((i % 20)); done
} >mine.csv
types "make install"
types ".venv/bin/python train.py -m placement=attn,ff rank=4 trainer.max_steps=20 study=mine \
  dataset=file dataset.path=mine.csv 'dataset.columns={prompt: question, response: answer, group: source}'"
has outputs/mine/summary.md
types ".venv/bin/python -m analysis outputs/mine --out paper/"
has paper/report.html
finish
