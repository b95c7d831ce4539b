"""Files that are whole or not there: a kill, a full disk, names from contents."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from crepa_trainer.data import files as cache_files
from crepa_trainer.data.files import ABANDONED, SAMPLE, content_identity, model_identity, remove_abandoned

from crepa_kernels.teachers.cache import DamagedFile, check_whole, file_name, read_tensors, write_tensors

KINDS = {
    "bf16": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
    "fp32": torch.randn(4, 5),
    "uint8": torch.randint(0, 256, (3, 2, 2), dtype=torch.uint8),
    "int64": torch.tensor([3, -4]),
    "number": torch.tensor(2.5),
    "none": torch.empty(0, 3),
}


def test_every_kind_of_tensor_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file.safetensors"
    write_tensors(path, {**KINDS, "transposed": KINDS["fp32"].t()})
    back = read_tensors(path)
    for name, tensor in {**KINDS, "transposed": KINDS["fp32"].t()}.items():
        assert back[name].dtype == tensor.dtype
        assert back[name].equal(tensor)
    check_whole(path)
    assert [file.name for file in path.parent.iterdir()] == ["file.safetensors"]
    # As any file that this process makes: others may share the cache.
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    write_tensors(path, {"a": torch.arange(5.0), "b": torch.arange(3)})
    whole = path.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        try:
            tensors = read_tensors(path)
        except DamagedFile:
            continue
        # Spaces that pad the header to a multiple of 8 mean nothing.
        assert chr(whole[place]) == " "
        assert tensors["a"].equal(torch.arange(5.0))


@pytest.mark.parametrize("keep", [0, 4, 20, -1])
def test_a_file_that_is_cut_off_is_found_by_its_header(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "file.safetensors"
    write_tensors(path, {"a": torch.arange(5.0)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DamagedFile, match=r"file\.safetensors is damaged"):
        check_whole(path)


def test_another_programs_file_is_not_taken_for_ours(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.ones(3)}, tmp_path / "a.safetensors")
    for check in (check_whole, read_tensors):
        with pytest.raises(DamagedFile, match="checksum"):
            check(tmp_path / "a.safetensors")


def test_a_file_in_the_place_of_another_is_found(tmp_path: Path) -> None:
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write_tensors(first, {"a": torch.ones(3)})
    write_tensors(second, {"a": torch.zeros(3)})
    first.rename(tmp_path / "kept")
    second.rename(first)
    (tmp_path / "kept").rename(second)
    for path in (first, second):
        for check in (check_whole, read_tensors):
            with pytest.raises(DamagedFile, match=rf"{path.name} is damaged: it was written as [ab]\.safetensors"):
                check(path)


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    write_tensors(path, {"a": torch.ones(10)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: .*file\.safetensors'$"):
            write_tensors(path, {"a": torch.ones(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == [path]
    assert read_tensors(path)["a"].equal(torch.ones(10))


def test_a_file_is_replaced_and_never_written_over(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    write_tensors(path, {"a": torch.ones(10)})
    # Under its own name, which is part of its checksum.
    (as_it_was := tmp_path / "as it was" / path.name).parent.mkdir()
    os.link(path, as_it_was)
    write_tensors(path, {"a": torch.zeros(10)})
    assert read_tensors(as_it_was)["a"].equal(torch.ones(10))
    assert read_tensors(path)["a"].equal(torch.zeros(10))


WRITER = """
import itertools, sys, torch
from pathlib import Path
from crepa_kernels.teachers.cache import write_tensors
for n in itertools.count():
    write_tensors(Path(sys.argv[1]) / "kind" / "file.safetensors", {"a": torch.full((1_000_000,), float(n))})
    print(n, flush=True)
"""


def test_a_kill_while_writing_leaves_a_whole_file(tmp_path: Path) -> None:
    for wait in (0.001, 0.004, 0.013):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout is not None
            written = [writer.stdout.readline() for _ in range(2)]
            time.sleep(wait)
            writer.send_signal(signal.SIGKILL)
        values = read_tensors(tmp_path / "kind" / "file.safetensors")["a"]
        assert values.unique().tolist()[0] >= int(written[-1])
        assert len(values.unique()) == 1


def test_what_a_kill_left_is_removed_once_it_is_nobodys(tmp_path: Path) -> None:
    (tmp_path / "kind").mkdir()
    old, young = (tmp_path / "kind" / name for name in ("old.tmp", "young.tmp"))
    for path in (old, young, tmp_path / "kind" / "file.safetensors"):
        path.touch()
    os.utime(old, (time.time(), time.time() - ABANDONED - 1))
    remove_abandoned(tmp_path)
    assert sorted(path.name for path in (tmp_path / "kind").iterdir()) == ["file.safetensors", "young.tmp"]
    remove_abandoned(tmp_path / "nowhere")


def test_a_name_depends_on_every_part_of_the_content() -> None:
    contents = [{"a": 1, "b": "x"}, {"a": 2, "b": "x"}, {"a": 1, "b": "X"}, {"a": "1", "b": "x"}, {"a": [1], "b": "x"}]
    assert len({file_name(content) for content in contents}) == len(contents)
    assert file_name({"a": 1, "b": "x"}) == file_name({"b": "x", "a": 1})
    assert file_name({"text": "naïve \ud800 日本"}).endswith(".safetensors")


@pytest.mark.parametrize("size", [0, 1, SAMPLE - 1, SAMPLE, 2 * SAMPLE + 3, 10 * SAMPLE])
def test_a_video_is_known_by_its_size_and_three_places_of_it(tmp_path: Path, size: int) -> None:
    path, content = tmp_path / "a.mp4", bytearray(os.urandom(size))
    path.write_bytes(content)
    known = content_identity(path)
    (tmp_path / "moved.mp4").write_bytes(content)
    os.utime(tmp_path / "moved.mp4", (1, 1))
    assert content_identity(tmp_path / "moved.mp4") == known
    path.write_bytes(content + b"\0")
    assert content_identity(path) != known
    for place in {0, size // 2, size - 1} if size else ():
        content[place] ^= 1
        path.write_bytes(content)
        assert content_identity(path) != known
        content[place] ^= 1


def test_a_hub_model_is_known_by_its_commit(tmp_path: Path) -> None:
    """In the hub's own cache layout, offline; in a process of its own, for the library reads its folder at import."""
    repository = tmp_path / "hub" / "models--owner--name"
    for commit in ("a" * 40, "b" * 40):
        for part in ("vae/config.json", "config.json"):
            file = repository / "snapshots" / commit / part
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("{}")
    (repository / "refs").mkdir()
    code = "from crepa_trainer.data.files import model_identity as m; print(m('owner/name', 'vae'), m('owner/name'))"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    for commit in ("a" * 40, "b" * 40):
        (repository / "refs" / "main").write_text(commit)
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == f"['owner/name', 'vae', '{commit}'] ['owner/name', '{commit}']"


def test_a_local_model_is_known_by_its_files(tmp_path: Path) -> None:
    for part in ("vae", "text_encoder"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text("{}")
    before = model_identity(str(tmp_path), "vae")
    (tmp_path / "text_encoder" / "config.json").write_text("{ }")
    assert model_identity(str(tmp_path), "vae") == before
    (tmp_path / "vae" / "config.json").write_text("{ }")
    assert model_identity(str(tmp_path), "vae") != before


def test_a_copied_model_is_the_same_and_another_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    tensors = {name: torch.randn(200, 200) for name in ("a", "b", "c")} | {"bias": torch.randn(7)}
    (folder := tmp_path / "model").mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    for limit in (cache_files.READ_WHOLE, 1000):
        monkeypatch.setattr(cache_files, "READ_WHOLE", limit)
        known = model_identity(str(folder))
        shutil.copytree(folder, copy := tmp_path / f"copy-{limit}", copy_function=shutil.copyfile)
        (copy / ".DS_Store").touch()
        assert model_identity(str(copy)) == known
        for name in tensors:
            save_file({**tensors, name: tensors[name] * 1.01}, copy / "model.safetensors")
            assert model_identity(str(copy)) != known
        # Not safetensors.
        (copy / "model.safetensors").write_bytes(os.urandom(3 << 20))
        assert model_identity(str(copy)) not in (known, model_identity(str(folder)))
