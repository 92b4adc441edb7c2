"""Talk to a model: python demo.py --cfg-path eval_configs/quickstart.yaml [--cli]."""

import sys

from minivlm.serve.demo import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
