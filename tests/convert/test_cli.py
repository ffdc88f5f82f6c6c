"""`python -m convert`: what it prints and its exit status."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from convert.__main__ import main
from omni_jax.weights import checkpoint
from omni_jax.weights.contents import MANIFEST, MARKER, PARAMS
from tests.convert.conftest import as_first_format, read_tensors
from tests.helpers.damage import flip

ROOT = Path(__file__).resolve().parent.parent.parent


def test_convert_verify_and_back(checkpoints, tmp_path, capsys):
    ours, back = tmp_path / "ours", tmp_path / "back"
    assert main([str(checkpoints("small")), str(ours), "--verify", "--dtype", "bfloat16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"tensors": 485, "arrays": 209, "destination": str(ours)}
    assert main(["--verify", str(ours), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"verified": 485, "checkpoint": str(ours)}
    assert main(["--reverse", str(ours), str(back), "--shard-size", "1M"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("tensors: 485\n")
    assert "reverse: 100%" in captured.err
    assert len(list(back.glob("*.safetensors"))) > 5
    assert main([str(checkpoints("small")), str(ours), "--parts", "thinker", "code2wav", "--overwrite"]) == 0
    assert checkpoint.read_manifest(ours).parts == ("thinker", "code2wav")


def test_reverse_replaces_a_converted_checkpoint_but_not_its_source(converted, tmp_path, capsys):
    one, other = (str(shutil.copytree(converted, tmp_path / name)) for name in ("one", "other"))
    assert main(["--reverse", one, other]) == 3
    assert "overwrite it with --overwrite" in capsys.readouterr().err
    for destination in (one, str(tmp_path)):
        assert main(["--reverse", one, destination, "--overwrite"]) == 3
        assert "holds the checkpoint that is to be converted" in capsys.readouterr().err
    assert main(["--reverse", one, other, "--overwrite"]) == 0
    assert (tmp_path / "other" / "model.safetensors").exists() and sorted(p.name for p in tmp_path.iterdir()) == [
        "one",
        "other",
    ]


def test_verification_says_what_the_first_format_cannot_compare(converted, tmp_path, monkeypatch, capsys):
    old = as_first_format(Path(shutil.copytree(converted, tmp_path / "old")))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["--verify", "~/old"]) == 0
    out = capsys.readouterr().out
    assert f"verified: 485\ncheckpoint: {old}\n" in out and "not_compared: small files such as config.json" in out


def test_dry_run(checkpoints, data_dir, tmp_path, capsys):
    manifest, config = data_dir / "tensor_manifest.json.gz", data_dir / "public_config.json"
    assert main(["--dry-run", str(manifest), "--config", str(config), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["tensors"], report["parameters"]) == (28_010, 35_259_818_545)
    assert (report["missing"], report["left_over"]) == (0, 0)
    headers = tmp_path / "headers"
    headers.mkdir()
    for file in checkpoints("small").iterdir():
        shutil.copyfile(file, headers / file.name)
    for file in headers.glob("*.safetensors"):
        # Only the header is real: the data is a hole of the right length.
        size = file.stat().st_size
        with file.open("r+b") as stream:
            stream.truncate(8 + int.from_bytes(stream.read(8), "little"))
            stream.truncate(size)
    assert main([str(headers), "--dry-run"]) == 0
    assert "tensors: 485\nparameters: " in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["headers"]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["SRC"],
        ["SRC", "DST", "more"],
        ["--reverse", "DST"],
        ["--dry-run", "--reverse", "SRC", "DST"],
        ["--reverse", "--verify", "DST", "SRC"],
        ["--verify"],
        ["--reverse", "DST", "SRC", "--shard-size", "big"],
        ["--reverse", "DST", "SRC", "--shard-size", "0"],
        ["--reverse", "DST", "SRC", "--parts", "thinker"],
        ["--reverse", "DST", "SRC", "--dtype", "float32"],
        ["--reverse", "DST", "SRC", "--allow-nonfinite"],
        ["--reverse", "DST", "SRC", "--shard-size", "inf"],
        ["--reverse", "DST", "SRC", "--shard-size", "1e400G"],
        ["--verify", "DST", "--parts", "thinker"],
        ["--verify", "DST", "--overwrite"],
        ["SRC", "DST", "--shard-size", "1G"],
        ["SRC", "DST", "--config", "config.json"],
        ["--dry-run", "SRC", "--shard-size", "1G"],
    ],
)
def test_wrong_usage(arguments, capsys):
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_unknown_options_are_wrong_usage(capsys):
    for arguments in (["SRC", "DST", "--dtype", "int4"], ["SRC", "DST", "--fast"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2


def test_bad_input(checkpoints, tmp_path, capsys):
    assert main([str(tmp_path / "nowhere"), str(tmp_path / "ours")]) == 3
    assert "nowhere: no such directory" in capsys.readouterr().err
    assert main(["--verify", str(checkpoints("small"))]) == 3
    assert f"python -m convert {checkpoints('small')} DST" in capsys.readouterr().err
    assert main([str(checkpoints("small")), str(tmp_path / "ours"), "--parts", "vision"]) == 3


def test_mismatch(checkpoints, converted, tmp_path, capsys):
    name = "thinker.model.embed_tokens.weight"
    damaged = Path(shutil.copytree(converted, tmp_path / "damaged"))
    flip(damaged, read_tensors(checkpoints("small"))[name].tobytes()[:2000], 77)
    assert main(["--verify", str(damaged)]) == 4
    assert name in capsys.readouterr().err


@pytest.mark.parametrize(
    "damage, status",
    [
        (lambda ours: (ours / MANIFEST).write_text((ours / MANIFEST).read_text().replace("float32", "float16", 1)), 4),
        (lambda ours: (ours / MANIFEST).write_text("{"), 4),
        (lambda ours: (ours / MANIFEST).write_text('{"format": 1, "leaves": 1}'), 4),
        (lambda ours: (ours / MANIFEST).unlink(), 4),
        (lambda ours: shutil.rmtree(ours / PARAMS), 4),
        (lambda ours: (ours / PARAMS / "_METADATA").unlink(), 4),
        (lambda ours: (ours / MANIFEST).write_text('{"format": 9}'), 3),
        (lambda ours: (ours / MANIFEST).rename(ours / MARKER), 3),
    ],
    ids=["value", "no JSON", "entry", "manifest", "params", "file", "later format", "unfinished"],
)
def test_damage_has_its_own_status(damage, status, converted, tmp_path):
    damage(ours := Path(shutil.copytree(converted, tmp_path / "damaged")))
    assert main(["--verify", str(ours)]) == status


def test_as_a_command(checkpoints, tmp_path):
    command = [sys.executable, "-m", "convert", str(checkpoints("small")), str(tmp_path / "ours")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"tensors: 485\narrays: 209\ndestination: {tmp_path / 'ours'}\n"
    assert "convert: 100%" in done.stderr
    assert "WARNING" not in done.stderr and "Warning" not in done.stderr


def test_a_report_that_cannot_be_written(checkpoints, converted):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "convert", "--verify", str(converted)]
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 3 and "python -m convert: standard output cannot be written" in done.stderr


def test_help_imports_nothing_heavy():
    code = "import sys; from convert.__main__ import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "sys.exit(' '.join({'jax', 'numpy', 'orbax'} & sys.modules.keys()) or 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "usage: python -m convert" in done.stdout, done.stderr


def test_too_little_memory_is_one_line(checkpoints, tmp_path, capsys, monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr("convert.convert.plan_weights", fail)
    assert main([str(checkpoints("small")), str(tmp_path / "ours")]) == 3
    assert capsys.readouterr().err.startswith("error: there is too little memory (MemoryError)")
