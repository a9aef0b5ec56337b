"""The ablations of docs/results/2026-11-quantization.md run, and their tables hold together."""

import re
import sys

import pytest

from benchmarks import ablate_cache, ablate_layers, compare_quantisers
from packforcing.runtime import demo_bundle
from packforcing.runtime.bundle import read_manifest


def table(module, capsys, monkeypatch, *args):
    """What a benchmark prints: the numbers of each row by its words."""
    monkeypatch.setattr(sys, "argv", ["benchmark", str(demo_bundle()), *args])
    module.main()
    found = {}
    for line in capsys.readouterr().out.splitlines():
        words, numbers = re.match(r"(.*?)((?:\s+-?\d[\d.e+-]*)*)(?:\s+blocks\S+)?$", line).groups()
        if numbers:
            found[" ".join(words.split())] = [float(number) for number in numbers.split()]
    return found


@pytest.mark.full
def test_a_bit_more_of_cache_is_worth_6_db(capsys, monkeypatch):
    found = {
        bits: table(ablate_cache, capsys, monkeypatch, "--prompts=1", "--fit=1", "--seconds=1",
                    f"--bits={bits}")
        for bits in (8, 12)
    }  # fmt: skip
    assert len(found[8]) == len(ablate_cache.WAYS) + 1
    way = "before RoPE token token absmax"  # never cut off, so all of its error is rounding
    for part in (0, 2):  # keys, values
        assert found[12][way][part] - found[8][way][part] == pytest.approx(4 * 6.02, abs=0.5)
    for rows in found.values():
        for keys, worst_keys, values, worst_values, *_ in rows.values():
            assert worst_keys <= keys and worst_values <= values


@pytest.mark.full
def test_every_part_with_matrices_loses_more_in_4_bits(capsys, monkeypatch):
    found = table(ablate_layers, capsys, monkeypatch)
    layers = read_manifest(demo_bundle()).config.layers
    parts = {"time_embedding", "time_projection", "head", *(f"blocks.{n}" for n in range(layers))}
    assert found.keys() == parts
    assert all(0 < int8 < int4 / 4 for _, int8, int4 in found.values())


def test_our_weights_are_no_worse_than_onnxruntimes(capsys, monkeypatch):
    found = table(compare_quantisers, capsys, monkeypatch, "--prompts=1", "--seconds=1")
    for kind in ("int8", "int4"):
        mean, _ = found[f"{kind} ours"]
        assert mean >= found[f"{kind} onnxruntime"][0] - 0.05
