"""The errors that bad input raises. Each names the thing and the remedy; the command line prints no traceback."""


class OmniError(ValueError):
    """Anything that a user can fix."""


class ConfigError(OmniError):
    """A `config.json` that is not a complete Qwen3-Omni configuration."""


class CheckpointError(OmniError):
    """Weights that are missing, damaged, of another shape or of another model."""


class MismatchError(CheckpointError):
    """Stored data that is not what was written."""


class InputError(OmniError):
    """Media, messages or settings that cannot be used."""


class MemoryLimitError(InputError):
    """A request that memory does not hold."""
