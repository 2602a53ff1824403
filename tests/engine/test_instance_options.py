"""What an instance says of itself, and the options that it refuses before the model loads."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm


from fake_engine import LLAMA, vllm_config  # noqa: E402

from vllm_loraserve.adapters.layout import ModuleShape, build_layout  # noqa: E402
from vllm_loraserve.config import ConfigError, LoRAServeConfig, parse_config  # noqa: E402
from vllm_loraserve.engine.agent import instance_name  # noqa: E402
from vllm_loraserve.engine.capacity import capacity_of, module_shapes  # noqa: E402
from vllm_loraserve.engine.engine_config import check_layout, prepare_engine_args  # noqa: E402


def test_sizes_are_reckoned_for_plain_dense_models_only():
    assert module_shapes(LLAMA)["down_proj"] == (128, 64)
    assert module_shapes(SimpleNamespace(model_type="mixtral")) == {}


def test_capacity_is_the_configured_memory_else_the_flags():
    shapes = module_shapes(LLAMA)
    row = 2 * 2 * sum(i + o for i, o in shapes.values())
    plain = capacity_of(vllm_config(), LoRAServeConfig(), shapes)
    assert (plain.rank_rows, plain.host_bytes, plain.host_adapters) == (4 * 64, 8 * 64 * row, 8)
    assert capacity_of(vllm_config(), LoRAServeConfig(arena_rank_rows=77), shapes).rank_rows == 77
    assert (plain.dtype, plain.kernels) == ("bfloat16", "rank-aware cpu")
    big = capacity_of(vllm_config(), LoRAServeConfig(arena_gib=1.0, host_gib=2.0), shapes)
    assert (big.rank_rows, big.host_bytes) == ((1 << 30) // row, 2 << 30)
    assert capacity_of(vllm_config(), LoRAServeConfig(max_rank=32), shapes).max_rank == 32
    nodes = vllm_config()
    nodes.parallel_config.nnodes = 2
    assert capacity_of(nodes, LoRAServeConfig(), shapes).max_rank == 64, "its part of the arena"


@pytest.mark.parametrize("tp", [1, 2])
def test_page_groups_are_those_of_the_layout(tp):
    """Rank rows of fused layers lie together; workers hold A (of column-parallel layers) or B each."""
    shapes = module_shapes(LLAMA)
    config = vllm_config()
    config.parallel_config.tensor_parallel_size = tp
    told = capacity_of(config, LoRAServeConfig(page_rows=16, host_gib=1.0, arena_gib=1.0), shapes)
    sizes = {name: (inner, outer // tp) for name, (inner, outer) in shapes.items()}
    sizes |= {name: (shapes[name][0] // tp, shapes[name][1]) for name in ("o_proj", "down_proj")}
    layers = {"qkv": ("q_proj", "k_proj", "v_proj"), "gate_up": ("gate_proj", "up_proj")}
    layers |= {"o": ("o_proj",), "down": ("down_proj",)}
    modules = [
        ModuleShape(f"{layer}.{i}", layer, sizes[parts[0]][0], tuple(sizes[p][1] for p in parts))
        for layer, parts in layers.items()
        for i in range(2)
    ]
    layout = build_layout(modules, model="m", dtype="bfloat16", page_rows=16, tp_rank=0, tp_size=tp)
    by_modules = {group.modules: group.row_bytes for group in told.page_groups}
    assert by_modules == {layers[group.name]: tp * layout.page_bytes(i) // 16 for i, group in enumerate(layout.groups)}
    assert (told.page_rows, told.host_bytes) == (16, tp << 30)
    assert told.rank_rows == (1 << 30) * 16 // layout.bytes_per_page_set
    config.lora_config.target_modules = ["q_proj", "down_proj"]
    some = capacity_of(config, LoRAServeConfig(), shapes).page_groups
    assert [group.modules for group in some] == [layers["qkv"], layers["down"]]


def test_a_transfer_key_that_can_not_be_used_is_refused_before_the_model_loads(tmp_path):
    key = tmp_path / "key"
    for prepare, says in ((lambda: None, "cannot be read"), (lambda: key.write_bytes(b"x" * 64), "chmod 600")):
        prepare()
        args = SimpleNamespace(additional_config={"loraserve": {"transfer_key_file": str(key)}}, max_cpu_loras=None)
        with pytest.raises(ConfigError, match=says) as refused:
            prepare_engine_args(args)
        assert "transfer_key_file=" in str(refused.value)


def test_curve_keys_that_can_not_be_used_are_refused_before_the_model_loads(tmp_path, monkeypatch):
    monkeypatch.setenv("LORASERVE_KEYS", str(tmp_path / "nothing"))
    alone = SimpleNamespace(additional_config={"loraserve": {}}, max_cpu_loras=1)
    assert prepare_engine_args(alone) is not None
    args = SimpleNamespace(additional_config={"loraserve": {"coordinator": "tcp://127.0.0.1:5700"}}, max_cpu_loras=1)
    with pytest.raises(ConfigError, match=r"LORASERVE_KEYS: .*nothing/member.key_secret' can't be read") as refused:
        prepare_engine_args(args)
    assert "\n" not in str(refused.value)


def test_a_server_that_can_not_be_one_instance_is_refused_before_the_model_loads():
    joined, alone = LoRAServeConfig(coordinator="tcp://127.0.0.1:1"), LoRAServeConfig()
    for engines, servers, says in (
        (2, 2, "start 2 servers without it"),
        (1, 3, "use --api-server-count 1"),
        (1, 1, ""),
    ):
        args = SimpleNamespace(data_parallel_size=engines, _api_process_count=servers)
        check_layout(args, alone)
        if not says:
            check_layout(args, joined)
            continue
        with pytest.raises(ConfigError, match=says) as refused:
            check_layout(args, joined)
        assert "\n" not in str(refused.value)


def test_two_sizes_for_the_arena_are_refused_before_the_model_loads():
    with pytest.raises(ConfigError, match="arena_gib=1 and arena_rank_rows=64 are both given"):
        parse_config({"arena_gib": 1.0, "arena_rank_rows": 64})
    for host in ("0.0.0.0", "::"):
        with pytest.raises(ConfigError, match="set transfer_advertise"):
            parse_config({"transfer_key_file": "/k", "transfer_host": host})
        parse_config({"transfer_key_file": "/k", "transfer_host": host, "transfer_advertise": "node-1"})


def test_ways_between_peers_are_those_that_there_are():
    assert parse_config({"transfer_ways": ["nixl", "tcp"]}).transfer_ways == ("nixl", "tcp")
    for ways, why in ((["pigeon"], "there is no way 'pigeon'; choose among cuda_ipc, memfd"), ([], "length >= 1")):
        with pytest.raises(ConfigError, match=f"transfer_ways=.*{why}"):
            parse_config({"transfer_ways": ways})


def test_instance_names():
    assert instance_name(LoRAServeConfig(instance="x"), "http://h:1") == "x"
    assert instance_name(LoRAServeConfig(), "http://127.0.0.1:8000") == "127.0.0.1-8000"
    assert instance_name(LoRAServeConfig(), "http://[::1]:8000") == "1-8000"
    assert instance_name(LoRAServeConfig(), "http://bücher.local:8000") == "b-cher.local-8000"
    assert instance_name(LoRAServeConfig(), "http://_h:80") == "h-80"
    for name in ("bücher", "n\u0661", "_h"):
        with pytest.raises(ConfigError, match="instance="):
            parse_config({"instance": name})
