"""What is planned on which machine, and what is then read from the results: without running anything."""

import pytest

from engine import reference
from engine.errors import RequestError
from engine.reproduction import cells, tables
from engine.reproduction.tables import FULL, TABLES, Machine, Scale

NATIVE = dict.fromkeys(("bf16", "fp8", "mxfp8", "nvfp4", "int8"), "native")
EMULATED = NATIVE | {"mxfp8": "emulated", "nvfp4": "emulated"}
B200 = Machine(device="NVIDIA B200", executions=NATIVE)
H100 = Machine(device="NVIDIA H100 80GB HBM3", executions=EMULATED)
CPU = Machine(device="AMD EPYC", executions=EMULATED | {"fp8": "emulated", "int8": "emulated"})


def columns(part):
    after = part.arguments[part.arguments.index("--precision") + 1 :]
    return after[: next(index for index, said in enumerate(after) if said.startswith("--"))]


def test_on_a_b200_every_table_is_filled_the_cheapest_part_first():
    parts = tables.plan(TABLES, Scale(), B200, [])
    assert {table for part in parts for table in part.tables} == set(TABLES)
    assert [part.seconds for part in parts] == sorted(part.seconds for part in parts)
    assert len(parts) == 9 + 2  # the selective half of the last table is FLUX.1-dev's LPIPS
    timed = [part for part in parts if part.to_file]
    assert {columns(part) for part in timed} == {("bf16", "mxfp8", "nvfp4")}
    assert all("engine post" in part.shown for part in timed)
    assert not any("--limit" in part.arguments for part in parts)
    assert 4 * 3600 < sum(part.seconds for part in parts) < 24 * 3600  # "a day"


def test_one_table_alone_makes_no_more_than_it_needs():
    (part,) = tables.plan(("flux-lpips",), Scale(), B200, [])
    assert part.arguments[part.arguments.index("--recipe") + 1 :][:2] == ("post", "--prompts")


def test_on_a_hopper_fp8_is_timed_in_the_place_of_both_and_their_pictures_are_emulated():
    parts = tables.plan(TABLES, Scale(), H100, [])
    assert {columns(part) for part in parts if part.to_file} == {("bf16", "fp8")}
    assert {columns(part) for part in parts if not part.to_file} == {("fp8", "mxfp8", "nvfp4")}
    assert all("--methods engine" in part.shown for part in parts if part.to_file)


def test_the_self_check_makes_what_is_measured_later_and_no_more():
    assert tables.check(("flux-performance",), H100, []).name == "self-check-fp8"
    assert columns(tables.check(TABLES, H100, [])) == ("fp8", "mxfp8", "nvfp4")
    assert columns(tables.check(TABLES, B200, [])) == ("mxfp8", "nvfp4")
    assert tables.check(TABLES, B200, []).bundled


def test_a_slower_card_takes_longer():
    def took(machine):
        return sum(part.seconds for part in tables.plan(("flux-performance",), Scale(), machine, []))

    assert took(Machine(device="NVIDIA RTX PRO 6000 Blackwell", executions=NATIVE)) > 2 * took(B200)


def test_a_format_that_was_disproved_is_measured_emulated_beside_the_other():
    machine = Machine(device="NVIDIA B200", executions=NATIVE | {"nvfp4": "emulated"})
    assert (machine.stands_in, machine.timed, machine.methods) == ("", ("mxfp8", "nvfp4"), ("engine", "post"))


def test_a_rehearsal_takes_miniatures_or_random_weights_and_few_steps():
    small = tables.plan(TABLES, tables.scale(True, False, None), CPU, ["--device=cpu"])
    assert len(small) == 5 and all("mini-" in part.shown and "--device=cpu" in part.arguments for part in small)
    assert all(part.bundled and "--steps" in part.arguments for part in small)
    large = tables.plan(TABLES, tables.scale(True, True, None), H100, [])
    assert all("--random-weights" in part.arguments and "mini-" not in part.shown for part in large)


def test_random_weights_fill_the_tables_of_speed_alone():
    asked = tables.scale(False, True, [1])
    assert tables.chosen(None, asked) == tuple(tables.PERFORMANCE)
    assert [part.name for part in tables.plan(tables.chosen(["flux-performance"], asked), asked, B200, [])] == [
        "flux-performance-batch-1"
    ]
    with pytest.raises(RequestError, match="make no pictures to score: leave out flux-lpips, or --random-weights"):
        tables.chosen(["flux-lpips"], asked)


def test_mistakes_say_what_there_is():
    with pytest.raises(RequestError, match="no table speed: choose from flux-performance, "):
        tables.chosen(["speed"], Scale())
    with pytest.raises(RequestError, match="no batch size 2: choose from 1, 4 and 8"):
        tables.scale(False, False, [1, 2])


def test_a_folder_of_this_machine_is_not_shown():
    (part,) = tables.plan(("flux-lpips",), Scale(), B200, ["--weights=/home/somebody/weights"])
    assert "--weights=/home/somebody/weights" in part.arguments and "somebody" not in part.shown


# What is read from the results


def lane(precision, method, seconds, execution="native"):
    return {
        "precision": precision,
        "method": method,
        "also": [],
        "execution": execution,
        "latency_s": {"median": seconds} if seconds else None,
        "memory_gb": {"weights": 10.0, "peak_allocated": 12.0},
        "error": None,
    }


def values(line):
    return {name: (value.engine, value.method, value.post) for name, value in line.values.items()}


def test_each_cell_stands_beside_the_posts():
    rows = [lane("bf16", "engine", 4.0), lane("bf16", "post", 5.0), lane("nvfp4", "engine", 2.0)]
    found = cells.lines(("flux-performance",), Scale(), B200, {"flux-performance-batch-1": {"rows": rows}})
    assert len(found) == 9 and [line.batch_size for line in found] == [1] * 3 + [4] * 3 + [8] * 3
    bf16, mxfp8, nvfp4 = found[:3]
    assert values(bf16)["latency_s"] == (4.0, 5.0, 2.1) and values(bf16)["speedup"] == (1.0, 1.0, 1.0)
    assert values(nvfp4) == {
        "latency_s": (2.0, None, 1.41),
        "speedup": (2.0, None, 1.5),
        "peak_memory_gb": (12.0, None, 21.33),
    }
    assert mxfp8.execution == "" and values(mxfp8)["latency_s"] == (None, None, 1.75)
    assert all(line.execution == "" for line in found[3:])


def test_what_stands_in_is_called_so():
    rows = [lane("bf16", "engine", 4.0), lane("fp8", "engine", 2.5)]
    results = {"flux-performance-batch-1": {"rows": rows}}
    bf16, mxfp8, nvfp4 = cells.lines(("flux-performance",), Scale(batch_sizes=(1,)), H100, results)
    assert (bf16.ran, bf16.note) == ("bf16", "")
    assert mxfp8.ran == nvfp4.ran == "fp8" and values(nvfp4)["speedup"] == (1.6, None, 1.5)
    assert nvfp4.note == "FP8 in the place of NVFP4, which needs a Blackwell GPU."


def test_an_emulated_format_has_neither_time_nor_peak():
    rows = [lane("bf16", "engine", 4.0), lane("nvfp4", "engine", None, "emulated")]
    results = {"flux-performance-batch-1": {"rows": rows}}
    nvfp4 = cells.lines(("flux-performance",), Scale(batch_sizes=(1,)), CPU, results)[2]
    assert values(nvfp4)["peak_memory_gb"] == (None, None, 21.33) and "Emulated" in nvfp4.note


def test_the_last_table_is_the_posts_row_by_row():
    row = {"lpips": {"mean": 0.4}, "latency_s": {"median": 2.0}, "memory_gb": {"peak": 21.0}, "execution": "native"}
    results = {FULL: {"results": [row | {"precision": "nvfp4", "recipe": "full"}]}}
    found = {(line.precision, line.recipe): line for line in cells.lines((FULL,), Scale(), B200, results)}
    theirs = reference.read()["full_vs_selective_flux.1-dev"]
    assert len(found) == len(theirs)
    for quoted in theirs:
        line = found[quoted["precision"], "full" if quoted["quantization"] == "full" else "post"]
        assert [line.values[name].post for name in ("lpips", "latency_s", "peak_memory_gb")] == [
            quoted["lpips"],
            quoted["latency_s"],
            quoted["memory_gb"],
        ]
    assert values(found["nvfp4", "full"])["latency_s"] == (2.0, None, 2.112)


def test_the_same_evaluation_fills_two_tables():
    row = {"precision": "mxfp8", "recipe": "post", "lpips": {"mean": 0.12}, "execution": "native"}
    (mxfp8, _) = cells.lines(("flux-lpips",), Scale(), B200, {FULL: {"results": [row]}})
    assert values(mxfp8)["lpips"] == (0.12, None, 0.11)
