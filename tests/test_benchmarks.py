"""What the benchmarks compute without a GPU: rows, groups of rows, classes of kernels, limits, tables."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nybble.demo.docstrings import DocPair

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)


@pytest.fixture
def profile_step() -> Any:
    import profile_step

    return profile_step


@pytest.fixture
def train_step() -> Any:
    import train_step

    return train_step


def test_row_is_written_as_it_is_read() -> None:
    from stacks import Row

    for text in ("qlora bf16 4 2048 keep", "lora fp8 1 512 offload 8"):
        assert str(Row.parse(text)) == text
    assert Row.parse("qlora bf16 4 2048 keep").tokens == 8192


@pytest.mark.parametrize(
    "text", ["qlora bf16 4 2048", "qlora bf16 4 2048 kept", "qlora fp4 4 2048 keep", "a b 1 2 c 8 9"]
)
def test_row_that_says_something_else_is_refused(text: str) -> None:
    from stacks import Row

    with pytest.raises(ValueError):
        Row.parse(text)


def test_rows_share_a_load_where_the_stack_can(train_step: Any) -> None:
    from stacks import Row

    rows = [
        Row.parse(text) for text in ("qlora bf16 4 2048 keep", "lora bf16 4 2048 keep", "qlora bf16 1 2048 offload")
    ]
    tasks = [(name, row) for row in rows for name in ("nybble", "unsloth")]
    groups = train_step.grouped(tasks, share_load=True)
    assert [len(group) for group in groups] == [2, 1, 1, 1, 1]  # nybble's two of QLoRA; Unsloth's differ in activations
    assert train_step.grouped(tasks, share_load=False) == [[task] for task in tasks]


def test_a_task_that_ends_its_process_is_reported_and_the_rest_measured(
    train_step: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stacks import Row

    child = tmp_path / "child.py"
    child.write_text(
        "import sys, os, json\n"
        "for task in sys.argv[sys.argv.index('--tasks') + 1:]:\n"
        "    stack, _, row = task.partition(' ')\n"
        "    if ' 2 ' in row: sys.stderr.write('gone'); sys.stderr.flush(); os._exit(3)\n"
        "    error = {'error': 'x'} if ' 3 ' in row else {}\n"
        "    print('ROW ' + json.dumps({'stack': stack, 'row': row} | error), flush=True)\n"
        "    if ' 3 ' in row: sys.exit()\n"
    )
    monkeypatch.setattr(train_step, "__file__", str(child))
    tasks = [("nybble", Row.parse(f"qlora bf16 {batch} 8 keep")) for batch in (1, 2, 3, 4)]
    options = argparse.Namespace(model="m", steps=1, time_limit=5)
    found = list(train_step.rows_of(tasks, options))
    assert [row["row"] for row in found] == [str(row) for _, row in tasks]
    assert [row.get("error") for row in found] == [None, "exit code 3\ngone", "x", None]


def test_rows_that_are_not_measured_anew_are_kept(train_step: Any, tmp_path: Path) -> None:
    from stacks import Row

    file = tmp_path / "rows.json"
    kept, again = "qlora bf16 1 8 keep", "qlora bf16 2 8 keep"
    file.write_text(json.dumps({"rows": [{"stack": "nybble", "row": kept}, {"stack": "nybble", "row": again}]}))
    rows = train_step.earlier_rows(file, [("nybble", Row.parse(again)), ("peft", Row.parse(kept))])
    assert [row["row"] for row in rows] == [kept]


@pytest.mark.parametrize(
    ("name", "microseconds", "expected"),
    [
        ("nvjet_sm90_tst_256x128_64x4_2x1_v_bz_coopA_TNN", 400.0, "matrix products"),
        ("nvjet_sm90_tst_64x64", 20.0, "adapter products"),
        ("void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<...>>", 400.0, "matrix products"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", 5.0, "adapter products"),
        ("low_rank_backward_kernel", 300.0, "adapter products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", 900.0, "attention"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_kernel<cutlass::bfloat16_t>", 900.0, "attention"),
        ("dequantize_kernel", 30.0, "quantize, dequantize"),
        ("nf4_dequantize_transposed_kernel", 30.0, "quantize, dequantize"),
        ("transpose_kernel", 30.0, "quantize, dequantize"),
        ("add_norm_kernel", 30.0, "norm, rotation, GLU"),
        ("split_rope_backward_kernel", 30.0, "norm, rotation, GLU"),
        ("glu_backward_kernel", 30.0, "norm, rotation, GLU"),
        ("cross_entropy_kernel", 30.0, "loss"),
        ("adamw_kernel", 30.0, "optimizer"),
        (
            "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::NormTwoOps<...>>>",
            9.0,
            "optimizer",
        ),
        ("Memcpy DtoH (Device -> Pinned)", 9.0, "copies"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>", 9.0, "other"),
    ],
)
def test_kernels_are_classed_by_name(profile_step: Any, name: str, microseconds: float, expected: str) -> None:
    assert profile_step.class_of(profile_step.Kernel(name, 0.0, microseconds), shortest_us=137.0) == expected


def test_time_in_which_nothing_runs_is_a_gap(profile_step: Any) -> None:
    trace = {
        "traceEvents": [
            {"cat": "kernel", "name": "nvjet", "ts": 100, "dur": 1000},
            {"cat": "gpu_memcpy", "name": "Memcpy DtoH", "ts": 1000, "dur": 500},  # beside the product for 100
            {"cat": "kernel", "name": "adamw_kernel", "ts": 1900, "dur": 100},
            {"cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 5000},
            {"name": "process_name", "ph": "M"},
        ]
    }
    kernels = profile_step.kernels_in(trace)
    assert profile_step.busy_us(kernels) == 1500
    lines = profile_step.table(kernels, 1, 10.0, {"matrix products": 0.5e-3})
    assert next(line for line in lines if line.startswith("gaps")).split() == ["gaps", "0.40", "21.1%"]
    assert next(line for line in lines if line.startswith("matrix")).split()[2:] == [
        "1",
        "1.00",
        "52.6%",
        "0.50",
        "50%",
    ]


def test_limits_count_each_pass(profile_step: Any) -> None:
    from stacks import Row

    shape = profile_step.Shape(2, hidden=64, qkv=96, queries=64, intermediate=128, vocabulary=1000)
    card = profile_step.Card(bf16_flops=1e12, fp8_flops=2e12, copied_bytes=1e9)
    weights = 2 * (96 * 64 + 64 * 64 + 3 * 128 * 64)

    def found(text: str) -> dict[str, float]:
        limits: dict[str, float] = profile_step.limits(shape, Row.parse(text), 10, card)
        return limits

    head = 4 * 32 * 64 * 1000 / 1e12
    keep, again = found("qlora bf16 4 8 keep"), found("qlora bf16 4 8 recompute")
    assert keep["matrix products"] == pytest.approx(2 * 2 * 32 * weights / 1e12 + head)
    assert again["matrix products"] == pytest.approx(3 * 2 * 32 * weights / 1e12 + head)
    assert keep["quantize, dequantize"] == pytest.approx(2 * weights * 2.516 / 1e9)
    assert found("lora bf16 4 8 keep")["quantize, dequantize"] == 0
    fp8 = found("qlora fp8 4 8 keep")
    assert fp8["matrix products"] == pytest.approx(2 * 2 * 32 * weights / 2e12 + head)
    rows = 2 * 32 * (64 + 128 + 96 + 64 + 256 + 64)  # of inputs that no norm quantizes, and of all gradients
    assert fp8["quantize, dequantize"] == pytest.approx((2 * weights * 1.516 + 3 * rows) / 1e9)
    more = fp8["norm, rotation, GLU"] - keep["norm, rotation, GLU"]
    assert more == pytest.approx(2 * 2 * 32 * 64 / 1e9)


def test_error_of_a_gradient_is_relative() -> None:
    import torch
    from check_step import errors

    exact = {"a": torch.tensor([3.0, 4.0], dtype=torch.float64)}
    compared = errors({"a": torch.tensor([3.0, 3.0])}, exact)["a"]
    assert compared["error"] == pytest.approx(0.2)
    assert compared["cosine"] == pytest.approx(21 / (5 * 18**0.5))


def test_rows_of_a_child_are_found_among_what_libraries_print(capsys: pytest.CaptureFixture[str]) -> None:
    from results import received_row, received_rows, send_row

    print("Unsloth: will patch your computer")
    send_row({"a": 1})
    send_row({"b": 2})
    output = capsys.readouterr().out
    assert list(received_rows(output.splitlines(keepends=True))) == [{"a": 1}, {"b": 2}]
    assert received_row(output) == {"a": 1}
    assert received_row("nothing\n") is None


def test_curves_are_summed_up_over_the_arms_that_came_through() -> None:
    from loss_curves import arms, summary

    rows = [
        {"arm": arm, "loss": [2.0 + shift, 1.0], "held_out": [3.0, 1.5 + shift]}
        for arm, shift in (("stock-0-1", 0.0), ("fused-0-1", 0.25), ("fused-0-2", 0.75), ("fp8-0-1", 0.5))
    ]
    assert {row["arm"] for row in rows} < set(arms())
    assert summary(rows) == {
        "fused_to_fused": 0.25,
        "fp8_to_fused": 0.125,
        "held_out_fused": 1.75,
        "held_out_fp8": 2.0,
        "held_out_fp8_worse_by": 0.25,
    }
    assert summary([]) == {}


def test_parity_is_the_mean_over_pairs_of_runs() -> None:
    from peft_parity import differences

    rows = {
        "nybble-lora-1": [1.0, 2.0],
        "peft-lora-1": [1.0, 2.5],
        "peft-lora-2": [2.0, 2.0],
        "peft-qlora-1": [9.0, 9.0],
    }
    assert differences(rows, "lora") == {"nybble_to_peft": 0.375, "peft_to_peft": 0.75}


def test_held_out_files_are_never_trained_on() -> None:
    from arms import HELD_OUT, training_files

    names = [set(file.parts) for file in training_files()]
    assert len(names) > 200
    assert not any(parts.intersection(HELD_OUT) for parts in names)


def test_rows_of_text_are_cut_to_length(tmp_path: Path) -> None:
    from load import write_text_data

    write_text_data(tmp_path / "text.jsonl", rows=3, characters=50)
    rows = [json.loads(line) for line in (tmp_path / "text.jsonl").read_text().splitlines()]
    assert [len(row["text"]) for row in rows] == [50, 50, 50]
    assert len({row["text"] for row in rows}) == 3


def test_chats_have_every_pair_once(tmp_path: Path) -> None:
    from packed_chat import MOST_TURNS, write_chats

    pairs = [DocPair(f"module.name{number}", f"What is {number}?", f"It is {number}.") for number in range(300)]
    write_chats(tmp_path / "chats.jsonl", pairs)
    chats = [json.loads(line)["messages"] for line in (tmp_path / "chats.jsonl").read_text().splitlines()]
    assert [message for chat in chats for message in chat] == [m for pair in pairs for m in pair.row()["messages"]]
    assert {len(chat) // 2 for chat in chats[:-1]} == set(range(1, MOST_TURNS + 1))


def test_ops_take_what_their_benchmarks_make(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that need no GPU, at small sizes."""
    pytest.importorskip("triton")
    import kernels
    from kernel_cases import gather, online_cross_entropy

    for name, value in {"VOCABULARY": 300, "HIDDEN": 64, "TOKENS": (20,)}.items():
        monkeypatch.setattr(gather, name, value)
    sizes = ((130, 1000, 64, None), (130, 1000, 64, 30.0))
    monkeypatch.setattr(online_cross_entropy, "SIZES", sizes)
    monkeypatch.setattr(online_cross_entropy, "CHUNK_BYTES", 0)  # 128 rows and words
    moved = {}
    for case in [*gather.cases(), *online_cross_entropy.cases()]:
        arguments = case.arguments(torch.device("cpu"))
        case.op(*arguments)
        moved[case.name] = kernels.moved_bytes(case, arguments)
    assert moved["gather_rows"] == 20 * (8 + 2 * 64 * 2)
    assert moved["gather_rows, from the host"] == 20 * 64 * 2
    assert moved["online_cross_entropy_"] == 128 * (8 + 24 + 2 * 128 * 2)
    assert moved["online_cross_entropy_, loss, capped"] == 128 * (8 + 24 + 128 * 2)
    assert moved["online_cross_entropy_end"] == 128 * (8 + 12 + 4 + (4 + 2 + 2) * 64)
