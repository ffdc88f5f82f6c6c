"""Stand-ins for what a server is made of, importable in its worker processes."""

import os
import time
from dataclasses import dataclass

from omni_jax.errors import InputError


@dataclass
class Acting:
    """Stands in for a processor: what a conversation says is done."""

    def prepare(self, conversation, **options):
        act, argument = conversation
        if act == "hang":
            time.sleep(600)
        if act == "crash":
            os._exit(9)
        if act == "grow":
            return len([bytes(1 << 20) for _ in range(argument)])
        if act == "fail":
            raise KeyError("inside")
        if act == "refuse":
            raise InputError("no such thing")
        return argument, options, os.getpid()
