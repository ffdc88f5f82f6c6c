"""What cards of 24, 48 and 80 GB hold of the public model, by shapes alone, and what a refusal advises."""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import jax
import pytest

from omni_jax.errors import CheckpointError
from omni_jax.weights import placement
from omni_jax.weights.budget import MOST_ROWS, WORKING_SHARE, Part, conversations, room_for
from omni_jax.weights.mesh_text import parse_mesh
from omni_jax.weights.placement import resolve_placement
from tests.helpers.placing import parts_of, with_memory

L40S, RTX_6000, RTX_4090, A100_40, H100, H200 = 46068, 49140, 24564, 40960, 81559, 143771
FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"
INT8 = r"quantize='int8' \(--quantize int8\) makes it fit"
LARGER = f"{FRACTION}=0.95 in the environment"
TABLE = Path(__file__).parent.parent / "docs" / "devices.md"
Use = Callable[..., None]

model = cache(parts_of)


class Card:
    """A device that reports its memory, as far as placing looks."""

    process_index = 0

    def __init__(self, mebibytes: int, share: float, platform: str):
        self.bytes, self.platform = int(mebibytes * 2**20 * share), platform

    def memory_stats(self) -> dict[str, int]:
        return {"bytes_limit": self.bytes}


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Use:
    """`use(46068, 0.9)` makes the first device a GPU of so many MiB of which JAX has this share."""

    def put(mebibytes: int, share: float | None = None, platform: str = "gpu", name: str = FRACTION) -> None:
        for known in ("XLA_CLIENT_MEM_FRACTION", FRACTION):
            monkeypatch.delenv(known, raising=False)
        if share is not None:
            monkeypatch.setenv(name, str(share))
        card = Card(mebibytes, share or 0.75, platform)
        monkeypatch.setattr(placement, "first_device", lambda: card)

    return put


def refusal(parts: list[Part]) -> str:
    with pytest.raises(CheckpointError) as caught:
        resolve_placement(None, parts)
    return str(caught.value)


@pytest.mark.parametrize("mebibytes", [L40S, RTX_6000])
@pytest.mark.parametrize("share", [0.9, 0.95])
def test_a_card_of_48_gb_holds_the_whole_model_in_eight_bits(mebibytes: int, share: float, use: Use) -> None:
    use(mebibytes, share)
    assert resolve_placement(None, model("full", quantize="int8")).meshes == {}


@pytest.mark.parametrize(
    "mebibytes, share, parts, quantize",
    [
        (A100_40, 0.95, (), "int8"),
        (RTX_4090, 0.95, ("thinker",), "int8"),
        (L40S, 0.75, (), "int8"),
        (L40S, 0.95, ("thinker",), None),
        (H100, 0.9, (), None),
    ],
)
def test_a_card_that_cannot_is_refused(
    mebibytes: int, share: float, parts: tuple[str, ...], quantize: str | None, use: Use
) -> None:
    use(mebibytes, share)
    said = refusal(model("full", *parts, quantize=quantize))
    assert re.match(
        r"each device would hold [0-9.]+ GB of weights and the cache of 1 conversation of 1024 tokens", said
    )


def test_the_limit_is_the_weights_and_one_short_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = model("full", quantize="int8")
    need = sum(part.weight_bytes({}) + part.most_cache_bytes({}, 1, 1024) for part in parts)
    for spare, fits in ((100, True), (-100, False)):
        with_memory(monkeypatch, (need + spare) / (1 - WORKING_SHARE) / 1e9)
        for asked in (None, "auto"):
            if fits:
                resolve_placement(asked, parts, jax.devices()[:1])
            else:
                with pytest.raises(CheckpointError, match="each device would hold 38.84 GB"):
                    resolve_placement(asked, parts, jax.devices()[:1])


@pytest.mark.parametrize(
    "mebibytes, share, quantize, dtype, remedies",
    [
        (L40S, 0.9, None, "bfloat16", INT8),
        (L40S, 0.75, "int8", "bfloat16", f"{LARGER} makes it fit"),
        (L40S, None, "int8", "bfloat16", f"{LARGER} makes it fit"),
        (L40S, 0.75, None, "bfloat16", f"{INT8} together with {LARGER}"),
        (H100, 0.9, None, "bfloat16", f"{INT8}, or {LARGER} makes it fit"),
        (H200, 0.9, None, "float32", rf"dtype='bfloat16' \(--dtype bfloat16\) makes it fit, or {INT8}"),
        (RTX_4090, 0.75, None, "bfloat16", ""),
        (A100_40, 0.95, None, "bfloat16", ""),
    ],
)
def test_a_refusal_names_all_that_would_help_and_nothing_else(
    mebibytes: int, share: float | None, quantize: str | None, dtype: str, remedies: str, use: Use
) -> None:
    use(mebibytes, share)
    said = refusal(model("full", quantize=quantize, dtype=dtype)).partition("beside working memory; ")[2]
    mesh = r"the smallest mesh that fits is (expert|tensor)=\d+(,tensor=\d)?"
    assert re.fullmatch(f"{remedies}, or {mesh}" if remedies else mesh, said), said


def test_a_share_is_named_only_where_it_is_jax_that_takes_it(use: Use) -> None:
    parts = model("full", quantize="int8")
    use(L40S, 0.75, platform="tpu")
    assert "FRACTION" not in refusal(parts)
    use(L40S, 0.75, name="XLA_CLIENT_MEM_FRACTION")
    assert "; XLA_CLIENT_MEM_FRACTION=0.95 in the environment makes it fit" in refusal(parts)


def test_what_is_advised_does_help(use: Use) -> None:
    use(L40S, 0.95)
    assert resolve_placement(None, [part.in_eight_bits() for part in model("full")]).meshes == {}
    for sizes in ({}, {"expert": 4}, {"expert": 2, "tensor": 2}):
        advised = [part.in_eight_bits().weight_bytes(sizes) for part in model("full")]
        assert advised == [part.weight_bytes(sizes) for part in model("full", quantize="int8")]
    for part in model("full", quantize="int8"):
        assert part.in_eight_bits() is part


def test_an_automatic_mesh_takes_one_card_where_no_more_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with_memory(monkeypatch, L40S * 2**20 * 0.9 / 1e9)
    parts, devices = model("full", quantize="int8"), jax.devices()
    assert resolve_placement("auto", parts, devices[:1]).reason == (
        "data=1: the model over 1 device, the fewest that hold it by experts; 38.56 GB of weights on each "
        "(of 39.13 GB usable), room for 1 conversation of 2048 tokens"
    )
    assert resolve_placement("auto", parts, devices[:2]).reason.startswith("expert=2: ")
    with pytest.raises(CheckpointError, match=f"; {INT8}, or the smallest mesh that fits is expert=2"):
        resolve_placement("auto", model("full"), devices[:1])


def test_a_part_without_a_cache_has_room_for_any_number(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = model("full", "code2wav")
    assert conversations(parts, {}, 1e12) == MOST_ROWS and conversations(parts, {}, 1) == 0
    with_memory(monkeypatch, 24)
    assert resolve_placement("auto", parts, jax.devices()[:1]).reason.endswith("(of 21.60 GB usable)")


def rows_of_the_table() -> list[list[str]]:
    section = TABLE.read_text().partition("\n## Which cards hold what\n")[2].partition("\n## ")[0]
    return [line.strip("| ").split(" | ") for line in section.splitlines() if re.match(r"\| (one|two|four) ", line)]


@pytest.mark.parametrize("row", rows_of_the_table(), ids=lambda row: row[0])
def test_the_table_of_cards_is_what_is_computed(row: list[str]) -> None:
    _, mebibytes, mesh, *cells = row
    sizes = {} if mesh == "none" else parse_mesh(mesh)
    kinds = [(parts, quantize) for parts in ((), ("thinker",)) for quantize in (None, "int8")]
    for cell, (parts, quantize) in zip(cells, kinds, strict=True):
        said = []
        for share in (0.75, 0.9, 0.95):
            limit = int(int(int(mebibytes) * 2**20 * share) * (1 - WORKING_SHARE))
            room = room_for(model("full", *parts, quantize=quantize), sizes, limit)
            said.append("-" if not room.rows else f"{room.rows} of {room.tokens}".removesuffix(" of 4096"))
        assert cell == " / ".join(said)


def test_the_table_has_the_usual_cards() -> None:
    assert {int(row[1]) for row in rows_of_the_table()} == {RTX_4090, L40S, RTX_6000, H100, H200}
