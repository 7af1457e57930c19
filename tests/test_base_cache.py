"""Quantised bases on disk: the same to the last bit, whole or not there, never in the way of a trial."""

import errno
import multiprocessing
import os
import re
import resource
import shutil
import threading
import time
from collections import namedtuple
from contextlib import contextmanager
from pathlib import Path

import bitsandbytes.functional
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from tests.tiny import make_tiny_llama, make_tiny_opt
from trainables import base_cache, cache, model
from trainables.cache import Cached
from trainables.checkpoint import MANIFEST, seal
from trainables.config import QLoRAConfig
from trainables.data import DataError
from trainables.packed.adapter import Adapter
from trainables.packed.base import Work

LAYERS = 14
"""Quantised ones of the tiny Llama."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    return {"llama": make_tiny_llama(directory / "llama"), "opt": make_tiny_opt(directory / "opt")}


@pytest.fixture
def llama(models):
    return str(models["llama"])


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Where bases are kept: empty at first."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "qlora-sweep" / "bases"


@pytest.fixture
def told():
    """What the cache has to say, unless a base has it."""
    return []


@pytest.fixture
def hashed(monkeypatch):
    """Names of the weights that were hashed."""
    names = []
    checksum_of = base_cache.checksum_of
    monkeypatch.setattr(base_cache, "checksum_of", lambda file: names.append(file.name) or checksum_of(file))
    return names


@contextmanager
def largest_file(size: int):
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def match(lines, pattern: str) -> bool:
    """Whether that is all that is told."""
    (line,) = lines
    return "\n" not in line and re.search(pattern, line) is not None


@pytest.fixture
def quantised(monkeypatch):
    """Shapes of the weights that were quantised."""
    shapes = []
    quantise = bitsandbytes.functional.quantize_4bit

    def counted(weight, **options):
        shapes.append(weight.shape)
        return quantise(weight, **options)

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", counted)
    return shapes


def load(name: str, quant_type="nf4", compute_dtype="bf16", double_quant=True):
    """The base as a process that has none finds it."""
    return model._load(name, quant_type, compute_dtype, double_quant)


def tensors(base) -> dict[str, torch.Tensor]:
    """All of the base's, those of quantisation among them, and what depends on nothing but the config."""
    return base.model.state_dict() | {f"buffer {name}": buffer for name, buffer in base.model.named_buffers()}


def trained(base) -> list[torch.Tensor]:
    """Losses of some rows, and the gradient that an adapter gets."""
    adapter = Adapter(QLoRAConfig(r=4), base.layers, torch.device("cpu"), base.model.dtype)
    base.seat(adapter)
    rows = [(np.arange(first, first + 24, dtype=np.int32), np.ones(24, dtype=np.bool_)) for first in (5, 70)]
    (losses,) = base.losses([Work(adapter, rows, (1, 2))], 0)
    losses.sum().backward()
    return [losses.detach(), adapter.gradient]


def the_one(kept: Path) -> Path:
    """The base that is kept, besides locks and checksums; nothing unfinished is there."""
    (found,) = [path for path in kept.iterdir() if path.is_dir() and path.name != "checksums"]
    assert not found.name.startswith(".")
    return found


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", ("nf4", "bf16", True)),
        ("llama", ("fp4", "fp32", False)),
        ("opt", ("nf4", "fp32", True)),  # biases, another tie
    ],
)
def test_the_second_process_quantises_nothing_and_trains_the_same(models, kept, quantised, name, settings):
    path = str(models[name])
    cold = load(path, *settings)
    assert len(quantised) == len(cold.layers)
    warm = load(path, *settings)
    assert len(quantised) == len(cold.layers)
    assert [*cold.notes, *warm.notes] == []
    assert warm.layers == cold.layers
    assert warm.model.lm_head.weight is warm.model.get_input_embeddings().weight
    before, after = tensors(cold), tensors(warm)
    assert before.keys() == after.keys()
    assert "model.layers.0.self_attn.q_proj.replaced.weight.absmax" in before or name == "opt"
    assert [key for key in before if before[key].dtype != after[key].dtype or not before[key].equal(after[key])] == []
    for one, other in zip(trained(cold), trained(warm), strict=True):
        assert one.equal(other)


def test_without_the_cache_nothing_is_different(llama, kept, tmp_path, monkeypatch):
    load(llama)
    warm = load(llama)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    never_kept = load(llama)
    assert match(never_kept.notes, "not kept")
    for one, other in zip(trained(warm), trained(never_kept), strict=True):
        assert one.equal(other)


def test_what_decides_the_tensors_decides_the_name(llama, kept, tmp_path, monkeypatch):
    def name(path=llama, *decides):
        return base_cache.locate(str(path), print, *(decides or ("nf4", "bf16", True, "a CPU"))).path

    def change(file, at, to):
        content = bytearray(file.read_bytes())
        content[at] = to
        file.write_bytes(content)

    copy = Path(shutil.copytree(llama, tmp_path / "copy"))
    first = name()
    assert first == name() == name(copy) == name(f"{copy}/../copy/")
    others = [name(llama, *decides) for decides in (("fp4", "bf16", True), ("nf4", "fp32", True), ("nf4", "bf16"))]
    weights = copy / "model.safetensors"
    change(weights, -1, weights.read_bytes()[-1] ^ 1)
    others.append(name(copy))
    config = copy / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    others.append(name(copy))
    (copy / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    others.append(name(copy))
    monkeypatch.setattr(base_cache, "version", lambda package: f"{package} 0")
    others.append(name())
    assert len({first, *others}) == len(others) + 1
    assert {path.parent for path in others} == {kept}


def test_other_settings_are_other_bases(llama, kept, quantised):
    load(llama, "nf4", "bf16", True)
    for number, settings in enumerate([("fp4", "bf16", True), ("nf4", "fp32", True), ("nf4", "bf16", False)], 2):
        for _ in range(2):
            state = load(llama, *settings).model.get_submodule("model.layers.0.mlp.up_proj.replaced").quant_state
            assert (state.quant_type, state.dtype, state.nested) == (
                settings[0],
                model.DTYPES[settings[1]],
                settings[2],
            )
        assert len(quantised) == number * LAYERS


def test_threads_of_a_cpu_decide_too(llama, kept, quantised, monkeypatch):
    load(llama)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    load(llama)
    assert len(quantised) == 2 * LAYERS


def test_weights_are_hashed_once(llama, kept, hashed, told, tmp_path):
    copy = Path(shutil.copytree(llama, tmp_path / "copy"))
    first = base_cache.locate(str(copy), told.append)
    assert hashed == ["model.safetensors"]
    assert base_cache.locate(str(copy), told.append) == first
    assert hashed == ["model.safetensors"]
    os.utime(copy / "model.safetensors")
    assert base_cache.locate(str(copy), told.append) == first
    assert hashed == ["model.safetensors"] * 2
    for memory in (kept / "checksums").iterdir():
        memory.write_bytes(bytes(64))  # what a power cut leaves
    assert base_cache.locate(str(copy), told.append) == first
    assert told == []


def refuse(*_, **__):
    raise OSError(errno.EROFS, "Read-only file system")


@pytest.mark.parametrize("remembered", [True, False])
def test_a_directory_that_cannot_be_written_to_is_read(llama, kept, quantised, monkeypatch, remembered):
    load(llama)
    if not remembered:  # other inodes, as in the image of a container
        shutil.rmtree(kept / "checksums")
    for module, name in ((os, "mkdir"), (os, "replace"), (Path, "write_text"), (cache, "FileLock")):
        monkeypatch.setattr(module, name, refuse)
    assert load(llama).notes == []
    assert len(quantised) == LAYERS


def test_a_full_disk_is_read(llama, kept, told):
    load(llama)
    shutil.rmtree(kept / "checksums")
    with largest_file(0):
        base = base_cache.locate(llama, told.append, "nf4", "bf16", True, model._kind())
    assert base.path == the_one(kept)
    assert told == []


@pytest.mark.parametrize("directory", ["cannot be made", "cannot be written to"])
def test_nothing_is_hashed_for_nothing(llama, kept, hashed, told, monkeypatch, directory):
    if directory == "cannot be made":
        monkeypatch.setattr(os, "mkdir", refuse)
    else:
        (kept / "checksums").mkdir(parents=True)
    with largest_file(0):
        assert base_cache.locate(llama, told.append) is base_cache.locate(llama, told.append) is None
    assert match(set(told), "not kept for the next time: .*(Read-only file system|File too large)")
    assert hashed == []


def flip_byte(base: Path) -> None:
    content = bytearray((base / "model.safetensors").read_bytes())
    content[-100] ^= 1
    (base / "model.safetensors").write_bytes(content)


def cut_weights(base: Path) -> None:
    content = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(content[: len(content) // 2])


def remove_config(base: Path) -> None:
    (base / "config.json").unlink()


def remove_manifest(base: Path) -> None:
    (base / "manifest.json").unlink()


def list_manifest(base: Path) -> None:
    (base / "manifest.json").write_text("[1, 2]")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip_byte, "model.safetensors was altered"),
        (cut_weights, "model.safetensors was altered"),
        (remove_config, "config.json is missing"),
        (remove_manifest, "manifest.json"),
        (list_manifest, "list indices"),
    ],
)
def test_a_damaged_base_is_made_anew(llama, kept, quantised, damage, words):
    expected = trained(load(llama))
    damage(the_one(kept))
    again = load(llama)
    assert match(again.notes, rf"is damaged \(.*{words}.*\); it is made anew")
    assert len(quantised) == 2 * LAYERS
    load(llama)
    assert len(quantised) == 2 * LAYERS
    assert all(one.equal(other) for one, other in zip(expected, trained(again), strict=True))


def test_weights_that_are_missing_are_not_made_up(llama, kept, quantised, monkeypatch):
    """Nor is such a base written, read and deleted time and again."""
    load(llama)
    base = the_one(kept)
    weights = load_file(base / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    (base / MANIFEST).unlink()
    seal(base, {})
    assert match(load(llama).notes, "not kept .*: what was written is not read back: it lacks model.norm.weight")
    assert "it lacks model.norm.weight" in base.read_text()
    assert len(quantised) == 2 * LAYERS
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", lambda *_, **__: pytest.fail("it would be the same"))
        again = load(llama)
    assert match(again.notes, f"not kept .*: {base} says why; delete it to have it tried again")
    assert base.is_file()
    base.unlink()
    assert load(llama).notes == []
    assert the_one(kept) == base


def test_a_base_that_is_deleted_while_it_is_read_is_made_anew(llama, kept, quantised, monkeypatch):
    load(llama)
    check_files = cache.check_files

    def check_then_delete(directory, files):
        check_files(directory, files)
        shutil.rmtree(directory)

    monkeypatch.setattr(cache, "check_files", check_then_delete)
    assert match(load(llama).notes, "made anew")
    assert len(quantised) == 2 * LAYERS


def test_models_that_are_stored_quantised_are_not_kept(llama, kept, tmp_path):
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(llama, quantization_config=four).save_pretrained(tmp_path / "four")
    assert len(load(str(tmp_path / "four")).layers) == LAYERS
    assert not kept.exists()


def test_a_model_with_an_adapter_beside_it_is_not_kept(llama, kept, tmp_path):
    """All that would be saved of it is the adapter."""
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), LoraConfig(target_modules=["q_proj"]))
    shutil.copytree(llama, tmp_path / "both")
    adapted.save_pretrained(tmp_path / "both")
    assert len(load(str(tmp_path / "both")).layers) == LAYERS
    assert [path.name for path in kept.iterdir()] == ["checksums"]


def test_a_model_on_the_hub_is_known_by_its_commit(llama, kept, tmp_path, monkeypatch):
    snapshot = Path(shutil.copytree(llama, tmp_path / "snapshots" / "abc123"))
    monkeypatch.setattr(base_cache, "check_model", lambda name: snapshot)
    from_pretrained = AutoModelForCausalLM.from_pretrained
    asked = []

    def stub(name, revision=None, **options):
        asked.append((str(name), revision))
        return from_pretrained(snapshot if name == "owner/name" else name, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", stub)
    load("owner/name")
    load("owner/name")
    assert asked == [("owner/name", "abc123"), (str(the_one(kept)), None)]
    assert not (kept / "checksums").exists()
    before = base_cache.locate("owner/name", print)
    snapshot = snapshot.rename(tmp_path / "snapshots" / "def456")
    after = base_cache.locate("owner/name", print)
    assert (before.revision, after.revision) == ("abc123", "def456")
    assert before.path != after.path


def test_what_cannot_be_found_is_left_to_transformers(kept, told, tmp_path, monkeypatch):
    def unreachable(name):
        raise DataError(f"model {name}: the Hub said: no route")

    monkeypatch.setattr(base_cache, "check_model", unreachable)
    assert base_cache.locate("owner/name", told.append) is None
    assert match(told, "not kept for the next time: model owner/name: the Hub said")
    with pytest.raises(OSError, match="nowhere"):
        load(str(tmp_path / "nowhere"))


Usage = namedtuple("Usage", "total used free")


def test_a_disk_that_is_nearly_full_is_left_to_checkpoints(llama, kept, quantised, monkeypatch):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: Usage(10**6, 9 * 10**5, 10**5))
    base = load(llama)
    assert match(base.notes, r"not kept for the next time: .*it takes 0\.0 GB and 0\.0 GB are free")
    trained(base)
    assert len(quantised) == LAYERS
    assert {path.suffix for path in kept.iterdir()} <= {".lock", ""}
    assert [path.name for path in kept.iterdir() if path.is_dir()] == ["checksums"]


def test_a_disk_that_is_full_half_way_ends_no_trial(llama, kept):
    with largest_file(20_000):
        base = load(llama)
    assert match(base.notes, "not kept for the next time: .*File too large")
    trained(base)
    assert [path.name for path in kept.iterdir() if path.is_dir()] == ["checksums"]


@pytest.mark.parametrize("seen", ["while saving", "while sealing"])
def test_no_space_is_told_and_leaves_nothing(kept, told, monkeypatch, seen):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if seen == "while sealing":
        monkeypatch.setattr(cache, "seal", full)
    save = full if seen == "while saving" else lambda directory: None
    Cached(kept / "base", "the quantised base", told.append).write(1, save)
    assert match(told, "No space left on device")
    assert [path.name for path in kept.iterdir() if path.is_dir()] == []


@pytest.mark.parametrize(
    "error", [ValueError("it is invalid:\n- `top_p`"), NotImplementedError("no"), RuntimeError("shared tensors")]
)
def test_a_model_that_cannot_be_saved_is_trained(llama, kept, quantised, monkeypatch, error):
    def fail(self, directory, **_):
        (directory / "config.json").touch()
        raise error

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fail)
    base = load(llama)
    assert match(base.notes, f"not kept for the next time: {type(error).__name__}: {' '.join(str(error).split())}$")
    assert [path.name for path in kept.iterdir() if path.is_dir()] == ["checksums"]
    trained(base)


def test_only_saving_is_excused(kept, told, monkeypatch):
    """What else goes wrong than the machine is a fault of ours."""
    monkeypatch.setattr(cache, "seal", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Cached(kept / "base", "the quantised base", told.append).write(1, lambda directory: None)
    assert [path.name for path in kept.iterdir() if path.is_dir()] == []


def test_the_banner_says_what_loading_told(llama, kept, monkeypatch):
    monkeypatch.setattr(os, "mkdir", refuse)
    base = load(llama)
    adapter = Adapter(QLoRAConfig(r=4), base.layers, torch.device("cpu"), base.model.dtype)
    lines = model.banner(base, adapter).splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["base", "adapter"]
    assert match(lines[2:], "the quantised base is not kept .*Read-only file system")


def test_a_user_without_home_is_told(monkeypatch, llama, told):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert base_cache.locate(llama, told.append) is None
    assert match(told, "Could not determine home directory.; set XDG_CACHE_HOME")


def write(text: str, directory: Path) -> None:
    for name in ("a", "b"):
        (directory / name).write_text(text)
        time.sleep(0.05)


def read(directory: Path) -> tuple[str, str]:
    return (directory / "a").read_text(), (directory / "b").read_text()


def write_at_once(base: Cached, text: str, barrier: threading.Barrier) -> None:
    barrier.wait()
    base.write(1, lambda directory: write(text, directory))


def test_of_two_writers_one_is_enough(kept):
    base = Cached(kept / "base", "the quantised base", print)
    fork = multiprocessing.get_context("fork")
    barrier = fork.Barrier(2)
    writers = [fork.Process(target=write_at_once, args=(base, text, barrier)) for text in "xy"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert base.read(read) in [("x", "x"), ("y", "y")]
    base.write(1, lambda directory: pytest.fail("it is there"))
    assert the_one(kept).name == "base"


def test_what_a_killed_writer_leaves_is_removed(kept):
    base = Cached(kept / "base", "the quantised base", print)
    fork = multiprocessing.get_context("fork")
    writer = fork.Process(target=base.write, args=(1, lambda directory: (write("x", directory), time.sleep(60))))
    writer.start()
    while not (kept / ".base" / "b").exists():
        time.sleep(0.01)
    writer.kill()
    writer.join()
    assert base.read(read) is None
    base.write(1, lambda directory: (directory / "a").write_text("y"))
    assert sorted(path.name for path in the_one(kept).iterdir()) == ["a", "manifest.json"]
