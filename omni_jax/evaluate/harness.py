"""A model for lm-evaluation-harness: its tasks, its metrics and its command line, run on `Omni`.

    python -m omni_jax.evaluate.harness run --model omni_jax --model_args path=ckpt/,mesh=expert=4 --tasks arc_easy

or, in Python, import this module and call `lm_eval.simple_evaluate(model="omni_jax", ...)`. The harness finds models by
name once their module is imported; it has no other way to find one of another package. Only this module imports it:
pip install 'omni_jax[harness]'.

Prompts are raw text, or with --apply_chat_template what the checkpoint's template makes of them. Log-likelihoods are
those of `loglikelihood`; generation is greedy unless the task says otherwise, stops at the end of the turn and at the
task's stop strings, and runs `batch_size` requests in as many slots.

Source: `lm_eval.api.model.TemplateLM`, which splits texts into context and continuation, and `HFLM`, whose settings and
truncation these are. Deliberate difference: nothing is truncated on the right, and a prompt whose reply does not fit
loses its beginning as there.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import fields
from itertools import groupby
from typing import Any, NamedTuple, cast

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

import omni_jax
from omni_jax.decode.prompt import Prompt
from omni_jax.errors import InputError
from omni_jax.evaluate.context import seed_of
from omni_jax.evaluate.loglikelihood import Continuation, Scored, log_likelihoods
from omni_jax.files import user_path
from omni_jax.inputs.batch import Batch
from omni_jax.inputs.messages import read_conversation
from omni_jax.inputs.tokenizer import Tokenizer
from omni_jax.omni import Omni
from omni_jax.settings import Sampling

# Sampling settings of the harness that are supported; it uses transformers' names, and so does `Sampling`.
SAMPLING = tuple(one.name for one in fields(Sampling) if one.name != "logprobs")
# Settings that may be present and change nothing.
IGNORED = ("do_sample", "until", "max_gen_toks", "num_beams", "use_cache")


class _Request(NamedTuple):
    """A request to continue a context, with its number among all."""

    number: int
    context: str
    gen_kwargs: dict
    seed: int


@register_model("omni_jax")
class OmniLM(TemplateLM):
    """The model as the harness sees it."""

    def __init__(
        self,
        path: str | Omni,
        batch_size: int | str = 8,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        dtype: str | None = None,
        mesh: str | None = None,
        seed: int = 0,
        enable_thinking: bool | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,
    ):
        """path: what `omni_jax.load` takes, or a loaded model. max_length: tokens of context, by default the model's.

        mesh: as for `omni_jax.load`, with + for the comma, at which --model_args would be split: expert=4+data=2.
        enable_thinking: whether a hybrid model's template lets it think; by default as the template has it.
        seed: the run's; a request's own follows from it, from the context and from how often the request came before.
        device and max_batch_size are arguments of the harness that have no effect here.
        """
        super().__init__()
        self.batch_size, self.max_gen_toks = _whole("batch_size", batch_size), _whole("max_gen_toks", max_gen_toks)
        self.seed, self.enable_thinking = _whole("seed", seed, least=0), enable_thinking
        length = None if max_length is None else _whole("max_length", max_length)
        self.omni = path if isinstance(path, Omni) else _load(path, mesh, dtype)
        self.path = "omni_jax" if isinstance(path, Omni) else path
        limit = self.omni.config.thinker.text.max_position_embeddings
        self.max_length = min(length or limit, limit)

    @property
    def _tokens(self) -> Tokenizer:
        return self.omni.processor.tokenizer

    @property
    def eot_token_id(self) -> int:
        """The end of a turn, which is also put before texts without a context."""
        return self.omni.config.im_end_token_id

    @property
    def tokenizer_name(self) -> str:
        """The name of the tokenizer in the harness's caches."""
        return self.path.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the checkpoint's template."""
        return self.omni.processor.template.source if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt that the checkpoint's template makes of messages."""
        messages = read_conversation(chat_history).messages
        return self.omni.processor.template.render(
            messages, None, add_generation_prompt=add_generation_prompt, enable_thinking=self.enable_thinking
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        """Token ids; literals of control tokens become these tokens, because templates write them."""
        return self._tokens.encode(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        continuations = [self._continuation(context, continuation) for _, context, continuation in requests]
        with tqdm(total=len(continuations), desc="log-likelihoods", disable=disable_tqdm) as bar:

            def seen(number: int, scored: Scored) -> None:
                bar.update()
                if requests[number][0] is not None:
                    answer = (scored.log_likelihood, scored.greedy)
                    self.cache_hook.add_partial("loglikelihood", requests[number][0], answer)

            scored = log_likelihoods(self.omni, continuations, rows=self.batch_size, seen=seen)
        return [(one.log_likelihood, one.greedy) for one in scored]

    def _continuation(self, context: list[int], continuation: list[int]) -> Continuation:
        """A request, without the beginning of a context that is too long."""
        room = self.max_length + 1 - len(continuation)
        if room < 1:
            raise InputError(f"{len(continuation)} tokens of continuation do not fit a context of {self.max_length}")
        return Continuation(Batch.of_text([context[-room:]]), continuation)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, in windows of the context where it is longer."""
        windows, counts = [], []
        for (text,) in (request.args for request in requests):
            cut = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            windows += [(None, *make_disjoint_window(window)) for window in cut]
            counts.append(len(windows) - sum(counts))
        scored = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        totals = [sum(next(scored)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to a stop string."""
        seeded = self._seeded([cast(tuple[str, dict], request.args) for request in requests])
        answers: dict[int, str] = {}
        with tqdm(total=len(seeded), desc="replies", disable=disable_tqdm) as bar:
            # All requests in slots at the same time draw with the same settings.
            for _, group in groupby(sorted(seeded, key=_drawn), key=_drawn):
                for number, answer in self._generated(list(group)):
                    answers[number] = answer
                    self.cache_hook.add_partial("generate_until", requests[number].args, answer)
                    bar.update()
        return [answers[number] for number in range(len(requests))]

    def _seeded(self, requests: Sequence[tuple[str, dict]]) -> list[_Request]:
        """Requests with seeds: the harness asks for a task's repeats by giving the same request several times."""
        met: Counter[str] = Counter()
        seeded = []
        for number, (context, gen_kwargs) in enumerate(requests):
            request = repr((context, gen_kwargs))
            seeded.append(_Request(number, context, gen_kwargs, seed_of(self.seed, context, met[request])))
            met[request] += 1
        return seeded

    def _generated(self, requests: list[_Request]) -> Iterator[tuple[int, str]]:
        settings = _settings(requests[0].gen_kwargs, self.max_gen_toks)
        unknown = [name for name in settings if name not in (*SAMPLING, *IGNORED)]
        if unknown:
            raise InputError(f"generation setting {unknown[0]!r} is unknown; there are {', '.join(SAMPLING)}")
        if settings.get("num_beams", 1) != 1:
            raise InputError(f"num_beams is {settings['num_beams']}; replies are drawn or greedy: leave it out")
        sampling = {name: settings[name] for name in SAMPLING if settings.get(name) is not None}
        prompts = (self._prompt(one) for one in requests)
        for i, reply in self.omni.generate_many(prompts, slots=self.batch_size, **sampling):
            yield requests[i].number, postprocess_generated_text(reply.text, self._stops(requests[i].gen_kwargs), None)

    def _prompt(self, request: _Request) -> Prompt:
        new = _settings(request.gen_kwargs, self.max_gen_toks)["max_gen_toks"]
        if new >= self.max_length:
            raise InputError(f"max_gen_toks is {new}, all of a context of {self.max_length}; ask for fewer")
        ids = self.tok_encode(request.context)[-(self.max_length - new) :]
        stops = self._stops(request.gen_kwargs)

        def ends(written: list[int]) -> bool:
            text = self._tokens.decode(written)
            return any(stop in text for stop in stops)

        return Prompt(Batch.of_text([ids or [self.prefix_token_id]]), request.seed, new, ends)

    def _stops(self, gen_kwargs: dict) -> list[str]:
        stops = handle_stop_sequences(_settings(gen_kwargs, self.max_gen_toks)["until"], eos=None)
        return [stop for stop in stops if stop]


def _load(path: str, mesh: str | None, dtype: str | None) -> Omni:
    path = str(user_path(path, "path"))
    if mesh is not None and not isinstance(mesh, str):
        raise InputError(f"mesh is {mesh!r}; give text, such as expert=4+data=2")
    return omni_jax.load(path, mesh=mesh and mesh.replace("+", ","), dtype=dtype, parts=("thinker",))


def _whole(name: str, value: Any, least: int = 1) -> int:
    """A setting that is a whole number, which --model_args may give as text."""
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if isinstance(number, bool) or not isinstance(number, int) or number < least:
        raise InputError(f"{name} {value!r}; give a whole number from {least} on, such as 8")
    return number


def _settings(gen_kwargs: dict, max_gen_toks: int) -> dict[str, Any]:
    """A task's settings as the harness reads them for its own models; max_gen_toks: unless they say how much."""
    return dict(normalize_gen_kwargs(gen_kwargs, max_gen_toks))


def _drawn(request: _Request) -> str:
    """What must be equal for requests to run together."""
    settings = _settings(request.gen_kwargs, 0)
    return repr([settings.get(name) for name in SAMPLING])


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
