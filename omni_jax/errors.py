"""The errors that bad input raises. Each names the thing and the remedy; the command line prints no trace of them."""


class OmniError(ValueError):
    """Anything that a user can mend."""


class ConfigError(OmniError):
    """A `config.json` that is not, or not completely, a Qwen3-Omni configuration."""


class CheckpointError(OmniError):
    """Weights that are missing, damaged, of another shape, or not ours."""


class InputError(OmniError):
    """Media, messages or settings that cannot be used."""
