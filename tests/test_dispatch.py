"""Which backend "auto" takes."""

import json

import pytest
import torch

from contrec_fast.ops import dispatch

SOURCE = "contrec_fast.ops.checks"  # any module with a file


@pytest.fixture
def operation(monkeypatch):
    """An operation of its own: `register(backend, ...)` adds an implementation that says so."""
    monkeypatch.setitem(dispatch._implementations, "echo", {})

    def register(backend, **options):
        dispatch.implements("echo", backend, **options)(lambda *arguments: backend)

    register("reference")
    yield register
    dispatch._served.pop("echo", None)


def serve(*arguments, backend="auto"):
    served = dispatch.resolve("echo", backend, *arguments)(*arguments)
    assert dispatch.last_backend("echo") == served
    return served


def needs_even(tensor):
    return None if len(tensor) % 2 == 0 else f"an even number of rows, got {len(tensor)}"


def test_auto_on_the_cpu_takes_the_extension_where_it_serves(operation):
    assert serve(torch.ones(2)) == "reference"
    operation("triton")
    operation("cpp", obstacle=needs_even)
    assert [serve(torch.ones(n)) for n in (2, 3)] == ["cpp", "reference"]


def test_auto_on_the_cpu_passes_over_what_is_slower(operation):
    operation("cpp", slower=lambda tensor: len(tensor) > 2)
    assert [serve(torch.ones(n)) for n in (2, 3)] == ["cpp", "reference"]
    assert serve(torch.ones(3), backend="cpp") == "cpp"


def test_a_backend_that_cannot_serve_is_refused_by_name(operation):
    operation("cpp", obstacle=needs_even)
    with pytest.raises(ValueError, match="^backend: cpp cannot serve this echo: an even number"):
        serve(torch.ones(3), backend="cpp")
    with pytest.raises(ValueError, match="^backend: echo has auto, reference, cpp, got 'none'$"):
        serve(torch.ones(3), backend="none")


@pytest.mark.parametrize("changed", [None, "architecture", "bucket", "source", "operation"])
def test_auto_on_a_gpu_takes_only_what_was_measured(operation, monkeypatch, changed):
    operation("triton", bucket=lambda tensor: f"rows={len(tensor)}", sources=(SOURCE,))
    operation("cuda", bucket=lambda tensor: "any", sources=(SOURCE,))
    row = {
        "operation": "echo",
        "backend": "triton",
        "architecture": "sm_90",
        "bucket": "rows=2",
        "source": dispatch.source_hash(SOURCE),
        "speedup": 1.5,
    }
    if changed:
        row[changed] += "?"
    monkeypatch.setattr(dispatch, "measurements", lambda: [row])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    gpu = torch.device("cuda", 0)
    chosen = dispatch._measured("echo", gpu, torch.ones(2))
    assert chosen == ([] if changed else ["triton"])
    if changed is None:
        faster = row | {"backend": "cuda", "bucket": "any", "speedup": 2.0}
        monkeypatch.setattr(dispatch, "measurements", lambda: [row, faster])
        assert dispatch._measured("echo", gpu, torch.ones(2)) == ["cuda", "triton"]
        assert dispatch._measured("echo", gpu, torch.ones(3)) == ["cuda"]
        assert dispatch._measured("echo", torch.device("meta"), torch.ones(2)) == []
        slower = row | {"speedup": 0.9}
        monkeypatch.setattr(dispatch, "measurements", lambda: [slower])
        assert dispatch._measured("echo", gpu, torch.ones(2)) == []


def test_stored_measurements_are_of_known_operations():
    for row in json.loads(dispatch.TABLE.read_text()):
        assert row["operation"] in dispatch._implementations
