"""Train LoRA runs: `python train.py rank=8` for one, `python train.py -m placement=attn,ff rank=4,8` for a grid."""

import sys

import hydra
from omegaconf import DictConfig

from sweeper import cli


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float | None:
    """Trains one run and returns its validation NLL. With -m, our sweeper and launcher run the grid instead."""
    return cli.train(cfg)


if __name__ == "__main__":
    cli.put_flags_last()
    sys.exit(cli.run(main))
