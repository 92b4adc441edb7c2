"""A language model alone: built, trained, saved, talked to, exported, and handed on to a model that sees."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_minimind import MODELS, language_config, settings
from golden_minimind import section as golden_section
from helpers import losses, run_train, tiny_model, write_yaml
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from test_minimind_checkpoints import language_state, same_logits
from test_resume import Killed, assert_same_weights, kill_after

from minivlm import api, cli
from minivlm.api import assemble
from minivlm.checkpoints.inspection import inspect_path
from minivlm.checkpoints.report import CheckpointError
from minivlm.config import ConfigError, load_config
from minivlm.config.experiment import DemoConfig, ModelConfig
from minivlm.config.loader import parse_model
from minivlm.datasets.feature_cache import FeatureCacheError
from minivlm.models.base import ModelError
from minivlm.models.vlm import VisionLanguageModel
from minivlm.runners.experiment import run_experiment
from minivlm.serve.chat import Chat
from minivlm.serve.terminal import run_terminal
from minivlm.types import SampleError

QUIET = Console(quiet=True)
NONE = {"vision_encoder": "none", "connector": "none"}


def text_model(**changes: Any) -> dict[str, Any]:
    """Section ``model`` of a tiny language model alone."""
    kept = {key: value for key, value in tiny_model().items() if key not in NONE}
    return {**kept, "template": "text", **changes}


def blind_twin() -> dict[str, Any]:
    return {**tiny_model(), "vision_encoder": {"name": "none", "pictures": "drop"}, "connector": "none"}


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A file of 48 texts."""
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(f"the {n}. cat is {'red' if n % 2 else 'blue, as it was before'}" for n in range(48)))
    return file


@pytest.fixture
def experiment(tmp_path: Path, texts: Path) -> dict[str, Any]:
    """Six steps on the texts."""
    return {
        "model": text_model(),
        "datasets": {"text": {"annotations": {"train": str(texts), "val": str(texts)}}},
        "run": {
            "output_dir": str(tmp_path / "out"),
            "batch_size_train": 8,
            "init_lr": 5e-3,
            "precision": "fp32",
            "device": "cpu",
        },
    }


def train(experiment: dict[str, Any], folder: Path, *options: str) -> Path:
    """Run it here; returns its output folder."""
    run_experiment(load_config(write_yaml(folder / "x.yaml", experiment), options), QUIET)
    return Path(experiment["run"]["output_dir"])


def picture(folder: Path) -> Path:
    Image.new("RGB", (40, 30), (220, 30, 30)).save(folder / "picture.png")
    return folder / "picture.png"


# --- configuration --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left_out", [{}, NONE, dict.fromkeys(NONE), {"vision_encoder": None}])
def test_what_is_left_out_is_none(left_out: dict[str, Any]) -> None:
    config = parse_model(text_model(**left_out), "test")
    assert config.vision_encoder and config.connector
    assert (config.vision_encoder.name, config.connector.name) == ("none", "none")
    assert config.vision_encoder.config.pictures == "refuse"


def test_a_preset_without_its_eyes(tmp_path: Path) -> None:
    preset = {"arch": "minimind_v", "model_type": "v1_small", "language_model": {"tokenizer": "asset:quickstart"}}
    for parts in (NONE, dict.fromkeys(NONE)):
        model, processor, _ = assemble(parse_model({**preset, **parts}, "test"), meta=True)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 26_878_464
        assert processor.tokens_per_image == 0 and not processor.transforms


@pytest.mark.parametrize(
    ("changes", "where", "reason"),
    [
        (
            {"connector": "mlp"},
            "model.vision_encoder",
            "a language model alone leaves out vision_encoder and connector",
        ),
        ({"vision_encoder": tiny_model()["vision_encoder"]}, "model.connector", "a model needs a connector"),
        (
            {"vision_encoder": "none", "connector": "mlp"},
            "model",
            "vision_encoder none, but connector mlp: a model that",
        ),
        ({"vision_encoder": "none", "connector": {"name": "none", "depth": 2}}, "model.connector.depth", "unknown key"),
        ({"vision_encoder": {"name": "none", "pictures": "hide"}}, "model.vision_encoder.pictures", "'drop'"),
    ],
)
def test_one_alone_is_refused(tmp_path: Path, changes: dict[str, Any], where: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write_yaml(tmp_path / "x.yaml", {"model": text_model(**changes)}))
    assert any(problem.key == where and reason in problem.message for problem in caught.value.problems)


def test_a_language_model_is_needed_as_ever(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write_yaml(tmp_path / "x.yaml", {"model": {"template": "qa"}}))
    assert {problem.key for problem in caught.value.problems} == {
        *("model.vision_encoder", "model.connector", "model.language_model")
    }


# --- training -------------------------------------------------------------------------------------------------------


def test_it_learns_is_saved_and_read(experiment: dict[str, Any], tmp_path: Path) -> None:
    experiment["run"] |= {"max_epoch": 3, "valid_splits": ["val"], "test_splits": ["val"], "max_steps": 16}
    console = Console(record=True, width=120)
    run_experiment(load_config(write_yaml(tmp_path / "x.yaml", experiment)), console)
    out = tmp_path / "out"
    steps = losses(out)
    assert len(steps) == 16 and steps[-1] < steps[0] - 0.3
    shown = console.export_text()
    assert "perplexity" in shown
    model, processor = api.load(out)
    assert isinstance(model, VisionLanguageModel) and not list(model.vision_encoder.parameters())
    saved = load_file(out / "model" / "model.safetensors")
    own = dict(model.state_dict())
    assert all(name.startswith("language_model.") and torch.equal(own[name], saved[name]) for name in saved)
    rows = dict(inspect_path(str(out)))
    assert rows["vision_encoder"] == rows["connector"] == "none: a language model alone"
    assert "all of it is here" in rows["language_model"]
    assert processor.template.config.eos == "always"


def test_a_dry_run(experiment: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", str(write_yaml(tmp_path / "x.yaml", experiment)), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "48 samples" in shown and "picture" not in shown.partition("what trains")[2]


def test_an_interrupted_run_goes_on_to_the_bit(
    experiment: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment["run"] |= {"max_epoch": 2, "save_freq": 3, "num_workers": 0}
    experiment["model"]["language_model"]["config"]["attention_dropout"] = 0.2
    whole = train(experiment, tmp_path)
    experiment["run"]["output_dir"] = str(tmp_path / "broken")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 8)
        train(experiment, tmp_path)
    broken = train(experiment, tmp_path)
    assert_same_weights(whole, broken)
    assert losses(broken)[-4:] == losses(whole)[-4:]


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(experiment: dict[str, Any], tmp_path: Path) -> None:
    experiment["run"] |= {"max_steps": 4}
    one = train(experiment, tmp_path)
    options = ["run.batch_size_train=4", f"run.output_dir={tmp_path}/two"]
    result = run_train(tmp_path / "x.yaml", *options, processes=2)
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(one), rel=1e-5)
    first, second = (load_file(out / "model" / "model.safetensors") for out in (one, tmp_path / "two"))
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_a_run_that_has_not_ended_is_told(
    experiment: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Who starts from it, by ``weights`` or ``checkpoint``, is told that it is half trained."""
    out = train(experiment, tmp_path, "run.save_freq=2")
    steps = sorted((out / "checkpoints").iterdir())
    (out / "model").rename(tmp_path / "model")
    notes = []
    for key in ("checkpoint", "language_model.weights"):
        capfd.readouterr()
        assemble(load_config(write_yaml(tmp_path / "next.yaml", experiment), [f"model.{key}={out}"]).stages[0].model)
        notes.append(capfd.readouterr().err)
    assert all(f", {steps[-1].name} of a run that has not ended): loaded" in note for note in notes), notes
    (tmp_path / "model").rename(out / "model")
    assemble(load_config(tmp_path / "next.yaml", [f"model.checkpoint={out}"]).stages[0].model)
    assert "not ended" not in capfd.readouterr().err


def test_a_feature_cache_is_refused(experiment: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(FeatureCacheError, match="there is no vision encoder"):
        train(experiment, tmp_path, f"run.feature_cache={tmp_path}/cache")


def test_a_blind_twin_learns_from_the_same_file(tiny_experiment: dict[str, Any], tmp_path: Path) -> None:
    """The data of a model that sees: its pictures are not even opened."""
    tiny_experiment["model"] = blind_twin()
    tiny_experiment["datasets"]["colours"]["images"] = str(tmp_path)
    out = train(tiny_experiment, tmp_path)
    assert len(losses(out)) == 6
    tiny_experiment["model"]["vision_encoder"]["pictures"] = "refuse"
    tiny_experiment["run"]["output_dir"] = str(tmp_path / "other")
    tiny_experiment["run"]["on_bad_sample"] = "raise"
    with pytest.raises(SampleError, match="no vision encoder"):
        train(tiny_experiment, tmp_path)


# --- serving --------------------------------------------------------------------------------------------------------


def test_talking_without_pictures(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, processor, _ = assemble(parse_model(text_model(template="qa"), "test"))
    chat = Chat(model.eval(), processor, max_new_tokens=4)
    assert not chat.sees
    assert chat.ask("what is it?") and chat.ask("and now?")
    with pytest.raises(SampleError, match="no vision encoder"):
        chat.ask("what is it?", [picture(tmp_path)])
    assert len(chat.messages) == 4

    lines = iter(["what?", f"/image {picture(tmp_path)}", "/quit"])

    class Output:
        text = ""

        def write(self, text: str) -> None:
            self.text += text

        def flush(self) -> None: ...

        def isatty(self) -> bool:
            return False

    shown = [Image.open(picture(tmp_path))]  # --image-file
    run_terminal(chat, DemoConfig(), shown, input=lambda _: next(lines), output=(said := Output()))  # type: ignore[arg-type]
    assert said.text.count("it takes no pictures") == 2 and "(no answer)" not in said.text
    assert "no picture yet" not in said.text and "/image" not in said.text


def test_a_blind_twin_talks_about_pictures_that_it_does_not_see(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, processor, _ = assemble(parse_model(blind_twin(), "test"))
    seen, alone = (Chat(model.eval(), processor, max_new_tokens=6) for _ in range(2))
    for question in ("what is it?", "why?"):
        images = [picture(tmp_path)] if question == "what is it?" else []
        assert seen.ask(question, images) == alone.ask(question)
    assert seen.messages == alone.messages and seen.num_images == 0


def test_the_page_has_no_picture_box() -> None:
    from minivlm.serve.web import build_page
    from minivlm.serve.web_handlers import Handlers

    model, processor, _ = assemble(parse_model(text_model(template="qa"), "test"))

    def factory() -> Chat:
        return Chat(model.eval(), processor, max_new_tokens=3)

    blocks = build_page(factory, DemoConfig()).get_config_file()["components"]
    (box,) = (block for block in blocks if block["props"].get("elem_id") == "picture")
    (column,) = (block for block in blocks if block["type"] == "column" and not block["props"]["visible"])
    (title,) = (block for block in blocks if block["props"].get("elem_id") == "title")
    assert box and column and "takes no pictures" in title["props"]["value"]
    shown = list(Handlers(factory, sees=False).ask("what?", None, 1, 0.0, None))
    assert [message["role"] for message in shown[-1][0]] == ["user", "assistant"]


def test_a_blind_twin_side_by_side(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """``minivlm compare`` asks both about the pictures; one that refuses them says so."""
    folder = tmp_path / "images"
    folder.mkdir()
    picture(folder)
    files = []
    for name, section in (("sees", tiny_model()), ("blind", blind_twin()), ("text", text_model(template="qa"))):
        files.append(str(write_yaml(tmp_path / f"{name}.yaml", {"model": section, "run": {"device": "cpu"}})))
    command = ["--images", str(folder), "--question", "what?", "--max-new-tokens", "2"]
    assert cli.main(["compare", *files[:2], *command, "--output", str(tmp_path / "two")]) == 0
    capfd.readouterr()
    assert cli.main(["compare", *files, *command, "--output", str(tmp_path / "again")]) == 1
    said = (
        "1 of 3 answers are missing:\n  picture.png (text.yaml): it has a picture, but the model has no vision encoder"
    )
    assert said in capfd.readouterr().err
    answers = [json.loads(line) for line in (tmp_path / "again" / "answers.jsonl").read_text().splitlines()]
    assert ["error" in answer for answer in answers] == [False, False, True]
    assert "no vision encoder" in answers[2]["error"]


def test_answers_to_a_file_of_questions(
    tmp_path: Path, experiment: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    """``minivlm generate``: records without pictures are answered, one with a picture is named."""
    experiment["run"]["max_steps"] = 1
    experiment["model"]["template"] = "qa"
    experiment["datasets"] = chats(tmp_path)
    out = train(experiment, tmp_path)
    picture(tmp_path)
    asked = [{"image": [], "prompt": "what?"}, {"prompt": "what?"}, {"image": "picture.png", "prompt": "what?"}]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, asked)))
    target = tmp_path / "answers.jsonl"
    command = ["generate", str(out), "--input", str(tmp_path / "asked.jsonl"), "--output", str(target)]
    assert cli.main([*command, "--device", "cpu", "--max-new-tokens", "3"]) == 1
    first, second, third = (json.loads(line) for line in target.read_text().splitlines())
    assert first["answer"] == second["answer"] and "no vision encoder" in third["error"]
    capfd.readouterr()
    shown = ["--image-file", str(tmp_path / "picture.png"), "--query", "what?", "--device", "cpu"]
    assert cli.main(["chat", str(out), *shown]) == 2
    assert re.search("^it has a picture, but the model has no vision encoder", capfd.readouterr().err, re.MULTILINE)


# --- from one stage to the next -------------------------------------------------------------------------------------


def chats(folder: Path) -> dict[str, Any]:
    turns = [("user", "what is it?"), ("assistant", "a cat"), ("user", "red?"), ("assistant", "yes")]
    record = {"conversations": [{"role": role, "content": content} for role, content in turns]}
    (folder / "chats.jsonl").write_text(f"{json.dumps(record)}\n" * 16)
    return {"llava_json": {"annotations": str(folder / "chats.jsonl")}}


def test_from_a_tokenizer_to_a_model_that_sees(
    experiment: dict[str, Any], tiny_experiment: dict[str, Any], tmp_path: Path, texts: Path
) -> None:
    """Tokenizer, texts, chats, an answer; then the language model is put behind an encoder, equal to the bit."""
    made = tmp_path / "tokenizer"
    assert cli.main(["train-tokenizer", str(texts), "--output", str(made), "--vocab-size", "300"]) == 0
    experiment["model"]["language_model"]["tokenizer"] = str(made)
    experiment["run"]["max_steps"] = 2
    first = train(experiment, tmp_path)
    experiment["model"] = {"checkpoint": str(first), "template": "minimind_v1"}
    experiment["datasets"] = chats(tmp_path)
    experiment["run"]["output_dir"] = str(tmp_path / "sft")
    second = train(experiment, tmp_path)
    model, processor = api.load(second, device="cpu")
    assert isinstance(Chat(model, processor, max_new_tokens=3).ask("what is it?"), str)
    assert processor.template.config.assistant_prefix == "<s>assistant"

    sees = tiny_experiment["model"]
    sees["language_model"] |= {"tokenizer": str(made), "weights": str(second)}
    own, _, _ = assemble(parse_model(sees, "test"))
    assert own.connector.tokens_per_image == 4
    theirs = model.language_model.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in own.language_model.state_dict().items())
    tiny_experiment["run"] |= {"max_steps": 2, "output_dir": str(tmp_path / "vlm")}
    assert len(losses(train(tiny_experiment, tmp_path))) == 2

    sees["language_model"]["tokenizer"] = "asset:quickstart"
    with pytest.raises(CheckpointError, match=r"asset:quickstart is not the tokenizer that .*sft was trained with"):
        assemble(parse_model(sees, "test"))


@pytest.mark.parametrize("key", ["checkpoint", "weights"])
def test_a_folders_own_tokenizer_stands_in_front_of_a_presets(
    key: str, experiment: dict[str, Any], tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage that starts from it need not name it again; one that names another is refused."""
    monkeypatch.setenv("MINIVLM_MINIMIND_V1_TOKENIZER", "asset:quickstart")
    made = tmp_path / "tokenizer"
    assert cli.main(["train-tokenizer", str(texts), "--output", str(made), "--vocab-size", "300"]) == 0
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 1000}
    preset = {"arch": "minimind_v", "model_type": "v1_small", **NONE, "language_model": {"config": sizes}}
    named = {"config": sizes, "tokenizer": str(made)}
    experiment["model"] = {**preset, "template": "text", "language_model": named}
    experiment["run"] |= {"max_steps": 1}
    start = str(train(experiment, tmp_path))
    later = {**preset, "checkpoint": start} if key == "checkpoint" else preset
    language = {"config": sizes} if key == "checkpoint" else {"config": sizes, "weights": start}
    for named in ({}, {"tokenizer": str(made)}, {"tokenizer": "asset:quickstart"}):
        file = write_yaml(tmp_path / "later.yaml", {"model": {**later, "language_model": language | named}})
        if "asset:quickstart" in named.values():
            with pytest.raises(CheckpointError, match=r"asset:quickstart is not the tokenizer that .*out was trained"):
                api.load(file, device="cpu")
            continue
        _, processor = api.load(file, device="cpu")
        assert len(processor.tokenizer) == 300


def test_a_checkpoint_of_the_other_kind_says_what_to_do(
    experiment: dict[str, Any], tiny_experiment: dict[str, Any], tmp_path: Path
) -> None:
    for each in (experiment, tiny_experiment):
        each["run"] |= {"max_steps": 1, "batch_size_train": 4}
    tiny_experiment["run"]["output_dir"] = str(tmp_path / "vlm")
    text, vlm = train(experiment, tmp_path), train(tiny_experiment, tmp_path)
    for start, other in ((text, tiny_model()), (vlm, text_model(**NONE))):
        with pytest.raises(CheckpointError, match=r"only one of the two sees.*model.language_model.weights: "):
            assemble(parse_model({**other, "checkpoint": str(start)}, "test"))
    with pytest.raises(ModelError, match="vision_encoder none, but connector mlp"):
        assemble(ModelConfig(checkpoint=str(vlm), vision_encoder=parse_model(text_model(), "test").vision_encoder))
    twin = blind_twin()
    twin["language_model"]["weights"] = str(vlm)
    assert assemble(parse_model(twin, "test"))[1].pictures == "drop"


# --- files of others ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_golden_minimind_v_language_models_alone(name: str, tmp_path: Path) -> None:
    """``*_llm.pth`` into a model without encoder: the logits of the whole model's language model; and back."""
    file = tmp_path / "llm.pth"
    torch.save(language_state(name), file)
    given = {**golden_section(name), **NONE}
    given["language_model"] = {"tokenizer": "asset:quickstart", "config": language_config(settings(name))}
    given["language_model"]["weights"] = str(file)
    model, _, _ = assemble(parse_model(given, "golden set"))
    same_logits(name, model.eval())
    yaml = write_yaml(tmp_path / "model.yaml", {"model": given})
    assert cli.main(["export", str(yaml), str(tmp_path / "back.pth"), "--to", "minimind_llm"]) == 0
    back, original = torch.load(tmp_path / "back.pth"), language_state(name)
    assert back.keys() == original.keys() and all(torch.equal(back[key], original[key].float()) for key in back)


@pytest.mark.parametrize("target", ["transformers", "minimind", "llava", "mgm"])
def test_formats_of_models_that_see_are_refused(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    yaml = write_yaml(tmp_path / "model.yaml", {"model": text_model()})
    assert cli.main(["export", str(yaml), str(tmp_path / "out"), "--to", target]) == 2
    assert "this one is a language model alone" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_folder_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    yaml = write_yaml(tmp_path / "model.yaml", {"model": text_model()})
    assert cli.main(["export", str(yaml), str(tmp_path / "llama"), "--to", "transformers_llm"]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llama")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "the cat"}], return_dict=True)["input_ids"]
    _, processor, _ = assemble(parse_model(text_model(), "test"), meta=True)
    assert ids == processor.prompt([{"role": "user", "content": "the cat"}]).input_ids[0].tolist()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "llama").config.model_type == "llama"
