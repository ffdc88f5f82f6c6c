"""`omni-jax evaluate`: from flags to a directory of results, with progress on stderr.

Everything that can be checked is checked before the weights are read.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import numpy as np
from tqdm import tqdm
from tyro.conf import OmitArgPrefixes, UseAppendAction

from omni_jax.config import OmniConfig
from omni_jax.distributed import barrier
from omni_jax.errors import InputError
from omni_jax.evaluate.checks import check_drafting, check_settings, check_stop
from omni_jax.evaluate.context import TaskContext
from omni_jax.evaluate.data import Dataset, Sample, read_dataset
from omni_jax.evaluate.metrics import MetricName, check_metrics, load_recogniser, recognise
from omni_jax.evaluate.processes import share_of
from omni_jax.evaluate.report import Summary, current_results, summary_of, write_comparison, write_report
from omni_jax.evaluate.run import Results, check_writable, claim_directory, fingerprint_of, run, safe_results
from omni_jax.evaluate.settings import RunSettings
from omni_jax.evaluate.tasks import choose_task, missing_field
from omni_jax.flags import (
    DeviceFlags,
    EndingFlags,
    MediaFlags,
    PreparationFlags,
    SamplingFlags,
    VoiceFlags,
    keywords_of,
)
from omni_jax.loading import default_dtype
from omni_jax.models.code2wav import SAMPLES_PER_SECOND
from omni_jax.omni import Omni
from omni_jax.process import finishing
from omni_jax.rows.files import digest_of
from omni_jax.rows.row import Problem
from omni_jax.settings import Drafting, Settings
from omni_jax.weights.adapter_config import CONFIG_FILE
from omni_jax.weights.adapters import WEIGHTS_FILE, Adapter, open_adapter
from omni_jax.weights.drafters import Drafter, load_drafter
from omni_jax.weights.locate import locate
from omni_jax.weights.manifest import identity
from omni_jax.weights.model import model_config

# Rows or samples that the command names on stderr, with what is wrong with each.
MAX_NAMED = 20
# Groups of flags that a task has a use for, beside those of all.
REPLIES = ("reply", "sampling", "drafting")
USED = {"generate": REPLIES, "mt-bench": REPLIES, "speech": (*REPLIES, "speech"), "choice": (), "loglikelihood": ()}
# Loads the model with these parts, all by default.
Load = Callable[[tuple[str, ...] | None], Omni]


@dataclass(frozen=True)
class SpeechFlags(VoiceFlags):
    """How replies are spoken, for the task speech."""

    recogniser: str | None = None
    """module:function that takes float32 samples and their rate and returns what was said."""


@dataclass(frozen=True)
class DraftersFlags(Drafting):
    """How replies are drafted."""

    drafter: UseAppendAction[tuple[Path, ...]] = ()
    """Directory of a DFlash or EAGLE-3 drafter, or nano/dflash; repeat to compare several, in own directories."""


@dataclass(frozen=True)
class Evaluate:
    """Score a model on a dataset; a run that was stopped goes on where it was."""

    model: Path
    """Model id, Hugging Face directory, converted checkpoint (python -m convert SRC DST), or nano."""
    data: Path
    """JSON lines, a table, or a directory of them; rows hold messages, prompt or turns, and references."""
    output: Path
    """Directory for results, report and plots; that of a stopped run goes on."""
    adapter: Path | None = None
    """Directory of a LoRA adapter for this model, as PEFT saves it; it is merged into the weights."""
    task: Literal["auto", "generate", "choice", "loglikelihood", "speech", "mt-bench"] = "auto"
    """What to do with a row; auto looks at its fields."""
    metric: UseAppendAction[tuple[MetricName, ...]] = ()
    """How to compare a reply with its references; repeat for more. By default exact and exact_normalised."""
    split: str | None = None
    """Of a directory, only the files of this split."""
    limit: int | None = None
    """Read only this many rows."""
    slots: int = 12
    """Requests that run at once."""
    fatal: bool = False
    """Stop at the first row or sample that cannot be used; by default it is reported and left out."""
    json: bool = False
    """Machine-readable summary."""
    prompt: OmitArgPrefixes[PreparationFlags] = field(default_factory=PreparationFlags)
    media: OmitArgPrefixes[MediaFlags] = field(default_factory=MediaFlags)
    reply: OmitArgPrefixes[EndingFlags] = field(default_factory=EndingFlags)
    sampling: OmitArgPrefixes[SamplingFlags] = field(default_factory=SamplingFlags)
    speech: OmitArgPrefixes[SpeechFlags] = field(default_factory=SpeechFlags)
    drafting: OmitArgPrefixes[DraftersFlags] = field(default_factory=DraftersFlags)
    devices: OmitArgPrefixes[DeviceFlags] = field(default_factory=DeviceFlags)

    def settings(self, task: str, metrics: tuple[MetricName, ...]) -> RunSettings:
        """What the flags say about a run; InputError for a value that cannot be."""
        made = keywords_of(self.media, self.prompt, self.reply, self.sampling, self.speech, self.drafting)
        del made["drafter"], made["recogniser"]
        return RunSettings(task, metrics, self.speech.recogniser, Settings.read(made))


def evaluate(command: Evaluate, load: Load) -> Summary:
    """Run a command to its end and write its report: the summary, by drafter where there are several.

    Raises InputError for data, settings or an output directory that cannot be used, and for samples if `fatal`.
    """
    dataset = read_dataset(command.data, split=command.split, limit=command.limit)
    task = choose_task(dataset.samples) if command.task == "auto" else command.task
    _check_used(command, task)
    metrics = _metrics(command, task, dataset)
    dataset = _fitting(dataset, task, metrics)
    if dataset.problems and command.fatal:
        first = dataset.problems[0]
        raise InputError(f"{first.where}: {first.why} ({len(dataset.problems)} such rows)")
    _report_rows("skipped", [(problem.where, problem.why) for problem in dataset.problems])
    if dataset.unread:
        print(f"columns that are not read: {_listed(dataset.unread)}", file=sys.stderr)
    recogniser = _recogniser(command, task)
    settings, config = command.settings(task, metrics), model_config(command.model)
    check_settings(settings, command.slots, config)
    check_stop(settings, command.model)
    runs = _runs(command, settings, dataset, config)
    stored = [claim_directory(one.output, one.fingerprint) for one in runs]
    if len(runs) > 1:
        check_writable(command.output)
    omni = load(None if task == "speech" else ("thinker",))
    share, summaries = share_of(omni.params), {}
    for one, before in zip(runs, stored, strict=True):
        context = TaskContext(omni, settings, command.slots, one.drafter, recogniser)
        results = Results(one.output, one.fingerprint, share, before)
        summaries[one.name] = _summarised(context, results, dataset, command.fatal)
    if len(summaries) == 1:
        return next(iter(summaries.values()))
    if share.reports:
        with safe_results(command.output):
            write_comparison(command.output, summaries)
    return summaries


@dataclass(frozen=True, eq=False)
class _Run:
    """One of the command's runs: its drafter's name, "" without one, and where its results go."""

    name: str
    drafter: Drafter | None
    output: Path
    fingerprint: dict[str, Any]


def _runs(command: Evaluate, settings: RunSettings, dataset: Dataset, config: OmniConfig) -> list[_Run]:
    """One run, or one for each drafter; InputError for drafters that cannot draft for this model as the flags say."""
    paths, dtype = command.drafting.drafter, command.devices.dtype
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        raise InputError(f"drafters {names}; their directories need different names to be told apart")
    adapter = None if command.adapter is None else open_adapter(command.adapter, config)
    model, runs = _model_digest(command.model, dtype, command.devices.quantize, adapter), []
    located = [locate(path, "the drafter") for path in paths]
    for name, path in zip(names or ("",), located or (None,), strict=True):
        drafter = load_drafter(path, dtype=dtype or default_dtype()) if path else None
        check_drafting(settings, drafter, config)
        output = command.output / name if len(names) > 1 else command.output
        fingerprint = fingerprint_of(settings, model, dataset.digest, _drafter_digest(path) if path else None)
        runs.append(_Run(name, drafter, output, fingerprint))
    return runs


def _summarised(context: TaskContext, results: Results, dataset: Dataset, fatal: bool) -> Summary:
    """Do the samples that are left of a run, and write the report of all."""
    directory, share = results.directory, results.share
    note = f"the sample under way ends first, and the same command goes on with what {directory} holds"
    with finishing(note), results:
        remaining = results.remaining(dataset.samples)
        if share.reports and (changed := results.changed(dataset.samples)):
            why = "its media have changed since it was scored"
            _report_rows("again", [(f"sample {sample.id}", why) for sample in changed])
        _run_all(context, remaining, results, fatal)
        barrier("done")
        found = current_results(dataset, results.stored.read())
        summary = summary_of(context.settings.task, dataset, found)
        if share.reports:
            with safe_results(directory):
                write_report(directory, summary, dataset, found, results.fingerprint)
            failed = [(f"sample {result['id']}", result["error"]) for result in found if "error" in result]
            _report_rows("failed", failed)
    return summary


def _run_all(context: TaskContext, samples: Sequence[Sample], results: Results, fatal: bool) -> None:
    """Run samples, with their number and the tokens per second on stderr."""
    start, tokens = perf_counter(), 0
    shown = None if results.share.reports else True
    with tqdm(total=len(samples), unit="sample", file=sys.stderr, disable=shown) as bar:
        for result in run(context, samples, results, fatal):
            tokens += sum(turn["stats"]["new_tokens"] for turn in result.get("turns", ()))
            bar.update()
            if tokens:
                bar.set_postfix_str(f"{tokens / (perf_counter() - start):.1f} token/s")


def _check_used(command: Evaluate, task: str) -> None:
    """InputError for a flag that the task has no use for."""
    for name in {*REPLIES, "speech"} - set(USED[task]):
        flags = getattr(command, name)
        stated = [one.name for one in fields(flags) if getattr(flags, one.name) != getattr(type(flags)(), one.name)]
        if stated:
            raise InputError(f"the task {task!r} has no use for --{stated[0].replace('_', '-')}; leave it out")


def _metrics(command: Evaluate, task: str, dataset: Dataset) -> tuple[MetricName, ...]:
    """The metrics of a run: those of the flags, or the usual ones where there are references."""
    if command.metric and task not in ("generate", "mt-bench"):
        raise InputError(f"the task {task!r} has its own scores; leave out --metric")
    if task == "speech":
        return check_metrics(("wer", "cer"))
    if command.metric:
        return check_metrics(command.metric)
    # Rows without references are reported like any other missing field.
    usual = task == "generate" and any(sample.references for sample in dataset.samples)
    return ("exact", "exact_normalised") if usual else ()


def _fitting(dataset: Dataset, task: str, metrics: tuple[MetricName, ...]) -> Dataset:
    """The samples that have what the task needs; the others are problems."""
    missing = {sample.id: missing_field(sample, task, metrics) for sample in dataset.samples}
    samples: list[Sample] = [sample for sample in dataset.samples if missing[sample.id] is None]
    problems = [Problem(f"sample {name}", why) for name, why in missing.items() if why is not None]
    if not samples:
        raise InputError(f"no row fits: {problems[0].why}")
    return replace(dataset, samples=samples, problems=[*dataset.problems, *problems])


def _listed(names: Sequence[str]) -> str:
    """Names in quotes; of many, only the first."""
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(repr(name[:80]) for name in names[:MAX_NAMED]) + more


def _report_rows(what: str, those: Sequence[tuple[str, str]]) -> None:
    """Report rows or samples on stderr: where each is and why it is reported; of many, only the first."""
    for where, why in those[:MAX_NAMED]:
        print(f"{what} {where}: {why}", file=sys.stderr)
    if len(those) > MAX_NAMED:
        print(f"{what} {len(those) - MAX_NAMED} more; the report names all", file=sys.stderr)


def _recogniser(command: Evaluate, task: str) -> Any:
    if task != "speech":
        return None
    if command.speech.recogniser is None:
        raise InputError("the task 'speech' needs a --recogniser module:function")
    recogniser = load_recogniser(command.speech.recogniser)
    # What it returns for a second of silence does not matter, as long as it is text.
    recognise(recogniser, np.zeros(SAMPLES_PER_SECOND, np.float32), SAMPLES_PER_SECOND)
    return recogniser


def _model_digest(model: Path, dtype: str | None, quantize: str | None, adapter: Adapter | None) -> str:
    """A digest of the model: its checkpoint's hashes, the type in which its weights are loaded, and its adapter."""
    files = () if adapter is None else (adapter.directory / CONFIG_FILE, adapter.directory / WEIGHTS_FILE)
    added = f":{digest_of(files)}" if files else ""
    held = f"{dtype or default_dtype() or 'stored'}{f',{quantize}' if quantize else ''}"
    return f"{held}:{identity(model)}{added}"


def _drafter_digest(drafter: Path) -> str:
    return digest_of([drafter / "config.json", *sorted(drafter.glob("*.safetensors"))])
