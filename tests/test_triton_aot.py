"""Triton kernels compiled ahead of time: no spills, and no more shared memory than there is.

The whole table is `python -m bench.aot_table`; here stand the configurations that are nearest to a
limit, for sm_80 and sm_90, in a process of its own, since this one interprets kernels.
"""

import json
import sys

import pytest

pytest.importorskip("triton")

CASES = [
    "sample mlp D=64 B=32",
    "sample mlp D=512 B=32 bf16",
    "sample mlp dpm++ D=512 B=2048 bf16",
    "sample separable W=1024 D=512 B=2048 bf16",
    "denoise mlp D=512 B=4096 w=2",
    "denoise separable W=1024 D=512 B=2048 bf16",
]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="triton compiles on Linux only")
def test_no_spills_and_enough_shared_memory(run_python, tmp_path):
    out = tmp_path / "table.json"
    run_python(
        "import sys; from bench import aot_table\n"
        f"sys.argv[1:] = {['--out', str(out), '--only', *CASES]!r}\n"
        "sys.exit(aot_table.main())"
    )
    rows = json.loads(out.read_text())["kernels"]
    for case in CASES:
        for architecture in ("sm_80", "sm_90"):
            assert any(
                row["architecture"] == architecture and any(case in name for name in row["cases"])
                for row in rows
            )
    for row in rows:
        assert not row["faults"], row
    tiled = {"affine", "mlp_hidden", "mlp_preactivation", "update", "adaln_residual"}
    tiled |= {"hidden", "expand", "expand_gradient", "residual"}
    for row in rows:
        if row["kernel"] in tiled | {"mlp_persistent"}:
            assert {"HMMA", "HGMMA"} & set(row["instructions"]), f"no tensor cores: {row}"
        if "B=2048" in row["cases"][0] and row["architecture"] == "sm_90":
            assert row["kernel"] not in tiled or "HGMMA" in row["instructions"], row
    assert {"mlp_persistent", "mlp_persistent_preactivation", *tiled} <= {
        row["kernel"] for row in rows
    }


def test_a_kernel_that_spills_is_found():
    aot = pytest.importorskip("contrec_kernels.aot")
    row = {"instructions": {"HMMA": 4}, "stack": 0, "local": 0, "shared": 163 << 10}
    assert aot.faults(row, 80) == []
    assert aot.faults(row | {"instructions": {"LDL": 1}}, 80)
    assert aot.faults(row | {"shared": (163 << 10) + 1}, 80)
    assert aot.faults(row | {"shared": 227 << 10}, 90) == []
