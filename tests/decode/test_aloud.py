"""A text that is read aloud: the codes are those of a reply of its tokens, which was drawn."""

from dataclasses import replace

import numpy as np
import pytest

from omni_jax.decode.speech import aloud
from omni_jax.decode.speech.aloud import Words
from omni_jax.errors import InputError
from omni_jax.settings import Voice

MESSAGES = [{"role": "user", "content": "What do you hear in the garden?"}]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_words_of_a_reply_sound_as_the_reply_did(omnis, monkeypatch, temperature):
    omni = omnis("tiny")
    voice = Voice("ethan", speech_temperature=temperature, max_frames=20)
    more = {"speech_temperature": temperature, "max_frames": 20, "max_new_tokens": 12, "seed": 6}
    reply = omni.generate(MESSAGES, speech=True, stop_ids=(), **more)
    read = aloud.Said.read
    # These tokens, which a text that spells them might be cut into otherwise.
    exact = classmethod(lambda cls, *given: replace(read(*given), words=Words(reply.token_ids[:-1], 6)))
    monkeypatch.setattr(aloud.Said, "read", exact)
    said = omni.speak("anything", messages=MESSAGES, voice=voice, seed=6)
    np.testing.assert_array_equal(said.codes, reply.codes)
    np.testing.assert_allclose(said.audio, reply.audio, atol=1e-6)
    assert said.stats["frames"] == reply.stats["frames"] > 0


def test_texts_and_seeds_make_a_difference(omnis):
    omni, voice = omnis("tiny"), Voice(max_frames=6)
    one, again = omni.speak("The river", voice=voice), omni.speak("The river", voice=voice)
    np.testing.assert_array_equal(one.codes, again.codes)
    assert one.text == "The river" and one.codes.shape[1] == 6
    assert not np.array_equal(one.codes, omni.speak("The garden", voice=voice).codes)
    assert not np.array_equal(one.codes, omni.speak("The river", voice=voice, seed=1).codes)
    # A literal of a control token is said as it is spelled.
    assert len(omni.speak("a<|im_end|>b", voice=voice).token_ids) > 3


@pytest.mark.parametrize("text, more", [("", {}), (None, {}), ("a", {"voice": Voice("nobody")}), ("a", {"seed": -1})])
def test_what_cannot_be_said(omnis, text, more):
    with pytest.raises(InputError):
        omnis("tiny").speak(text, **more)


def test_media_in_what_a_text_answers_are_refused(omnis, data_dir):
    content = [{"type": "image", "image": str(data_dir / "flower.jpg"), "max_pixels": 4096}]
    with pytest.raises(InputError, match="media"):
        omnis("tiny").speak("a", messages=[{"role": "user", "content": content}])


def test_models_without_a_voice(omnis):
    with pytest.raises(InputError, match="talker"):
        omnis("thinking").speak("a")
