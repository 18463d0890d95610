"""A card that lies is found out before anything is shown that it multiplied, and everybody says why."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from engine import catalog, events
from engine.formats import FORMATS, NARROW, QUANTIZED
from engine.machine import Machine, Proof
from engine.quantization import capability, int8, nvfp4, proof
from engine.quantization.capability import detect, support
from engine.quantization.emulation import fp8_rows, nvfp4_activation, nvfp4_weight
from engine.request import CompareRequest
from engine.results import Comparison, Generation, Metrics
from engine.runtime.studio import Studio
from engine.serving.process import Process
from engine.serving.worker import Worker
from tests.support import products, tiny
from ui import words

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")
LIED_TO = ("fp8", "mxfp8", "nvfp4")
SHAPES = frozenset({(64, 128, True), (320, 64, True)})


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TWINFRAME_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def card(monkeypatch):
    """Have the CPU multiply as a card that multiplies so; counts the products."""

    def install(multiply):
        made = []
        monkeypatch.setattr(torch, "_scaled_mm", lambda *a, **k: made.append(1) or multiply(*a, **k))
        return made

    return install


def prove(name, machine=products.RTX_5090, shapes=SHAPES):
    return proof.prove(machine, CPU, {name: shapes})


def is_sentence(text):
    return text.endswith(".") and text[0].isupper() and len(text.splitlines()) == 1 and ". " not in text


@pytest.mark.parametrize("name", LIED_TO)
def test_right_products_are_native_and_said_to_be_proven(card, name):
    made = card(products.multiply)
    found = support(name, prove(name))
    each = sum(rows <= proof.CPU_ROWS for rows in proof.ROWS)
    assert len(made) == found.machine.proof(name).products == each * len(SHAPES)
    assert found.execution == "native" and not found.disproved
    assert f"{each * len(SHAPES)} products there agree with the exact emulation." in found.reason


def test_one_row_is_compared_only_where_a_layer_can_have_it(card):
    made = card(products.multiply)
    prove("nvfp4", shapes={(64, 128, False), (320, 64, True)})
    rows = sum(rows <= proof.CPU_ROWS for rows in proof.ROWS)
    assert len(made) == 2 * rows - 1


@pytest.mark.parametrize("kind", [kind for kind in products.LIES if kind != "hang"])
@pytest.mark.parametrize("name", LIED_TO)
def test_wrong_products_are_found_out(card, caplog, name, kind):
    card(products.LIES[kind])
    found = support(name, prove(name))
    assert (found.execution, found.disproved, found.fused_quantizer) == ("emulated", True, False)
    assert "GEMM on" in found.gemm and is_sentence(found.reason)
    assert found.reason.startswith("The NVIDIA GeForce RTX 5090 has ")
    assert found.reason.endswith(f", so {FORMATS[name].label} is emulated.")
    assert ("not numbers" if kind == "not numbers" else "away from the exact emulation") in found.reason
    assert found.reason in caplog.text


def test_what_raises_is_no_product(card):
    card(products.refuse)
    said = support("mxfp8", prove("mxfp8")).reason
    assert is_sentence(said) and "raised RuntimeError (CUDA error: no kernel image is available" in said


def test_a_device_without_memory_is_no_liar(card):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    card(full)
    with pytest.raises(torch.OutOfMemoryError):
        prove("fp8")
    assert proof.known(products.RTX_5090).proofs == ()


def test_a_device_that_a_product_has_spoilt_ends_the_run_and_is_remembered(card, monkeypatch):
    def spoilt(*_, **__):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    card(products.refuse)
    monkeypatch.setattr(torch, "ones", spoilt)
    with pytest.raises(RuntimeError, match="The device is of no more use to this process"):
        prove("fp8")
    assert support("fp8", proof.known(products.RTX_5090)).disproved


@pytest.mark.parametrize("where", ["a row", "a column", "an element of few"])
def test_a_single_wrong_part_is_as_far_as_a_whole(where):
    chance = torch.Generator().manual_seed(0)
    exact = torch.randn(512, 256, generator=chance) * 2.0 ** torch.randint(-3, 4, (512, 1), generator=chance)
    made = exact.clone()
    assert proof.furthest(made, exact) == 0
    if where == "a row":
        made[-1] = made[-1].roll(1)
    elif where == "a column":
        made[:, -1] = made[:, -1].roll(1)
    else:
        made, exact = made[:1], exact[:1].clone()
        made[0, 3] *= 2
    assert proof.furthest(made, exact) > NARROW
    assert proof.furthest(made[:, 1:], exact) == float("inf")


# ---------------------------------------------------------------------------------------------------------------------
# The bounds


def narrow_sum(a, b, at_once, bits=13):
    """a @ b.T by an accumulator with so many bits after the point: of `at_once` products and of what it holds, all are
    cut to the last bit of the largest of them. float64 (M, K), (N, K) -> (M, N)."""

    def cut(value, largest):
        last = 2.0 ** (largest.clamp(min=1e-300).log2().floor() - bits)
        return (value / last).trunc() * last

    held = torch.zeros(len(a), len(b), dtype=torch.float64)
    for begin in range(0, a.shape[1], at_once):
        part = slice(begin, begin + at_once)
        parts = torch.cat([held.unsqueeze(-1), a[:, None, part] * b[None, :, part]], -1)
        held = cut(parts, parts.abs().amax(-1, keepdim=True)).sum(-1)
        held = cut(held, held.abs())
    return held


@pytest.mark.parametrize("width", [256, 16384])
@pytest.mark.parametrize("name", ["fp8", "nvfp4"])
def test_the_bound_leaves_room_for_the_narrowest_accumulator_known_and_for_no_more(name, width):
    """16,384 products is the longest sum in the catalog. The bound is more than twice its distance, and less than half
    of that of two blocks of 16 that are swapped in it."""
    chance = torch.Generator().manual_seed(1)
    x, weight = proof._uneven(64 if width < 1000 else 16, width, chance), proof._uneven(64, width, chance)
    if name == "fp8":
        (x, x_scale), (weight, scale) = fp8_rows(x), fp8_rows(weight)
        x, weight, scales = x.double(), weight.double(), x_scale * scale.t()
    else:
        codes, blocks, scale = nvfp4.quantize(weight)
        x, x_scale = nvfp4_activation(x)
        x, weight, scales = x.double(), nvfp4_weight(codes, blocks).double(), x_scale * scale
    exact = x @ weight.t()
    narrow = narrow_sum(x, weight, at_once=64 if name == "nvfp4" else 32)
    swapped = torch.cat([x[:, 16:32], x[:, :16], x[:, 32:]], 1) @ weight.t()

    def rounded(product):
        return (product * scales).to(torch.bfloat16)

    bound = FORMATS[name].bound
    assert proof.furthest(rounded(narrow), rounded(exact)) < 0.5 * bound
    assert proof.furthest(rounded(swapped), rounded(exact)) > 2 * bound


def test_every_format_has_its_bound():
    bounds = {name: FORMATS[name].bound for name in QUANTIZED}
    assert bounds == {"fp8": NARROW, "mxfp8": NARROW, "nvfp4": NARROW, "int8": 0.0}


# ---------------------------------------------------------------------------------------------------------------------
# What is kept


def test_the_next_start_is_free(card):
    card(products.multiply)
    before = prove("nvfp4")
    made = card(products.zeros)
    after = proof.known(products.RTX_5090)
    assert after.proofs == before.proofs != ()
    assert prove("nvfp4").proofs == before.proofs and not made
    bigger = support("nvfp4", prove("nvfp4", shapes=SHAPES | {(128, 64, True)}))
    assert len(made) == 1 and bigger.disproved, "only what was never compared is"
    assert support("nvfp4", prove("nvfp4")).disproved, "and one wrong product is enough"


@pytest.mark.parametrize(
    "other",
    [{"name": "NVIDIA B200"}, {"capability": (10, 0)}, {"mslk": True}],
    ids=["another card", "another architecture", "another quantizer"],
)
def test_another_device_is_compared_anew(card, other):
    card(products.zeros)
    prove("mxfp8")
    assert proof.known(replace(products.RTX_5090, **other)).proofs == ()


def test_another_driver_or_version_is_compared_anew(card, monkeypatch):
    card(products.zeros)
    prove("mxfp8")
    assert proof.known(products.RTX_5090).proofs
    with monkeypatch.context() as patch:
        patch.setattr(proof, "_driver", lambda: "999.1")
        assert proof.known(products.RTX_5090).proofs == ()
    with monkeypatch.context() as patch:
        patch.setattr(proof, "versions", lambda: {"torch": "99"})
        assert proof.known(products.RTX_5090).proofs == ()


@pytest.mark.parametrize("content", ["", "[]", "{", '{"%s": 3}', '{"%s": {"fp8": {"speed": 9}}}', '{"%s": {"fp8": 3}}'])
def test_a_damaged_file_costs_a_comparison(card, content, tmp_path):
    file = tmp_path / "cache" / "proofs.json"
    file.parent.mkdir()
    file.write_text(content % proof._key(products.RTX_5090) if "%" in content else content)
    made = card(products.multiply)
    assert support("fp8", prove("fp8")).execution == "native" and made


def test_one_process_that_ended_over_it_may_have_been_ended_but_not_two(card):
    gone = (2**22 + 1, 1.0)
    made = card(products.multiply)
    for times, disproved in ((1, False), (2, True)):
        proof._write(products.RTX_5090, "fp8", proof._Kept(begun=(gone,) * times))
        found = support("fp8", prove("fp8"))
        assert found.disproved == disproved and is_sentence(found.reason.replace("; ", ", "))
    assert "ended 2 times over its native products" in found.reason and made


def test_a_comparison_of_another_process_that_still_runs_counts_for_nothing(card):
    card(products.multiply)
    proof._write(products.RTX_5090, "fp8", proof._Kept(begun=(proof._self(),) * 5))
    assert support("fp8", prove("fp8")).execution == "native"


def test_a_comparison_is_written_down_while_it_runs_and_whoever_stops_it_is_no_fault(card, tmp_path):
    def stopped(*_, **__):
        (kept,) = json.loads((tmp_path / "cache" / "proofs.json").read_text()).values()
        assert kept["fp8"]["begun"][0][0] == os.getpid()
        raise KeyboardInterrupt

    card(stopped)
    with pytest.raises(KeyboardInterrupt):
        prove("fp8")
    assert proof._read(products.RTX_5090, "fp8") == proof._Kept()


# ---------------------------------------------------------------------------------------------------------------------
# A whole comparison


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.checkpoint("flux.1-dev", tmp_path_factory.mktemp("weights"))


def asked(*columns):
    request = CompareRequest.create("a cat", model=products.MODEL, precisions=columns, num_inference_steps=1)
    return replace(request, height=64, width=64)


def make(out, request):
    """What each column makes, without scores: column -> generation, and what was told."""
    out.mkdir()
    studio, spec, told, made = Studio("cpu"), catalog.model(request.model), [], {}
    with torch.inference_mode():
        for column in request.columns:
            rendition = studio.rendition(spec, column, told.append)
            made[column.format] = studio.generate(rendition, spec, request, out, told.append, lambda: False)[0]
    return made, told


@pytest.fixture(scope="module")
def emulated(checkpoint, tmp_path_factory):
    """The pictures of a CPU that has none of the formats and says so."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TWINFRAME_CACHE", str(tmp_path_factory.mktemp("honest")))
        products.rehearse(products.refuse, checkpoint, patch)
        patch.setattr(capability, "detect", lambda device: Machine(name="a CPU", kind="cpu"))
        made, _ = make(tmp_path_factory.mktemp("pictures") / "cpu", asked("bf16", *LIED_TO))
    assert [made[name].execution for name in LIED_TO] == ["emulated"] * 3
    return {name: Image.open(made[name].files[0]).tobytes() for name in LIED_TO}


@pytest.mark.parametrize("kind", ["right", *(kind for kind in products.LIES if kind != "hang")])
def test_no_lie_reaches_a_picture(kind, checkpoint, emulated, monkeypatch, tmp_path):
    products.rehearse(products.LIES.get(kind, products.multiply), checkpoint, monkeypatch)
    request = asked("bf16", *LIED_TO)
    made, told = make(tmp_path / "card", request)
    assert sum(isinstance(event, events.Proved) for event in told) == len(LIED_TO)
    for name in LIED_TO:
        found = made[name]
        if kind == "right":
            assert (found.execution, found.disproof) == ("native", "")
            assert "products there agree" in found.ran["Execution"]
            continue
        assert found.execution == "emulated" and not found.latency_comparable
        assert found.disproof in found.ran["Execution"] and is_sentence(found.disproof)
        assert Generation.from_json(found.to_json()).disproof == found.to_json()["disproof"] == found.disproof
        assert words.compare.no_latency_note(found, request) == found.disproof
        scored = replace(found, metrics=Metrics(lpips=(0.1,), psnr_db=(30.0,)))
        both = Comparison(
            request=request, device="", versions={}, results=(made["bf16"], scored), ruler=None, created=""
        )
        assert found.disproof in words.verdict.verdict(both)
        picture = Image.open(found.files[0])
        assert picture.tobytes() == emulated[name]
        assert '"emulated"' in picture.text["twinframe"]


def test_what_was_native_before_a_larger_layer_was_found_wrong_is_loaded_anew(checkpoint, monkeypatch, tmp_path):
    products.rehearse(products.multiply, checkpoint, monkeypatch)
    studio, request = Studio("cpu"), asked("bf16", "mxfp8")
    spec = catalog.model(products.MODEL)
    column = request.columns[1]
    with torch.inference_mode():
        assert studio.rendition(spec, column, lambda _: None).support.execution == "native"
        wrong = replace(studio.machine, proofs=(Proof(precision="mxfp8", fault="it is wrong"),))
        assert studio._learn(wrong)
        monkeypatch.setattr(proof, "prove", lambda machine, *_: machine)
        assert studio.rendition(spec, column, lambda _: None).support.execution == "emulated"


def test_a_product_that_never_returns_ends_the_process_and_the_next_one_emulates(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(catalog, "MODELS", {products.MODEL: tiny.spec("flux.1-dev", checkpoint)})
    device = Process(str(checkpoint), make=products.make)
    worker = Worker((products.MODEL,), device)
    try:
        first, request = device._child, asked("bf16", "nvfp4")
        assert device.support["nvfp4"].execution == "native"
        *_, last = worker.submit(request, tmp_path / "first").events()
        assert "A product of this device did not return" in last.reason and len(last.reason.splitlines()) == 1
        assert device._child is not first
        *_, last = worker.submit(request, tmp_path / "second").events()
        made = last.comparison.results[1]
        assert made.execution == "emulated" and "did not return within 0.5 s" in made.disproof
        assert device.support["nvfp4"].disproved and device.examine()
    finally:
        worker.close()


@pytest.mark.parametrize("name", LIED_TO)
def test_the_command_line_ends_with_one_sentence(name, tmp_path):
    program = f"""
from engine.leaving import leave
from engine.logs import plain

def work():
    import torch
    from engine.quantization import proof
    from tests.support import products
    proof.DEADLINE_SECONDS = 0.5
    torch._scaled_mm = products.hang
    proof.prove(products.RTX_5090, torch.device("cpu"), {{{name!r}: {{(64, 128, True)}}}})

leave(work, plain)
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 1 and ended.stdout == ""
    assert "did not return within 0.5 s" in ended.stderr and len(ended.stderr.splitlines()) == 1
    assert support(name, proof.known(products.RTX_5090)).disproved


# ---------------------------------------------------------------------------------------------------------------------
# INT8, and real devices

INT8_CPU = Machine(name="A CPU with VNNI", kind="cpu", int8=True)


@pytest.mark.parametrize("lies", [False, True])
def test_int8_is_proven_to_the_last_bit(monkeypatch, lies):
    monkeypatch.setattr(int8, "cpu_has_int8", lambda: True)
    multiply, made = torch._int_mm, []

    def counted(a, b):
        made.append(len(a))
        product = multiply(a, b)
        if lies:
            product[-1, -1] += 1 << 20
        return product

    monkeypatch.setattr(torch, "_int_mm", counted)
    found = support("int8", prove("int8", INT8_CPU))
    assert found.disproved == lies and made
    if lies:
        assert len(made) == 1 and found.gemm == "fp32 GEMM on INT8 values, in sums that are exact"
        layer = torch.nn.Linear(64, 64).to(torch.bfloat16).requires_grad_(False)
        capability.quantize_linear_modules(torch.nn.ModuleDict({"a": layer}), {"a"}, found)
        layer(torch.randn(4, 64).to(torch.bfloat16))
        assert len(made) == 1, "what was disproved is not used"


gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("name", [pytest.param(name, marks=gpu) for name in QUANTIZED])
def test_gpu_what_it_calls_native_is_proven_in_the_shapes_of_the_large_models(name, record_property):
    machine, device = detect("cuda"), torch.device("cuda")
    if support(name, machine).execution != "native":
        pytest.skip("not native on this CUDA device")
    each = [(3072, 3072), (3072, 12288), (12288, 3072), (15360, 3072), (4096, 16384), (16384, 4096)]
    shapes = {(*shape, False) for shape in each} | {(3072, 18432, True), (3072, 9216, True), (256, 3072, True)}
    torch.ones(1, device=device).item()
    began = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    began[0].record()
    found = prove_on(machine, device, name, shapes)
    began[1].record()
    torch.cuda.synchronize()
    seconds = began[0].elapsed_time(began[1]) / 1000
    print(f"{name} on {machine.name}: {found.machine.proof(name)}, {seconds:.2f} s")
    assert found.execution == "native", found.reason
    assert found.machine.proof(name).distance < 0.5 * FORMATS[name].bound or name == "int8"
    assert seconds < 2


@pytest.mark.parametrize("name", [pytest.param("fp8", marks=gpu), pytest.param("int8", marks=gpu)])
@pytest.mark.parametrize("kind", ["zeros", "not numbers"])
def test_gpu_a_lie_is_found_out(name, kind, monkeypatch):
    machine, device = detect("cuda"), torch.device("cuda")
    if support(name, machine).execution != "native":
        pytest.skip("not native on this CUDA device")
    operator = "_int_mm" if name == "int8" else "_scaled_mm"
    true = getattr(torch, operator)

    def lie(*args, **kwargs):
        made = true(*args, **kwargs)
        made[-1] = 0 if kind == "zeros" or name == "int8" else torch.nan
        return made

    monkeypatch.setattr(torch, operator, lie)
    assert prove_on(machine, device, name, {(3072, 3072, False)}).disproved


def prove_on(machine, device, name, shapes):
    return support(name, proof.prove(machine, device, {name: shapes}))
