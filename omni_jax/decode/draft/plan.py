"""How a request drafts: a drafter and the request's settings become a `DraftPlan`, which an engine carries out."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal, assert_never
from weakref import WeakKeyDictionary

from jax.sharding import Mesh

from omni_jax.config import OmniConfig
from omni_jax.decode.draft.dflash import BlockProposer
from omni_jax.decode.draft.eagle3 import ChainProposer, TreeProposer
from omni_jax.decode.draft.length import LENGTHS
from omni_jax.decode.draft.loop import Proposer, begin_drafting, decode_rounds
from omni_jax.decoder_config import DecoderConfig
from omni_jax.draft_config import DFlashConfig, Eagle3Config
from omni_jax.errors import InputError
from omni_jax.inputs.values import flag, is_whole, shown
from omni_jax.models.param import Declaration
from omni_jax.weights.drafters import Drafter, check_drafter
from omni_jax.weights.trees import flatten

# Depth and width of a drafted tree: levels after the first, and in each the nodes that get children, and their number.
Tree = tuple[int, int]
# Tokens of a tree by default, EAGLE's own setting without the current token.
TREE_TOKENS = 59
# The most tokens that a round may verify, and nodes that a drafter may run for a tree.
MAX_NODES = 256
# Architectures of drafters whose programs are kept; trees of different sizes count apart.
MAX_ARCHITECTURES = 8


class RoundTimes:
    """Seconds of a round for each number of tokens to verify, by rows and cache capacity; filled in as engines measure.

    Drafters of one architecture share one.
    """

    def __init__(self) -> None:
        self.measured: dict[tuple[int, int], dict[int, float]] = {}


@dataclass
class DraftPlan:
    """How to draft: a proposer, its parameters, and the tokens that a round verifies, the current one included.

    verify_tokens: one number, or several from which an engine chooses as it goes. drawn: whether drafts are drawn as
    the request says and verified by rejection. times: what rounds take, shared by all that draft alike. stack: the
    drafter's layers, which have a cache; None for a drafter without one.
    """

    proposer: Proposer
    params: Any
    verify_tokens: tuple[int, ...]
    drawn: bool = False
    times: RoundTimes = field(default_factory=RoundTimes)
    stack: DecoderConfig | None = None

    @property
    def slots_written(self) -> int:
        """The most cache positions after a row's length that a round writes, even if little of it is accepted."""
        return max(map(self.proposer.slots_written, self.verify_tokens))


@dataclass(frozen=True)
class _Placed:
    """A drafter on the model's devices. architecture: equal for drafters that can share programs."""

    declaration: Declaration
    params: Any
    architecture: tuple[Any, ...]


@dataclass(frozen=True)
class _Shared:
    """What drafters of one architecture have in common."""

    proposer: Proposer
    times: RoundTimes


class KnownDrafters:
    """A model's drafters, each checked and placed once.

    Drafters of one architecture share programs and round times. A drafter that nobody else holds is forgotten with its
    weights; programs stay for the last MAX_ARCHITECTURES.
    """

    def __init__(self, config: OmniConfig, mesh: Mesh | None = None):
        """mesh: where the Thinker is; drafters are placed there too, replicated where it does not divide them."""
        self.config, self.mesh = config, mesh
        self._placed: WeakKeyDictionary[Drafter, _Placed] = WeakKeyDictionary()
        self._shared: dict[Any, _Shared] = {}

    def resolve_draft_plan(
        self, drafter: Drafter | None, tokens: int | Literal["auto"] | None, tree: Tree | None, drawn: bool
    ) -> DraftPlan | None:
        """How a request drafts, None if it does not; arguments as in `Omni.generate`.

        Raises InputError for a drafter of another model and for wrong settings.
        """
        drawn = flag("draft_sampling", drawn)
        if drafter is None:
            if tokens is not None or tree is not None or drawn:
                raise InputError("draft_tokens, draft_tree and draft_sampling need a drafter")
            return None
        if not isinstance(drafter, Drafter):
            raise InputError(f"drafter is {shown(drafter)}; load one with load_drafter(directory)")
        if drawn and (tree is not None or tokens == "auto"):
            # Which drafts are drawn decides the reply, and chosen lengths follow the machine's times.
            raise InputError("draft_sampling draws a fixed number of drafts: leave out draft_tree and 'auto'")
        plan = replace(self._default_plan(drafter, tree), drawn=drawn)
        if tokens is None:
            return plan
        most, default = plan.proposer.max_tokens, plan.verify_tokens[0]
        if tokens == "auto" and tree is None:
            return replace(plan, verify_tokens=tuple(sorted({default, *(n for n in LENGTHS if n <= most + 1)})))
        if isinstance(tokens, str) or not is_whole(tokens) or not 1 <= tokens <= most:
            auto = ", or 'auto'" if tree is None else " with this draft_tree"
            raise InputError(f"draft_tokens is {shown(tokens)}; this drafter proposes 1 to {most} tokens a round{auto}")
        return replace(plan, verify_tokens=(int(tokens) + 1,))

    def _default_plan(self, drafter: Drafter, tree: Tree | None) -> DraftPlan:
        check_tree(tree)
        tree = tree and (int(tree[0]), int(tree[1]))
        if drafter not in self._placed:
            check_drafter(drafter, self.config)
            laid = drafter.placed(self.mesh)
            arrays = tuple((path, x.shape, x.dtype.name) for path, x in flatten(laid.params).items())
            self._placed[drafter] = _Placed(laid.declaration, laid.params, (drafter.config, arrays))
        placed = self._placed[drafter]
        shared = self._shared_by((*placed.architecture, tree), drafter, placed.declaration, tree)
        tokens = (shared.proposer.default_tokens + 1,)
        return DraftPlan(shared.proposer, placed.params, tokens, times=shared.times, stack=stack_of(drafter.config))

    def _shared_by(self, key: Any, drafter: Drafter, declaration: Declaration, tree: Tree | None) -> _Shared:
        """What drafters of one architecture share; the one that was used least recently is given up."""
        shared = self._shared.pop(key, None)
        if shared is None:
            placed = replace(drafter, declaration=declaration)
            shared = _Shared(proposer_for(placed, self.config.thinker.text.num_layers, tree), RoundTimes())
        self._shared[key] = shared
        if len(self._shared) > MAX_ARCHITECTURES:
            del self._shared[next(iter(self._shared))]
            # A compiled program holds its proposer, and cannot be dropped alone.
            programs: tuple[Any, ...] = (begin_drafting, decode_rounds)
            for program in programs:
                program.clear_cache()
        return shared


def check_tree(tree: Any) -> None:
    """Raise InputError unless `tree` is None or holds depth and width, of a size that can be drafted."""
    if tree is None:
        return
    if not isinstance(tree, tuple) or len(tree) != 2 or not all(is_whole(n) and n > 0 for n in tree):
        raise InputError(f"draft_tree is {tree!r}; it takes two numbers, depth and width, such as (7, 10)")
    if tree[0] * tree[1] > MAX_NODES:
        raise InputError(f"draft_tree is {tree!r}: {tree[0] * tree[1]} nodes are more than {MAX_NODES}; take fewer")


def stack_of(config: DFlashConfig | Eagle3Config) -> DecoderConfig:
    """The layers of a drafter."""
    match config:
        case DFlashConfig(layers=layers):
            return layers
        case Eagle3Config(layer=layer):
            return layer
        case _:
            assert_never(config)


def proposer_for(drafter: Drafter, target_layers: int, tree: Tree | None = None) -> Proposer:
    """The proposer of a drafter, for a Thinker of `target_layers` layers; tree: its depth and width.

    Raises InputError for a tree that it cannot draft.
    """
    taps, config = drafter.taps(target_layers), drafter.config
    match config:
        case DFlashConfig(block_size=size):
            if tree is not None:
                raise InputError("a DFlash drafter drafts blocks; leave draft_tree out, or take an EAGLE-3 drafter")
            drafts = min(size, MAX_NODES) - 1
            return BlockProposer(drafter.declaration, taps, drafts, drafts)
        case Eagle3Config(draft_vocab_size=known):
            if tree is None:
                return ChainProposer(drafter.declaration, taps)
            depth, top_k = tree
            if top_k > known:
                raise InputError(f"draft_tree is {tree!r}; this drafter knows {known} tokens to choose from")
            most = min(top_k + depth * top_k**2, MAX_NODES - 1)
            return TreeProposer(drafter.declaration, taps, min(TREE_TOKENS, most), most, depth, top_k)
        case _:
            assert_never(config)
