"""Every setting of every door reaches what it is for, and nothing else: keywords in Python, and flags."""

import dataclasses
import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import convert
from omni_jax.ask import Generate, Stream
from omni_jax.cli import main
from omni_jax.decode import generation
from omni_jax.decode.batching import Batching
from omni_jax.decode.engine import Engine
from omni_jax.decode.generation import GenerationPlan
from omni_jax.decode.reply import Event, Reply
from omni_jax.flags import MediaFlags
from omni_jax.inputs.batch import Batch
from omni_jax.inputs.processor import Processor
from omni_jax.omni import Omni
from omni_jax.settings import Settings, meanings
from omni_jax.weights.drafters import load_drafter
from tests.helpers.flags import flag_names
from tests.parity import user

MESSAGES = user("What is this?")
TOOLS = [{"type": "function", "function": {"name": "look", "description": "d", "parameters": {}}}]
SPEAKING = {"speech": True}
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "logprobs")
SPOKEN = ("temperature", "top_k", "top_p", "repetition_penalty")
USUAL_SPEECH = {f"speech.{name}": value for name, value in zip(SPOKEN, (0.9, 50, 1.0, 1.05), strict=True)}
# Keyword, what it is set to, what must be set too, and what changes in what `told` records, by name.
TOLD: list[tuple[str, Any, dict[str, Any], dict[str, Any]]] = [
    ("max_new_tokens", 7, {}, {"max_new_tokens": 7}),
    ("stop", ["ab", "c"], {}, {"stop": ("ab", "c")}),
    ("stop_ids", [5, 3], {}, {"stop_ids": [3, 5]}),
    ("seed", 9, {}, {"seed": [9]}),
    ("n", 2, {"temperature": 1.0}, {"copies": 2, "seed": [0, 1]}),
    ("temperature", 0.5, {}, {"sampling.temperature": 0.5}),
    ("top_k", 7, {}, {"sampling.top_k": 7}),
    ("top_p", 0.75, {}, {"sampling.top_p": 0.75}),
    ("min_p", 0.25, {}, {"sampling.min_p": 0.25}),
    ("repetition_penalty", 1.5, {}, {"sampling.repetition_penalty": 1.5}),
    ("logprobs", 3, {}, {"sampling.logprobs": 3}),
    ("use_audio_in_video", True, {}, {"prepare.use_audio_in_video": True}),
    ("tools", TOOLS, {}, {"prepare.tools": TOOLS}),
    ("fps", 0.5, {}, {"prepare.fps": 0.5}),
    ("media", {"max_pixels": 401408}, {}, {"prepare.media": {"max_pixels": 401408}}),
    ("thinking", False, {}, {"prepare.enable_thinking": False}),
    ("speech", True, {}, {"speaker": "ethan", "max_frames": 4096, **USUAL_SPEECH}),
    ("speaker", "aiden", SPEAKING, {"speaker": "aiden"}),
    ("speech_temperature", 0.25, SPEAKING, {"speech.temperature": 0.25}),
    ("speech_top_k", 9, SPEAKING, {"speech.top_k": 9}),
    ("speech_top_p", 0.5, SPEAKING, {"speech.top_p": 0.5}),
    ("speech_repetition_penalty", 1.25, SPEAKING, {"speech.repetition_penalty": 1.25}),
    ("max_frames", 11, SPEAKING, {"max_frames": 11}),
    ("drafter", "dflash", {}, {"widths": (8,), "tree": None, "drawn": False}),
    ("draft_tokens", 2, {"drafter": "dflash"}, {"widths": (3,)}),
    ("draft_tree", (2, 3), {"drafter": "eagle3"}, {"tree": (2, 3), "widths": (22,)}),
    ("draft_sampling", True, {"drafter": "dflash"}, {"drawn": True}),
    ("slots", 3, {}, {"slots": 3}),
    ("piece_tokens", 64, {}, {"piece": 64}),
    ("keep_bytes", 1000, {}, {"kept": 1000}),
]  # fmt: skip


class Enough(Exception):
    """All has been recorded."""


@pytest.fixture
def told(
    omnis: Callable[[str], Omni], drafters: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> Callable:
    """`told("generate", top_k=7)` is what that call tells those who do the work, by name; nothing is run."""
    omni, record = omnis("tiny"), {}
    batching, prepare = generation.Batching, Processor.prepare

    def together(self: GenerationPlan, batch: Batch, seeds: list[int], *model: Any) -> Any:
        record.update({f"sampling.{name}": getattr(self.sampling, name) for name in SAMPLING})
        limits, drafts, voice = self.limits, self.drafts, self.voice
        stop = () if limits.stops is None else limits.stops.strings
        record.update(max_new_tokens=limits.max_new_tokens, stop=stop, stop_ids=list(limits.stop_ids))
        record.update(seed=seeds, copies=len(seeds) // len(batch.mask))
        if drafts is not None:
            proposer: Any = drafts.proposer
            tree = (proposer.depth, proposer.top_k) if hasattr(proposer, "depth") else None
            record.update(widths=drafts.verify_tokens, drawn=drafts.drawn, tree=tree)
        if voice is not None:
            record.update({f"speech.{name}": getattr(voice.sampling, name) for name in SPOKEN})
            record.update(speaker=voice.speaker, max_frames=voice.max_frames)
        raise Enough

    def prepared(self, messages, **settings):
        record.update({f"prepare.{name}": value for name, value in settings.items()})
        return prepare(self, messages, **settings)

    def counted(engine: Engine, rows: int, *given: Any, **named: Any) -> Batching:
        target: Any = getattr(engine, "target", engine)
        kept = None if target.keeper is None else target.keeper.store.most_bytes
        record.update(slots=rows, piece=target.piece, kept=kept)
        return batching(engine, rows, *given, **named)

    monkeypatch.setattr(GenerationPlan, "together", together)
    monkeypatch.setattr(Processor, "prepare", prepared)
    monkeypatch.setattr(generation, "Batching", counted)

    def call(door: str, **settings: Any) -> dict[str, Any]:
        record.clear()
        if "drafter" in settings:
            settings["drafter"] = load_drafter(drafters(settings["drafter"], "tiny"))
        with pytest.raises(Enough):
            list(getattr(omni, door)([MESSAGES] if door == "generate_many" else MESSAGES, **settings))
        return dict(record)

    return call


@pytest.mark.parametrize("keyword, value, also, changes", TOLD, ids=[row[0] for row in TOLD])
@pytest.mark.parametrize("door", ["generate", "stream", "generate_many"])
def test_a_keyword_changes_what_it_says(
    door: str, keyword: str, value: Any, also: dict, changes: dict, told: Callable
) -> None:
    known = inspect.signature(getattr(Omni, door)).parameters
    if keyword not in known:
        pytest.skip(f"{door} has no {keyword}")
    before, after = told(door, **also), told(door, **also, **{keyword: value})
    assert after == {**before, **changes} != before


@pytest.mark.parametrize("door", ["generate", "stream", "generate_many"])
def test_the_table_has_every_keyword(door: str) -> None:
    known = set(inspect.signature(getattr(Omni, door)).parameters) - {"self", "messages", "conversations"}
    assert not known - {row[0] for row in TOLD}


@pytest.mark.parametrize("door, own", [
    ("generate", {"n": None}), ("stream", {}),
    ("generate_many", {"slots": None, "piece_tokens": None, "keep_bytes": 0}),
])  # fmt: skip
def test_every_door_shows_all_settings_with_defaults_and_meanings(door: str, own: dict) -> None:
    shown = {name: one.default for name, one in inspect.signature(getattr(Omni, door)).parameters.items()}
    given = {name: shown.pop(name) for name in [*shown][: 2 + len(own) + 2]}
    assert shown == Settings().keywords()
    assert list(given.items())[2:] == [*own.items(), ("speech", False), ("drafter", None)]
    docs = " ".join((inspect.getdoc(getattr(Omni, door)) or "").split())
    assert all(f"{name}: {meaning}" in docs for name, meaning in meanings().items())


def test_what_is_not_stated_is_not_checked_again() -> None:
    """A server reads settings with every request, and most of them at their defaults."""
    one, other = Settings.read({"temperature": 1.0}), Settings.read({"seed": 3})
    assert one.voice is other.voice and one.sampling != other.sampling == Settings().sampling


def test_padding(omnis: Callable[[str], Omni]) -> None:
    two = [user("One."), user("One and two and three.")]
    left, right = (omnis("tiny").prepare(two, padding=side).mask for side in ("left", "right"))
    assert left[0, -1] and not left[0, 0] and right[0, 0] and not right[0, -1]


def test_thinking_reaches_the_template(omnis: Callable[[str], Omni], monkeypatch: pytest.MonkeyPatch) -> None:
    template, seen = omnis("tiny").processor.template, []
    render = template.render
    monkeypatch.setattr(
        type(template), "render", lambda self, *a, **k: seen.append(k["enable_thinking"]) or render(*a, **k)
    )
    for thinking in (None, True, np.bool_(False)):
        omnis("tiny").prepare(MESSAGES, thinking=thinking)
    assert seen == [None, True, False]


# Flags by field, and what they make of the call; `None`: seen elsewhere below.
FLAGS: dict[str, tuple[list[str], Any]] = {
    "max_new_tokens": (["--max-new-tokens", "7"], 7),
    "stop": (["--stop", "ab", "--stop", "c d"], ("ab", "c d")),
    "temperature": (["--temperature", "0.5"], 0.5),
    "top_k": (["--top-k", "13"], 13),
    "top_p": (["--top-p", "0.75"], 0.75),
    "min_p": (["--min-p", "0.25"], 0.25),
    "repetition_penalty": (["--repetition-penalty", "1.5"], 1.5),
    "seed": (["--seed", "19"], 19),
    "logprobs": (["--logprobs", "3"], 3),
    "use_audio_in_video": (["--use-audio-in-video"], True),
    "fps": (["--fps", "0.125"], 0.125),
    "thinking": (["--thinking", "False"], False),
    "speaker": (["--speaker", "aiden"], "aiden"),
    "speech_temperature": (["--speech-temperature", "0.625"], 0.625),
    "speech_top_k": (["--speech-top-k", "9"], 9),
    "speech_top_p": (["--speech-top-p", "0.375"], 0.375),
    "speech_repetition_penalty": (["--speech-repetition-penalty", "1.25"], 1.25),
    "max_frames": (["--max-frames", "11"], 11),
    "draft_tokens": (["--draft-tokens", "2"], 2),
    "draft_tree": (["--draft-tree", "2", "3"], (2, 3)),
    "draft_sampling": (["--draft-sampling"], True),
}
# Flags of media options by field, and the option that each states.
MEDIA: dict[str, tuple[list[str], dict[str, Any]]] = {
    "min_pixels": (["--min-pixels", "4096"], {"min_pixels": 4096}),
    "max_pixels": (["--max-pixels", "65536"], {"max_pixels": 65536}),
    "resized_height": (["--resized-height", "64"], {"resized_height": 64}),
    "resized_width": (["--resized-width", "96"], {"resized_width": 96}),
    "nframes": (["--nframes", "6"], {"nframes": 6}),
    "min_video_frames": (["--min-video-frames", "4"], {"min_frames": 4}),
    "max_video_frames": (["--max-video-frames", "10"], {"max_frames": 10}),
    "total_pixels": (["--total-pixels", "1000000"], {"total_pixels": 1000000}),
    "video_start": (["--video-start", "0.5"], {"video_start": 0.5}),
    "video_end": (["--video-end", "2.5"], {"video_end": 2.5}),
    "audio_start": (["--audio-start", "0.25"], {"audio_start": 0.25}),
    "audio_end": (["--audio-end", "3.5"], {"audio_end": 3.5}),
}
ELSEWHERE = {
    "adapter",
    *("model", "text", "image", "audio", "video", "system", "messages", "speak", "drafter"),
    *("mesh", "dtype", "quantize"),
    *("json", "media", "distributed", "coordinator", "processes", "process", "n"),
}


@pytest.fixture(scope="module")
def model(checkpoints: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    destination = tmp_path_factory.mktemp("converted") / "tiny"
    convert.convert_checkpoint(checkpoints("tiny"), destination, progress=False)
    return destination


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the command line asks of a model, whether for a stream or for several replies."""
    record: dict[str, Any] = {}
    stats = {
        "prompt_tokens": 1,
        "new_tokens": 1,
        "finish_reason": "stop",
        "prefill_seconds": 0.0,
        "decode_seconds": 0.0,
    }

    def stream(self: Omni, messages: list, **settings: Any) -> Iterator[Event]:
        self._read_weights()
        dtypes, mesh = {str(self.params["thinker"]["embed"].dtype)}, self.meshes["thinker"]
        record.update(
            settings, messages=messages, dtypes=dtypes, parts=set(self.params), mesh=mesh and dict(mesh.shape),
            int8=self.config.thinker.text.int8_experts,
        )  # fmt: skip
        yield Event("", [], Reply("x", [], {**stats, "talker_seconds": 0.0, "vocoder_seconds": 0.0}))

    def generate(self: Omni, messages: list, **settings: Any) -> list[Reply]:
        return [event.reply for event in stream(self, messages, **settings) if event.reply] * 2

    monkeypatch.setattr(Omni, "stream", stream)
    monkeypatch.setattr(Omni, "generate", generate)
    return record


def test_every_flag_reaches_the_call(
    model: Path,
    heard: dict[str, Any],
    checkpoints: Callable[[str], Path],
    drafters: Callable[[str, str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert flag_names(Generate) | flag_names(Stream) == {*FLAGS, *ELSEWHERE}
    main(["stream", "--model", str(model), "--text", "Hi"])
    usual = dict(heard)
    assert all(usual[name] != value for name, (_, value) in FLAGS.items()) and usual["drafter"] is None
    values = [value for _, value in FLAGS.values() if not isinstance(value, bool)]
    assert len(set(values)) == len(values), "no two flags can be exchanged unseen"
    flags = [word for words, _ in FLAGS.values() for word in words]
    media = ["--image", "a.png", "--audio", "b.wav", "--video", "c.mp4", "--image", "d.png", "--system", "Be brief."]
    placed = ["--dtype", "bfloat16", "--mesh", "expert=2", "--json", "--drafter", str(drafters("dflash", "tiny"))]
    main(["stream", "--model", str(model), "--text", "Hi", *flags, *media, *placed])
    assert {name: heard[name] for name in FLAGS} == {name: value for name, (_, value) in FLAGS.items()}
    assert heard["drafter"].kind == "dflash" and heard["dtypes"] == {"bfloat16"} != usual["dtypes"]
    assert heard["mesh"]["expert"] == 2 and usual["mesh"] is None and heard["parts"] == {"thinker"}
    parts = [("image", "a.png"), ("image", "d.png"), ("audio", "b.wav"), ("video", "c.mp4"), ("text", "Hi")]
    content = [{"type": kind, kind: value} for kind, value in parts]
    assert heard["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]
    main(["stream", "--model", str(checkpoints("tiny")), "--text", "Hi", "--quantize", "int8"])
    assert heard["int8"] and not usual["int8"]
    capsys.readouterr()


def test_every_media_flag_reaches_the_call(model: Path, heard: dict[str, Any]) -> None:
    assert {field.name for field in dataclasses.fields(MediaFlags)} == set(MEDIA)
    main(["stream", "--model", str(model), "--text", "Hi"])
    assert heard["media"] == {}, "what is not stated is left to the messages"
    main(["stream", "--model", str(model), "--text", "Hi", *(word for words, _ in MEDIA.values() for word in words)])
    assert heard["media"] == {name: value for _, option in MEDIA.values() for name, value in option.items()}
    assert heard["max_frames"] == 4096, "--max-video-frames is no limit of speech"


def test_several_answers(model: Path, heard: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    main(["generate", "--model", str(model), "--text", "Hi", "--n", "2", "--temperature", "0.5"])
    assert (heard["n"], heard["temperature"]) == (2, 0.5)
    assert capsys.readouterr().out == "x\n---\nx\n"
    main(["generate", "--model", str(model), "--text", "Hi", "--n", "2", "--temperature", "0.5", "--json"])
    assert [reply["text"] for reply in json.loads(capsys.readouterr().out)] == ["x", "x"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--n", "2", "--temperature", "1", "--speak", "a.wav"], "leave out --n"),
        (["--n", "2"], "greedy replies are all the same"),
        (["--logprobs", "2"], "add --json"),
    ],
)
def test_flags_that_do_not_go_together(
    flags: list[str], message: str, model: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="3"):
        main(["generate", "--model", str(model), "--text", "Hi", *flags])
    err = capsys.readouterr().err
    assert message in err and "loading" not in err, "said before the weights are read"


def test_stop_strings_and_log_probabilities_in_json(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--model", str(model), "--text", "Why is the sky blue?", "--max-new-tokens", "12", "--json"]
    main(["generate", *asked])
    free = json.loads(capsys.readouterr().out)
    stop = next(c for c in free["text"][3:] if c.isalpha() and c not in free["text"][:3])
    main(["stream", *asked, "--stop", stop, "--logprobs", "2"])
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    reply = events[-1]["reply"]
    assert reply["text"] == free["text"][: free["text"].index(stop)] == "".join(event["text"] for event in events)
    assert reply["stats"]["stop_string"] == stop
    tokens = [token for event in events for token in event.get("logprobs", ())]
    assert tokens == reply["logprobs"] and [t["token_id"] for t in tokens] == reply["token_ids"]
    for token in tokens:
        first, second = token["top_logprobs"]
        assert token["logprob"] == first["logprob"] >= second["logprob"] and token["token"] == first["token"]
