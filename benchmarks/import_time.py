"""What `import trimllm_hf` costs beside `import transformers` alone, and what its parts cost when they are first used.

    python benchmarks/import_time.py            # 7 rounds, each import in a new process, in turn
    python benchmarks/import_time.py --rounds 15

Prints medians of wall time, of CPU time, and the number of imported modules, over those of a bare interpreter. Files are
in the page cache: a first round that does not count reads them.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version

IMPORTS = {
    "import transformers": "import transformers",
    "import trimllm_hf": "import trimllm_hf",
    "from trimllm_hf import LayerMap": "from trimllm_hf import LayerMap",
    "from transformers import Trainer": "from transformers import Trainer",
    "from trimllm_hf import TrimCallback": "from trimllm_hf import TrimCallback",
    "from trimllm_hf import *": "from trimllm_hf import *",
    "trimllm --help": "import sys; sys.argv = ['trimllm', '--help']; import trimllm_hf.cli",
}
PROBE = """
import json, sys, time
wall, cpu, before = time.perf_counter(), time.process_time(), len(sys.modules)
{}
print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu, len(sys.modules) - before, 'torch' in sys.modules]))
"""


def main() -> None:
    """Run, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    seen: dict[str, list[list[float]]] = {name: [] for name in IMPORTS}
    for number in range(arguments.rounds + 1):
        for name, statement in IMPORTS.items():
            command = [sys.executable, "-c", PROBE.format(statement)]
            done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=os.getcwd())
            if number:
                seen[name].append(json.loads(done.stdout.splitlines()[-1]))
    named = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "huggingface_hub", "typer"))
    print(f"Python {platform.python_version()}, {named}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
    print("| | s | CPU s | modules | torch |\n|---|--:|--:|--:|---|")
    for name, rounds in seen.items():
        wall, cpu, modules, torch = (statistics.median(column) for column in zip(*rounds, strict=True))
        print(f"| `{name}` | {wall:.2f} | {cpu:.2f} | {modules:.0f} | {'loaded' if torch else 'no'} |")


if __name__ == "__main__":
    main()
