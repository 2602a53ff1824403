"""An engine client that only keeps books, and its configuration, for tests of what stands before the engine."""

import asyncio
from types import SimpleNamespace

from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind

from vllm_loraserve.coordinator.messages import (
    AdapterRecord,
)

LLAMA = SimpleNamespace(
    model_type="llama", hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128,
    num_hidden_layers=2,
)  # fmt: skip


def vllm_config(extension=""):
    return SimpleNamespace(
        lora_config=SimpleNamespace(max_loras=4, max_lora_rank=64, max_cpu_loras=8, lora_dtype=None),
        cache_config=SimpleNamespace(num_gpu_blocks=100, block_size=16),
        model_config=SimpleNamespace(hf_text_config=LLAMA, dtype="torch.bfloat16", max_model_len=1024),
        # Engines of which the agent asks workers by collective_rpc; for those with desks see test_worker_desk.py.
        parallel_config=SimpleNamespace(tensor_parallel_size=1, data_parallel_size=2, worker_extension_cls=extension),
        device_config=SimpleNamespace(device_type="cpu"),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=512, max_num_seqs=32),
    )


class FakeEngine:
    """An engine client that holds LoRARequests by id and generates tokens when told to."""

    def __init__(self) -> None:
        self.held: dict[int, LoRARequest] = {}
        self.broken: set[str] = set()
        self.logger_manager = SimpleNamespace(stat_loggers=[])
        self.gate = asyncio.Event()
        self.load_s = 0.0
        self.arena_rows: int | None = None
        self.loading: dict[int, asyncio.TimerHandle] = {}
        self.located: list[tuple] = []
        self.told_before_load: list[str] = []
        self.errors: dict[int, str] = {}
        self.closed = 0
        self.errored = False
        self.dead_error = RuntimeError("EngineCore encountered an issue.")

    async def add_lora(self, request):
        if request.lora_name in self.broken:
            raise RuntimeError("Call to add_lora failed:\nno adapter_config.json there")
        self.told_before_load += [row[0] for row in self.located if row[0] == request.lora_name]
        if not self.load_s:
            self.held[request.lora_int_id] = request
        else:
            put = self.held.__setitem__
            loop, number = asyncio.get_running_loop(), request.lora_int_id
            self.loading[number] = loop.call_later(self.load_s, put, number, request)
        return True

    async def remove_lora(self, lora_id):
        if lora_id in self.loading:
            self.loading.pop(lora_id).cancel()
        return self.held.pop(lora_id, None) is not None

    async def list_loras(self):
        return set(self.held)

    async def collective_rpc(self, method, args=()):
        if method == "loraserve_transfer_endpoint":
            return ["127.0.0.1:7001", "127.0.0.1:7002"]
        if method == "loraserve_shapes":
            return [{"q_proj": [[64, 64]], "lm_head": []}, {"q_proj": [[64, 64]], "o_proj": [[64, 64]]}]
        if method == "loraserve_arena_rows":
            return [self.arena_rows, None]
        if method == "loraserve_residency":
            generations = {str(i): 10 + i for i in self.held}
            return [
                ([i for i in self.held if i == 1], list(self.held), self.errors, generations),
                ([], list(self.held), {}, dict.fromkeys(generations, 1)),
            ]
        if method == "loraserve_retain":
            self.retained = args
            return [None, None]
        assert method == "loraserve_locate"
        self.located += args[0]
        return [None, None]

    async def encode(self, prompt, pooling_params, request_id, lora_request=None):
        self.encoding = True
        try:
            yield SimpleNamespace(prompt_token_ids=[1, 2, 3], outputs=SimpleNamespace(data=[0.5]))
        finally:
            self.encoding = False

    async def generate(self, prompt, sampling_params, request_id, *, lora_request=None):
        try:
            for i in range(1, 4):
                n = 1 if sampling_params.output_kind is RequestOutputKind.DELTA else i
                yield SimpleNamespace(prompt_token_ids=[1] * 5, outputs=[SimpleNamespace(token_ids=[7] * n)])
                if i == 1:
                    await self.gate.wait()
        finally:
            self.closed += 1


def record(name: str, sha256: str = "one", source: str = "/adapters/a") -> AdapterRecord:
    return AdapterRecord(
        name=name, source=source, rank=8, target_modules=("q_proj",), size_bytes=1000, sha256=sha256, base_model="toy",
        added_at=1.0,
    )  # fmt: skip
