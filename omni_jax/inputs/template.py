"""A checkpoint's chat template: found in one of the files that may hold it, compiled, and rendered to text.

Source: HF `render_jinja_template`, and `PreTrainedTokenizerBase` for the places of templates. Deliberate difference: a
template always runs within the limits of `limits` and `sandbox`.
"""

from pathlib import Path
from typing import Any

from omni_jax.errors import CheckpointError, InputError
from omni_jax.files import read_object, read_text, reason_of
from omni_jax.inputs.limits import LimitError, limits, made
from omni_jax.inputs.sandbox import compile_template

JINJA, TEMPLATE, SETTINGS = "chat_template.jinja", "chat_template.json", "tokenizer_config.json"
REMEDY = "take the chat template of the published checkpoint"


class ChatTemplate:
    """A checkpoint's Jinja template, compiled in the sandbox."""

    def __init__(self, source: str, variables: dict[str, str], path: Path):
        """variables: texts that the template can read, such as the tokenizer's eos_token. path: for errors."""
        self.source, self._variables, self._path = source, variables, path
        try:
            self._template = compile_template(source)
        except Exception as error:  # a template can fail in any way that a parser and Python can
            raise CheckpointError(
                f"{path}: the chat template cannot be compiled ({_reason(error)}); {REMEDY}"
            ) from None

    def __reduce__(self) -> tuple[Any, ...]:
        """To another process as its source, because a compiled template does not cross."""
        return type(self), (self.source, self._variables, self._path)

    @classmethod
    def from_dir(cls, directory: str | Path) -> "ChatTemplate":
        """Read chat_template.jinja, else chat_template.json, else the template in tokenizer_config.json."""
        directory = Path(directory)
        settings = _read(directory / SETTINGS)
        tokens = {key: value for key, value in settings.items() if key.endswith("_token")}
        contents = {key: value.get("content") if isinstance(value, dict) else value for key, value in tokens.items()}
        variables = {key: value for key, value in contents.items() if isinstance(value, str)}
        path = directory / JINJA
        if path.is_file():
            return cls(read_text(path, remedy=REMEDY), variables, path)
        for path, values in ((directory / TEMPLATE, _read(directory / TEMPLATE)), (directory / SETTINGS, settings)):
            template = values.get("chat_template")
            if template is not None:
                return cls(_default(template, path), variables, path)
        raise CheckpointError(
            f"{directory} has no chat template: none of {JINJA}, {TEMPLATE} and {SETTINGS} with one is there; copy one "
            "from the published checkpoint"
        )

    def render(
        self,
        messages: list[dict],
        tools: list[dict] | None,
        *,
        add_generation_prompt: bool,
        enable_thinking: bool | None = None,
    ) -> str:
        """The prompt as text; InputError if the template refuses the messages, fails on them or exceeds a limit."""
        thinking = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        try:
            with limits():
                return made(
                    self._template.render(
                        self._variables | thinking,
                        messages=messages,
                        tools=tools,
                        documents=None,
                        add_generation_prompt=add_generation_prompt,
                    )
                )
        except LimitError as error:
            raise InputError(
                f"{self._path} goes beyond what a chat template may do: {error}; {REMEDY}, or shorten the messages"
            ) from None
        except Exception as error:  # a template can fail in any way that Python can
            raise InputError(f"{self._path} cannot render these messages: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {reason_of(error)}"


def _read(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint; empty when the file does not exist."""
    return read_object(path, remedy=REMEDY) if path.is_file() else {}


def _default(template: Any, path: Path) -> str:
    """The template that is used if none is named: the only one, or the one called "default"."""
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else None
        if template is None:
            raise CheckpointError(f"{path}: no template of 'chat_template' is called 'default'; {REMEDY}")
    if not isinstance(template, str):
        raise CheckpointError(f"{path}: 'chat_template' is of type {type(template).__name__}, not text; {REMEDY}")
    return template
