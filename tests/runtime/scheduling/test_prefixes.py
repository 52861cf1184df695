"""What requests share is computed once, and changes no token."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.errors import raises
from tests.runtime import toy
from tests.runtime.scheduling.asking import WAIT, facts, question
from vlmport.bundle import SUFFIXES, Bundle
from vlmport.errors import CacheWarning, OptionError
from vlmport.runtime import disk_store
from vlmport.runtime.content_store import ContentStore
from vlmport.runtime.graphs.cache import CHUNK
from vlmport.runtime.graphs.components import Components
from vlmport.runtime.graphs.decoder import Decoder
from vlmport.runtime.images.features import FeatureCache
from vlmport.runtime.model import VLM
from vlmport.runtime.scheduling import Scheduler
from vlmport.runtime.scheduling.prefixes import BLOCK, Block

SYSTEM = {"role": "system", "content": "or " * 30}


def ask(scheduler: Scheduler, messages: list[Any], images: Any = (), **options: Any) -> Any:
    """A response, checked against that of the model alone."""
    want = scheduler.model.generate(messages, list(images), logprobs=2, **options)
    job = scheduler.submit(messages, list(images), logprobs=2, **options)
    got = job.result(WAIT)
    assert facts(got) == facts(want)
    assert got.counts["cached_tokens"] == job.cached_tokens
    return got


def whole_blocks(tokens: int) -> int:
    """Tokens of a prompt of the toy, of one chunk, that are reused when it is asked again."""
    if tokens % 16 == 1:  # its last token is alone in a tile of the attention
        return 0
    return (tokens - 2) // BLOCK * BLOCK


def test_a_second_question_about_an_image(scheduler: Scheduler) -> None:
    image = toy.picture(1, 24, 40)
    first = ask(scheduler, question("or", 1), [image])
    before = scheduler.stats()
    second = ask(scheduler, question("a b or", 1), [image])
    after = scheduler.stats()
    assert after.images_encoded == before.images_encoded == 1
    shared = first.counts["image_tokens"] // BLOCK * BLOCK
    assert second.counts["cached_tokens"] >= shared > 0
    fresh = second.counts["prompt_tokens"] - second.counts["cached_tokens"]
    assert after.prefill_tokens - before.prefill_tokens == fresh < 2 * BLOCK + 20
    assert after.cached_tokens == second.counts["cached_tokens"]


def test_the_same_prompt_again(scheduler: Scheduler) -> None:
    for words in range(1, 40):  # prompts of all lengths past a block's end
        first = ask(scheduler, question("or " * words))
        again = ask(scheduler, question("or " * words), do_sample=True, seed=1)
        tokens = first.counts["prompt_tokens"]
        assert again.counts["cached_tokens"] == whole_blocks(tokens)


def test_a_system_prompt_is_shared(scheduler: Scheduler) -> None:
    for n in range(3):
        response = ask(scheduler, [SYSTEM, *question("ab"[n % 2] * (n + 1))])
        assert (response.counts["cached_tokens"] >= 2 * BLOCK) is (n > 0)


def test_another_image_shares_nothing_after_it(scheduler: Scheduler) -> None:
    one, other = toy.picture(1, 24, 40), toy.picture(2, 24, 40)
    ask(scheduler, [SYSTEM, *question("or", 1)], [one])
    response = ask(scheduler, [SYSTEM, *question("or", 1)], [other])
    ids = response.counts["prompt_tokens"] - response.counts["image_tokens"]
    assert 0 < response.counts["cached_tokens"] < ids
    gained = ask(
        scheduler, [SYSTEM, *question("or", 1)], [one], image_options={"gain": np.float32(0.5)}
    )
    assert gained.counts["cached_tokens"] == response.counts["cached_tokens"]


def test_requests_that_come_together_share_too(
    model: VLM, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    let, original = threading.Event(), FeatureCache.encoded

    def encoded(self: FeatureCache, image: Any) -> Any:
        assert let.wait(WAIT)
        return original(self, image)

    image = toy.picture(1, 24, 40)
    want = [model.generate(question("or " * n, 1), [image]) for n in range(1, 6)]
    monkeypatch.setattr(FeatureCache, "encoded", encoded)
    jobs = [scheduler.submit(question("or " * n, 1), [image]) for n in range(1, 6)]
    let.set()
    assert [facts(job.result(WAIT)) for job in jobs] == [facts(one) for one in want]
    assert scheduler.stats().images_encoded == 1
    assert all(job.cached_tokens > 0 for job in jobs[1:])


def test_without_a_budget_nothing_is_kept(model: VLM) -> None:
    with Scheduler(model, cache_bytes=0) as scheduler:
        for _ in range(2):
            response = ask(scheduler, question("or " * 30, 1), [toy.picture(1)])
            assert response.counts["cached_tokens"] == 0
        assert scheduler.stats().cache_bytes == 0
        assert scheduler.stats().images_encoded == 2


def test_the_least_recently_used_goes_first(model: VLM) -> None:
    with Scheduler(model) as scheduler:
        ask(scheduler, question("or " * 39))
        size = scheduler.stats().cache_bytes
    with Scheduler(model, cache_bytes=2 * size) as scheduler:
        words = ["or ", "ab ", "ba "]
        ask(scheduler, question(words[0] * 39))
        ask(scheduler, question(words[1] * 39))
        whole = ask(scheduler, question(words[0] * 39)).counts["cached_tokens"]
        assert whole > 3 * BLOCK
        ask(scheduler, question(words[2] * 39))
        assert scheduler.stats().cache_bytes <= 2 * size
        assert ask(scheduler, question(words[0] * 39)).counts["cached_tokens"] == whole
        # The end of the oldest goes first, so what is left of it can still be used.
        assert 0 < ask(scheduler, question(words[1] * 39)).counts["cached_tokens"] < whole - BLOCK


@pytest.mark.parametrize("precision", SUFFIXES)
def test_reuse_changes_no_number(built_in: Callable[[str], Bundle], precision: str) -> None:
    """Log-probabilities are equal to the last bit; where chunks matter, whole chunks are shared."""
    image = toy.picture(1, 40, 60)
    with (
        VLM.open(built_in("shapes-smolvlm"), precision=precision, threads=1) as model,
        Scheduler(model) as scheduler,
    ):
        cached, prompt = [], 0
        for tail in ("red", "green one", "blue " * 40, "red"):
            messages = question("what is it " * 150 + tail, 1)
            response = ask(scheduler, messages, [image], max_new_tokens=4)
            cached.append(response.counts["cached_tokens"])
            prompt = response.counts["prompt_tokens"]
    assert cached[0] == 0
    if precision in ("fp32", "q4"):
        assert cached[3] == (prompt - 2) // BLOCK * BLOCK
    else:
        assert cached[3] == (prompt - CHUNK // 2 - 1) // CHUNK * CHUNK > 0
        assert all(tokens % CHUNK == 0 for tokens in cached)


def test_another_device_than_the_cpu_reuses_no_prompt(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There a token's numbers may depend on the chunk that it is in, at every precision."""
    monkeypatch.setattr(Decoder, "on_host", False)
    for _ in range(2):
        assert ask(scheduler, question("or " * 40)).counts["cached_tokens"] == 0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "kept"


@pytest.fixture
def disk(model: VLM, folder: Path) -> Iterator[Callable[..., Scheduler]]:
    """Opens schedulers on one folder; each is closed when the next one opens."""
    opened: list[Scheduler] = []

    def scheduler(other: VLM = model, **settings: Any) -> Scheduler:
        for one in opened:
            one.close()
        opened.append(Scheduler(other, cache_dir=folder, **settings))
        return opened[-1]

    yield scheduler
    for one in opened:
        one.close()


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*"))


def test_features_and_prefixes_outlive_the_process(disk: Callable[..., Scheduler]) -> None:
    image = toy.picture(1, 24, 40)
    first = ask(disk(), question("or", 1), [image])
    scheduler = disk()
    again = ask(scheduler, question("or", 1), [image])
    assert again.counts["cached_tokens"] == whole_blocks(first.counts["prompt_tokens"]) > 0
    stats = scheduler.stats()
    assert stats.images_encoded == 0
    assert stats.cache_bytes > 0  # in memory again


def test_an_evicted_value_is_read_from_the_folder(disk: Callable[..., Scheduler]) -> None:
    scheduler = disk(cache_bytes=0)
    first = ask(scheduler, question("or", 1), [toy.picture(1, 24, 40)])
    assert scheduler._store.disk is not None
    scheduler._store.disk.close()  # until it is written
    again = ask(scheduler, question("or", 1), [toy.picture(1, 24, 40)])
    assert again.counts["cached_tokens"] == whole_blocks(first.counts["prompt_tokens"]) > 0


def test_another_model_finds_nothing(
    disk: Callable[..., Scheduler], folder: Path, tmp_path: Path
) -> None:
    ask(disk(), question("or " * 30))
    other = toy.write_bundle(tmp_path / "other", seed=1, context=600)
    with VLM.open(other, threads=1) as model:
        scheduler = disk(model)
        assert ask(scheduler, question("or " * 30)).counts["cached_tokens"] == 0
        scheduler.close()
    assert len({path.parent for path in files(folder)}) == 2


def test_a_namespace_is_of_bundle_precision_device_and_machine(
    built_in: Callable[[str], Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = built_in("shapes-smolvlm")
    models = [VLM.open(bundle, precision=one) for one in ("fp32", "q4", "vision=fp32,decoder=q4")]
    names = {disk_store.namespace_of(model.components) for model in models}
    assert len(names) == 3
    again = VLM.open(bundle, precision="fp32").components
    assert disk_store.namespace_of(again) in names
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert disk_store.namespace_of(again) not in names
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    monkeypatch.setattr(disk_store, "machine_key", lambda: {"cpu": "another"})
    assert disk_store.namespace_of(again) not in names
    older = Components.open(bundle, precision="fp32", older_attention=True)
    assert disk_store.namespace_of(older) not in names


def damage(path: Path) -> None:
    contents = bytearray(path.read_bytes())
    contents[-1] ^= 1
    path.write_bytes(contents)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def foreign(path: Path) -> None:
    from safetensors.numpy import save

    path.write_bytes(save({"0": np.zeros((2, 16, 4), np.float32)}))


def no_json(path: Path) -> None:
    path.write_bytes((5).to_bytes(8, "little") + b"hello")


def huge_header(path: Path) -> None:
    path.write_bytes((1 << 62).to_bytes(8, "little") + path.read_bytes()[8:])


def of_another_key(path: Path) -> None:
    known = files(path.parents[1])
    path.write_bytes(known[(known.index(path) + 1) % len(known)].read_bytes())


def of_other_sizes(path: Path) -> None:
    key = bytes.fromhex(path.stem)
    path.write_bytes(disk_store._contents(key, Block((np.zeros((1, 2, 3), "f4"),)).arrays()))


@pytest.mark.parametrize(
    "spoil",
    [damage, cut_off, empty, foreign, no_json, huge_header, of_another_key, of_other_sizes],
)
def test_a_wrong_file_is_ignored(
    disk: Callable[..., Scheduler], folder: Path, spoil: Callable[[Path], None]
) -> None:
    image = toy.picture(1, 24, 40)
    ask(disk(), question("or", 1), [image])
    disk().close()
    for path in files(folder):
        spoil(path)
    scheduler = disk()
    with pytest.warns(CacheWarning, match="ignored") as caught:
        response = ask(scheduler, question("or", 1), [image])
    assert {one.message.code for one in caught} == {"cache.file-ignored"}  # type: ignore[union-attr]
    assert len(caught) == 1
    assert response.counts["cached_tokens"] == 0
    assert scheduler.stats().images_encoded == 1
    again = ask(disk(), question("or", 1), [image])  # what was wrong is written again
    assert again.counts["cached_tokens"] == whole_blocks(response.counts["prompt_tokens"]) > 0


def ask_and_write(scheduler: Scheduler) -> None:
    ask(scheduler, question("or " * 30))
    scheduler._store.close()


def test_a_full_disk_is_survived(
    disk: Callable[..., Scheduler], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk_store.os, "replace", full)
    scheduler = disk()
    with pytest.warns(CacheWarning, match="No space left") as caught:
        ask_and_write(scheduler)
    assert [one.message.code for one in caught] == ["cache.unwritable"]  # type: ignore[union-attr]
    assert files(folder) == []
    ask(scheduler, question("a " * 30))
    scheduler._store.close()
    assert files(folder) == []


def test_any_error_of_the_thread_that_writes_is_survived(
    disk: Callable[..., Scheduler], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("no safetensors")

    monkeypatch.setattr(disk_store, "_contents", fails)
    store = disk_store.DiskStore(folder, "name")
    warned: list[CacheWarning] = []
    monkeypatch.setattr(store, "_warn", warned.append)
    for n in range(2 * disk_store.MAX_WAITING):
        store.put(bytes([n % 256, n // 256]), Block((np.zeros(1, "f4"),)))
    closing = threading.Thread(target=store.close, daemon=True)
    closing.start()
    closing.join(WAIT)
    assert not closing.is_alive()
    assert [one.code for one in warned] == ["cache.unwritable"]
    assert "RuntimeError: no safetensors" in str(warned[0])


def test_partial_files_of_a_killed_process_are_removed(folder: Path) -> None:
    own = folder / "name"
    own.mkdir(parents=True)
    old, fresh, foreign = own / "a.part", own / "b.part", own / "notes.txt"
    for path in (old, fresh, foreign):
        path.write_bytes(b"1234")
    for path in (old, foreign):
        os.utime(path, (1, 1))
    store = disk_store.DiskStore(folder, "name")
    store.put(b"key", Block((np.zeros(1, "f4"),)))
    store.close()
    assert {path.name for path in files(folder)} == {"b.part", "notes.txt", "6b6579.safetensors"}


def test_a_folder_that_is_a_file(model: VLM, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        Scheduler(model, cache_dir=tmp_path / "file") as scheduler,
        pytest.warns(CacheWarning) as caught,
    ):
        ask_and_write(scheduler)
    assert len(caught) == 1


def test_a_warning_that_is_an_error_fails_no_request(
    disk: Callable[..., Scheduler], folder: Path
) -> None:
    ask(disk(), question("or " * 30))
    disk().close()
    for path in files(folder):
        damage(path)
    ask(disk(), question("or " * 30))  # warnings are errors in this suite


def test_the_folder_is_bounded(disk: Callable[..., Scheduler], folder: Path) -> None:
    size = 60_000
    scheduler = disk(cache_dir_bytes=size)
    for n in range(20):
        ask(scheduler, question(f"{'ab'[n % 2]} " * n + "or " * 30))
    scheduler.close()
    total = sum(path.stat().st_size for path in files(folder))
    assert size / 2 < total <= size
    scheduler = disk(cache_dir_bytes=size)
    assert ask(scheduler, question("b " * 19 + "or " * 30)).counts["cached_tokens"] > BLOCK


def test_sizes_are_checked(model: VLM, folder: Path) -> None:
    with raises(OptionError, "option.wrong-value", "cache_dir_bytes"):
        Scheduler(model, cache_dir=folder, cache_dir_bytes=-1)


def test_a_store_tells_values_apart_by_type() -> None:
    store = ContentStore(1000)
    block = Block((np.zeros(3, "f4"),))
    store.put({b"key": block})
    assert store.get(b"key", Block, lambda _: block) is block
    assert store.get(b"key", FeatureCache, lambda _: None) is None  # type: ignore[type-var,arg-type]
