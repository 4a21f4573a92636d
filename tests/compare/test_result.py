"""Arms, their folders and their table, as plain values."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from nybble.compare.single import Arm, ArmFolder, ArmResult, Comparison, parse_arms
from nybble.compare.table import comparison_table
from nybble.errors import UserError


def result(arm: Arm, **changes: object) -> ArmResult:
    values = ArmResult(
        arm=arm,
        storage="bf16",
        trainable=4_880_000,
        total=139_400_000,
        loss_before=3.25,
        loss_after=2.125,
        tokens_per_second=151.4,
        steps=40,
        seconds=75.0,
        peak_host_bytes=3 * 2**30,
        peak_device_bytes=None,
        disk_bytes=19 * 2**20,
    )
    return replace(values, **changes)


def test_arms_are_run_in_one_order_whatever_was_typed() -> None:
    assert parse_arms("qlora, base") == ("base", "qlora")


@pytest.mark.parametrize("text", ["", "lora,loraa", ","])
def test_unknown_arms(text: str) -> None:
    with pytest.raises(UserError, match="no such arm"):
        parse_arms(text)


def test_an_arm_is_finished_when_its_result_is_there(tmp_path: Path) -> None:
    folder = ArmFolder(tmp_path / "lora", {"lora": {"r": 8}, "method": "lora"})
    assert (folder.begun, folder.result(), folder.changed_settings()) == (False, None, [])
    folder.begin()
    assert (folder.begun, folder.result()) == (True, None)
    folder.finish(result("lora"))
    assert folder.result() == result("lora")


def test_changed_settings_are_named(tmp_path: Path) -> None:
    ArmFolder(tmp_path, {"lora": {"r": 8}, "method": "lora"}).begin()
    assert ArmFolder(tmp_path, {"lora": {"r": 9}, "method": "lora"}).changed_settings() == ["lora"]


def test_the_table_has_a_row_an_arm_and_device_memory_where_there_is_a_device() -> None:
    base = result("base", trainable=0, loss_after=3.25, steps=0)
    text = _text(Comparison(Path("out"), (base, result("lora"))))
    assert max(map(len, text.splitlines()[1:])) <= 80
    assert [line.split() for line in text.splitlines() if "bf16" in line] == [
        ["base", "bf16", "-", "3.00", "GiB", "151", "3.250", "-", "-", "19.00", "MiB"],
        ["lora", "bf16", "4.88", "M", "3.5%", "3.00", "GiB", "151", "3.250", "2.125", "1.125", "19.00", "MiB"],
    ]
    assert "device" not in text
    on_gpu = result("lora", peak_device_bytes=7 * 2**30)
    assert "7.00 GiB" in _text(Comparison(Path("out"), (on_gpu,)))


def _text(comparison: Comparison) -> str:
    console = Console(width=100, file=io.StringIO())
    with console.capture() as captured:
        console.print(comparison_table(comparison))
    return captured.get()
