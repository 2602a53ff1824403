"""An installation without Triton can import every kernel module that is not itself a Triton kernel."""

import subprocess
import sys
from pathlib import Path

import vllm_loraserve.kernels

FOLDER = Path(vllm_loraserve.kernels.__file__).parent
TRITON_SOURCES = {"triton_shrink", "triton_expand"}
NEED_VLLM = {"punica_cpu", "punica_gpu", "cpu_native"}


def test_modules_import_where_triton_is_missing():
    names = sorted(p.stem for p in FOLDER.glob("*.py") if p.stem not in TRITON_SOURCES | NEED_VLLM | {"__init__"})
    assert {"lora_linear", "op", "cost", "stock_sources", "aot"} <= set(names)
    imports = "\n".join(f"import vllm_loraserve.kernels.{name}" for name in names)
    code = f"import sys\nsys.modules['triton'] = None\n{imports}\nassert 'vllm' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=800, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
