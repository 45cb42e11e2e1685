#!/usr/bin/env python3
"""What a model must beat: majority class and character TF-IDF on the test split of every task that needs no network.

    pip install scikit-learn
    python -m benchmarks.task_baselines [NAME ...]

A task with classes gets the accuracy of the most frequent training class and of TF-IDF (2 to 5 characters) with a
logistic regression; a task with free answers the ROUGE-L of the nearest training prompt's answer (cosine of the same
features).
"""

import argparse
from collections import Counter
from pathlib import Path

from omegaconf import OmegaConf
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from sweeper import tasks
from sweeper.errors import DataError
from sweeper.spec import DatasetSpec, from_mapping
from sweeper.tasks.metrics import exact_match, macro_f1, rouge_l

CONF = Path(__file__).parent.parent / "conf" / "dataset"
NETWORK = ("hub", "file", "jsonl", "mixture", "sequence")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    for name in parser.parse_args().names or [path.stem for path in sorted(CONF.glob("*.yaml"))]:
        plain = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"))
        assert isinstance(plain, dict)
        if plain["family"] not in NETWORK:
            report(from_mapping(DatasetSpec, {str(key): value for key, value in plain.items()}))


def report(spec: DatasetSpec) -> None:
    try:
        tasks.check(spec, training=False)
    except DataError as error:
        print(error)
        return
    splits = tasks.load(spec)
    train, test = splits["train"], splits["test"]
    print(f"{spec.name}: {' / '.join(f'{split} {len(part)}' for split, part in splits.items())}")
    if not train:
        return
    labels = [e.response for e in train]
    (majority, _), *_ = Counter(labels).most_common(1)
    print(f"  majority {sum(e.response == majority for e in test) / len(test):.3f}")
    features = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True, max_features=200_000)
    known, asked = features.fit_transform([e.prompt for e in train]), features.transform([e.prompt for e in test])
    if len(set(labels)) <= 50:
        found = list(LogisticRegression(max_iter=1000, C=10).fit(known, labels).predict(asked))
        right = [e.response for e in test]
        accuracy = sum(a == b for a, b in zip(found, right, strict=True)) / len(test)
        print(f"  TF-IDF + logistic regression {accuracy:.3f}, macro F1 {macro_f1(found, right):.3f}")
        return
    picks = [int(row.toarray().argmax()) for row in asked @ known.T]
    pairs = [(labels[pick], e.response) for pick, e in zip(picks, test, strict=True)]
    print(f"  nearest prompt: exact match {sum(exact_match(*p) for p in pairs) / len(pairs):.3f}", end="")
    print(f", ROUGE-L {sum(rouge_l(*p) for p in pairs) / len(pairs):.3f}")


if __name__ == "__main__":
    main()
