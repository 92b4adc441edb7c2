"""Run an experiment: python train.py --cfg-path train_configs/quickstart.yaml [--options a.b=c] [--dry-run]."""

import sys

from minivlm.cli import train

if __name__ == "__main__":
    sys.exit(train(sys.argv[1:]))
