"""Conversations of every kind of content."""

from pathlib import Path

from tests.parity import audio_part, image_part, user, video_part

SPOKEN = Path(__file__).parent.parent / "data" / "hello_with_speech.mp4"

PROMPTS: dict[str, tuple[list[list[dict]], bool]] = {
    "text": ([user("Why is the sky blue?")], False),
    "image": ([user(image_part(120, 90), "What is this?")], False),
    "images": ([user(image_part(64, 200), "and", image_part(150, 100, 3), "differ how?")], False),
    "audio": ([user(audio_part(2.3), "Who speaks?")], False),
    "long audio": ([user("Listen:", audio_part(11.7, 1))], False),
    "half a minute of audio": ([user(audio_part(33.2, 4), "Go on.")], False),
    "short audio": ([user(audio_part(0.3, 2), "A click?")], False),
    "video": ([user(video_part(7, 90, 120), "What happens?")], False),
    "audio in video": ([user({"type": "video", "video": str(SPOKEN), "fps": 0.5}, "What is said?")], True),
    "mixed": (
        [
            user(
                image_part(60, 80, 1),
                audio_part(1.4, 3),
                video_part(5, 70, 60, 1.5),
                "between",
                audio_part(3.1, 4),
                image_part(100, 40, 2),
                "and the end",
            )
        ],
        False,
    ),
    "unequal rows": (
        [
            user("Just words."),
            user(image_part(90, 90, 5), "One picture, and rather more words than in the first row."),
            user(audio_part(1.2, 5), video_part(4, 64, 64, 2.0, 6)),
            user(audio_part(9.4, 6), image_part(40, 130, 7), "Both."),
        ],
        False,
    ),
}
