"""The real LAVIS in an environment that is built here: its ViT, Q-Former, processors and datasets against ours.

``make test-lavis`` runs these. The environment is built from ``requirements-lavis.txt`` (a few minutes and 2 GB)
and kept in the user's cache, in a folder named after that file's pins. LAVIS itself works without network.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ROOT
from PIL import Image
from torch import Tensor

from minivlm.datasets.configs import LavisDatasetConfig
from minivlm.datasets.lavis import LavisBuilder
from minivlm.lavis.client import connect, wrong_versions
from minivlm.lavis.configs import LavisEnvironment
from minivlm.models.configs import EvaClipGConfig, LavisVisionConfig, QFormerConfig
from minivlm.models.connectors.qformer import QFormerConnector
from minivlm.models.vision.eva_clip_g import EvaClipG
from minivlm.models.vision.lavis import LavisVisionEncoder
from minivlm.processors.configs import ImageConfig, LavisImageConfig
from minivlm.processors.image import ImageTransform
from minivlm.processors.lavis import LavisImageTransform, process_text
from minivlm.types import Message

pytestmark = pytest.mark.lavis

SIZE, WIDTH, DEPTH, HEADS = 56, 32, 3, 4
QUERIES, HIDDEN, LAYERS = 5, 24, 4
SMALL_VIT = f"""\
import lavis.models.eva_vit as eva

Full = eva.VisionTransformer

class Small(Full):
    '''LAVIS writes 1408 x 39 into its code; everything but these three numbers stays LAVIS's own.'''

    def __init__(self, **settings):
        super().__init__(**{{**settings, "embed_dim": {WIDTH}, "depth": {DEPTH}, "num_heads": {HEADS}}})

eva.VisionTransformer = Small
"""


@pytest.fixture(scope="session")
def lavis_python() -> str:
    """The interpreter of an environment made as the documents say."""
    requirements = ROOT / "requirements-lavis.txt"
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "minivlm"
    pins = [line for line in requirements.read_text().splitlines() if line[:1] != "#"]
    folder = cache / f"lavis-{hashlib.sha1(repr(pins).encode()).hexdigest()[:12]}"
    python, complete = folder / "bin" / "python", folder / "complete"
    if not complete.exists():
        shutil.rmtree(folder, ignore_errors=True)
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        for command in (
            [shutil.which("python3.11") or sys.executable, "-m", "venv", str(folder)],
            [*pip, "-r", str(requirements)],
            [*pip, "--no-deps", "salesforce-lavis==1.0.2"],
        ):
            done = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False)
            assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-4000:]}"
        complete.touch()
    return str(python)


@pytest.fixture(scope="module")
def ours() -> tuple[EvaClipG, QFormerConnector]:
    """Our two parts with random weights, large enough to leave the linear range of every layer."""
    torch.manual_seed(0)
    encoder = EvaClipG(EvaClipGConfig(image_size=SIZE, width=WIDTH, depth=DEPTH, num_heads=HEADS)).eval()
    settings = QFormerConfig(
        num_query_tokens=QUERIES, hidden_size=HIDDEN, num_layers=LAYERS, num_heads=3, intermediate_size=56
    )
    connector = QFormerConnector(settings, encoder, 8).eval()
    with torch.no_grad():
        for parameter in [*encoder.parameters(), *connector.parameters()]:
            parameter.add_(0.2 * torch.randn_like(parameter))
    return encoder, connector


@pytest.fixture(scope="module")
def folder(ours: tuple[EvaClipG, QFormerConnector], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LAVIS's working folder: the files that it wants from the network, small and in its own key names."""
    made = tmp_path_factory.mktemp("lavis")
    encoder, connector = ours
    vit = {name.removeprefix("vit."): tensor for name, tensor in encoder.state_dict().items() if name[:4] == "vit."}
    # The published file has one block more than is used, and a norm.
    last = {k.replace(".0.", f".{DEPTH}."): torch.randn_like(t) for k, t in vit.items() if k.startswith("blocks.0.")}
    (made / "torch/hub/checkpoints").mkdir(parents=True)
    torch.save({**vit, **last, "norm.weight": torch.ones(WIDTH)}, made / "torch/hub/checkpoints/eva_vit_g.pth")
    state = {f"ln_vision.{name}": tensor for name, tensor in encoder.ln_vision.state_dict().items()}
    state["query_tokens"] = connector.query_tokens.data
    state |= {_lavis_name(name): tensor for name, tensor in connector.qformer.state_dict().items()}
    torch.save({"model": state}, made / "blip2_pretrained.pth")
    bert = made / "bert-base-uncased"
    bert.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "square"]
    (bert / "vocab.txt").write_text("\n".join(words))
    config = {
        "model_type": "bert",
        "vocab_size": len(words),
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 3,
        "intermediate_size": 56,
        "max_position_embeddings": 64,
    }
    (bert / "config.json").write_text(json.dumps(config))
    torch.save({"bert.embeddings.word_embeddings.weight": torch.randn(len(words), HIDDEN)}, bert / "pytorch_model.bin")
    (made / "small.py").write_text(SMALL_VIT)
    return made


def _lavis_name(name: str) -> str:
    """The key of ``blip2_pretrained*.pth`` for a parameter of transformers' Q-Former."""
    name = name.replace(".attention.attention.", ".attention.self.")
    name = name.replace(".crossattention.attention.", ".crossattention.self.")
    return "Qformer.bert." + name.replace("layernorm.", "embeddings.LayerNorm.")


@pytest.fixture
def environment(lavis_python: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Settings of every part, and no network for LAVIS."""
    monkeypatch.setenv("TORCH_HOME", str(folder / "torch"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "1")
    return {"python": lavis_python, "folder": str(folder), "setup": str(folder / "small.py")}


def lavis_encoder(environment: dict[str, str], folder: Path, **settings: Any) -> LavisVisionEncoder:
    config = LavisVisionConfig(
        model="blip2_feature_extractor",
        type="pretrain",
        checkpoint=str(folder / "blip2_pretrained.pth"),
        device="cpu",
        options={"vit_precision": "fp32", "num_query_token": QUERIES},
        **environment,
        **settings,
    )
    return LavisVisionEncoder(config)


def close(name: str, got: Tensor, expected: Tensor) -> None:
    print(f"{name}: largest difference {(got - expected).abs().max():.2e}, largest value {expected.abs().max():.1f}")
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_the_environment_has_the_versions_of_the_requirements(environment: dict[str, str]) -> None:
    versions = connect(LavisEnvironment(**environment)).versions
    assert wrong_versions(versions) == [] and versions["salesforce-lavis"] == "1.0.2"
    wanted = dict(
        line.split("==") for line in (ROOT / "requirements-lavis.txt").read_text().splitlines() if line[:1] != "#"
    )
    for name in ("transformers", "timm", "torch"):
        assert str(versions[name]).split("+")[0] == wanted[name]


@pytest.mark.parametrize("size", [SIZE, 84])
def test_the_vit_is_that_of_lavis(
    environment: dict[str, str], folder: Path, ours: tuple[EvaClipG, QFormerConnector], size: int
) -> None:
    """At another size than the file's, both interpolate the positions."""
    theirs = lavis_encoder(environment, folder, output="vit", image_size=size)
    mine = EvaClipG(EvaClipGConfig(image_size=size, width=WIDTH, depth=DEPTH, num_heads=HEADS)).eval()
    mine.load_state_dict(ours[0].state_dict())
    assert (theirs.num_tokens, theirs.hidden_size, theirs.grid) == (mine.num_tokens, mine.hidden_size, mine.grid)
    assert dict(theirs.image_settings) == dict(mine.image_settings)
    pixels = torch.randn(3, 3, size, size)
    with torch.no_grad():
        close(f"ViT at {size} px", mine(pixels), theirs(pixels))


def test_the_qformer_is_that_of_lavis(
    environment: dict[str, str], folder: Path, ours: tuple[EvaClipG, QFormerConnector]
) -> None:
    theirs = lavis_encoder(environment, folder, image_size=SIZE)
    assert (theirs.num_tokens, theirs.hidden_size) == (QUERIES, HIDDEN)
    encoder, connector = ours
    pixels = torch.randn(3, 3, SIZE, SIZE)
    connector.linear = torch.nn.Identity()
    with torch.no_grad():
        close("ViT and Q-Former", connector(encoder(pixels)), theirs(pixels))
        changed = pixels.clone()
        changed[0] += 1
        assert (theirs(changed)[0] - theirs(pixels)[0]).abs().max() > 1e-2, "the picture must matter"
    again = lavis_encoder(environment, folder, image_size=SIZE)
    assert torch.equal(again.fingerprint, theirs.fingerprint)
    assert not torch.equal(lavis_encoder(environment, folder, image_size=84).fingerprint, theirs.fingerprint)


def test_processors(environment: dict[str, str]) -> None:
    encoder = {"size": 48, "mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (61, 83, 3), dtype=np.uint8))
    theirs = LavisImageTransform(LavisImageConfig(processor="blip_image_eval", **environment), encoder)
    assert torch.equal(theirs(picture), ImageTransform(ImageConfig(), encoder)(picture)), "bit for bit"
    random = LavisImageTransform(LavisImageConfig(processor="blip2_image_train", **environment), encoder)
    first, second = random(picture, "1"), random(picture, "2")
    assert torch.equal(random(picture, "1"), first) and not torch.equal(first, second)
    text = process_text(LavisEnvironment(**environment), "blip_caption", "A Red, red: square!  ", prompt="see ")
    assert text == "see a red, red square"


def test_datasets(environment: dict[str, str], tmp_path: Path) -> None:
    Image.new("RGB", (20, 10), (200, 0, 0)).save(tmp_path / "red.jpg")
    captions = [{"image": "red.jpg", "caption": "A red Square!", "image_id": "red"}]
    questions = [
        {"image": "red.jpg", "question": "What colour?", "question_id": 7, "answer": ["red", "dark", "red"]},
        {"image": "red.jpg", "question_id": 8, "answer": ["red"]},
    ]
    for name, records in (("captions", captions), ("questions", questions), ("answers", ["red"])):
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
    for split in ("train", "val"):
        builder = LavisBuilder(
            LavisDatasetConfig(
                builder="coco_caption",
                annotations={split: str(tmp_path / "captions.json")},
                images=str(tmp_path),
                text_processor="blip_caption",
                **environment,
            )
        )
        assert builder.splits == (split,)
        (sample,) = builder.build(split)
        assert sample.images == [tmp_path / "red.jpg"]
        # LAVIS's evaluation split gives no caption; the annotation has it, unprocessed
        assert sample.messages == [Message("assistant", "a red square" if split == "train" else "A red Square!")]
    files = [str(tmp_path / f"{name}.json") for name in ("questions", "answers")]
    for split, wanted in (("train", files[0]), ("val", files)):
        config = LavisDatasetConfig(
            builder="coco_vqa", annotations={split: wanted}, images=str(tmp_path), **environment
        )
        samples = LavisBuilder(config).build(split)
        assert len(samples) == 2
        assert samples[0].messages == [Message("user", "<image>\nWhat colour?"), Message("assistant", "red")]
        with pytest.raises(ValueError, match=r"coco_vqa/.*/1.*KeyError: 'question'"):
            samples[1]
