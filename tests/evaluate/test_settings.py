"""Every flag of `evaluate` and every setting of the harness's model is shown to change what it says it changes."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import omni_jax
from omni_jax import distributed
from omni_jax.errors import InputError
from omni_jax.evaluate import command as command_module
from omni_jax.evaluate import stored, tasks
from omni_jax.evaluate.command import Evaluate
from omni_jax.evaluate.context import seed_of
from omni_jax.evaluate.loglikelihood import Scored
from omni_jax.evaluate.settings import RunSettings
from omni_jax.evaluate.stored import read_all
from omni_jax.flags import DeviceFlags
from omni_jax.omni import Omni
from omni_jax.settings import Settings
from omni_jax.weights import checkpoint
from tests.evaluate.stub import StubOmni
from tests.helpers.commands import hear, status_of
from tests.helpers.datasets import write
from tests.helpers.flags import flag_names


def hear_nothing(wave: np.ndarray, rate: int) -> str:
    return ""


@dataclass
class Seen:
    """What a run of the command did."""

    status: int
    stub: StubOmni
    loaded: dict[str, Any]
    weighed: list[int]
    drafters: list[tuple[str, Any]]
    out: str
    output: Path
    reports: dict[str, str] = field(default_factory=dict)

    def asked(self, method: str, name: str) -> Any:
        """The value of a keyword argument in all calls of a method, which must agree."""
        (value,) = {
            json.dumps(call.get(name), default=lambda drafter: drafter.kind) for call in self.stub.asked[method]
        }
        return json.loads(value)

    @property
    def results(self) -> list[dict]:
        return read_all(self.output)


ROWS = [
    {"prompt": "one", "reference": "The one", "id": "a"},
    {"prompt": "two", "reference": "two", "id": "b"},
    {"prompt": "", "id": "c"},
]

Run = Callable[..., Seen]


@pytest.fixture
def run(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command with some flags, on the rows above unless told."""
    count = 0

    def run(*flags: str) -> Seen:
        nonlocal count
        count += 1
        stub, loaded, weighed, drafters = StubOmni(checkpoint.read_config(model)), {}, [], []
        load_drafter = command_module.load_drafter

        def load(path: Path, **settings: Any) -> StubOmni:
            loaded.update(path=path, **settings)
            return stub

        def weigh(omni: Any, asked: list, rows: int) -> list[Scored]:
            weighed.append(rows)
            return [Scored(-1.0, True, 1) for _ in asked]

        def drafted(path: Path, dtype: Any) -> Any:
            drafters.append((path.name, dtype))
            return load_drafter(path, dtype=dtype)

        output = tmp_path / f"out{count}"
        asked = {"--model": str(model), "--data": str(tmp_path / "rows.jsonl"), "--output": str(output)}
        given = set(flags)
        with monkeypatch.context() as patched:
            patched.setattr(omni_jax, "load", load)
            patched.setattr(tasks, "log_likelihoods", weigh)
            patched.setattr(tasks, "prepare_choices", lambda omni, context, texts: [tasks.Continuation(context, [1])])
            patched.setattr(command_module, "load_drafter", drafted)
            usual = [word for name, value in asked.items() if name not in given for word in (name, value)]
            status = status_of(["evaluate", *usual, *flags])
        return Seen(status, stub, loaded, weighed, drafters, capsys.readouterr().out, output)

    write(tmp_path / "rows.jsonl", *ROWS)
    return run


SPEAK = ("--task", "speech", "--recogniser", f"{__name__}:hear_nothing")
# Of both doors to the model: the flag, its text, and the value that must arrive under its own name.
DRAWING = [
    ("temperature", "0.5", 0.5),
    ("top_k", "7", 7),
    ("top_p", "0.75", 0.75),
    ("min_p", "0.125", 0.125),
    ("repetition_penalty", "1.5", 1.5),
    ("stop", "END", ["END"]),
]
SPOKEN = [
    ("speaker", "vera", "vera"),
    ("speech_temperature", "0.25", 0.25),
    ("speech_top_k", "3", 3),
    ("speech_top_p", "0.5", 0.5),
    ("speech_repetition_penalty", "1.25", 1.25),
    ("max_frames", "17", 17),
]
PREPARED = [("fps", "3.0", 3.0), ("use_audio_in_video", "", True), ("thinking", "False", False)]


def flag(name: str, text: str) -> list[str]:
    return [f"--{name.replace('_', '-')}", *([text] if text else [])]


@pytest.mark.parametrize("flags", [(), SPEAK], ids=["text", "speech"])
@pytest.mark.parametrize("name, text, value", DRAWING, ids=[name for name, *_ in DRAWING])
def test_how_replies_are_drawn(name: str, text: str, value: Any, flags: tuple, run: Run) -> None:
    before, after = run(*flags), run(*flags, *flag(name, text))
    assert before.asked("generate_many", name) != value == after.asked("generate_many", name)


@pytest.mark.parametrize("name, text, value", SPOKEN, ids=[name for name, *_ in SPOKEN])
def test_how_replies_are_spoken(name: str, text: str, value: Any, run: Run) -> None:
    before, after = run(*SPEAK), run(*SPEAK, *flag(name, text))
    assert before.asked("generate_many", name) != value == after.asked("generate_many", name)
    assert before.asked("generate_many", "speech") is True


@pytest.mark.parametrize(
    "task, flags",
    [
        ("generate", ["--speaker", "vera"]),
        ("mt-bench", ["--recogniser", "json:dumps"]),
        ("choice", ["--temperature", "0.5"]),
        ("choice", ["--drafter", "none"]),
        ("loglikelihood", ["--max-new-tokens", "3"]),
    ],
)
def test_flags_that_a_task_has_no_use_for(task: str, flags: list[str], run: Run, capsys: pytest.CaptureFixture) -> None:
    assert run("--task", task, *flags).status == 3


@pytest.mark.parametrize("task", ["generate", "speech", "loglikelihood"])
@pytest.mark.parametrize("name, text, value", PREPARED, ids=[name for name, *_ in PREPARED])
def test_how_media_are_read(name: str, text: str, value: Any, task: str, run: Run) -> None:
    flags = SPEAK if task == "speech" else ("--task", task)

    def seen(run: Seen) -> Any:
        calls = [call for call in run.stub.asked["prepare"] if call]
        (got,) = {json.dumps(call[name]) for call in calls}
        return json.loads(got)

    assert seen(run(*flags)) != value == seen(run(*flags, *flag(name, text)))


@pytest.mark.parametrize("task", ["generate", "speech", "loglikelihood"])
def test_options_of_media(task: str, run: Run) -> None:
    flags = SPEAK if task == "speech" else ("--task", task)
    for more, want in (((), {}), (("--nframes", "4", "--max-video-frames", "9"), {"nframes": 4, "max_frames": 9})):
        calls = [call["media"] for call in run(*flags, *more).stub.asked["prepare"] if call]
        assert calls and all(call == want for call in calls)


@pytest.mark.parametrize("flags", [(), SPEAK], ids=["text", "speech"])
def test_how_replies_are_drafted(flags: tuple, run: Run, drafters: Callable[[str, str], Path]) -> None:
    method = "generate_many"
    eagle, dflash = drafters("eagle3", "small"), drafters("dflash", "small")
    plain = run(*flags)
    for name in ("drafter", "draft_tokens", "draft_tree", "draft_sampling"):
        assert not plain.asked(method, name)
    with_drafter = (*flags, "--drafter", str(eagle))
    assert run(*with_drafter).asked(method, "drafter") == "eagle3"
    assert run(*flags, "--drafter", str(dflash)).asked(method, "drafter") == "dflash"
    assert run(*with_drafter, "--draft-tokens", "2").asked(method, "draft_tokens") == 2
    assert run(*with_drafter, "--draft-tokens", "auto").asked(method, "draft_tokens") == "auto"
    assert run(*with_drafter, "--draft-tree", "2", "3").asked(method, "draft_tree") == [2, 3]
    assert run(*with_drafter, "--draft-sampling").asked(method, "draft_sampling") is True
    seen = run(*with_drafter, "--drafter", str(dflash))
    assert [name for name, _ in seen.drafters] == [eagle.name, dflash.name]
    assert {path.name for path in seen.output.iterdir() if path.is_dir()} == {eagle.name, dflash.name}


def test_the_number_and_seeds_of_new_tokens(run: Run) -> None:
    for flags in ((), SPEAK):
        plain, other = run(*flags), run(*flags, "--max-new-tokens", "9", "--seed", "5")
        assert [prompt.max_new_tokens for prompt in plain.stub.prompts] == [1024] * 2
        assert [prompt.max_new_tokens for prompt in other.stub.prompts] == [9] * 2
        assert [prompt.seed for prompt in plain.stub.prompts] == [seed_of(0, name) for name in "ab"]
        assert [prompt.seed for prompt in other.stub.prompts] == [seed_of(5, name) for name in "ab"]


def test_slots(run: Run) -> None:
    assert run().asked("generate_many", "slots") == 12
    assert run("--slots", "3").asked("generate_many", "slots") == 3
    assert run(*SPEAK, "--slots", "3").asked("generate_many", "slots") == 3
    assert run("--task", "loglikelihood", "--slots", "3").weighed == [3]


def test_the_task(run: Run, tmp_path: Path) -> None:
    calls = {task: run("--task", task).stub.asked for task in ("auto", "generate")}
    assert all(len(asked["generate_many"]) == 1 for asked in calls.values())
    assert run("--task", "loglikelihood").weighed and not run("--task", "generate").weighed
    assert run(*SPEAK).asked("generate_many", "speech") and not run().asked("generate_many", "speech")
    write(tmp_path / "rows.jsonl", {"prompt": "?", "choices": ["a", "b"], "answer": 0})
    assert run().weighed and run("--task", "generate").stub.prompts
    assert run("--task", "mt-bench").status == 3
    write(tmp_path / "rows.jsonl", {"turns": ["one", "two"]})
    assert len(run("--task", "mt-bench").stub.prompts) == 2


@pytest.mark.parametrize("metric, score", [
    ("exact", [0, 1]), ("exact_normalised", [1, 1]), ("exact_number", [0, 0]), ("wer", [1, 0]), ("cer", [4, 0]),
])  # fmt: skip
def test_the_metric(metric: str, score: list[int], run: Run) -> None:
    pytest.importorskip("jiwer")
    assert [next(iter(result["scores"].values())) for result in run("--metric", metric).results] == score
    first, *_ = run("--metric", metric, "--metric", "exact").results
    assert "exact" in first["scores"] and list(run().results[0]["scores"]) == ["exact", "exact_normalised"]


def test_what_is_read(run: Run, tmp_path: Path, model: Path) -> None:
    seen = run("--limit", "1")
    assert len(seen.results) == 1 and seen.status == 0 and run().status == 4
    assert run("--fatal").status == 3
    write(tmp_path / "more" / "test-0.jsonl" if (tmp_path / "more").mkdir() is None else tmp_path, *ROWS[:1])
    write(tmp_path / "more" / "train-0.jsonl", ROWS[1])
    assert [r["id"] for r in run("--data", str(tmp_path / "more")).results] == ["a", "b"]
    assert [r["id"] for r in run("--data", str(tmp_path / "more"), "--split", "train").results] == ["b"]
    assert run("--output", str(tmp_path / "elsewhere")).status == 4 and (tmp_path / "elsewhere" / "run.json").exists()
    assert run().loaded["path"] == model and run("--model", str(tmp_path / "no")).status == 3


def test_results_are_read_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that were there before the weights are read; afterwards only what has been added."""
    checked, lines = stored._checked, []
    monkeypatch.setattr(stored, "_checked", lambda line, where: lines.append(where) or checked(line, where))
    output = run().output
    assert len(lines) == 3 - 1
    lines.clear()
    assert run("--output", str(output)).status == 4 and len(lines) == len(set(lines)) == 2


def test_results_among_the_data_are_no_data(run: Run, tmp_path: Path) -> None:
    """A run goes on that writes into a folder of its dataset, or beside its files."""
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "rows.jsonl", ROWS[0], ROWS[1])
    for output in (tmp_path / "set" / "out", tmp_path / "set"):
        for _ in range(2):
            seen = run("--data", str(tmp_path / "set"), "--output", str(output))
            assert seen.status == 0 and [result["id"] for result in read_all(output)] == ["a", "b"]


def test_fatal_stops_at_a_sample_that_fails(run: Run, tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", ROWS[0], {"prompt": "x" * 10**5, "reference": "a"}, {**ROWS[1], "id": "d"})
    assert len(run("--slots", "1").results) == 3
    seen = run("--slots", "1", "--fatal")
    assert seen.status == 3 and len(seen.results) == 1


def test_the_recogniser(run: Run) -> None:
    pytest.importorskip("jiwer")
    other = run("--task", "speech", "--recogniser", f"{hear.__module__}:hear")
    assert [result["heard"] for result in run(*SPEAK).results] == ["", ""]
    assert [result["heard"] for result in other.results] == ["a", "a"]


def test_how_the_model_is_loaded(run: Run, drafters: Callable[[str, str], Path]) -> None:
    plain, other = run(), run("--dtype", "bfloat16", "--mesh", "expert=2")
    assert (plain.loaded["dtype"], plain.loaded["mesh"]) == (None, None)
    assert (other.loaded["dtype"], other.loaded["mesh"]) == ("bfloat16", "expert=2")
    assert plain.loaded["parts"] == ("thinker",) and run(*SPEAK).loaded["parts"] is None
    drafter = ("--drafter", str(drafters("eagle3", "small")))
    assert [run(*drafter, "--dtype", dtype).drafters[0][1] for dtype in ("bfloat16", "float32")] == [
        "bfloat16",
        "float32",
    ]
    int8 = run("--quantize", "int8")
    assert (plain.loaded["quantize"], int8.loaded["quantize"]) == (None, "int8")
    depends = [json.loads((seen.output / "run.json").read_text())["model"] for seen in (plain, other, int8)]
    assert len(set(depends)) == 3


def test_what_is_printed(run: Run) -> None:
    assert run().out.startswith("# Evaluation") and json.loads(run("--json").out)["scored"] == 2


def test_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    joined = []
    monkeypatch.setattr(distributed, "start", lambda *stated: joined.append(stated))
    DeviceFlags(distributed=True, coordinator="host:1", processes=3, process=2).join()
    DeviceFlags(distributed=True).join()
    DeviceFlags().join()
    assert joined == [("host:1", 3, 2), (None, None, None)]
    for alone in ({"coordinator": "host:1"}, {"processes": 3}, {"process": 2}):
        with pytest.raises(InputError, match="need --distributed"):
            DeviceFlags(**alone).join()


def test_results_depend_on_every_setting(run: Run, drafters: Callable[[str, str], Path]) -> None:
    """A run goes on only where all that its results depend on is as it was."""
    drafter = ("--drafter", str(drafters("eagle3", "small")))
    cases = {
        **{name: flag(name, text) for name, text, _ in (*DRAWING, *PREPARED)},
        **{name: [*SPEAK, *flag(name, text)] for name, text, _ in SPOKEN[1:]},
        "seed": ["--seed", "1"],
        "media": ["--nframes", "4"],
        "max_new_tokens": ["--max-new-tokens", "3"],
        "metrics": ["--metric", "exact"],
        "task": ["--task", "mt-bench"],
        "recogniser": ["--task", "speech", "--recogniser", f"{hear.__module__}:hear"],
        "speaker": [],
        "draft_tokens": [*drafter, "--draft-tokens", "2"],
        "draft_tree": [*drafter, "--draft-tree", "2", "2"],
        "draft_sampling": [*drafter, "--draft-sampling"],
    }
    assert set(cases) == {*RunSettings("", (), None, Settings()).stored()}
    del cases["speaker"], cases["task"]
    for name, flags in cases.items():
        base = [] if "--task" not in flags else [*SPEAK]
        base += drafter if "--drafter" in flags else ()
        first = run(*base)
        again = run(*base, "--output", str(first.output))
        other = run(*flags, "--output", str(first.output))
        assert (first.status, again.status, other.status) == (4, 4, 3), name


TESTED = {
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "speaker", "speech_temperature", "max_frames",
    "speech_top_k", "speech_top_p", "speech_repetition_penalty", "adapter",
    "fps", "use_audio_in_video", "drafter", "draft_tokens", "draft_tree", "draft_sampling", "max_new_tokens", "seed",
    "slots", "task", "metric", "limit", "fatal", "data", "split", "output", "model", "recogniser", "dtype", "mesh",
    "quantize", "stop", "media", "thinking", "json", "distributed", "coordinator", "processes", "process",
}  # fmt: skip


def test_no_flag_is_without_a_test() -> None:
    assert flag_names(Evaluate) == TESTED


def test_a_prompts_end_is_asked_of_all_that_was_written(omnis: Callable[[str], Omni]) -> None:
    """A stop string may span what two reads of the device bring."""
    from omni_jax.decode.prompt import Prompt
    from omni_jax.decode.text import CHUNK

    omni, seen = omnis("small"), []

    def ends(written: list[int]) -> bool:
        seen.append(list(written))
        return len(written) > 2 * CHUNK + 1

    prompt = Prompt(omni.prepare([{"role": "user", "content": "Once upon"}]), 0, 4 * CHUNK, ends)
    ((_, reply),) = omni.generate_many([prompt], slots=1, stop_ids=())
    assert len(seen) >= 3 and all(ids == reply.token_ids[: len(ids)] for ids in seen)
    assert [len(ids) for ids in seen] == sorted({len(ids) for ids in seen}) and seen[-1] == reply.token_ids
    assert 2 * CHUNK < len(reply.token_ids) < 4 * CHUNK and reply.stats["finish_reason"] == "stop"
