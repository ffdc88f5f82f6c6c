"""The models under jit, grad, vmap, checkpoint and nnx.jit; and everything that the documents say about it, run."""

import doctest
import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import omni_jax as oj
from convert import convert_checkpoint, load_hf
from omni_jax.decode.media import encode_audio, encode_vision
from omni_jax.decode.sampling import Sampling
from omni_jax.decode.text import DecodeState, Rows, decode_chunk
from omni_jax.errors import InputError
from omni_jax.inputs.processor import Processor
from omni_jax.models.param import bind
from omni_jax.models.thinker import Thinker
from omni_jax.omni import Omni
from omni_jax.ops.cache import KVCache
from omni_jax.sharding import make_mesh
from tests.parity import audio_part, image_part, user

ROOT = Path(__file__).resolve().parents[1]
IDS = np.array([[3, 14, 15, 92, 65, 35], [8, 9, 79, 32, 38, 46]], np.int32)
MIXED = [user(image_part(60, 90), "What?"), user(audio_part(1.2), "Who is it?"), user("Hi.")]


def close(got: Any, want: Any, atol: float = 5e-5) -> None:
    """Logits of scale 15 to 30 from two programs that compute the same."""
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=0, atol=atol)


def blocks(file: Path, heading: str = "") -> list[str]:
    """The fenced Python blocks of a document, or of its section with this heading."""
    text = file.read_text()
    if heading:
        text = next(iter(re.findall(rf"^## {heading}$(.*?)(?=^## |\Z)", text, re.M | re.S)), "")
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


def loss(model: Thinker, ids: jax.Array) -> jax.Array:
    log_probs = jax.nn.log_softmax(model(ids)[:, :-1])
    return -jnp.mean(jnp.take_along_axis(log_probs, ids[:, 1:, None], axis=-1))


@pytest.fixture(scope="module")
def thinker(omnis: Callable[[str], Omni]) -> Thinker:
    return omnis("tiny").thinker


@pytest.fixture(scope="module")
def logits(thinker: Thinker) -> jax.Array:
    return jax.jit(lambda m: m(IDS))(thinker)


@pytest.mark.parametrize("padding", ["right", "left"])
def test_a_call_gives_the_logits_of_the_model(padding: str, omnis: Callable[[str], Omni]) -> None:
    omni = omnis("small")
    batch = omni.prepare(MIXED, padding=padding)
    call = jax.jit(lambda m, media: m(batch.token_ids, batch.position_ids, mask=batch.mask, media=media))
    got = call(omni.thinker, omni.encode(batch))
    assert got.dtype == jnp.float32 and got.shape[:2] == batch.token_ids.shape
    close(got[batch.mask], omni.logits(batch)[batch.mask])
    assert omni.encode(omni.prepare(MIXED[2])) is None


@pytest.mark.parametrize("padding", ["right", "left"])
def test_positions_are_those_of_text_unless_given(padding: str, omnis: Callable[[str], Omni]) -> None:
    omni = omnis("tiny")
    batch = omni.prepare([user("Hi."), user("A longer one than that.")], padding=padding)
    got = jax.jit(lambda m: m(batch.token_ids, mask=batch.mask))(omni.thinker)
    close(got[batch.mask], omni.logits(batch)[batch.mask])


def test_a_cache_is_read_on_from(thinker: Thinker, logits: jax.Array) -> None:
    """The second row is one token shorter at first; each row goes on where it was."""

    @jax.jit
    def read(model: Thinker, first: jax.Array, rest: jax.Array) -> tuple[Any, Any]:
        mask = np.array([[True, True, True], [True, True, False]])
        one = model(first, mask=mask, cache=model.empty_cache(2, 8))
        return one, model(rest, cache=one.cache)

    rest = np.stack([IDS[0, 3:6], IDS[1, 2:5]])
    one, two = read(thinker, IDS[:, :3], rest)
    assert one.cache.length.tolist() == [3, 2] and two.cache.length.tolist() == [6, 5]
    close(one.logits[0], logits[0, :3])
    close(one.logits[1, :2], logits[1, :2])
    close(two.logits[0], logits[0, 3:])
    close(two.logits[1], logits[1, 2:5])


def test_media_are_read_into_a_cache(omnis: Callable[[str], Omni]) -> None:
    omni = omnis("small")
    batch = omni.prepare(MIXED)
    B, T = batch.token_ids.shape
    call = jax.jit(
        lambda m, media, cache: m(batch.token_ids, batch.position_ids, mask=batch.mask, media=media, cache=cache)
    )
    out = call(omni.thinker, omni.encode(batch), omni.thinker.empty_cache(B, T))
    close(out.logits[batch.mask], omni.logits(batch)[batch.mask])
    assert out.cache.length.tolist() == batch.mask.sum(axis=1).tolist()


def test_prefill_and_extend_are_named(thinker: Thinker, logits: jax.Array) -> None:
    positions = np.broadcast_to(np.arange(6, dtype=np.float32), (3, 2, 6))

    @jax.jit
    def run(model: Thinker) -> tuple[jax.Array, jax.Array]:
        x = model.embed_tokens(jnp.asarray(IDS))
        begun = model.prefill(x[:, :4], positions[..., :4], model.empty_cache(2, 6), taps=(0,))
        more = model.extend(x[:, 4:], positions[..., 4:], begun.cache)
        return model.logits(jnp.concatenate([begun.hidden, more.hidden], axis=1)), begun.taps

    got, taps = run(thinker)
    close(got, logits)
    np.testing.assert_array_equal(taps[0], np.asarray(thinker.embed)[IDS[:, :4]])


def test_vmap_over_rows_is_the_batch(thinker: Thinker, logits: jax.Array) -> None:
    each = jax.jit(jax.vmap(lambda model, row: model(row[None])[0], in_axes=(None, 0)))
    close(each(thinker, IDS), logits)


def test_nnx_jit_and_a_dict_give_the_same(omnis: Callable[[str], Omni], thinker: Thinker, logits: jax.Array) -> None:
    close(nnx.jit(lambda model, ids: model(ids))(thinker, IDS), logits)
    declaration, params = omnis("tiny").declarations["thinker"], omnis("tiny").params["thinker"]
    assert oj.bind is bind
    close(jax.jit(lambda params, ids: bind(declaration, params)(ids))(params, IDS), logits)


def test_gradients_are_modules_and_checkpoint_keeps_them(omnis: Callable[[str], Omni], thinker: Thinker) -> None:
    value, gradient = jax.jit(jax.value_and_grad(loss))(thinker, IDS)
    assert isinstance(gradient, Thinker)
    again = jax.jit(jax.grad(jax.checkpoint(loss)))(thinker, IDS)
    declaration = omnis("tiny").declarations["thinker"]
    bound = jax.jit(jax.grad(lambda params: loss(bind(declaration, params), IDS)))(omnis("tiny").params["thinker"])
    others = (nnx.to_pure_dict(nnx.state(again)), bound)
    mine = nnx.to_pure_dict(nnx.state(gradient))
    assert np.abs(mine["layers"]["moe"]["down"]).max() > 0
    for other in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), mine, other)
    assert jax.jit(loss)(jax.tree.map(lambda p, g: p - 1e-3 * g, thinker, gradient), IDS) < value


def test_the_same_on_a_mesh(checkpoints: Callable[[str], Path], thinker: Thinker, logits: jax.Array) -> None:
    mesh = make_mesh(expert=2, data=2)
    params, config = load_hf(checkpoints("tiny"), mesh=mesh)
    spread = Omni(params, config, Processor.from_dir(checkpoints("tiny"), config), mesh).thinker
    close(jax.jit(lambda m, ids: m(ids))(spread, np.tile(IDS, (2, 1))), np.tile(logits, (2, 1, 1)))
    values = [jax.jit(jax.value_and_grad(loss))(m, np.tile(IDS, (2, 1))) for m in (thinker, spread)]
    (one, gradient), (other, parted) = values
    close(one, other)
    np.testing.assert_allclose(parted.norm.weight[...], gradient.norm.weight[...], rtol=1e-3, atol=1e-5)


def test_talker_and_vocoder_are_called_too(omnis: Callable[[str], Omni]) -> None:
    omni = omnis("tiny")
    talker, code2wav, config = omni.talker, omni.code2wav, omni.config.code2wav
    assert config is not None
    x = talker.embed_codes(jnp.asarray(IDS))
    whole = jax.jit(lambda m, x: m(x))(talker, x)

    def in_two(m: Any, x: jax.Array) -> jax.Array:
        one = m(x[:, :4], cache=m.empty_cache(2, 8))
        return jnp.concatenate([one.logits, m(x[:, 4:], cache=one.cache).logits], axis=1)

    assert whole.shape == (2, 6, talker.config.text.vocab_size) and whole.dtype == jnp.float32
    close(jax.jit(in_two)(talker, x), whole)
    left = jnp.pad(x, ((0, 0), (2, 0), (0, 0)))
    mask = np.arange(8) >= np.array([[2], [2]])
    close(jax.jit(lambda m, x: m(x, mask=mask))(talker, left)[:, 2:], whole)

    codes = np.random.default_rng(0).integers(0, config.codebook_size, (2, config.num_quantizers, 9))
    wave = jax.jit(lambda m, codes: m(codes))(code2wav, codes)
    close(wave, omni.vocode(codes), 3e-5)
    sound = jax.jit(lambda m, codes: m(codes, m.start(2)))(code2wav, codes)
    np.testing.assert_array_equal(sound.wave[:, config.lost_samples :], wave)
    assert int(sound.state.frames) == 9
    slope = jax.jit(jax.grad(lambda m: jnp.sum(jnp.square(m(codes[:, :, :3])))))(code2wav)
    assert np.abs(slope.embed[...]).max() > 0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda o: o.thinker(IDS[0]), r"token_ids has shape \[6\]; give int \[B, T\], a batch even for one row"),
        (lambda o: o.thinker(IDS, mask=np.ones((2, 5), bool)), r"mask has shape \[2, 5\]; give bool \[2, 6\]"),
        (
            lambda o: o.thinker(IDS, mask=IDS > 8, cache=o.thinker.empty_cache(2, 8)),
            "a cache takes rows that are padded on the right",
        ),
        (lambda o: o.thinker(IDS[:, :0]), r"token_ids has shape \[2, 0\]"),
        (lambda o: o.thinker(IDS, mask=[[True] * 5] * 2), r"mask has shape \[2, 5\]; give bool \[2, 6\]"),
        (lambda o: o.thinker(IDS, np.zeros((3, 2, 5))), r"position_ids has shape \[3, 2, 5\]"),
        (lambda o: o.thinker(IDS, cache=o.thinker.empty_cache(1, 8)), "the cache has 1 rows, and token_ids has 2"),
        (lambda o: o.thinker(IDS, cache=o.thinker.empty_cache(2, 4)), "room for 4 tokens, and these need 6"),
        (
            lambda o: o.thinker(IDS[:, :1], cache=o.thinker(IDS, cache=o.thinker.empty_cache(2, 6)).cache),
            "room for 6 tokens, and these need 7",
        ),
        (
            lambda o: o.thinker(IDS[:1], mask=jnp.arange(6)[None] > 0, cache=o.thinker.empty_cache(1, 8)),
            "padded on the right",
        ),
        (lambda o: oj.bind(o.declarations["thinker"], o.params), r'of one part, .*; give params\["thinker"\]'),
        (
            lambda o: oj.bind(o.declarations["thinker"], _renamed(o.params["thinker"])),
            r"declares a_norm/weight none, the parameters hold \[256\]",
        ),
        (lambda o: oj.bind(o.declarations["thinker"], o.params["thinker"] | {"embed": IDS}), r"declares embed \["),
        (lambda o: o.talker(IDS), r"x has shape \[2, 6\]; give \[B, T, D\]"),
        (lambda o: o.code2wav(IDS), r"codes have shape \[2, 6\]; give int \[B, Q, F\] with Q = "),
    ],
)
def test_other_shapes_are_refused(call: Callable[[Omni], Any], words: str, omnis: Callable[[str], Omni]) -> None:
    with pytest.raises(InputError, match=words):
        call(omnis("tiny"))


def test_what_is_printed_is_one_short_line(omnis: Callable[[str], Omni]) -> None:
    omni = omnis("tiny")
    things = (omni.thinker, omni.talker, omni.code2wav, omni.thinker.layers, omni.prepare(MIXED))
    for thing, name in zip(things, ("Thinker", "Talker", "Code2Wav", "DecoderLayers", "Batch"), strict=True):
        assert re.fullmatch(rf"{name}\(.{{9,80}}\)", repr(thing)) and str(thing) == repr(thing)
    size = sum(x.size for x in jax.tree.leaves(omni.params["thinker"]))
    assert repr(omni.thinker) == f"Thinker({size:,} parameters, float32)"
    arrays = len(jax.tree.leaves(omni.params["thinker"]))
    assert repr(jax.tree.map(lambda p: p.ndim > 1, omni.thinker)) == f"Thinker({arrays} leaves that are no arrays)"
    assert repr(omni.declarations["thinker"]) == f"Declaration({arrays} arrays, {size:,} parameters, 1 device(s))"
    out = omni.thinker(IDS, cache=omni.thinker.empty_cache(2, 8))
    assert repr(out).startswith("CachedLogits(logits [2, 6, ") and repr(out.cache) in repr(out) and len(repr(out)) < 99


def _renamed(params: dict) -> dict:
    return {"a_norm" if name == "norm" else name: value for name, value in params.items()}


def scopes(function: Any, *args: Any, **named: Any) -> set[str]:
    """The words in the names of a compiled program's operations."""
    text = function.lower(*args, **named).compile().as_text()
    return {word for name in re.findall(r'op_name="([^"]*)"', text) for word in re.split(r"[/()]", name)}


def test_a_compiled_decoding_step_names_its_blocks(omnis: Callable[[str], Omni]) -> None:
    omni, sampling = omnis("small"), Sampling()
    plan, values = sampling.plan(omni.config.thinker.text.vocab_size), sampling.values()
    keys, zeros = jax.random.split(jax.random.key(0), 1), jnp.zeros((1,), jnp.int32)
    rows = Rows(zeros, zeros > 0, zeros + 9, jnp.zeros((1, 0), bool), keys)
    state = DecodeState(omni.thinker.empty_cache(1, 256), jnp.zeros((1,)), rows)
    named = {"declaration": omni.declarations["thinker"], "plan": plan}
    got = scopes(decode_chunk, omni.params["thinker"], state, 4, zeros, values, **named)
    assert {"embed", "attention", "experts", "router", "norm", "logits", "sample", "record"} <= got


def test_a_program_runs_on_from_an_empty_cache_on_a_mesh(checkpoints: Callable[[str], Path]) -> None:
    """The empty cache is where the returned one is: a loop can carry it, and a step compiles once."""
    model = oj.load(checkpoints("tiny"), mesh="expert=2,data=2", parts=("thinker",)).thinker
    step = jax.jit(lambda m, ids, cache: m(ids, cache=cache), donate_argnums=2)

    @jax.jit
    def looped(m: Thinker, ids: jax.Array) -> jax.Array:
        def one(cache: KVCache, token: jax.Array) -> tuple[KVCache, jax.Array]:
            out = m(token[:, None], cache=cache)
            return out.cache, out.logits[:, 0]

        return jax.lax.scan(one, m.empty_cache(2, 8), ids.T)[1]

    out = step(model, IDS[:, :1], model.empty_cache(2, 8))
    close(step(model, IDS[:, 1:2], out.cache).logits[:, 0], looped(model, IDS)[1])
    assert step._cache_size() == 1  # type: ignore[attr-defined]


def test_other_compiled_programs_name_theirs(omnis: Callable[[str], Omni]) -> None:
    omni = omnis("small")
    batch = omni.prepare(MIXED)
    named = {"declaration": omni.declarations["thinker"]}
    vision, audio = batch.vision[0], batch.audio
    assert audio is not None
    seen = scopes(encode_vision, omni.params["thinker"], vision.patches, vision.grid, **named)
    assert {"vision", "block", "attention", "mlp", "merger"} <= seen
    heard = scopes(encode_audio, omni.params["thinker"], audio.mel, audio.frames, audio.width, **named)
    assert {"audio", "block", "attention", "mlp", "convolutions"} <= heard
    read = jax.jit(lambda m, media: m(batch.token_ids, batch.position_ids, media=media))
    assert {"deepstack", "attention", "logits"} <= scopes(read, omni.thinker, omni.encode(batch))

    def frame(talker: Any, x: jax.Array) -> Any:
        predictor, config = talker.code_predictor, talker.code_predictor.config
        cache = KVCache.empty(config.num_layers, 1, config.num_kv_heads, 4, config.head_dim, x.dtype)
        return talker(x), predictor.logits(predictor.extend(x[..., : config.hidden_size], cache).hidden, 0)

    spoken = scopes(jax.jit(frame), omni.talker, jnp.zeros((1, 2, omni.talker.config.text.hidden_size)))
    assert {"attention", "shared_expert", "logits", "code_predictor", "code_logits"} <= spoken
    codes = np.zeros((1, omni.code2wav.config.num_quantizers, 4), np.int32)
    sounding = scopes(jax.jit(lambda m: m(codes)), omni.code2wav)
    assert {"transformer", "upsample_0", "conv_in", "block_0", "block_1", "conv_out"} <= sounding


@pytest.mark.parametrize(
    ("file", "heading"), [("docs/jit.md", ""), ("docs/training.md", ""), ("README.md", "Under jit")]
)
def test_every_block_of_the_documents_runs(
    file: str, heading: str, checkpoints: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other, in a folder that holds a converted checkpoint and the media."""
    code = blocks(ROOT / file, heading)
    if not code:
        pytest.skip(f"{file} has no section {heading}")
    convert_checkpoint(checkpoints("tiny"), tmp_path / "ckpt", progress=False)
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for i, block in enumerate(code):
        exec(compile(block, f"{file}, block {i + 1}", "exec"), names)


EXAMPLES = [path for path in sorted((ROOT / "omni_jax").rglob("*.py")) if re.search(r"^ *>>> ", path.read_text(), re.M)]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_in_docstrings_give_what_they_say(path: Path) -> None:
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    failed, tried = doctest.testmod(module)
    assert tried and not failed
