#!/usr/bin/env bash
# From a fresh machine to the first table, of a real model and real data.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
types "make sweep"
has outputs/default/summary.md
finish
