"""How a request drafts: from a drafter and the request's settings to what a session is told."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal
from weakref import WeakKeyDictionary

from jax.sharding import Mesh

from omni_jax.config import OmniConfig
from omni_jax.decode.draft.length import WIDTHS
from omni_jax.decode.draft.loop import Proposer, begin, decode_rounds
from omni_jax.decode.draft.proposers import check_tree, proposer_for
from omni_jax.errors import InputError
from omni_jax.inputs.values import flag, is_whole, shown
from omni_jax.models.param import Declaration
from omni_jax.weights.drafters import Drafter, check_drafter
from omni_jax.weights.trees import flatten

# Levels of a drafted tree, and children of each node.
Tree = tuple[int, int]
# What a round of each width takes, by rows and cache slots.
Measured = dict[tuple[int, int], dict[int, float]]
# How many architectures of drafters, trees of different sizes counted apart, keep their programs.
ARCHITECTURES = 8


@dataclass(frozen=True)
class Drafting:
    """How to draft: a proposer, its parameters, and how many tokens a round verifies (the one at hand included).

    widths: one, or several of which the session chooses as it goes. drawn: whether drafts are drawn as the request says
    and verified by rejection. measured: what a round of each width takes, by rows and cache slots; filled in by the
    first session that needs it.
    """

    proposer: Proposer
    params: Any
    widths: tuple[int, ...]
    drawn: bool = False
    measured: Measured = field(default_factory=dict)


@dataclass(frozen=True)
class _Placed:
    """A drafter over the model's devices. architecture: equal for those that can share programs."""

    declaration: Declaration
    params: Any
    architecture: tuple[Any, ...]


class Draftings:
    """What a model's drafters were found to be, so that each is checked and laid out once.

    Drafters of one architecture share programs and what rounds take. A drafter that nobody else holds is forgotten with
    its weights; programs stay for the last ARCHITECTURES.
    """

    def __init__(self, config: OmniConfig, mesh: Mesh | None = None):
        """mesh: where the Thinker lies; drafters are laid over it too, replicated where it does not divide them."""
        self.config, self.mesh = config, mesh
        self._placed: WeakKeyDictionary[Drafter, _Placed] = WeakKeyDictionary()
        self._shared: dict[Any, tuple[Proposer, Measured]] = {}

    def settle(
        self, drafter: Drafter | None, tokens: int | Literal["auto"] | None, tree: Tree | None, drawn: bool
    ) -> Drafting | None:
        """How a request drafts, None if it does not; InputError for a drafter of another model or wrong settings."""
        drawn = flag("draft_sampling", drawn)
        if drafter is None:
            if tokens is not None or tree is not None or drawn:
                raise InputError("draft_tokens, draft_tree and draft_sampling need a drafter")
            return None
        if not isinstance(drafter, Drafter):
            raise InputError(f"drafter is {shown(drafter)}; load one with load_drafter(directory)")
        if drawn and (tree is not None or tokens == "auto"):
            # Which drafts are drawn decides the reply, and widths follow the machine's times.
            raise InputError("draft_sampling draws a fixed number of drafts: leave out draft_tree and 'auto'")
        drafting = replace(self._with(drafter, tree), drawn=drawn)
        if tokens is None:
            return drafting
        most, usual = drafting.proposer.most, drafting.widths[0]
        if tokens == "auto" and tree is None:
            return replace(drafting, widths=tuple(sorted({usual, *(w for w in WIDTHS if w <= most + 1)})))
        if isinstance(tokens, str) or not is_whole(tokens) or not 1 <= tokens <= most:
            auto = ", or 'auto'" if tree is None else " with this draft_tree"
            raise InputError(f"draft_tokens is {shown(tokens)}; this drafter proposes 1 to {most} tokens a round{auto}")
        return replace(drafting, widths=(int(tokens) + 1,))

    def _with(self, drafter: Drafter, tree: Tree | None) -> Drafting:
        check_tree(tree)
        tree = tree and (int(tree[0]), int(tree[1]))
        if drafter not in self._placed:
            check_drafter(drafter, self.config)
            laid = drafter.placed(self.mesh)
            arrays = tuple((path, x.shape, x.dtype.name) for path, x in flatten(laid.params).items())
            self._placed[drafter] = _Placed(laid.declaration, laid.params, (drafter.config, arrays))
        placed = self._placed[drafter]
        proposer, measured = self._shared_by((*placed.architecture, tree), drafter, placed.declaration, tree)
        return Drafting(proposer, placed.params, (proposer.usual + 1,), measured=measured)

    def _shared_by(
        self, key: Any, drafter: Drafter, declaration: Declaration, tree: Tree | None
    ) -> tuple[Proposer, Measured]:
        """What drafters of one architecture share; the one that was used least recently is given up."""
        shared = self._shared.pop(key, None)
        if shared is None:
            shared = (
                proposer_for(replace(drafter, declaration=declaration), self.config.thinker.text.num_layers, tree),
                {},
            )
        self._shared[key] = shared
        if len(self._shared) > ARCHITECTURES:
            del self._shared[next(iter(self._shared))]
            # A compiled program holds its proposer, and cannot be dropped alone.
            programs: tuple[Any, ...] = (begin, decode_rounds)
            for program in programs:
                program.clear_cache()
        return shared
