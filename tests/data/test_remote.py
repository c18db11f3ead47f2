"""Shards behind URLs: the same samples, few fetches, a cache that keeps its size, failures in a sentence."""

import contextlib
import http.server
import multiprocessing
import random
import shutil
import threading
import time
from dataclasses import replace

import pytest
import torch

from data import remote
from data.build import build
from data.loader import DataConfig, batches, open_dataset
from data.remote import RemoteShards, ShardCache
from flashvsr.base.cli import UserError

pytestmark = pytest.mark.usefixtures("quick")


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder; `faults` says what goes wrong with the next requests of a name."""

    def __init__(self, folder):
        self.folder, self.log, self.faults = folder, [], {}
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        name = self.path.strip("/").split("?")[0]
        self.server.log.append(self.path)
        path = self.server.folder / name
        waiting = self.server.faults.get(name, [])
        fault = waiting.pop(0) if waiting else None
        if isinstance(fault, int) or not path.is_file():
            self.send_error(fault or 404)
            return
        data = path.read_bytes()
        self.send_response(200)
        if fault != "unannounced":
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if fault in ("short", "unannounced") else data)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def corpus(footage, tmp_path_factory):
    """A build of the four clips, a shard for each."""
    folder = tmp_path_factory.mktemp("remote") / "corpus"
    build([footage], folder, quiet=True)
    return folder


@pytest.fixture
def server(corpus, monkeypatch):
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)
    served = Server(corpus)
    thread = threading.Thread(target=served.serve_forever, daemon=True)
    thread.start()
    yield served
    served.shutdown()
    served.server_close()


def config(location, cache, **change):
    return replace(
        DataConfig(shards=str(location), latents_per_clip=1, height=32, width=32, cache_dir=str(cache)),
        **change,
    )


def same(a, b):
    pairs = zip(a["segments"], b["segments"], strict=True)
    return a["id"] == b["id"] and all(torch.equal(x[k], y[k]) for x, y in pairs for k in ("hr", "lr"))


def test_samples_are_those_of_the_local_shards_and_each_is_fetched_once(corpus, server, tmp_path):
    local = open_dataset(config(corpus, tmp_path), 1)
    far = open_dataset(config(server.url + "index.json?key=secret", tmp_path / "cache"), 1)
    assert far.identity() == local.identity()
    for counter in range(4):
        assert same(far.sample(counter), local.sample(counter))
    again = open_dataset(config(server.url + "index.json?key=secret", tmp_path / "cache"), 1)
    assert same(again.sample(2), local.sample(2))
    tars = [path for path in server.log if ".tar" in path]
    assert sorted(tars) == sorted(
        f"/{s.shard}?key=secret" for s in {v.shard: v for v in local.videos}.values()
    )


@pytest.mark.parametrize("faults", [[503, "short"], ["unannounced"], [500, 429, "short", "short"]])
def test_failures_on_the_way_are_tried_again(corpus, server, tmp_path, faults):
    clips = open_dataset(config(server.url + "index.json", tmp_path), 1)
    shard = clips.videos[0].shard
    server.faults[shard] = list(faults)
    assert same(clips.sample(0), open_dataset(config(corpus, tmp_path), 1).sample(0))
    assert server.log.count(f"/{shard}") == len(faults) + 1
    assert not list(tmp_path.glob("*.part"))


def test_lasting_failures_are_one_sentence(corpus, server, tmp_path):
    with pytest.raises(
        UserError, match=r"cannot fetch '.*/nowhere/index.json' \(HTTP 404 Not Found\).*data.shards"
    ):
        open_dataset(config(server.url + "nowhere/index.json?key=secret", tmp_path), 1)
    assert len(server.log) == 1  # trying again is no use
    clips = open_dataset(config(server.url + "index.json", tmp_path), 1)
    server.faults[clips.videos[0].shard] = ["short"] * 99
    with pytest.raises(UserError, match=r"5 attempts; the last: \d+ of \d+ bytes came") as error:
        clips.sample(0)
    assert "\n" not in str(error.value) and not list(tmp_path.glob("*.tar"))
    with pytest.raises(UserError, match="must name an index.json"):
        open_dataset(config(server.url, tmp_path), 1)
    with pytest.raises(UserError, match="'nix:' is nothing that webdataset opens"):
        open_dataset(config("nix://host/index.json", tmp_path), 1)
    server.faults["index.json"] = ["short"] * 9
    with pytest.raises(UserError, match="5 attempts"):
        open_dataset(config(server.url + "index.json", tmp_path), 1)
    with pytest.raises(UserError, match="cache_gb=1e-06 holds not even"):
        open_dataset(config(server.url + "index.json", tmp_path, cache_gb=1e-6), 1).sample(0)


def test_what_webdataset_opens(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)
    expected = open_dataset(config(corpus, tmp_path), 1).sample(0)
    for location in (f"pipe:cat {corpus}/index.json", f"file://{corpus}/index.json"):
        assert same(open_dataset(config(location, tmp_path / "cache"), 1).sample(0), expected)
    with pytest.raises(UserError, match="cannot fetch 'pipe:cat .*' .5 attempts; the last: .* with code 1"):
        open_dataset(config("pipe:cat /nowhere/index.json 2>/dev/null", tmp_path), 1)
    half = f"pipe:head -c 300 {corpus}/index.json"
    with pytest.raises(UserError, match="is no index"):
        open_dataset(config(half, tmp_path), 1)


def fill(folder, limit, sizes, seed, most):
    """Opens files of several sizes in an order of its own, checks every byte, watches the folder's size."""
    cache = ShardCache(folder, limit)
    random.seed(seed)
    for _ in range(30):
        number = random.randrange(len(sizes))
        url = f"pipe:head -c {sizes[number]} /dev/zero | tr '\\0' '{chr(65 + number)}'"
        with cache.open(url, "v", sizes[number]) as file:
            data = file.read()
        assert data == bytes([65 + number]) * sizes[number]
        held = 0
        for path in list(folder.glob("*.tar")):
            with contextlib.suppress(FileNotFoundError):  # dropped by another process this moment
                held += path.stat().st_size
        most.value = max(most.value, held)


def test_the_cache_keeps_its_size_with_several_processes(tmp_path):
    sizes, limit = [300_000, 200_000, 250_000, 100_000, 280_000], 800_000
    most = multiprocessing.Value("l", 0)
    workers = [multiprocessing.Process(target=fill, args=(tmp_path, limit, sizes, i, most)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert 300_000 < most.value <= limit and not list(tmp_path.glob("*.part"))


def test_the_copy_used_least_recently_goes(tmp_path):
    def opened(letter):
        return cache.open(f"pipe:head -c 100000 /dev/zero | tr '\\0' {letter}", "v", 100_000)

    cache = ShardCache(tmp_path, 350_000)
    held = opened("a")
    time.sleep(0.02)
    opened("b").close()
    time.sleep(0.02)
    opened("a").close()  # used again
    time.sleep(0.02)
    first = {p.name for p in tmp_path.glob("*.tar")}
    opened("c").close()  # needs room: b goes
    left = {p.name for p in tmp_path.glob("*.tar")}
    assert len(first) == 2 and len(left) == 2 and len(first & left) == 1
    with opened("a") as copy:
        assert copy.read(1) == b"a"
    assert {p.name for p in tmp_path.glob("*.tar")} == left
    shutil.rmtree(tmp_path)
    assert held.read(3) == b"aaa"  # what is open stays readable
    held.close()


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="cannot be used .*give another data.cache_dir"):
        ShardCache(tmp_path / "file", 10**6).open("pipe:true", "v", 1)


def test_what_a_killed_process_left_is_taken_away(tmp_path):
    left = tmp_path / f"{'0' * 32}.part"
    left.write_bytes(bytes(900_000))
    cache = ShardCache(tmp_path, 500_000)
    cache.open("pipe:head -c 300000 /dev/zero", "v", 300_000).close()
    assert not left.exists()


def test_workers_share_the_cache(server, corpus, tmp_path):
    local = open_dataset(config(corpus, tmp_path), 3)
    far = open_dataset(config(server.url + "index.json", tmp_path / "cache"), 3)
    for counter, batch in zip(range(6), batches(far, 0, 1, 0, 1, 2), strict=False):
        assert torch.equal(batch["segments"][0]["hr"][0], local.sample(counter)["segments"][0]["hr"])
    tars = [path for path in server.log if path.endswith(".tar")]
    assert len(tars) == len(set(tars))


def test_an_index_may_speak_of_shards_in_another_folder(tmp_path):
    shards = RemoteShards("http://host/a/curated/index.json?k=1", ShardCache(tmp_path, 1))
    assert shards.place("x.tar") == "http://host/a/curated/x.tar?k=1"
    shards.folder = "../corpus"
    assert shards.place("x.tar") == "http://host/a/corpus/x.tar?k=1"
