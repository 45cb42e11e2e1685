#!/usr/bin/env python3
"""Loads a run's adapter with stock PEFT, scores it with stock transformers, and compares with the record.

    python -m benchmarks.adapter_nll outputs/STUDY/RUN_ID

The base is loaded in the run's precision; in float32 the two NLLs agree within 1e-4.
"""

import argparse
from pathlib import Path

import torch
from peft import PeftModel

from sweeper import models, tasks
from sweeper.record import read_record
from sweeper.spec import run_spec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--split", default="validation")
    args = parser.parse_args()
    record = read_record(args.run)
    spec = run_spec(record.spec)
    dtype = getattr(torch, record.environment["precision"])
    base = models.load(spec.model, dtype=dtype, device=torch.device("cpu"))
    examples = tasks.encode(spec.dataset, base.tokenizer, model_key="", cache=None)[args.split].examples
    model = PeftModel.from_pretrained(base.model, str(args.run / "adapter")).eval()
    total, tokens = 0.0, 0
    with torch.no_grad():
        for example in examples:
            ids = torch.tensor([example.input_ids])
            log_p = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
            picked = log_p[example.prompt_length - 1 :].gather(1, ids[0, example.prompt_length :, None])
            total -= float(picked.double().sum())
            tokens += picked.shape[0]
    recorded, found = record.scores[args.split]["after"].nll, total / tokens
    arm = f"{spec.placement.name}, rank {spec.rank}, {record.environment['precision']}"
    print(f"{args.run.name} ({arm}), {args.split}:")
    print(f"  recorded {recorded:.6f}, PEFT {found:.6f}, difference {abs(recorded - found):.2e}")


if __name__ == "__main__":
    main()
