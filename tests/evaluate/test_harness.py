"""lm-evaluation-harness: a task of local files gives the numbers that its own transformers model gives."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from omni_jax.errors import InputError
from omni_jax.omni import Omni
from omni_jax.sharding import mesh_name

lm_eval = pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")

TEXTS = ["The quick brown fox", "A model that listens", "What do you see in the image", "people walk along the water"]
CHOICES = {
    "task": "local_choices",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
REPLIES = {
    "task": "local_replies",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{reply}}",
    "generation_kwargs": {"until": ["o", "<|im_end|>"], "max_gen_toks": 12, "do_sample": False},
    "metric_list": [{"metric": "exact_match"}],
}
ROLLING = {
    "task": "local_rolling",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{question}} {{choices}}",
    "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
}
TASKS = (CHOICES, REPLIES, ROLLING)
# Short enough that the longest texts need several windows.
MAX_LENGTH = 48


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import yaml

    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {
            "question": TEXTS[i % 4] + " and" * i,
            "choices": [f" {text}" for text in TEXTS[: 2 + i % 3]],
            "answer": 1,
            # What the model says to one of them.
            "reply": "evereri",
        }
        for i in range(6)
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    local = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    for task in TASKS:
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump({**task, **local}))
    return folder


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)


def evaluate(model: Any, tasks: Path) -> tuple[dict, dict[str, list]]:
    """The harness's scores, and what each document gave, task by task."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    names = [str(task["task"]) for task in TASKS]
    found = lm_eval.simple_evaluate(model=model, tasks=names, task_manager=manager, bootstrap_iters=0, log_samples=True)
    scores = {name: {k: v for k, v in found["results"][name].items() if k != "alias"} for name in names}
    return scores, {name: [sample["resps"] for sample in found["samples"][name]] for name in names}


def test_a_task_of_local_files_gives_what_transformers_gives(
    omnis: Callable[[str], Omni],
    reference: Callable[[str], Any],
    checkpoints: Callable[[str], Path],
    tasks: Path,
    offline: None,
) -> None:
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    from omni_jax.evaluate.harness import OmniLM

    tokenizer = AutoTokenizer.from_pretrained(checkpoints("small"))
    thinker = reference("small").thinker
    thinker.generation_config.eos_token_id = thinker.generation_config.pad_token_id = tokenizer.eos_token_id
    theirs = HFLM(pretrained=thinker, tokenizer=tokenizer, backend="causal", batch_size=3, max_length=MAX_LENGTH)
    ours = OmniLM(omnis("small"), batch_size=4, max_length=MAX_LENGTH)
    assert ours.eot_token_id == theirs.eot_token_id == ours.prefix_token_id == theirs.prefix_token_id
    scores, said = evaluate(ours, tasks)
    want_scores, want = evaluate(theirs, tasks)
    for kind in ("local_choices", "local_rolling"):
        for got, expected in zip(said[kind], want[kind], strict=True):
            for (one,), (other,) in zip(got, expected, strict=True):
                greedy, other_greedy = (x[1] if isinstance(x, tuple) else None for x in (one, other))
                one, other = (x[0] if isinstance(x, tuple) else x for x in (one, other))
                assert one == pytest.approx(other, rel=1e-4) and greedy == other_greedy
    assert said["local_replies"] == want["local_replies"]
    assert any("o" not in reply for [[reply]] in said["local_replies"]), "some end by themselves"
    for name, values in want_scores.items():
        for metric, value in values.items():
            if isinstance(value, float):
                assert scores[name][metric] == pytest.approx(value, rel=1e-4), (name, metric)
    assert 0 < scores["local_choices"]["acc,none"] < 1 and scores["local_replies"]["exact_match,none"] > 0
    assert {len(want[name]) for name in want} == {6}


def test_generation_ends_at_stop_strings_and_draws_as_told(
    omnis: Callable[[str], Omni], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.api.instance import Instance

    from omni_jax.evaluate.harness import OmniLM

    omni = omnis("small")
    model = OmniLM(omni, batch_size=2)

    def ask(*settings: dict) -> list[str]:
        instances = [Instance("generate_until", {}, ("Once upon", kw), i) for i, kw in enumerate(settings)]
        return model.generate_until(instances, disable_tqdm=True)

    made, lengths = omni.generate_many, []

    def counted(*asked: Any, **settings: Any) -> Any:
        for number, reply in made(*asked, **settings):
            lengths.append(reply.stats["new_tokens"])
            yield number, reply

    monkeypatch.setattr(omni, "generate_many", counted)
    (whole,) = ask({"max_gen_toks": 70})
    (until,) = ask({"max_gen_toks": 70, "until": [whole[10:12]]})
    assert until == whole[: whole.index(whole[10:12])] and lengths[0] > lengths[1], "it is not written on"
    stop = whole[10:12]
    cut, again, warm, short = ask(
        {"max_gen_toks": 70, "until": [stop]},
        {"max_gen_toks": 70},
        {"max_gen_toks": 70, "do_sample": True, "temperature": 1.5, "top_k": 50},
        {"max_gen_toks": 3},
    )
    assert cut == whole[: whole.index(stop)] and again == whole != warm and whole.startswith(short) and short != whole
    repeated = ask(*[{"max_gen_toks": 8, "do_sample": True, "temperature": 1.5}] * 4)
    assert len(set(repeated)) == 4, "a task's repeats draw each for themselves"
    assert len(set(ask(*[{"max_gen_toks": 8}] * 3))) == 1
    with pytest.raises(InputError, match="num_return_sequences"):
        ask({"num_return_sequences": 2})
    with pytest.raises(InputError, match="batch_size 'auto'"):
        OmniLM(omni, batch_size="auto")
    asked = model.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert asked.endswith("<|im_start|>assistant\n")
    assert model.apply_chat_template([{"role": "user", "content": "Hi", "tool_calls": None}]) == asked
    with pytest.raises(InputError, match="message 0 has the role 'human'"):
        model.apply_chat_template([{"role": "human", "content": "Hi"}])


def test_the_harness_finds_the_model_by_name(
    model: Path, tasks: Path, tmp_path: Path, offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own command line, as `python -m omni_jax.evaluate.harness` runs it, on several devices."""
    from lm_eval.__main__ import cli_evaluate

    import omni_jax.evaluate.harness

    load, meshes = omni_jax.load, []

    def told(*asked: Any, **settings: Any) -> Omni:
        omni = load(*asked, **settings)
        meshes.append(omni.meshes["thinker"])
        return omni

    monkeypatch.setattr(omni_jax, "load", told)
    asked = [
        "lm_eval",
        "run",
        "--model",
        "omni_jax",
        "--model_args",
        f"path={model},mesh=expert=2+data=2,max_length=48",
    ]
    asked += ["--tasks", "local_choices", "--include_path", str(tasks), "--output_path", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", [*asked, "--batch_size", "4", "--limit", "2"])
    cli_evaluate()
    (results,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(results.read_text())["n-samples"]["local_choices"]["effective"] == 2
    assert [mesh_name(mesh) for mesh in meshes] == ["expert=2,data=2"]
