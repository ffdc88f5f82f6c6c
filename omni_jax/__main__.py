"""The command `omni-jax`, also `python -m omni_jax`: nothing heavy is imported before interrupts are handled."""

from typing import NoReturn

from omni_jax.process import enter


def main() -> NoReturn:
    """Run the command."""
    enter("omni-jax", "omni_jax.cli")


if __name__ == "__main__":
    main()
