"""`sievit simulate` and `sievit compare`: what they print, write, draw and refuse."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from sievit.accel import PROFILES, area, presets, simulate
from sievit.accel.simulators.registry import SIMULATORS
from sievit.cli import app
from sievit.cli.report_formats import FORMATS
from sievit.pipeline.networks import sparse_workload
from sievit.workload import AttentionMask

SMALL = ("--image-size", "64")


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "80"})


def figures(path) -> dict:
    return json.loads(path.read_text())


def test_simulate_in_every_detail(mask_file, tmp_path):
    out, trace = tmp_path / "new" / "report.json", tmp_path / "trace.json"
    done = run("simulate", "--model", "deit_tiny", "--mask", mask_file, *SMALL, "--latent-heads",
               2, "--heads", "--json", out, "--trace", trace, "--plots", tmp_path / "plots",
               "--profile", "horowitz-28nm")  # fmt: skip
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in done.output  # nothing is cut off
    for words in (
        "bottleneck  attention",
        "Attention by layer on vitcod",
        "Attention by head on vitcod",
        "Where the time of the 64 MAC lines goes",
        "waits for: decoder",
        "Bottleneck of attention:",
        "Resources at work on vitcod",
        "Data movement of attention on vitcod, kB",
        "codec weights",
        "Data movement of the whole network on vitcod, kB",
        "blocks.*.mlp.fc*",
        "Energy on vitcod, profile 'horowitz-28nm'",
        "Area",
    ):
        assert words in done.output, words
    stored = figures(out)["vitcod"]
    assert f"{stored['attention']['cycles']:,}" in done.output
    assert stored["energy"]["profile"] == stored["area"]["profile"] == "horowitz-28nm"
    assert sum(len(op["heads"]) for op in stored["ops"]) == 36
    assert figures(trace)["traceEvents"]
    names = {path.name for path in (tmp_path / "plots").iterdir()}
    assert names == {
        "cycles_by_phase.png",
        "data_movement.png",
        "roofline.png",
        "utilization_vitcod.png",
    }
    for path in (tmp_path / "plots").iterdir():
        with Image.open(path) as picture:
            assert min(picture.size) > 250


def test_the_table_of_lines_sums_to_their_time(mask_file):
    done = run("simulate", "--model", "deit_tiny", "--mask", mask_file, *SMALL)
    shares = [
        float(line.split("%")[0].split()[-1])
        for line in done.output.splitlines()
        if line.strip().startswith(("at work ", "waits for:")) and "<" not in line
    ]
    assert sum(shares) == pytest.approx(100, abs=0.05 * len(shares) + 0.1)


def test_global_keys_that_cost_time_are_warned_of_and_the_rule_is_said(mask_file):
    machine = ("--mask", mask_file, *SMALL)
    for command in (("simulate", "--model", "deit_tiny"), ("compare", "deit_tiny")):
        done = run(*command, *machine, "--simulator", "vitcod", "--global-threshold", "0.05")
        assert done.exit_code == 0
        words = " ".join(done.output.split())
        assert (
            "warning: on vitcod global keys (kept by more than 0.05 of the queries) cost" in words
        )
        assert 'give Schedule(global_threshold="best")' in words
        assert "global keys a head (kept by more than 0.05 of the queries)" in words
        done = run(*command, *machine, "--simulator", "vitcod", "--set", "global_threshold=best")
        assert done.exit_code == 0
        assert "warning" not in done.output
        assert "global_threshold best" in " ".join(done.output.split())
    three = run("compare", "deit_tiny", *machine, *("--simulator", "vitcod_no_codec"),
                *("--simulator", "vitcod_plain"), *("--simulator", "vitcod"))  # fmt: skip
    words = " ".join(three.output.split())
    assert "Polarized, vitcod_no_codec, vitcod: " in words
    assert words.count("Polarized") == 1


def test_closed_forms_say_that_they_have_no_heads_or_stalls(mask_file):
    done = run("simulate", "--model", "deit_tiny", "--mask", mask_file, *SMALL, "--heads",
               "--simulator", "sanger", "--simulator", "systolic")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "sanger has closed forms for whole layers: no table of heads." in done.output
    assert "no stalls of its MAC lines are known" in done.output
    assert "Faster: than sanger at batch 1, both simulated." in done.output


def test_compare_says_what_speedups_are_against(mask_file, tmp_path):
    out = tmp_path / "compare.json"
    done = run("compare", "deit_tiny", "--mask", mask_file, *SMALL, "--batch", 2, "--json", out,
               "--plots", tmp_path / "plots", "--against", "spatten")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "Faster: than spatten at batch 2, both simulated." in " ".join(done.output.split())
    assert "the mask given; codec 3 -> 2 heads." in " ".join(done.output.split())
    stored = figures(out)
    machines = stored["machines"]
    assert next(iter(machines)) == "spatten"
    assert {"systolic", "sanger", "vitcod", "vitcod_plain", "vitcod_no_codec",
            "vitcod_no_reorder"} < set(machines)  # fmt: skip
    for row in stored["speedups"]:
        name = row["subject"].split(",")[0]
        part = {"attention": "attention", "end to end": "network"}[row["part"]]
        base = machines["spatten"][part]["seconds"]
        assert row["factor"] == pytest.approx(base / machines[name][part]["seconds"])
        assert row["against"] == "spatten, batch 2 (simulated)"
        assert row["basis"] == "simulated"
    assert {p.name for p in (tmp_path / "plots").iterdir()} >= {"speedups.png", "roofline.png"}


def test_compare_names_the_macs_of_the_codec_beside_those_of_the_lines(mask_file, tmp_path):
    out = tmp_path / "lines.json"
    done = run("compare", "deit_tiny", "--mask", mask_file, *SMALL, "--json", out, "--simulator",
               "systolic", "--simulator", "vitcod_no_codec", "--simulator", "vitcod")  # fmt: skip
    assert done.exit_code == 0, done.output
    text = " ".join(done.output.split())
    assert "512 MACs (64 x 8 in lines): systolic, vitcod_no_codec." in text
    assert "512 MACs + 320 of the codec (64 x 8 in lines, encoder 64, decoder 256): vitcod." in text
    assert "Equal for all: 512 MACs in lines, bandwidth and clock." in text
    stored = figures(out)
    assert stored["codec"] in text
    assert stored["codec"].startswith("The codec ")
    assert stored["macs"] in text


def test_compare_at_equal_macs_names_the_cut(mask_file, tmp_path):
    out = tmp_path / "macs.json"
    done = run("compare", "deit_tiny", "--mask", mask_file, *SMALL, "--json", out, "--simulator",
               "systolic", "--simulator", "vitcod", "--equal", "macs",
               "--total-macs", "256")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert max(map(len, done.output.splitlines())) <= 80
    text = " ".join(done.output.split())
    machines = figures(out)["machines"]
    hardware = machines["vitcod"]["hardware"]
    codec = hardware["encoder_macs"] + hardware["decoder_macs"]
    lines = hardware["lines"]
    assert 8 * lines + codec == 256
    assert (
        f"{8 * lines} MACs + {codec} of the codec ({lines} x 8 in lines, encoder "
        f"{hardware['encoder_macs']}, decoder {hardware['decoder_macs']}): vitcod." in text
    )
    assert machines["systolic"]["hardware"]["lines"] == 32
    assert "256 MACs (32 x 8 in lines): systolic." in text
    assert "Equal for all: at most 256 MACs in all, bandwidth and clock." in text


def test_hardware_lists_the_presets_with_their_silicon():
    done = run("hardware")
    assert done.exit_code == 0, done.output
    assert max(map(len, done.output.splitlines())) <= 80
    rows = {line.split()[0]: line.split() for line in done.output.splitlines() if "flat" in line}
    for name in ("vitcod", "vitcod_64_banks"):
        space = area(presets[name])
        banks = str(presets[name].q_banks)
        assert rows[name][1:5] == ["512", "320", banks, "320"]
        assert rows[name][-2:] == [f"{space.total_mm2:.2f}", f"{space.estimated_mm2:.2f}"]
    assert "512 MACs + 320 of the codec" in done.output
    stored = json.loads(run("hardware", "--format", "json").stdout)
    assert set(stored) == set(presets)
    assert stored["vitcod_64_banks"]["output_banks"] == 64


def test_compare_without_a_mask_makes_a_synthetic_one_and_says_so():
    arguments = ("compare", "deit_tiny", *SMALL, "--sparsity", "0.6", "--latent-heads", "0",
                 "--simulator", "systolic", "--simulator", "vitcod")  # fmt: skip
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    text = " ".join(done.output.split())
    assert "a synthetic mask (seed 0)" in text
    assert "without a statement about accuracy; no codec." in text
    assert run(*arguments).output == done.output
    assert run(*arguments, "--seed", "1").output != done.output


def test_sparse_workload_takes_a_codec_for_each_layer():
    workload, about = sparse_workload("levit_128s", 0.5, image_size=224)
    heads = {(op.heads, op.codec.latent_heads) for op in workload.attention}
    assert all(latent == -(-count // 2) for count, latent in heads)
    assert len(heads) > 1
    assert "4 -> 2 heads" in about


def test_a_network_without_attention_is_simulated_but_not_compared(tmp_path):
    done = run("simulate", "--model", "resnet50", *SMALL, "--heads", "--plots", tmp_path)
    assert done.exit_code == 0, done.output
    assert "warning" not in done.output
    assert "by layer" not in done.output
    assert "Data movement of the whole network" in done.output
    assert {path.name for path in tmp_path.iterdir()} >= {"cycles_by_phase.png", "roofline.png"}
    done = run("compare", "resnet50", *SMALL)
    assert done.exit_code == 1
    assert done.output == "error: resnet50 has no attention that a mask could prune\n"


def test_what_a_machine_does_not_count_is_no_zero(mask_file):
    done = run("compare", "deit_tiny", "--sparsity", "0.5", "--image-size", "128", "--simulator",
               "released", "--simulator", "vitcod")  # fmt: skip
    assert done.exit_code == 0, done.output
    rows = [line.split() for line in done.output.splitlines() if line.startswith(" released")]
    assert rows[0][3:5] == ["-", "-"]
    assert rows[1][1:] == ["-"] * 5
    assert "released lacks: MACs and all bytes" in done.output


def test_quiet_prints_nothing_and_writes_the_file(mask_file, tmp_path):
    out = tmp_path / "report.json"
    done = run("compare", "deit_tiny", "--mask", mask_file, *SMALL, "--json", out, "--quiet",
               "--simulator", "vitcod")  # fmt: skip
    assert (done.exit_code, done.stdout.strip()) == (0, "")
    workload, _ = sparse_workload("deit_tiny", AttentionMask.load(mask_file), image_size=64)
    expected = simulate(workload, presets["vitcod"]).attention_cycles
    assert figures(out)["machines"]["vitcod"]["attention"]["cycles"] == expected


def test_a_profile_of_ones_own(mask_file, tmp_path):
    own = {"name": "mine", "base": "aladdin-28nm", "mac_pj": 0.2,
           "sources": {"mac_pj": "post-layout"}}  # fmt: skip
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(own))
    done = run("simulate", "--model", "deit_tiny", *SMALL, "--mask", mask_file, "--profile", path)
    assert done.exit_code == 0, done.output
    assert "profile 'mine'" in done.output


def bad_inputs(folder, mask) -> dict[str, tuple[tuple, tuple[str, ...]]]:
    """name -> (arguments, words of the error line)"""
    (folder / "wrong.toml").write_text('name = "x"\nbase = "aladdin-28nm"\nmac_pj = -1\n')
    (folder / "broken.json").write_text("{")
    (folder / "file").write_text("no folder")
    ready = ("--mask", mask, *SMALL)
    one, many = ("simulate", "--model", "deit_tiny", *ready), ("compare", "deit_tiny", *ready)
    return {
        "simulator": ((*one, "--simulator", "abacus"), ("abacus", *SIMULATORS)),
        "compared simulator": ((*many, "--simulator", "abacus"), ("abacus", *SIMULATORS)),
        "profile": ((*one, "--profile", "none"), ("none", *PROFILES)),
        "profile's figure": ((*many, "--profile", folder / "wrong.toml"), ("wrong.toml", "-1")),
        "profile's file": ((*many, "--profile", folder / "broken.json"), ("broken.json",)),
        "hardware": ((*many, "--hardware", "tpu"), ("tpu", "vitcod")),
        "equal": ((*many, "--equal", "area"), ("area", "lines", "macs")),
        "total of equal lines": ((*many, "--total-macs", "512"), ("512", "equal='macs'")),
        "total for a codec": ((*many, "--equal", "macs", "--total-macs", "9"), ("9", "10")),
        "equal on paper": ((*many, "--paper", "--equal", "macs"), ("--paper", "--equal")),
        "against": ((*many, "--against", "vitcod_dense"), ("vitcod_dense", "systolic")),
        "model": (("compare", "deit_tyni"), ("deit_tyni", "deit_tiny")),
        "sparsity": (("compare", "deit_tiny", *SMALL, "--sparsity", "1.5"), ("1.5",)),
        "latent heads": ((*many, "--latent-heads", "5"), ("5",)),
        "a mask of other tokens": (("compare", "deit_tiny", "--mask", mask), ("(3, 17, 17)",)),
        "no such mask": (("compare", "deit_tiny", "--mask", folder / "gone.npz"), ("gone.npz",)),
        "trace into a folder": ((*one, "--trace", folder), (str(folder), "folder")),
        "plots into a file": ((*one, "--plots", folder / "file"), ("file",)),
        "json into a file's folder": ((*many, "--json", folder / "file" / "x.json"), ("file",)),
        "released has no batch": ((*one, "--simulator", "released", "--batch", "2"), ("batch 2",)),
    }


def test_bad_input_is_one_clear_line(mask_file, tmp_path):
    for name, (arguments, words) in bad_inputs(tmp_path, mask_file).items():
        done = run(*arguments)
        assert done.exit_code == 1, (name, done.output)
        lines = [line for line in done.output.splitlines() if line.strip()]
        assert len(lines) == 1, (name, done.output)
        assert lines[0].startswith("error: "), (name, lines)
        assert all(word in lines[0] for word in words), (name, lines)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.json", "file", "wrong.toml"]


def test_fields_are_set_and_figures_printed_as_json(mask_file):
    many = ("compare", "deit_tiny", "--mask", mask_file, *SMALL, "--simulator", "spatten",
            "--simulator", "vitcod", "--format", "json")  # fmt: skip
    done = run(*many, "--set", "q_banks+k_banks=8", "--set", "assignment=lockstep", "--set",
               "spatten.lsb_share=0.25")  # fmt: skip
    assert done.exit_code == 0, done.output
    made = json.loads(done.stdout)["machines"]
    assert made["vitcod"]["schedule"]["assignment"] == "lockstep"
    assert made["vitcod"]["hardware"]["k_banks"] == 8
    assert made["spatten"]["parameters"]["lsb_share"] == 0.25
    usual = json.loads(run(*many).stdout)["machines"]
    assert usual["vitcod"]["attention"]["cycles"] < made["vitcod"]["attention"]["cycles"]
    shown = run(*many[:-1], "table", "--set", "assignment=lockstep")
    assert "assignment lockstep" in shown.output
    for arguments, words in {
        ("--format", "xml"): f"--format must be one of {', '.join(FORMATS)}, got 'xml'",
        ("--set", "linez=3"): "no such field: linez",
        ("--set", "lines=3,4"): "--set takes one value of lines here",
        ("--set", "sanger.mask_bits_per_cycle=3"): "of the simulators run, spatten, vitcod",
    }.items():
        refused = run(*many[:-2], *arguments)
        assert refused.exit_code == 1
        assert words in " ".join(refused.output.split())
