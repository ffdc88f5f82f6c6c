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
import tyro
from tqdm import tqdm

from omni_jax.config import OmniConfig
from omni_jax.distributed import Machines, barrier
from omni_jax.errors import InputError
from omni_jax.evaluate.checks import check_drafting, check_settings, check_stop
from omni_jax.evaluate.data import Dataset, Problem, Sample, read_dataset
from omni_jax.evaluate.metrics import MetricName, check_metrics, load_recogniser, recognise
from omni_jax.evaluate.processes import share_of
from omni_jax.evaluate.report import Summary, current_results, summary_of, write_comparison, write_report
from omni_jax.evaluate.rows import digest_of
from omni_jax.evaluate.run import Results, check_writable, run, safe_results, settings_of, try_directory
from omni_jax.evaluate.settings import Settings
from omni_jax.evaluate.stored import read_all
from omni_jax.evaluate.tasks import Means, choose_task, lacks
from omni_jax.loading import default_dtype
from omni_jax.media_flags import MediaFlags
from omni_jax.models.code2wav import SAMPLES_PER_SECOND
from omni_jax.omni import Omni
from omni_jax.process import finishing
from omni_jax.weights.drafters import Drafter, load_drafter
from omni_jax.weights.locate import locate
from omni_jax.weights.manifest import identity
from omni_jax.weights.model import model_config

# Rows or samples of which the command says on stderr what is wrong with each.
MAX_TOLD = 20
# Loads the model with these parts, all by default.
Load = Callable[[tuple[str, ...] | None], Omni]


@dataclass(frozen=True)
class Evaluate(Machines):
    """Score a model on a dataset; a run that was stopped goes on where it was."""

    model: Path
    """Model id, Hugging Face directory or converted checkpoint (python -m convert SRC DST)."""
    data: Path
    """JSON lines, a table, or a directory of them; rows hold messages, prompt or turns, and references."""
    output: Path
    """Directory for results, report and plots; that of a stopped run goes on."""
    task: Literal["auto", "generate", "choice", "loglikelihood", "speech", "mt-bench"] = "auto"
    """What to do with a row; auto looks at its fields."""
    metric: tyro.conf.UseAppendAction[tuple[MetricName, ...]] = ()
    """How to compare a reply with its references; repeat for more. By default exact and exact_normalised."""
    split: str | None = None
    """Of a directory, only the files of this split."""
    limit: int | None = None
    """Read so many rows only."""
    slots: int = 12
    """Requests that run at once."""
    fatal: bool = False
    """Stop at the first row or sample that cannot be used; by default it is reported and left out."""
    max_new_tokens: int = 1024
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A text that ends a reply, which does not hold it; repeat the flag for more."""
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """0 is off."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    use_audio_in_video: bool = False
    """Listen to the sound tracks of the videos, in step with their frames."""
    fps: float | None = None
    """Frames sampled per second of video."""
    media: tyro.conf.OmitArgPrefixes[MediaFlags] = field(default_factory=MediaFlags)
    thinking: bool | None = None
    """Let a model that can do both think first, or not; by default as its template has it."""
    recogniser: str | None = None
    """For the task speech: module:function that takes float32 samples and their rate and returns what was said."""
    speaker: str = "ethan"
    """Whose voice; `inspect` lists the checkpoint's."""
    speech_temperature: float = 0.9
    """0 is greedy."""
    max_frames: int = 4096
    """Longest speech, in frames of 80 ms."""
    drafter: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """Directory of a DFlash or EAGLE-3 drafter; repeat to compare several, each in a directory of its own."""
    draft_tokens: int | Literal["auto"] | None = None
    """Tokens that it drafts a round; by default as many as it was trained for, with auto as many as prove fastest."""
    draft_tree: tuple[int, int] | None = None
    """Levels and candidates of the tree that an EAGLE-3 drafter proposes; its authors take 7 10."""
    draft_sampling: bool = False
    """Draw the drafts too: more are accepted at high temperatures, and the answer is another one, drawn alike."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Weights' type; by default the checkpoint's own, on CPU float32."""
    json: bool = False
    """Machine-readable summary."""


def evaluate(command: Evaluate, load: Load) -> Summary:
    """Run a command to its end and write its report: the summary, by drafter where there are several.

    Raises InputError for data, settings or an output directory that cannot be used, and for samples if `fatal`.
    """
    dataset = read_dataset(command.data, split=command.split, limit=command.limit)
    task = choose_task(dataset.samples) if command.task == "auto" else command.task
    metrics = _metrics(command, task, dataset)
    dataset = _fitting(dataset, task, metrics)
    if dataset.problems and command.fatal:
        first = dataset.problems[0]
        raise InputError(f"{first.where}: {first.why} ({len(dataset.problems)} such rows)")
    _report_rows("skipped", [(problem.where, problem.why) for problem in dataset.problems])
    if dataset.unread:
        print(f"columns that are not read: {_listed(dataset.unread)}", file=sys.stderr)
    recogniser = _recogniser(command, task)
    settings, config = _settings(command, task, metrics), model_config(command.model)
    check_settings(settings, command.slots, config)
    check_stop(settings, command.model)
    runs = _runs(command, settings, dataset, config)
    for one in runs:
        try_directory(one.output, one.depends)
    if len(runs) > 1:
        check_writable(command.output)
    omni = load(None if task == "speech" else ("thinker",))
    summaries = {}
    for one in runs:
        means = Means(omni, settings, command.slots, one.drafter, recogniser)
        summaries[one.name] = _summarised(one, means, dataset, command.fatal)
    if len(summaries) == 1:
        return next(iter(summaries.values()))
    if share_of(omni.params).reports:
        with safe_results(command.output):
            write_comparison(command.output, summaries)
    return summaries


@dataclass(frozen=True, eq=False)
class _Run:
    """One of the command's runs: its drafter's name, "" without one, and where its results go."""

    name: str
    drafter: Drafter | None
    output: Path
    depends: dict[str, Any]


def _runs(command: Evaluate, settings: Settings, dataset: Dataset, config: OmniConfig) -> list[_Run]:
    """One run, or one for each drafter; InputError for drafters that do not draft for this model as told."""
    names = [path.resolve().name for path in command.drafter]
    if len(set(names)) < len(names):
        raise InputError(f"drafters {names}; their directories need different names to be told apart")
    model, runs = _model_digest(command.model, command.dtype), []
    drafters = [locate(path, "the drafter") for path in command.drafter]
    for name, path in zip(names or ("",), drafters or (None,), strict=True):
        drafter = load_drafter(path, dtype=command.dtype or default_dtype()) if path else None
        check_drafting(settings, drafter, config)
        output = command.output / name if len(names) > 1 else command.output
        depends = settings_of(settings, model, dataset.digest, _drafter_digest(path) if path else None)
        runs.append(_Run(name, drafter, output, depends))
    return runs


def _summarised(one: _Run, means: Means, dataset: Dataset, fatal: bool) -> Summary:
    """Do the samples that are left of a run, and write the report of all."""
    share = share_of(means.omni.params)
    note = f"the sample under way ends first, and the same command goes on with what {one.output} holds"
    with finishing(note), Results(one.output, one.depends, share) as written:
        left = written.left(dataset.samples)
        if share.reports and (changed := written.changed(dataset.samples)):
            _report_rows(
                "again", [(f"sample {sample.id}", "its media have changed since it was scored") for sample in changed]
            )
        start, tokens = perf_counter(), 0
        with tqdm(total=len(left), unit="sample", file=sys.stderr, disable=None if share.reports else True) as bar:
            for result in run(means, left, written, fatal):
                tokens += sum(turn["stats"]["new_tokens"] for turn in result.get("turns", ()))
                bar.update()
                if tokens:
                    bar.set_postfix_str(f"{tokens / (perf_counter() - start):.1f} token/s")
        barrier("done")
        found = current_results(dataset, read_all(one.output))
        summary = summary_of(means.settings.task, dataset, found)
        if share.reports:
            with safe_results(one.output):
                write_report(one.output, summary, dataset, found, one.depends)
            _report_rows(
                "failed", [(f"sample {result['id']}", result["error"]) for result in found if "error" in result]
            )
    return summary


def _metrics(command: Evaluate, task: str, dataset: Dataset) -> tuple[MetricName, ...]:
    """The metrics of a run: what was asked for, or the usual ones where there are references."""
    if command.metric and task not in ("generate", "mt-bench"):
        raise InputError(f"the task {task!r} has its own scores; leave out --metric")
    if task == "speech":
        return check_metrics(("wer", "cer"))
    if command.metric:
        return check_metrics(command.metric)
    # Rows without one are reported, as everything that a row lacks.
    usual = task == "generate" and any(sample.references for sample in dataset.samples)
    return ("exact", "exact_normalised") if usual else ()


def _fitting(dataset: Dataset, task: str, metrics: tuple[MetricName, ...]) -> Dataset:
    """The samples that have what the task needs; the others are problems."""
    wanting = {sample.id: lacks(sample, task, metrics) for sample in dataset.samples}
    samples: list[Sample] = [sample for sample in dataset.samples if wanting[sample.id] is None]
    problems = [Problem(f"sample {name}", why) for name, why in wanting.items() if why is not None]
    if not samples:
        raise InputError(f"no row fits: {problems[0].why}")
    return replace(dataset, samples=samples, problems=[*dataset.problems, *problems])


def _listed(names: Sequence[str]) -> str:
    """Names in quotes, the first of many."""
    more = f" and {len(names) - MAX_TOLD} more" if len(names) > MAX_TOLD else ""
    return ", ".join(repr(name[:80]) for name in names[:MAX_TOLD]) + more


def _report_rows(what: str, those: Sequence[tuple[str, str]]) -> None:
    """Report rows or samples on stderr: where each is, and why it is named; of many, the first ones."""
    for where, why in those[:MAX_TOLD]:
        print(f"{what} {where}: {why}", file=sys.stderr)
    if len(those) > MAX_TOLD:
        print(f"{what} {len(those) - MAX_TOLD} more; the report names all", file=sys.stderr)


def _recogniser(command: Evaluate, task: str) -> Any:
    if task != "speech":
        return None
    if command.recogniser is None:
        raise InputError("the task 'speech' needs a --recogniser module:function")
    recogniser = load_recogniser(command.recogniser)
    # What it returns for a second of silence does not matter, but it is text.
    recognise(recogniser, np.zeros(SAMPLES_PER_SECOND, np.float32), SAMPLES_PER_SECOND)
    return recogniser


def _settings(command: Evaluate, task: str, metrics: tuple[MetricName, ...]) -> Settings:
    """The flags that results depend on."""
    given = {one.name: getattr(command, one.name, None) for one in fields(Settings)}
    return Settings(**{**given, "task": task, "metrics": metrics})


def _model_digest(model: Path, dtype: str | None) -> str:
    """Of the model, by its checkpoint's hashes, and of the type that its weights are held in."""
    return f"{dtype or default_dtype() or 'stored'}:{identity(model)}"


def _drafter_digest(drafter: Path) -> str:
    return digest_of([drafter / "config.json", *sorted(drafter.glob("*.safetensors"))])
