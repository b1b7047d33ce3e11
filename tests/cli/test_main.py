"""The command line as a user meets it: a process, its output, its exit code, and what it loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vramcalc.main import COMMANDS, make_app

HEAVY = ("torch", "transformers", "pandas", "scipy", "matplotlib", "numpy", "datasets", "peft")


def vramcalc(*arguments: str, **further: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vramcalc", *arguments], capture_output=True, text=True, timeout=120, **further
    )


def loaded_by(*arguments: str) -> set[str]:
    """The top-level modules in memory after a command has run."""
    code = (
        "import sys, io, contextlib, vramcalc.main\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        "    try: vramcalc.main.run(sys.argv[1:])\n"
        "    except SystemExit as end: assert not end.code, end.code\n"
        "print(' '.join({name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize("arguments", [["--help"], ["estimate", "--params", "8e9", "--seq", "8192"], ["estimate", "--model", "nano", "--gpu", "rtx-3090", "--json"], ["models"]], ids=" ".join)  # fmt: skip
def test_help_and_estimates_load_nothing_heavy(arguments: list[str]) -> None:
    assert not loaded_by(*arguments) & set(HEAVY)


def test_every_command_is_listed_with_the_first_line_of_its_own_help() -> None:
    done = vramcalc("--help", env={"COLUMNS": "200", "PATH": ""})
    assert done.returncode == 0
    for name, summary in COMMANDS.items():
        assert name in done.stdout and summary in done.stdout
        own = make_app(name).registered_commands
        documented = next(command.callback.__doc__ for command in own if command.name == name and command.callback)
        assert (documented or "").splitlines()[0] == summary


def test_the_estimate_is_a_document_in_base_units_that_keeps_to_the_contract() -> None:
    done = vramcalc(
        "estimate",
        "--params",
        "8e9",
        "--seq",
        "8192",
        "--gpu",
        "h100",
        "--gpus",
        "8",
        "--dataset-tokens",
        "1e9",
        "--json",
    )
    assert done.returncode == 0 and done.stderr == ""
    document = json.loads(done.stdout)
    assert document["schema"] == "vramcalc/estimate/1"
    assert {"setup", "model", "memory", "fits", "time", "checkpoint", "run", "naive"} <= set(document)
    memory = document["memory"]
    assert sum(memory["parts_bytes"].values()) == memory["peak_allocated_bytes"]["value"]
    assert all(isinstance(amount, int) for amount in memory["parts_bytes"].values())
    for name in ("peak_allocated_bytes", "peak_reserved_bytes", "peak_device_bytes", "peak_host_bytes"):
        assert memory[name]["low"] <= memory[name]["value"] <= memory[name]["high"]
    assert document["model"]["parameters"] == 8_000_000_000
    assert document["setup"]["accelerator"] == "H100-SXM-80GB" and document["setup"]["seq"] == 8192
    assert document["fits"]["capacity_bytes"] == round(79.11 * 2**30)
    assert document["time"]["tokens_per_second"]["value"] == pytest.approx(
        8 * document["time"]["tokens_per_second_per_gpu"]["value"]
    )
    assert document["run"]["tokens"] == 10**9
    assert (
        document["checkpoint"]["bytes"]
        >= document["checkpoint"]["model_bytes"] + document["checkpoint"]["optimizer_bytes"]
    )


def test_a_narrow_pipe_gets_plain_text_within_its_width() -> None:
    done = vramcalc(
        "estimate", "--params", "8e9", "--gpu", "rtx-3090", "--samples", "1000", env={"COLUMNS": "60", "PATH": ""}
    )
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    assert max(len(line) for line in done.stdout.splitlines()) <= 60


@pytest.mark.parametrize(
    "arguments",
    [
        ["estimate", "--model", "no-such-model"],
        ["estimate", "--params", "-8e9"],
        ["estimate", "--params", "eight"],
        ["estimate"],
        ["estimate", "--model", "nano", "--params", "8e9"],
        ["estimate", "--model", "nano", "--batch", "0"],
        ["estimate", "--model", "nano", "--precision", "bf17"],
        ["estimate", "--model", "nano", "--gpu", "rtx-3091"],
        ["estimate", "--model", "nano", "--no-such-flag"],
        ["estimate", "--model", "nano", "--price", "free"],
        ["estimate", "--model", "nano", "--reserve", "2XB"],
        ["estimate", "--model", "nano", "--dataset-tokens", "0"],
        ["estimate", "--model", "/no/such/config.json"],
        ["estimate", "--config", "/no/such/file.toml"],
        ["estimate", "--model", "nano", "--calibration", "/no/such/calibration.json", "--gpu", "cpu"],
        ["estimate", "--model", "nano", "--epochs", "nan"],
        ["estimate", "--model", "nano", "--check"],
        ["estimate", "--model", "nano", "--lora-targets", "q_proj"],
        ["estimate", "--model", "nano", "--method", "lora", "--lora-targets", ","],
        ["estimate", "--model", "nano", "--gpu", "rtx-3090", "--reserve", "200GiB"],
        ["estimate", "--model", "nano", "--method", "lora", "--trainable-layers", "1"],
        ["estimate", "--model", "nano", "--calibration", "laws.json", "--no-calibration"],
        ["estimate", "--params", "8e9", "--seq", "1e300", "--batch", "1e300"],
        ["no-such-command"],
    ],
    ids=" ".join,
)
def test_wrong_input_is_one_clear_line_and_exit_code_2(in_process: Callable[..., Any], arguments: list[str]) -> None:
    done = in_process(*arguments)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr


def test_no_command_at_all_prints_the_help_and_says_so() -> None:
    done = vramcalc()
    assert (done.returncode, done.stderr) == (2, "error: no command given; see vramcalc --help\n")
    assert "estimate" in done.stdout


def test_a_name_that_the_terminals_encoding_lacks_is_no_crash(tmp_path: Path) -> None:
    config = tmp_path / "模型.json"
    config.write_text(
        '{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 99, "rms_norm_eps": 1}'
    )
    command = [sys.executable, "-m", "vramcalc", "estimate", "--model", str(config)]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_parts_of_an_absurdly_large_setup_still_sum_exactly() -> None:
    done = vramcalc("estimate", "--params", "8e9", "--seq", "1e12", "--batch", "1e12", "--json")
    memory = json.loads(done.stdout)["memory"]
    assert sum(memory["parts_bytes"].values()) == memory["peak_allocated_bytes"]["value"]


def test_a_check_that_fails_exits_with_3_after_printing_the_estimate() -> None:
    done = vramcalc("estimate", "--model", "llama-3.1-8b", "--gpu", "rtx-3090", "--check", "--json")
    assert done.returncode == 3
    assert json.loads(done.stdout)["fits"]["fits"] is False
    assert "RTX-3090 has" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert vramcalc("estimate", "--model", "nano", "--gpu", "rtx-3090", "--check").returncode == 0


def test_a_config_file_gives_settings_and_flags_override_it(tmp_path: Path) -> None:
    config = tmp_path / "setup.toml"
    config.write_text('model = "nano"\nseq = 256\nlora-rank = 4\nmethod = "lora"\ncompile = true\n')
    done = vramcalc("estimate", "--config", str(config), "--seq", "512", "--json")
    setup = json.loads(done.stdout)["setup"]
    assert (setup["model"], setup["seq"], setup["lora_rank"], setup["compile"]) == ("nano", 512, 4, True)
    config.write_text('params = 8e9\ngpu = "h100"\ngpus = 8\nquantization = "nf4"\nmethod = "qlora"\n')
    short = json.loads(vramcalc("estimate", "--config", str(config), "--json").stdout)["setup"]
    assert (short["accelerator"], short["accelerators"], short["base_quantization"]) == ("H100-SXM-80GB", 8, "nf4")
    config.write_text('model = "nano"\nparams = "8e9"\n')
    assert "gives it twice" in vramcalc("estimate", "--config", str(config)).stderr
    config.write_text("colour = 3\n")
    assert "colour: no such setting" in vramcalc("estimate", "--config", str(config)).stderr
    config.write_text("seq = [\n")
    assert vramcalc("estimate", "--config", str(config)).returncode == 2


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = f"{sys.executable} -m vramcalc models | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_closed_output_is_no_error() -> None:
    command = f"{sys.executable} -m vramcalc estimate --params 8e9 >&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_version_and_the_doctor_answer() -> None:
    assert vramcalc("--version").stdout.startswith("vramcalc ")
    state = json.loads(vramcalc("doctor", "--json").stdout)
    assert {"toolkit", "python", "packages", "devices", "disk_free_bytes", "problems"} <= set(state)
    assert any(device["name"] == "cpu" and device["capacity_bytes"] > 2**30 for device in state["devices"])
    assert vramcalc("doctor").returncode == 0


def test_the_models_command_lists_every_catalog_entry_with_its_parameters() -> None:
    listed = json.loads(vramcalc("models", "--json").stdout)
    by_name = {model["name"]: model["parameters"] for model in listed["models"]}
    assert by_name["llama-3.1-8b"] == 8_030_261_248  # the model card's tensors
    assert "nano" in by_name and len(listed["accelerators"]) >= 30


def test_the_python_api_says_the_same_as_the_command() -> None:
    import vramcalc as api

    setup = api.Setup(model="llama-3.1-8b", seq=4096, accelerator="H100-SXM-80GB")
    document = json.loads(
        vramcalc("estimate", "--model", "llama-3.1-8b", "--seq", "4096", "--gpu", "h100", "--json").stdout
    )
    assert api.estimate(setup).memory.peak_device_bytes.value == document["memory"]["peak_device_bytes"]["value"]
    assert set(api.__all__) <= set(dir(api)) | set(api._HOMES)


def test_a_hub_model_without_a_network_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    # A name that never resolves stands for the missing network.
    environment = {"PATH": "", "HF_ENDPOINT": "https://hub.invalid", "HOME": "/nonexistent"}
    done = vramcalc("estimate", "--model", "someone/something-9b", env=environment)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: model: 'someone/something-9b'") and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full")
@pytest.mark.parametrize("command", ["estimate --model nano --json", "models"])
def test_a_full_disk_behind_the_output_is_one_line(command: str) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "vramcalc", *command.split()], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 2
    assert done.stderr == "error: output: cannot be written: No space left on device\n"
