"""Foreign formats as tables: what their tensors are called here, which of them count, and what sizes they tell.

In a pattern ``#`` stands for a number and ``*`` for one or more characters of any kind; ``**`` is anything or
nothing, which does not matter. A format is a table (see :mod:`minivlm.checkpoints.minigpt4`); everything that is done
with one is done here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from minivlm.checkpoints.files import WeightFile
from minivlm.checkpoints.report import CheckpointError, LoadReport, fill
from minivlm.models.base import PartModule
from minivlm.models.lora import is_adapter
from minivlm.models.vlm import VisionLanguageModel

Row = tuple[str, str]


@dataclass(frozen=True)
class Rule:
    """One name, or a family of names, of a file: what it is called in our model.

    Several of ours share the rows of one tensor of theirs evenly, in order (a fused Wqkv), or with ``copied`` have
    all of it each (the A matrix of its adapter). The other way round ``stacked`` is ``(k, n)`` for the k-th of n
    tensors whose rows make up one entry of ours, the number of the entry being the last ``#`` (an expert's matrices).
    ``interleaved`` says that rotary embeddings turn neighbouring rows of an attention head there, rows 2i and 2i + 1,
    and rows i and half a head + i here.
    Without ``ours`` it is ignored, and ``why`` is the reason. With both, ``why`` is the reason for leaving out what is
    numbered higher than anything in the model.
    """

    theirs: str
    ours: str | tuple[str, ...] | None = None
    why: str = ""
    copied: bool = False
    stacked: tuple[int, int] | None = None
    interleaved: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """What it is called in our model."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours or ()


@dataclass(frozen=True)
class Size:
    """A size that names and shapes tell: dimension ``dim`` of the first tensor that fits ``name``.

    ``dim`` None counts the numbers that ``#`` takes. ``key`` is the setting that must agree with it;
    ``at_least`` lets a file hold more than the model wants.
    """

    what: str
    key: str
    name: str
    dim: int | None
    at_least: bool = False


@dataclass(frozen=True)
class Format:
    """One kind of file. ``key`` is the setting that takes it, ``base`` says that its weights are a fixed base.

    A file is of this format if some name fits each pattern of ``signature`` and the ``config.json`` beside it, if
    there is one, has the keys in ``wants``. ``always`` and ``together`` are
    patterns of our names: the model's tensors of the first must all be in the file, those of each of the second
    all or none. ``initial`` names what keeps its initial value, ones and zeros, when the file does not hold it.
    ``repeats`` names what the file holds whether it has been trained or not.
    ``ranks`` says how many dimensions a tensor has whose name, in the file, ends so.
    ``prepare`` gives the tensors that count, where they are not simply those of the file.
    ``explain`` tells in words what a comparison of shapes would not, or None; ``describe`` adds to what
    ``sizes`` tell about a file.
    """

    name: str
    key: str
    signature: tuple[str, ...]
    rules: tuple[Rule, ...]
    always: tuple[str, ...]
    together: tuple[str, ...] = ()
    wants: tuple[str, ...] = ()
    initial: tuple[str, ...] = ()
    repeats: tuple[str, ...] = ()
    sizes: tuple[Size, ...] = ()
    ranks: Mapping[str, int] = field(default_factory=dict)
    base: bool = False
    prepare: Callable[[WeightFile], Mapping[str, Tensor]] = lambda file: file.tensors
    explain: Callable[[WeightFile, VisionLanguageModel], str | None] = lambda file, model: None
    describe: Callable[[WeightFile], list[Row]] = lambda file: []

    @property
    def part(self) -> str:
        """The part whose ``weights:`` takes such a file; empty for one of a whole model, which every part takes."""
        return self.key.split(".")[1] if self.key.endswith(".weights") else ""

    def always_of(self, part: str) -> tuple[str, ...]:
        """What must be in the file when ``part`` (empty: the model) is filled from it."""
        return (f"{part}.*",) if part and not self.part else self.always

    def recognises(self, names: Iterable[str], settings: Mapping[str, Any] | None = None) -> bool:
        """Whether a file with these names, and ``settings`` beside it, is of this format."""
        if isinstance(settings, Mapping) and any(settings.get(key) is None for key in self.wants):
            return False
        listed = list(names)
        return all(any(matches(pattern, name) for name in listed) for pattern in self.signature)

    def wrong_rank(self, tensors: Mapping[str, Tensor]) -> str | None:
        """What is wrong with a tensor that has not the dimensions of its name; None if there is no such one."""
        for name, tensor in tensors.items():
            for ending, rank in self.ranks.items():
                if name.endswith(ending) and tensor.dim() != rank:
                    return f"{name} has the shape {tuple(tensor.shape)}, but {rank} dimensions are wanted"
        return None

    def back(self, tensors: Mapping[str, Tensor], head_dim: int | None = None) -> tuple[dict[str, Tensor], list[str]]:
        """Tensors of our model by the names of the file, and those of ours for which it has no place.

        ``head_dim`` is the model's, which interleaved rows ask for.
        """
        done: dict[str, Tensor] = {}
        lost = []
        for name, tensor in tensors.items():
            if entries := self._unstacked(name, tensor):
                done |= entries
                continue
            rule, theirs, ours = self._place(name)
            whole = [tensors[each] for each in ours if each in tensors]
            if rule is None or len(whole) < len(ours):
                lost.append(name)
            elif theirs not in done:
                done[theirs] = whole[0] if len(whole) == 1 else torch.cat(whole)
                if rule.interleaved:
                    assert head_dim, "interleaved rows need the size of a head"
                    done[theirs] = _interleave(done[theirs], head_dim)
            elif len(ours) == 1 and not torch.equal(done[theirs], tensors[name]):  # should be one, but are two
                lost.append(name)
        return done, lost

    def _unstacked(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """What the file calls the shares of a tensor of ours that is stacked; empty for any other."""
        done: dict[str, Tensor] = {}
        shares: set[tuple[int, int]] = set()  # other rules for one share are other spellings of the first one
        for rule in self.rules:
            found = _compiled(rule.names[0]).fullmatch(name) if rule.stacked else None
            if found and rule.stacked and rule.stacked not in shares:
                shares.add(rule.stacked)
                share, count = rule.stacked
                for number, entry in enumerate(tensor):
                    done[_fill(rule.theirs, (*found.groups(), str(number)))] = entry.chunk(count)[share]
        return done

    def _place(self, name: str) -> tuple[Rule | None, str, list[str]]:
        """The rule for a tensor of ours, what the file calls it, and which tensors of ours that one consists of."""
        for rule in self.rules:
            for pattern in rule.names:
                found = _compiled(pattern).fullmatch(name)
                if found:
                    parts = [name] if rule.copied else [_fill(each, found.groups()) for each in rule.names]
                    return rule, _fill(rule.theirs, found.groups()), parts
        return None, "", []


@dataclass
class Translation:
    """The tensors of a file by our names, their own names, and what was left out for which reason."""

    tensors: dict[str, Tensor]
    theirs: dict[str, str]
    ignored: dict[str, list[str]]


def prefixed(prefix: str, rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """The rules for a module that other files hold below a prefix."""
    return tuple(replace(rule, theirs=prefix + rule.theirs) for rule in rules)


def translate(
    form: Format, tensors: Mapping[str, Tensor], own: Iterable[str] | None = None, head_dim: int | None = None
) -> Translation:
    """Give the tensors of a file our names.

    With ``own``, the names of a model, what is numbered beyond it is left out where the rules allow it, and
    ``head_dim`` is the size of its attention heads, without which interleaved rows stay so. A name that no rule knows
    stays as it is.
    """
    done = Translation({}, {}, {})
    known = None if own is None else set(own)
    modules = None if known is None else {m for name in known for m in _numbered(name)}
    stacks: dict[str, dict[tuple[int, int], str]] = {}
    for name, tensor in tensors.items():
        rule, ours = _apply(form, name)
        surplus = modules is not None and rule and rule.why and not all(modules >= _numbered(each) for each in ours)
        if rule and (not ours or surplus):
            done.ignored.setdefault(rule.why, []).append(name)
            continue
        if rule and rule.stacked:
            stacks.setdefault(ours[0], {})[_last_number(rule, name), rule.stacked[0]] = name
            continue
        if rule and rule.interleaved and head_dim and tensor.dim() and len(tensor) % head_dim == 0:
            tensor = _part(tensor, head_dim)
        shares = [tensor] * len(ours) if not rule or rule.copied or not tensor.dim() else tensor.chunk(len(ours))
        for each, share in zip(ours, shares, strict=False):  # what cannot be shared has another shape than is wanted
            done.tensors[each], done.theirs[each] = share, name
    for each, names in stacks.items():
        _stack(done, each, names, tensors)
    return done


def _part(rows: Tensor, head_dim: int) -> Tensor:
    """Of every head first the even rows, then the odd ones."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def _interleave(rows: Tensor, head_dim: int) -> Tensor:
    """The way back from :func:`_part`."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def _last_number(rule: Rule, name: str) -> int:
    found = _compiled(rule.theirs).fullmatch(name)
    assert found is not None
    return int(found.groups()[-1])


def _stack(done: Translation, ours: str, names: Mapping[tuple[int, int], str], tensors: Mapping[str, Tensor]) -> None:
    """One tensor of ours from the named ones at (entry, share); where one is lacking they keep their names."""
    entries, shares = (range(max(at[axis] for at in names) + 1) for axis in (0, 1))
    if len(names) == len(entries) * len(shares):
        parts = [[tensors[names[entry, share]] for share in shares] for entry in entries]
        if parts[0][0].dim() and len({tensor.shape for part in parts for tensor in part}) == 1:
            done.tensors[ours] = torch.stack([torch.cat(part) for part in parts])
            done.theirs[ours] = names[0, 0]
            return
    for name in names.values():
        done.tensors[name], done.theirs[name] = tensors[name], name


def load_foreign(model: VisionLanguageModel, file: WeightFile, form: Format, key: str, part: str = "") -> LoadReport:
    """Fill what a file of a foreign format holds into a model; raises like :func:`check_foreign`."""
    report, tensors = check_foreign(model, file, form, key, part)
    fill(model, tensors, f"{key}: {file.path}")
    return report


def check_foreign(
    model: VisionLanguageModel, file: WeightFile, form: Format, key: str, part: str = ""
) -> tuple[LoadReport, dict[str, Tensor]]:
    """Compare a file with a model, of which only names and shapes count; returns its tensors by our names, too.

    Of a file of a whole model, ``part`` takes what belongs to it. Raises :class:`CheckpointError` with the reason
    and a report when it does not fit.
    """
    own = model.state_dict(keep_vars=True)
    given = translate(form, form.prepare(file), own, model.language_model.head_dim)
    if part and not form.part:
        _leave_others(given, part)
    needed = [*form.always_of(part), *(p for p in form.together if any(matches(p, name) for name in given.tensors))]
    wanted = {n: t for n, t in own.items() if n in given.tensors or any(matches(p, n) for p in needed)}
    tied = {id(own[name]) for name in given.tensors if name in own}  # a head that is the embeddings is stored once
    elsewhere = tuple(p for p in _inner_bases(model) if not any(name.startswith(p) for name in given.tensors))
    lacking = {
        n
        for n, t in wanted.items()
        if n not in given.tensors and (id(t) in tied or _may_lack(form, n, part) or n.startswith(elsewhere))
    }
    wanted = {n: t for n, t in wanted.items() if n not in lacking}
    report = LoadReport.compare(wanted, given.tensors, model.fits)
    report.unexpected = [given.theirs[name] for name in report.unexpected]
    report.ignored, report.where, report.what = given.ignored, f"{key} {file.path}", form.name
    reason = form.explain(file, model) or _another_size(form, given.tensors, own)
    if reason or not report.fits:
        text = reason or "it belongs to another model"
        raise CheckpointError(f"{key}: {file.path} ({form.name}) does not fit: {text}\n{report}")
    return report, given.tensors


def _leave_others(given: Translation, part: str) -> None:
    """Keep what belongs to one part."""
    for name in [name for name in given.tensors if not name.startswith(f"{part}.")]:
        del given.tensors[name], given.theirs[name]


def _may_lack(form: Format, name: str, part: str) -> bool:
    """Whether a tensor that is wanted need not be in the file: a base knows no adapters and leaves initial values."""
    return bool(part or form.base) and (is_adapter(name) or any(matches(pattern, name) for pattern in form.initial))


def _inner_bases(model: VisionLanguageModel) -> tuple[str, ...]:
    """The beginnings of names of encoders inside another that a folder of their own gives (the towers of ``dual``)."""
    inner = model.vision_encoder.named_children()
    return tuple(f"vision_encoder.{name}." for name, child in inner if _has_path(child))


def _has_path(module: Any) -> bool:
    return isinstance(module, PartModule) and bool(getattr(getattr(module, "config", None), "path", None))


def measure(size: Size, tensors: Mapping[str, Any]) -> int | None:
    """A size of tensors with our names; None if they do not tell it."""
    found = [(match, name) for name in tensors if (match := _compiled(size.name).fullmatch(name))]
    if not found:
        return None
    return len({match[1] for match, _ in found}) if size.dim is None else int(tensors[found[0][1]].shape[size.dim])


def _another_size(form: Format, given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str | None:
    for size in form.sizes:
        there, here = measure(size, given), measure(size, own)
        if there is not None and here is not None and there != here and not (size.at_least and there > here):
            return f"{size.what}: {there} in the file, {here} in the model ({size.key})"
    return None


def matches(pattern: str, name: str) -> bool:
    """Whether a name fits a pattern with ``#`` and ``*``."""
    return _compiled(pattern).fullmatch(name) is not None


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    escaped = re.escape(pattern).replace(r"\*\*", ".*")
    return re.compile(escaped.replace(r"\#", r"(\d+)").replace(r"\*", r"(.+)"))


def _apply(form: Format, name: str) -> tuple[Rule | None, list[str]]:
    """The rule for a name of the file, and the names in our model; without a rule it keeps its name."""
    for rule in form.rules:
        found = _compiled(rule.theirs).fullmatch(name)
        if found:
            return rule, [_fill(ours, found.groups()) for ours in rule.names]
    return None, [name]


def _fill(pattern: str, values: Iterable[str]) -> str:
    rest = iter(values)
    return re.sub(r"[#*]", lambda _: next(rest), pattern)


def _numbered(name: str) -> set[str]:
    """The modules on the way to a name that end with a number, such as ``vit.blocks.3``."""
    return {name[: found.end()] for found in re.finditer(r"\.\d+(?=\.)", name)}
