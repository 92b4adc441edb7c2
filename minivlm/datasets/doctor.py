"""The data doctor: reads samples as training would and says what is wrong with them.

:func:`check_dataset` counts findings of each kind with their first examples, and token lengths when a
processor is given; :func:`print_report` prints them. :func:`render_mask` shows which tokens of a sample
are supervised.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any, Protocol

from minivlm.datasets.base import DatasetBuilder
from minivlm.datasets.records import RecordDataset
from minivlm.datasets.streams import SampleStream, ShardError, sample_or_error
from minivlm.evaluation.vqa import evenly_spaced
from minivlm.processors.image import open_image
from minivlm.types import IGNORE_INDEX, IMAGE_MARKER, IMAGE_TOKEN_ID, Encoded, Sample, SampleError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

ADVICE = {
    "shard": "fetch or make it again; training skips what it cannot read of it",
    "record": "correct the record in the annotation file",
    "picture path": "give a path below the folder `images`",
    "missing picture": "put the file there, or correct the setting `images` of the dataset",
    "unreadable picture": "replace the file; it is broken, or no picture",
    "marker count": f"write {IMAGE_MARKER} once for every picture of the record",
    "role order": "let user and assistant take turns, the user first, the assistant last",
    "nothing supervised": "give the sample an answer, within the longest sequence",
    "too long": "shorten the text, or raise model.processor.max_length",
    "refused": "see the reason",
    "unknown key": "rename the key; it is ignored as it stands",
    "other ending": "nothing to do: the file that is there is taken",
    "other name": "nothing to do: `renames` of the dataset leads to the file that is there",
    "joined markers": "nothing to do where a message shows one picture; the template makes one marker of several",
    "lost question": "use another template, or give every turn its picture: of this one's user only pictures stay",
}
"""Kinds of findings, in the order of the report, and what to do about them."""
HARMLESS = ("other ending", "other name", "joined markers")
"""Kinds that are told, but are no fault."""
TEXT_KINDS = ("record", "picture path", "nothing supervised")
"""Kinds that make a record useless by its text alone, and so are looked for in all records."""

_REASONS = {
    "nothing is supervised": "nothing supervised",
    "the answer is empty": "nothing supervised",
    "do not fit": "too long",
    "markers in the text": "marker count",
    "is due": "role order",
    "no user turn": "role order",
}
"""Parts of the reasons with which a processor refuses a sample, and their kinds."""

UNLIMITED = 2**31
EXAMPLES = 3


class DoctorProcessor(Protocol):
    """What the doctor asks of a processor."""

    def encode(self, sample: Sample) -> Encoded:
        """The sample as numbers, or a :class:`SampleError`."""


@dataclass
class Finding:
    """How often a kind was found, and the first examples as (id of the sample, what is wrong)."""

    count: int = 0
    examples: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Report:
    """What was found in a split.

    ``bad`` of the ``checked`` samples cannot be used; a stream has no ``total``. Of ``skimmed`` further records the
    text alone was looked at. ``lengths`` and ``supervised``
    are tokens of the samples, before anything is cut; they are empty without a processor.
    """

    dataset: str
    split: str
    total: int | None
    checked: int = 0
    skimmed: int = 0
    bad: int = 0
    findings: dict[str, Finding] = field(default_factory=dict)
    pictures: Counter[int] = field(default_factory=Counter)
    lengths: list[int] = field(default_factory=list)
    supervised: list[int] = field(default_factory=list)
    max_length: int | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing was found that is a fault."""
        return set(self.findings) <= set(HARMLESS)

    def add(self, kind: str, sample_id: str, text: str) -> None:
        """Count a finding and keep it if it is one of the first of its kind."""
        finding = self.findings.setdefault(kind, Finding())
        finding.count += 1
        if len(finding.examples) < EXAMPLES:
            finding.examples.append((sample_id, text))


def check_dataset(
    builder: DatasetBuilder[Any], split: str, processor: DoctorProcessor | None = None, limit: int = 1000
) -> Report:
    """Read at most ``limit`` samples, spread evenly over the split, and open their pictures.

    The text of all other records is looked through as well, where the data are records. Of a stream the samples
    come from several places; what is broken as a whole is looked for in all of it.

    Raises :class:`DatasetError` if the split cannot be opened at all.
    """
    samples = builder.build(split)
    name = builder.name or type(builder).__name__
    if isinstance(samples, SampleStream):
        return _check_stream(samples, Report(name, split, None), processor, limit)
    total = min(len(samples), getattr(builder.config, "max_samples", None) or len(samples))
    report = Report(name, split, total)
    encoder = None if processor is None else _Encoder(processor, report)
    chosen = list(evenly_spaced(total, limit))
    for number in chosen:
        complaints = samples.check(number) if hasattr(samples, "check") else ()
        _examine(sample_or_error(samples, number), complaints, encoder, report)
    if isinstance(samples, RecordDataset):
        _skim(samples, sorted(set(range(total)) - set(chosen)), report)
    return report


def _skim(samples: RecordDataset[Any], numbers: Sequence[int], report: Report) -> None:
    """Look for what makes a record useless by its text alone: a handful in a million spoil no sample of samples."""
    for number in numbers:
        found: dict[str, list[str]] = {}
        sample_id = str(number)
        try:
            record = samples.record(number)
            sample_id = samples.sample_id(record, number)
            for text in samples.complaints(record, number):
                kind, _, what = text.partition(": ")
                found.setdefault(kind, []).append(what)
        except SampleError as error:
            found["record"] = [error.reason]
        for kind in found.keys() & TEXT_KINDS:
            report.add(kind, sample_id, "; ".join(found[kind]))
    report.skimmed = len(numbers)


def _check_stream(stream: SampleStream, report: Report, processor: DoctorProcessor | None, limit: int) -> Report:
    encoder = None if processor is None else _Encoder(processor, report)
    broken = {error.sample_id: error for error in stream.faults()}
    for error in broken.values():
        report.add("shard", error.sample_id, error.reason)
    for sample in stream.look(limit):
        if not isinstance(sample, ShardError):
            _examine(sample, (), encoder, report)
        elif sample.sample_id not in broken:
            report.add("shard", sample.sample_id, sample.reason)
    return report


def _examine(sample: Sample | SampleError, complaints: Iterable[str], encoder: _Encoder | None, report: Report) -> None:
    """Add a sample, and what is wrong with it, to the report."""
    report.checked += 1
    found: dict[str, list[str]] = {}
    usable = False
    try:
        for text in complaints:
            kind, _, what = text.partition(": ")
            found.setdefault(kind, []).append(what)
        if isinstance(sample, SampleError):
            raise sample
        sample_id = sample.id
        report.pictures[len(sample.images)] += 1
        if encoder is None:
            usable = _examine_bare(sample, found)
        else:
            # Where markers must stand and answers lack is the template's affair, so the processor has the last word.
            found.pop("marker count", None)
            found.pop("nothing supervised", None)
            usable = encoder.examine(sample, found)
    except SampleError as error:
        sample_id = error.sample_id
        if not any(error.reason in texts for texts in found.values()):
            found.setdefault("record", []).append(error.reason)
    for kind, texts in found.items():
        report.add(kind, sample_id, "; ".join(texts))
    report.bad += not usable


def _examine_bare(sample: Sample, found: dict[str, list[str]]) -> bool:
    """What can be said without a processor."""
    markers = sum((message.content or "").count(IMAGE_MARKER) for message in sample.messages)
    if markers != len(sample.images):
        text = f"{markers} x {IMAGE_MARKER} in the text for {len(sample.images)} picture(s)"
        found["marker count"] = [text]
    if not any(message.role == "assistant" and message.content for message in sample.messages):
        found["nothing supervised"] = ["there is no answer"]
    pictures = _examine_pictures(sample)
    found |= pictures
    return not pictures


def _examine_pictures(sample: Sample) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for image in sample.images:
        try:
            open_image(image)
        except FileNotFoundError as error:
            found.setdefault("missing picture", []).append(str(error))
        except OSError as error:
            found.setdefault("unreadable picture", []).append(str(error))
    return found


class _Encoder:
    """Encodes samples without limits, so that true lengths are seen, then judges them by the limits."""

    def __init__(self, processor: DoctorProcessor, report: Report):
        config: Any = getattr(processor, "config", None)
        self.report = report
        self.processor = processor
        self.uncut = processor
        report.max_length = getattr(config, "max_length", None)
        if dataclasses.is_dataclass(config) and not isinstance(config, type):
            limits = {"max_length": UNLIMITED, "max_answer_tokens": None}
            known = {f.name for f in dataclasses.fields(config)} & set(limits)
            self.uncut = copy.copy(processor)
            self.uncut.config = dataclasses.replace(config, **{key: limits[key] for key in known})  # type: ignore

    def examine(self, sample: Sample, found: dict[str, list[str]]) -> bool:
        """Add what is wrong to ``found``; returns whether training can use the sample."""
        try:
            encoded = self.uncut.encode(sample)
            if encoded.num_supervised == 0:
                raise SampleError(sample.id, "nothing is supervised")
            found |= _examine_markers(sample, getattr(self.processor, "template", None))
            size = len(encoded.input_ids)
            self.report.lengths.append(size)
            self.report.supervised.append(encoded.num_supervised)
            limit = self.report.max_length
            if limit is not None and size > limit:
                found["too long"] = [f"{size} tokens, at most {limit}"]
                cut = self.processor.encode(sample)
                found["too long"][0] += "; its end is cut" if cut.num_supervised else "; all of its answers are cut off"
        except SampleError as error:
            pictures = _examine_pictures(sample)
            found |= pictures or {_kind(error): [error.reason]}
            return False
        return True


def _examine_markers(sample: Sample, template: Any) -> dict[str, list[str]]:
    """What the template makes of the user's text, where a record may mean something else."""
    found = {}
    texts = [(number, m.content or "") for number, m in enumerate(sample.messages, 1) if m.role == "user"]
    markers = sum(text.count(IMAGE_MARKER) for _, text in texts)
    if markers > len(sample.images):
        found["joined markers"] = [f"{markers} x {IMAGE_MARKER} in the text for {len(sample.images)} picture(s)"]
    if template is not None and template.config.user_text == "drop":
        lost = [number for number, text in texts if IMAGE_MARKER not in text]
        if lost:
            found["lost question"] = [f"turn {', '.join(map(str, lost))} shows no picture"]
    return found


def _kind(error: SampleError) -> str:
    return next((kind for part, kind in _REASONS.items() if part in error.reason), "refused")


def print_report(report: Report, console: Console) -> None:
    """Print a report: the verdict, findings with examples and advice, pictures and token lengths."""
    from rich.text import Text

    part = "" if report.checked == report.total or report.total is None else f" of {report.total:,}"
    end = " of a stream" if report.total is None else ""
    console.print(Text(f"{report.dataset} / {report.split}: {report.checked:,}{part} samples{end} read", "bold"))
    if not report.checked:
        console.print(Text("  nothing could be read", "bold red"))
    elif report.bad:
        console.print(Text(f"  {report.bad:,} cannot be used", "bold red"))
    else:
        console.print(Text("  all of them can be used", "green"))
    if report.skimmed:
        console.print(Text(f"  of the other {report.skimmed:,} the text alone was looked at; --limit reads more whole"))
    for kind in sorted(report.findings, key=lambda kind: list(ADVICE).index(kind) if kind in ADVICE else 99):
        finding = report.findings[kind]
        what = "shards" if kind == "shard" else "samples"
        console.print(Text(f"  {kind}: {finding.count:,} {what} - {ADVICE.get(kind, '')}", "yellow"))
        for sample_id, text in finding.examples:
            console.print(Text(f"      sample '{sample_id}': {text}"), soft_wrap=True)
    pictures = ", ".join(f"{count:,} with {number}" for number, count in sorted(report.pictures.items()))
    if pictures:
        console.print(Text(f"  pictures: {pictures}"))
    if report.lengths:
        for line in (*length_lines(report), *histogram(report.lengths)):
            console.print(Text(f"  {line}"))


def length_lines(report: Report) -> list[str]:
    """Token lengths as two lines of text."""
    ordered = sorted(report.lengths)
    mean = sum(ordered) / len(ordered)
    limit = "" if report.max_length is None else f" (at most {report.max_length})"
    answers = sum(report.supervised)
    return [
        f"tokens: min {ordered[0]}, mean {mean:.1f}, p50 {percentile(ordered, 50)}, "
        f"p95 {percentile(ordered, 95)}, max {ordered[-1]}{limit}",
        f"supervised tokens: {answers / len(ordered):.1f} a sample, {100 * answers / sum(ordered):.1f} % of all",
    ]


def percentile(ordered: Sequence[int], percent: float) -> int:
    """The smallest of the sorted values that at least ``percent`` of them do not exceed."""
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def histogram(values: Sequence[int], bins: int = 10, width: int = 40) -> list[str]:
    """An ASCII histogram, a line a bin of equal width."""
    low, high = min(values), max(values)
    step = max(1, -(-(high - low + 1) // bins))
    counts = Counter((value - low) // step for value in values)
    longest = max(counts.values())
    digits = len(str(high + step))
    return [
        f"{low + place * step:>{digits}}-{low + (place + 1) * step - 1:<{digits}} "
        f"{'#' * -(-counts[place] * width // longest):<{width}} {counts[place]:,}"
        for place in range((high - low) // step + 1)
    ]


def render_mask(encoded: Encoded, tokenizer: Any) -> Text:
    """The tokens of a sample as text: supervised ones bold green, others dim, ``[image x 16]`` for pictures.

    ``tokenizer`` is one of transformers.
    """
    from rich.text import Text

    text = Text()
    sizes = iter(encoded.tokens_per_image)
    pairs = list(zip(encoded.input_ids, encoded.labels, strict=True))
    for is_image, run in groupby(pairs, key=lambda pair: pair[0] == IMAGE_TOKEN_ID):
        if is_image:
            for size in _split_run(len(list(run)), sizes):
                text.append(f"[image x {size}]", "cyan")
        else:
            _append_tokens(text, list(run), tokenizer)
    return text


def _split_run(left: int, sizes: Iterator[int]) -> Iterator[int]:
    """The sizes of the pictures that stand side by side in a run of visual tokens."""
    while left > 0:
        size = min(next(sizes, left), left)
        yield size
        left -= size


def _append_tokens(text: Text, run: list[tuple[int, int]], tokenizer: Any) -> None:
    ids: list[int] = []
    shown = ""
    for supervised, part in groupby(run, key=lambda pair: pair[1] != IGNORE_INDEX):
        ids += [token for token, _ in part]
        # Decoding from the start of the run keeps the blanks that a tokenizer drops at a start.
        decoded = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        text.append(decoded[len(shown) :], "bold green" if supervised else "dim")
        shown = decoded
