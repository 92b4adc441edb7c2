"""How fast samples come: reading, decoding, transforming and tokenising easy-VQA with 0 and 2 workers.

Prints samples per second of the loader alone, and the share of step time that a training step of the
quickstart's model spends waiting for it.

    python benchmarks/loader.py
"""

from __future__ import annotations

import argparse
import time

from common import machine

import minivlm  # noqa: F401
from minivlm.api import assemble
from minivlm.config import load_config
from minivlm.datasets.sampling import BatchPlan
from minivlm.datasets.training_set import TrainingSet, build_datasets, build_split, make_loader

CONFIG = "train_configs/quickstart.yaml"
WARM_UP = 10  # more than the workers fetch ahead


def main() -> None:
    """Measure each number of workers twice: without and with a training step between batches."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=60)
    arguments = parser.parse_args()
    stage = load_config(CONFIG).stage("instruct")
    model, processor, _ = assemble(stage.model)
    model.train()
    sources = build_split(build_datasets(stage.datasets), ["train"])
    data = TrainingSet([source.sized for source in sources], processor, 0, "raise")
    size = stage.run.batch_size_train
    plan = BatchPlan([len(data)], size, 0)
    print(f"{machine()}; batches of {size} conversations about one picture, pictures encoded in every step")
    print("workers   samples/s   waiting")
    for workers in (0, 2):
        rates = []
        waits = []
        for training in (False, True):
            loader = make_loader(
                data, plan, start=0, stop=arguments.batches + WARM_UP, rank=0, world=1, workers=workers, pin=False
            )
            iterator = iter(loader)
            for _ in range(WARM_UP):
                next(iterator)
            start, waited = time.perf_counter(), 0.0
            for _ in range(arguments.batches):
                before = time.perf_counter()
                batch = next(iterator)
                waited += time.perf_counter() - before
                if training:
                    loss = model(batch).loss
                    assert loss is not None
                    loss.backward()
            total = time.perf_counter() - start
            rates.append(arguments.batches * size / total)
            waits.append(waited / total)
        print(f"{workers:7d}   {rates[0]:9.0f}   {waits[1]:7.1%}")


if __name__ == "__main__":
    main()
