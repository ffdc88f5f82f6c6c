"""Tasks with a model: results are what it says and scores when asked directly, and a run that dies goes on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import crc32

import jax
import numpy as np
import pytest

from omni_jax.cli import main
from omni_jax.errors import InputError
from omni_jax.evaluate import loglikelihood, run
from omni_jax.evaluate.context import seed_of
from omni_jax.evaluate.data import Sample
from omni_jax.evaluate.loglikelihood import Continuation, log_likelihoods, prepare_choices
from omni_jax.evaluate.stored import read_all
from omni_jax.evaluate.tasks import missing_field
from omni_jax.loading import load
from omni_jax.omni import Omni
from tests.helpers.datasets import NEW, results, score, write
from tests.parity import image_part, user


def test_log_likelihoods_are_those_of_the_logits(omnis: Callable[[str], Omni]) -> None:
    omni = omnis("small")
    asked = []
    for messages in (user("Hi."), user(image_part(60, 60), "A picture?"), user("word " * 20)):
        asked += prepare_choices(omni, omni.prepare(messages), [" yes, of course", "<|im_end|>", "no"])
    told = {}
    scored = log_likelihoods(omni, asked, rows=4, seen=told.__setitem__)
    assert [told[i] for i in range(len(asked))] == scored
    for one, got in zip(asked, scored, strict=True):
        n = len(one.token_ids)
        logits = omni.logits(one.whole())[0, -n - 1 : -1]
        want = jax.nn.log_softmax(logits)[np.arange(n), np.asarray(one.token_ids)].sum()
        assert got.tokens == n and got.log_likelihood == pytest.approx(float(want), abs=1e-3)
        assert got.greedy == bool((logits.argmax(-1) == np.asarray(one.token_ids)).all())
    assert min(one.tokens for one in scored[1::3]) > 1, "control tokens in a choice are text"
    # What the model says itself is greedy, behind a picture too, whose positions are not indices.
    for messages, context in (
        (user("Hi."), asked[0].context),
        (user(image_part(60, 60), "A picture?"), asked[3].context),
    ):
        ids = omni.generate(messages, max_new_tokens=20, stop_ids=()).token_ids
        said, wrong = Continuation(context, ids), Continuation(context, [*ids[:-1], (ids[-1] + 1) % 100])
        assert [one.greedy for one in log_likelihoods(omni, [said, wrong])] == [True, False]
    with pytest.raises(InputError, match="context"):
        log_likelihoods(omni, [Continuation(asked[0].context, [1] * 10**6)])


def test_a_forward_has_so_many_tokens_and_no_more(
    omnis: Callable[[str], Omni], monkeypatch: pytest.MonkeyPatch
) -> None:
    omni, ran = omnis("small"), []
    contexts = (omni.prepare(user("word " * n)) for n in (1, 30, 9, 2, 9, 1))
    asked = [one for context in contexts for one in prepare_choices(omni, context, ["yes"])]
    want = log_likelihoods(omni, asked, rows=3)

    def counted(params: dict, token_ids: np.ndarray, *more: Any, **settings: Any) -> Any:
        ran.append(token_ids.shape)
        return score_tokens(params, token_ids, *more, **settings)

    score_tokens = loglikelihood.token_log_probs
    monkeypatch.setattr(loglikelihood, "token_log_probs", counted)
    monkeypatch.setattr(loglikelihood, "TOKENS", 128)
    got = log_likelihoods(omni, asked, rows=3)
    assert [one.log_likelihood for one in got] == pytest.approx([one.log_likelihood for one in want], abs=1e-3)
    assert all(B * T <= 128 or B == 1 for B, T in ran) and {B for B, _ in ran} == {1, 2, 3}, ran


def test_what_samples_lack() -> None:
    def lacking(task: str, **fields: Any) -> str:
        return missing_field(Sample("0", [], **fields), task, ()) or ""

    assert "choice 1 is empty" in lacking("choice", choices=("a", ""), answer=0), "nothing is likelier than nothing"
    assert "the 'reference' is empty" in lacking("loglikelihood", references=("", "b"))
    assert not lacking("choice", choices=("a", " "), answer=0) and not lacking("loglikelihood", references=("b", ""))


def test_generate_scores_replies_and_goes_on_after_an_interrupt(
    omnis: Callable[[str], Omni], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    omni, texts = omnis("small"), [f"Question {'and ' * n}{n}?" for n in range(5)]
    want = [omni.generate(user(text), max_new_tokens=NEW, stop_ids=None) for text in texts]
    rows = [{"prompt": t, "reference": [r.text, "x"][i % 2]} for i, (t, r) in enumerate(zip(texts, want, strict=True))]
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    data = write(tmp_path / "rows.jsonl", *rows, {"prompt": "?", "image": "broken.png", "reference": "x", "id": "bad"})

    add, count = run.Results.add, 0

    def interrupted(self: run.Results, result: dict) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        add(self, result)

    monkeypatch.setattr(run.Results, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        score(omni, model, data, tmp_path / "out")
    assert len(read_all(tmp_path / "out")) == 2 and not (tmp_path / "out" / "report.md").exists()
    monkeypatch.setattr(run.Results, "add", add)
    summary = score(omni, model, data, tmp_path / "out")
    assert len(read_all(tmp_path / "out")) == 6 and summary["failed"] == 1
    assert summary["scores"] == {"exact": 3 / 5, "exact_normalised": 3 / 5}
    got = results(tmp_path / "out")
    assert "broken.png" in got["bad"]["error"]
    for i, reply in enumerate(want):
        (turn,) = got[f"#{i}"]["turns"]
        assert turn["text"] == reply.text and turn["token_ids"] == reply.token_ids
    with pytest.raises(InputError, match="max_new_tokens was 6, is 7"):
        score(omni, model, data, tmp_path / "out", max_new_tokens=7)
    with pytest.raises(InputError, match="sample bad"):
        score(omni, model, data, tmp_path / "strict", fatal=True)


def test_both_turns_are_said_and_drafters_compared(
    omnis: Callable[[str], Omni], drafters: Callable[[str, str], Path], model: Path, tmp_path: Path
) -> None:
    omni = omnis("small")
    rows = [{"question_id": 80 + i, "category": "ab"[i % 2], "turns": [f"Write {i}.", "Again."]} for i in range(3)]
    data = write(tmp_path / "questions.jsonl", *rows)
    chain, tree = drafters("eagle3", "small"), drafters("dflash", "small")
    summary = score(omni, model, data, tmp_path / "out", drafter=(chain, tree), draft_tokens=2)
    plain = score(omni, model, data, tmp_path / "plain")
    assert plain["task"] == "mt-bench" and plain["replies"]["replies"] == 6 and plain["scores"] == {}
    for i in range(3):
        first = omni.generate(user(f"Write {i}."), max_new_tokens=NEW)
        history = [*user(f"Write {i}."), {"role": "assistant", "content": first.text}, *user("Again.")]
        second = omni.generate(history, max_new_tokens=NEW)
        for output in ("plain", f"out/{chain.name}", f"out/{tree.name}"):
            said = [turn["token_ids"] for turn in results(tmp_path / output)[str(80 + i)]["turns"]]
            assert said == [first.token_ids, second.token_ids]
    for name in (chain.name, tree.name):
        micro = summary[name]["drafting"]["accepted_length_micro"]
        turns = [t["stats"] for r in read_all(tmp_path / "out" / name) for t in r["turns"]]
        assert micro == pytest.approx(sum(t["new_tokens"] - 1 for t in turns) / sum(t["rounds"] for t in turns))
        assert f"{micro:.4g}" in (tmp_path / "out" / "report.md").read_text()


def test_choices_and_references_are_weighed(omnis: Callable[[str], Omni], model: Path, tmp_path: Path) -> None:
    omni, choices = omnis("small"), ["yes", "perhaps, who knows", "no"]
    context = omni.prepare(user("Pick one."))
    scored = log_likelihoods(omni, prepare_choices(omni, context, choices), rows=2)
    best = int(np.argmax([one.log_likelihood for one in scored]))
    rows = [{"prompt": "Pick one.", "choices": choices, "answer": i} for i in range(3)]
    data = write(tmp_path / "choices.jsonl", *rows, {"prompt": "No answer.", "choices": choices})
    summary = score(omni, model, data, tmp_path / "choices", max_new_tokens=None)
    assert summary["task"] == "choice" and summary["rows_skipped"] == 1
    got = results(tmp_path / "choices")
    assert [got[f"#{i}"]["scores"]["accuracy"] for i in range(3)] == [float(i == best) for i in range(3)]
    assert got["#0"]["log_likelihoods"] == pytest.approx([one.log_likelihood for one in scored], abs=1e-3)
    with pytest.raises(InputError, match=r"sample #3: .*needs at least two"):
        score(omni, model, data, tmp_path / "strict", max_new_tokens=None, fatal=True)

    data = write(tmp_path / "texts.jsonl", *({"prompt": "Pick one.", "reference": text} for text in choices))
    summary = score(omni, model, data, tmp_path / "texts", task="loglikelihood", max_new_tokens=None)
    total, tokens = sum(one.log_likelihood for one in scored), sum(one.tokens for one in scored)
    assert summary["scores"]["perplexity_per_token"] == pytest.approx(np.exp(-total / tokens), rel=1e-4)


HEARD: list[tuple] = []


def recognise(wave: np.ndarray, rate: int) -> str:
    """A recogniser that hears one word too many, and every sample."""
    HEARD.append((wave.dtype, wave.ndim, rate))
    return f"spare {crc32(wave.tobytes())}"


def test_speech_is_recognised(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("jiwer")
    # A model of its own, so that its first reply compiles, whatever other tests have asked.
    omni, data = load(model), write(tmp_path / "rows.jsonl", *[{"prompt": "Speak."}] * 3)
    settings = {"task": "speech", "max_frames": 4, "speech_temperature": 0.0, "slots": 1}
    summary = score(omni, model, data, tmp_path / "out", recogniser=f"{__name__}:recognise", **settings)
    assert HEARD and HEARD[-1] == (np.dtype("float32"), 1, 24_000)
    told = [result["turns"][0]["stats"] for _, result in sorted(results(tmp_path / "out").items())]
    cold, *_, warm = told
    assert cold["compiled"] > 0 == warm["compiled"]
    timed = [stats for stats in told if not stats["compiled"]]
    seconds, spoken = (sum(stats[name] for stats in timed) for name in ("share_seconds", "audio_seconds"))
    assert summary["speech"]["replies_not_timed"] == len(told) - len(timed)
    assert summary["speech"]["real_time_factor"] == pytest.approx(seconds / spoken)
    assert read_all(tmp_path / "out")[1]["heard"].startswith("spare") and summary["scores"]["wer"] > 0
    assert warm["share_seconds"] > warm["talker_seconds"] + warm["vocoder_seconds"]
    with pytest.raises(InputError, match="needs a --recogniser"):
        score(omni, model, data, tmp_path / "other", **settings)


def test_speech_in_slots_is_that_of_each_alone(omnis: Callable[[str], Omni], model: Path, tmp_path: Path) -> None:
    pytest.importorskip("jiwer")
    omni, texts = omnis("small"), [f"Question {'and ' * n}{n}?" for n in range(5)]
    data = write(tmp_path / "rows.jsonl", *({"prompt": text} for text in texts))
    drawn = {"temperature": 1.0, "max_new_tokens": 12, "max_frames": 9}
    settings = {"task": "speech", "recogniser": f"{__name__}:recognise", **drawn}
    summaries = [score(omni, model, data, tmp_path / f"{slots}", slots=slots, **settings) for slots in (1, 3)]
    assert summaries[0]["scores"] == summaries[1]["scores"]
    for i, text in enumerate(texts):
        want = omni.generate(user(text), speech=True, seed=seed_of(0, f"#{i}"), **drawn)
        assert want.audio is not None
        for slots in (1, 3):
            result = results(tmp_path / f"{slots}")[f"#{i}"]
            (turn,) = result["turns"]
            assert (turn["text"], turn["token_ids"]) == (want.text, want.token_ids)
            assert result["heard"] == recognise(want.audio, 24_000)
            for name in ("frames", "audio_seconds", "speech_finish_reason", "finish_reason"):
                assert turn["stats"][name] == want.stats[name]


def test_the_command_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write(tmp_path / "rows.jsonl", {"prompt": "Hi", "reference": "x"}, {"prompt": ""})
    paths = ["evaluate", "--model", str(model), "--data", str(data), "--output", str(tmp_path / "out")]
    asked = [*paths, "--max-new-tokens", "2", "--slots", "1", "--metric", "exact_number"]
    with pytest.raises(SystemExit, match="4"):  # a row was skipped
        main([*asked, "--json"])
    out, err = capsys.readouterr()
    assert json.loads(out)["scores"] == {"exact_number": 0} and "skipped rows.jsonl:2: 'prompt' is empty" in err
    with pytest.raises(SystemExit, match="4"):
        main(asked)
    assert capsys.readouterr().out.startswith("# Evaluation: generate")
    whole = write(tmp_path / "whole.jsonl", {"prompt": "Hi", "reference": "x"})
    main([*asked, "--data", str(whole), "--output", str(tmp_path / "whole")])
    assert "1 of 1 samples scored" in capsys.readouterr().out

    def interrupted(self: run.Results, result: dict) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(run.Results, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            main([*asked, "--output", str(tmp_path / "other")])
    capsys.readouterr()
    for more, why in (
        (["--fatal"], "rows.jsonl:2"),
        (["--seed", "1"], "seed was 0, is 1"),
        (["--task", "choice"], "has no use for --max-new-tokens"),
        (["--draft-tokens", "2"], "need a drafter"),
    ):
        with pytest.raises(SystemExit, match="3"):
            main([*asked, *more])
        assert why in capsys.readouterr().err
    with pytest.raises(SystemExit, match="3"):
        main([*paths, "--task", "choice", "--metric", "exact"])
    assert "leave out --metric" in capsys.readouterr().err
