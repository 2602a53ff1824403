"""What a scrape of the coordinator says."""

import urllib.request
from collections import Counter

from coordinator_bench import record

from vllm_loraserve.coordinator.metrics import serve_metrics


def test_a_scrape_tells_members_adapters_and_messages(bench, unused_tcp_port):
    b = bench()
    b.join("one")
    b.controller.add(record("a"), b.now)
    b.run(2)
    stop = serve_metrics(b.controller, Counter({"Heartbeat": 3, "malformed": 1}), "127.0.0.1", unused_tcp_port)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{unused_tcp_port}/metrics", timeout=120) as answer:
            text = answer.read().decode()
    finally:
        stop()
    assert 'loraserve_coordinator_messages_total{kind="malformed"} 1.0' in text
    assert 'loraserve_coordinator_adapters{state="active"} 1.0' in text
    assert "loraserve_coordinator_instances 1.0" in text
    assert 'loraserve_coordinator_resident{instance="one"} 1.0' in text
