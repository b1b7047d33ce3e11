"""How long a dry run takes beyond importing torch and the model's class, and what memory its process comes to.

    python benchmarks/dry_run_speed.py [MODEL ...]

Each model in a process of its own, trained in full in bf16-mixed with full checkpointing at 8,192 tokens on one H100. Seconds
are wall time and CPU time, so that a loaded machine shows.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time

MODELS = ("llama-3.1-8b", "llama-3.1-405b", "mixtral-8x7b", "qwen3-30b-a3b")


def measure(model: str) -> str:
    """One line: seconds of imports, of the dry run, CPU seconds of it, and the process's largest resident set."""
    started = time.perf_counter()
    import torch  # noqa: F401

    from estimator.building.model import model_config
    from estimator.dryrun.run import dry_run
    from estimator.setup import Setup

    def setup(seq: int) -> Setup:
        return Setup(model=model, seq=seq, checkpointing="full", accelerator="H100-SXM-80GB")

    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM._model_mapping[type(model_config(setup(1)))]  # imports the class
    import estimator.dryrun.steps  # noqa: F401

    imported, cpu = time.perf_counter(), time.process_time()
    found = dry_run(setup(8192))
    seconds, cpu_seconds = time.perf_counter() - imported, time.process_time() - cpu
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return (
        f"{model}: imports {imported - started:.1f} s, dry run {seconds:.2f} s ({cpu_seconds:.2f} s of CPU), "
        f"process {peak_mib:,.0f} MiB, peak {found.peak_allocated_bytes / 2**30:,.1f} GiB"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(measure(sys.argv[2]))
    else:
        for name in sys.argv[1:] or MODELS:
            subprocess.run([sys.executable, "-W", "ignore", __file__, "--one", name], check=True)
