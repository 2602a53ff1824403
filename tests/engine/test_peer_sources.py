"""Two workers' host tiers over real connections: an adapter of one is brought to the other, or left to its file."""

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

import torch  # noqa: E402
from vllm.lora.request import LoRARequest  # noqa: E402

from vllm_loraserve.adapters.layout import ModuleShape, build_layout  # noqa: E402
from vllm_loraserve.config import LoRAServeConfig  # noqa: E402
from vllm_loraserve.engine.peer_sources import PeerSources  # noqa: E402
from vllm_loraserve.memory.host_tier import HostTier  # noqa: E402
from vllm_loraserve.transfer.auth import generate_key  # noqa: E402


def tier(dtype: str = "float32") -> HostTier:
    modules = [ModuleShape("q", "attention", 64, (64,)), ModuleShape("up", "mlp", 64, (96,))]
    return HostTier(build_layout(modules, model="tiny", dtype=dtype, page_rows=8, tp_rank=0, tp_size=1), 1 << 20)


def fill(t: HostTier, key: int, digest: str, seed: int) -> bytes:
    entry = t.create(key, digest, (16, 8))
    generator = torch.Generator().manual_seed(seed)
    for target in t.targets(entry):
        if target is not None:
            target.copy_(torch.rand(target.shape, generator=generator))
    t.commit(entry)
    return content(t, key)


def content(t: HostTier, key: int) -> bytes:
    entry = t.get(key)
    return bytes(t.slab.view(entry.offset, entry.size))


@pytest.fixture
def worker(tmp_path):
    """make(instance, tier, **options) -> PeerSources with the cluster's key"""
    key = tmp_path / "key"
    key.write_bytes(generate_key())
    key.chmod(0o600)
    made = []

    def make(instance: str, t: HostTier, whole=lambda _: True, **options) -> PeerSources:
        config = LoRAServeConfig(
            transfer_key_file=str(options.pop("key", key)), instance=instance, transfer_rdma="off", **options
        )
        made.append(PeerSources(config, t, whole))
        return made[-1]

    yield make
    for m in made:
        m.close()


def test_an_adapter_comes_from_a_peer_under_an_id_of_our_own(worker):
    theirs, ours = tier(), tier()
    holder, asker = worker("one", theirs), worker("two", ours)
    weights = fill(theirs, 5, "sha", seed=1)
    holder.served(LoRARequest("a", 5, "/gone"))
    request = LoRARequest("a", 9, "/gone")
    assert asker.bring(request) is None, "nobody has said where it is"
    asker.locate("a", "/gone", "sha", [("one", holder.endpoint)])
    adapter = asker.bring(request)
    assert (adapter.id, adapter.rank, adapter.ranks) == (9, 16, (16, 8))
    assert content(ours, 9) == weights
    counted = {(name, *labels.values()): n for f in asker.metrics() for name, labels, n in f.samples}
    assert counted["loraserve_fetches_total", "peer", "ok"] == 1
    assert counted["loraserve_transfer_bytes_total",] == len(weights)
    assert asker.bring(request) is None, "it is here already"
    # From now on the asker is a source too.
    third_tier = tier()
    third = worker("three", third_tier)
    third.locate("a", "/gone", "sha", [("two", asker.endpoint)])
    assert third.bring(LoRARequest("a", 1, "/gone")) is not None
    assert content(third_tier, 1) == weights


@pytest.mark.parametrize("why", ["other content", "other layout", "removed", "not whole", "dead peer", "other rank"])
def test_what_can_not_come_from_a_peer_is_left_to_the_checkpoint(worker, why):
    theirs = tier()
    holder = worker("one", theirs, whole=lambda _: why != "not whole")
    asker = worker("two", tier("bfloat16" if why == "other layout" else "float32"), transfer_deadline_s=3.0)
    fill(theirs, 5, "sha", seed=1)
    holder.served(LoRARequest("a", 5, "/a"))
    endpoint = "127.0.0.1:1" if why == "dead peer" else holder.endpoint
    if why == "removed":
        holder.removed(5)
    if why == "other rank":
        asker._rank = 1
    asker.locate("a", "/a", "another sha" if why == "other content" else "sha", [("one", endpoint)])
    assert asker.bring(LoRARequest("a", 9, "/a")) is None


def test_new_content_of_a_name_replaces_the_old_for_peers(worker):
    theirs, ours = tier(), tier()
    holder, asker = worker("one", theirs), worker("two", ours)
    fill(theirs, 5, "old", seed=1)
    holder.served(LoRARequest("a", 5, "/a"))
    new = fill(theirs, 6, "new", seed=2)
    holder.served(LoRARequest("a", 6, "/a/."))
    holder.removed(5)
    asker.locate("a", "/a/.", "new", [("one", holder.endpoint)])
    assert asker.bring(LoRARequest("a", 9, "/a/.")) is not None
    assert content(ours, 9) == new


def test_a_stranger_gets_nothing(worker, tmp_path):
    theirs = tier()
    holder = worker("one", theirs)
    fill(theirs, 5, "sha", seed=1)
    holder.served(LoRARequest("a", 5, "/a"))
    other = tmp_path / "other"
    other.write_bytes(generate_key())
    other.chmod(0o600)
    stranger = worker("two", tier(), key=other, transfer_deadline_s=3.0)
    stranger.locate("a", "/a", "sha", [("one", holder.endpoint)])
    assert stranger.bring(LoRARequest("a", 9, "/a")) is None
