#!/usr/bin/env bash
# From a fresh machine and the records of a study to a figure and a table in a LaTeX document. Needs pdflatex.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
types "make install"
types "mkdir -p outputs && tar xf notebooks/study.tar.xz -C outputs"
study=$(dirname "$(find outputs -name record.json | head -n 1 | xargs dirname)")
types ".venv/bin/python -m analysis $study --out paper/ --venue neurips"
has paper/figures/pareto_nll.pdf
cat >main.tex <<'LATEX'
\documentclass{article}
\usepackage{booktabs,graphicx}
\begin{document}
\begin{figure}\centering\includegraphics[width=\linewidth]{paper/figures/pareto_nll.pdf}\caption{Cost and score.}\end{figure}
\input{paper/tables/placement_rank_nll}
\end{document}
LATEX
types "pdflatex -interaction=nonstopmode -halt-on-error main.tex"
has main.pdf
finish
